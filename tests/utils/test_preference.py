"""Scores of pairs become shares of rows that mean what they say."""

from __future__ import annotations

import numpy as np

from utils.metrics import compare_scores, score_labels, score_preferences

BASE = np.array([[-10.0, -20.0], [-30.0, -12.0], [-8.0, -8.0]])
TUNED = np.array([[-11.0, -25.0], [-20.0, -21.0], [-9.0, -8.0]])
TOKENS = np.array([[5, 20], [10, 3], [4, 4]])


def test_preference_accuracy_asks_which_answer_is_likelier_and_a_tie_counts_half() -> None:
    assert score_preferences("preference_accuracy", BASE, TOKENS, BASE) == [1.0, 0.0, 0.5]
    assert score_preferences("preference_accuracy", TUNED, TOKENS, BASE) == [1.0, 1.0, 0.0]


def test_per_token_a_long_answer_can_win() -> None:
    # The first rejected answer has four times as many tokens: by the token it is the likelier one.
    assert score_preferences("preference_accuracy_per_token", BASE, TOKENS, BASE) == [0.0, 1.0, 0.5]


def test_reward_accuracy_asks_which_answer_training_has_raised_more() -> None:
    assert score_preferences("reward_accuracy", BASE, TOKENS, BASE) == [0.5, 0.5, 0.5]
    assert score_preferences("reward_accuracy", TUNED, TOKENS, BASE) == [1.0, 1.0, 0.0]


def test_the_untouched_model_has_a_reward_accuracy_of_one_half() -> None:
    sides = [score_preferences("reward_accuracy", side, TOKENS, BASE) for side in (BASE, TUNED)]
    comparison = compare_scores(*sides)
    assert comparison.base == 0.5
    assert comparison.tuned == 2 / 3


def test_label_accuracy_asks_of_each_answer_whether_it_moved_the_right_way() -> None:
    tokens = np.array([[5, 0], [0, 3], [4, 4], [4, 0]])
    base = np.array([[-10.0, 0.0], [0.0, -12.0], [-8.0, -8.0], [-3.0, 0.0]])
    tuned = np.array([[-9.0, 0.0], [0.0, -11.0], [-9.0, -20.0], [-3.0, 0.0]])
    # Up as it should be; up though undesirable; of a pair both fell, which is right for one; not moved at all.
    assert score_labels(tuned, tokens, base) == [1.0, 0.0, 0.5, 0.5]
    assert score_labels(base, tokens, base) == [0.5, 0.5, 0.5, 0.5]
    # A pair whose answers both fell is right as a pair.
    assert score_preferences("reward_accuracy", tuned[2:3], tokens[2:3], base[2:3]) == [1.0]
