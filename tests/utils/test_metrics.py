"""The before/after numbers are right, their intervals are sane, and the verdict says no more than they do."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

from config.structured_config import MetricName
from utils.examples import Example
from utils.metrics import Comparison, compare_losses, compare_scores, give_verdict, score_answers, wilson_interval

DATABASE = "CREATE TABLE city (name TEXT, size INTEGER); INSERT INTO city VALUES ('Oslo', 700), ('Rome', 2800);"


def make_example(answer: str, **fields: Any) -> Example:
    messages = ({"role": "user", "content": "?"}, {"role": "assistant", "content": answer})
    return Example("messages", messages, None, "x:1", fields)


# Wilson's score interval with z = 1.96; Newcombe 1998, table I, gives 81/263 as 0.2553 to 0.3662 and 1/29 as 0.0061 to 0.1718.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (10, 10, 0.72247, 1.0),
        (8, 10, 0.49016, 0.94331),
        (5, 10, 0.23659, 0.76341),
        (81, 263, 0.2553, 0.3662),
        (1, 29, 0.0061, 0.1718),
        (0, 20, 0.0, 0.1611),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_exact_match_ignores_space_around_the_answer_and_nothing_else() -> None:
    examples = [make_example("SELECT 1 ")] * 5
    answers = ["SELECT 1", "\n SELECT 1\n", "select 1", "SELECT  1", ""]
    assert score_answers("exact_match", examples, answers) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_execution_accuracy_compares_what_the_queries_return() -> None:
    example = make_example("SELECT name FROM city WHERE size > 1000", database=DATABASE)
    answers = [
        "SELECT name FROM city WHERE name = 'Rome'",
        "```sql\nselect name from city order by size desc limit 1;\n```",
        "SELECT name FROM city",
        "SELECT size FROM city WHERE size > 1000",
        "SELECT name FROM town",
        "I do not know.",
        "",
    ]
    assert score_answers("execution_accuracy", [example] * 7, answers) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_answers_and_examples_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="zip"):
        score_answers("exact_match", [make_example("a")], ["a", "a"])


def test_scores_are_compared_with_their_means_and_intervals() -> None:
    base, tuned = [0.0] * 8 + [1.0] * 2, [0.0] * 2 + [1.0] * 8
    found = compare_scores(base, tuned)
    assert (found.base, found.tuned, found.rows) == (0.2, 0.8, 10)
    assert found.difference == pytest.approx(0.6)
    assert (found.base_low, found.base_high) == pytest.approx(wilson_interval(2, 10))
    assert (found.tuned_low, found.tuned_high) == pytest.approx(wilson_interval(8, 10))
    assert 0.0 < found.low < 0.6 < found.high <= 1.0


def test_the_bootstrap_repeats() -> None:
    generator = np.random.default_rng(1)
    base, tuned = generator.integers(0, 2, 40).tolist(), generator.integers(0, 2, 40).tolist()
    assert compare_scores(base, tuned) == compare_scores(base, tuned)


def test_the_bootstrap_is_as_wide_as_theory_says() -> None:
    # For paired differences d the standard error is sd(d) / sqrt(n); the percentile interval must come close to ± 1.96 of it.
    generator = np.random.default_rng(2)
    base, tuned = generator.integers(0, 2, 400).astype(float), generator.integers(0, 2, 400).astype(float)
    found = compare_scores(base.tolist(), tuned.tolist())
    half = 1.96 * (tuned - base).std() / math.sqrt(400)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.01)


def test_the_bootstrap_pairs_the_rows() -> None:
    # Rows differ widely, but each gains exactly 0.1: unpaired resampling would see nothing but noise.
    sums = [(float(nats), 1) for nats in np.linspace(0.5, 9, 30)]
    found = compare_losses(sums, [(nats - 0.1, 1) for nats, _ in sums], perplexity=False)
    assert (found.low, found.high) == pytest.approx((-0.1, -0.1), abs=1e-9)


def test_equal_answers_differ_by_exactly_nothing() -> None:
    found = compare_scores([0.0, 1.0, 1.0], [0.0, 1.0, 1.0])
    assert (found.difference, found.low, found.high) == (0.0, 0.0, 0.0)


def test_losses_are_weighted_by_tokens() -> None:
    found = compare_losses([(10.0, 10), (6.0, 2)], [(5.0, 10), (3.0, 2)], perplexity=False)
    assert found.base == pytest.approx(16 / 12)
    assert found.tuned == pytest.approx(8 / 12)
    assert found.difference == pytest.approx(-8 / 12)
    assert found.rows == 2
    assert found.base_low <= found.base <= found.base_high
    assert found.low <= found.difference <= found.high < 0


def test_perplexity_is_the_exponential_of_the_loss() -> None:
    rows = [[(nats * side, 7) for nats in (5.0, 9.0, 14.0, 6.0)] for side in (1.0, 0.5)]
    loss, perplexity = (compare_losses(*rows, perplexity=flag) for flag in (False, True))
    assert perplexity.base == pytest.approx(math.exp(loss.base))
    assert perplexity.tuned == pytest.approx(math.exp(loss.tuned))
    assert perplexity.difference == pytest.approx(math.exp(loss.tuned) - math.exp(loss.base))
    assert perplexity.base_low == pytest.approx(math.exp(loss.base_low))
    assert perplexity.tuned_high == pytest.approx(math.exp(loss.tuned_high))


def test_a_hopeless_loss_has_a_finite_perplexity() -> None:
    found = compare_losses([(2000.0, 1)] * 2, [(1.0, 1)] * 2, perplexity=True)
    assert all(math.isfinite(value) for value in dataclasses.astuple(found))


def test_a_comparison_is_plain_json() -> None:
    found = compare_losses([(10.0, 10), (6.0, 2)], [(5.0, 10), (3.0, 2)], perplexity=True)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert {"base", "tuned", "difference", "low", "high"} <= set(json.loads(text))


def make_comparison(base: float, tuned: float, low: float, high: float) -> Comparison:
    return Comparison(base, tuned, tuned - base, low, high, base, base, tuned, tuned, 50)


@pytest.mark.parametrize(
    ("name", "base", "tuned", "spread", "verdict"),
    [
        ("loss", 2.0, 1.0, 0.5, "Better"),
        ("loss", 1.0, 2.0, 0.5, "Worse"),
        ("loss", 2.0, 1.9, 0.5, "No measurable change"),
        ("perplexity", 9.0, 3.0, 2.0, "Better"),
        ("perplexity", 3.0, 9.0, 2.0, "Worse"),
        ("exact_match", 0.1, 0.6, 0.2, "Better"),
        ("exact_match", 0.6, 0.1, 0.2, "Worse"),
        ("exact_match", 0.5, 0.6, 0.2, "No measurable change"),
        ("execution_accuracy", 0.1, 0.6, 0.2, "Better"),
        ("execution_accuracy", 0.6, 0.1, 0.2, "Worse"),
    ],
)
def test_the_verdict_follows_the_interval_and_the_direction_of_the_metric(
    name: MetricName, base: float, tuned: float, spread: float, verdict: str
) -> None:
    difference = tuned - base
    text = give_verdict(name, make_comparison(base, tuned, difference - spread, difference + spread))
    assert text.startswith(f"{verdict}: ")
    assert "50 held-out rows" in text


def test_accuracies_are_told_in_percent_and_losses_in_nats() -> None:
    text = give_verdict("exact_match", make_comparison(0.1, 0.625, 0.4, 0.65))
    assert text == (
        "Better: exact match went from 10.0 % to 62.5 % (95 % interval +40.0 points to +65.0 points, 50 held-out rows)."
    )
    text = give_verdict("loss", make_comparison(1.7301, 0.2299, -1.6, -1.4))
    assert "(nats per token) went from 1.730 to 0.230 (95 % interval -1.600 to -1.400" in text


def test_one_row_gives_no_verdict() -> None:
    # The bootstrap of a single row has an interval of width 0, which read «Better» with full certainty.
    comparison = compare_losses([(10.0, 5)], [(9.9, 5)], perplexity=False)
    assert give_verdict("loss", comparison).startswith("Cannot tell")
