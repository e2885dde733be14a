"""Windows over a stream of tokens: nothing is learned twice, nothing is left out, nothing crosses the border."""

import numpy as np
import pytest

from utils.text_windows import cut_windows, make_examples, split_tokens

CASES = [(count, context, stride) for count in (1, 2, 7, 8, 9, 64, 101) for context in (8, 16) for stride in (1, 3, 7)]


@pytest.mark.parametrize(("count", "context", "stride"), CASES)
def test_every_token_but_the_first_is_learned_exactly_once(count: int, context: int, stride: int) -> None:
    tokens = np.arange(count, dtype=np.int32)
    learned = [
        int(token)
        for example in make_examples(tokens, context, stride, "text")
        for token, mask in zip(example.input_ids, example.loss_mask, strict=True)
        if mask
    ]
    assert learned == list(range(1, count))


@pytest.mark.parametrize(("count", "context", "stride"), CASES)
def test_a_learned_token_never_stands_first_in_its_window(count: int, context: int, stride: int) -> None:
    # Nothing would predict it: the batch drops it from the loss in silence.
    for example in make_examples(np.arange(count, dtype=np.int32), context, stride, "text"):
        assert not example.loss_mask[0]
        assert example.supervised_tokens == example.loss_mask.sum() > 0


def test_all_windows_are_full_where_the_text_is_long_enough() -> None:
    assert {window.end - window.start for window in cut_windows(101, 16, 7)} == {16}
    assert [(window.start, window.end) for window in cut_windows(5, 16, 7)] == [(0, 5)]


def test_a_smaller_stride_gives_each_token_more_before_it() -> None:
    for stride in (3, 7, 15):
        windows = list(cut_windows(200, 16, stride))
        assert min(window.learned_from - window.start for window in windows[1:]) >= 16 - stride


def test_the_split_is_two_blocks_that_are_the_text() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    train, held_out = split_tokens(tokens, 0.1)
    assert len(held_out) == 100
    assert np.concatenate([train, held_out]).tolist() == tokens.tolist()
    assert len(split_tokens(tokens, 0.0)[1]) == 0


@pytest.mark.parametrize("stride", [1, 5, 15])
def test_no_window_holds_tokens_of_both_sides(stride: int) -> None:
    # Cutting windows first and holding out some of them would leave overlapping tokens on both sides.
    train, held_out = split_tokens(np.arange(500, dtype=np.int32), 0.2)
    seen = {int(token) for example in make_examples(train, 16, stride, "train") for token in example.input_ids}
    unseen = {int(token) for example in make_examples(held_out, 16, stride, "eval") for token in example.input_ids}
    assert seen == set(range(400))
    assert unseen == set(range(400, 500))
