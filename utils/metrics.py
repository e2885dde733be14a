"""Metrics of the before/after report, and how sure one can be of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from config.recipe_rules import ON_ANSWERS, PAIR_METRICS
from config.structured_config import MetricName
from utils.examples import Example
from utils.sql_execution import execution_match

RESAMPLES = 10_000
MIN_ROWS = 5  # a bootstrap over one row has an interval of width 0
LOWER_IS_BETTER: tuple[MetricName, ...] = ("loss", "perplexity")
BINARY: tuple[MetricName, ...] = (*ON_ANSWERS, *PAIR_METRICS)
TITLES: dict[MetricName, str] = {
    "loss": "held-out loss (nats per token)",
    "perplexity": "held-out perplexity",
    "exact_match": "exact match",
    "execution_accuracy": "execution accuracy",
    "preference_accuracy": "preference accuracy (chosen answer preferred)",
    "preference_accuracy_per_token": "preference accuracy per token",
    "reward_accuracy": "reward accuracy (50 % before, by definition)",
    "label_accuracy": "label accuracy (50 % before, by definition)",
}
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One metric before and after, on the same rows.

    Attributes:
        base, tuned: values of the untouched and the trained model.
        difference: tuned - base.
        low, high: 95 % interval of the difference.
        base_low, base_high, tuned_low, tuned_high: 95 % intervals of the values.
        rows: rows that both were measured on.
    """

    base: float
    tuned: float
    difference: float
    low: float
    high: float
    base_low: float
    base_high: float
    tuned_low: float
    tuned_high: float
    rows: int

    def to_json(self) -> dict[str, float]:
        """Plain numbers for report.json."""
        return asdict(self)


def score_answers(metric: MetricName, examples: Sequence[Example], answers: Sequence[str]) -> list[float]:
    """1.0 or 0.0 for each generated answer.

    exact_match compares the stripped texts; execution_accuracy compares what the two SQL queries return.
    """
    if metric == "exact_match":
        return [
            float(answer.strip() == example.answer.strip()) for example, answer in zip(examples, answers, strict=True)
        ]
    return [
        float(execution_match(answer, example.answer, example.fields["database"]))
        for example, answer in zip(examples, answers, strict=True)
    ]


def score_preferences(
    metric: MetricName, log_probs: Floats, tokens: npt.NDArray[np.int64], base_log_probs: Floats
) -> list[float]:
    """1.0 for each pair in which the chosen answer wins, 0.5 for a tie, else 0.0.

    What wins: under preference_accuracy the answer of higher log-probability, the same question to both models. It leans to
    short answers, so preference_accuracy_per_token divides by the tokens. reward_accuracy asks which answer training has
    raised more (DPO's implicit reward, arXiv 2305.18290, section 4), and the untouched model ties with itself everywhere.

    Args:
        log_probs: by the model in question, in nats, shape (pairs, 2), the chosen answers first.
        tokens: of each answer, shape (pairs, 2).
        base_log_probs: by the untouched model.
    """
    scores = {
        "preference_accuracy": log_probs,
        "preference_accuracy_per_token": log_probs / tokens,
        "reward_accuracy": log_probs - base_log_probs,
    }[metric]
    return [float(share) for share in (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2]


def score_labels(log_probs: Floats, tokens: npt.NDArray[np.int64], base_log_probs: Floats) -> list[float]:
    """Of each row the share of its answers that training moved the right way: desirable ones up, undesirable ones down.

    A tie counts half, so the untouched model has 0.5 everywhere. A labelled row has one answer, a pair two: they are judged
    one by one, where reward_accuracy would take a pair for right whose answers both fell.

    Args:
        log_probs: by the model in question, in nats, shape (rows, 2), chosen or desirable answers first.
        tokens: of each answer, shape (rows, 2); 0 of one that is missing.
        base_log_probs: by the untouched model.
    """
    is_there = tokens > 0
    right = (np.sign((log_probs - base_log_probs) * np.array([1.0, -1.0])) + 1) / 2
    return [float(share) for share in (right * is_there).sum(axis=1) / is_there.sum(axis=1)]


def compare_scores(base: Sequence[float], tuned: Sequence[float]) -> Comparison:
    """Compares scores of 0, 1, or 0.5 for a tie: Wilson intervals for the values, a paired bootstrap for the difference."""
    rows = len(base)
    low, high = bootstrap_difference(np.array(base), np.array(tuned), np.ones(rows), exponentiate=False)
    values = sum(base) / rows, sum(tuned) / rows
    return Comparison(
        *values,
        values[1] - values[0],
        low,
        high,
        *wilson_interval(sum(base), rows),
        *wilson_interval(sum(tuned), rows),
        rows,
    )


def compare_losses(
    base: Sequence[tuple[float, int]], tuned: Sequence[tuple[float, int]], *, perplexity: bool
) -> Comparison:
    """Compares token-weighted losses, or their exponentials, from (sum of nats, tokens) of each row."""
    weights = np.array([tokens for _, tokens in base], dtype=np.float64)
    sums = [np.array([nats for nats, _ in side]) for side in (base, tuned)]
    values = [total.sum() / weights.sum() for total in sums]
    intervals = [bootstrap_ratio(total, weights, exponentiate=perplexity) for total in sums]
    low, high = bootstrap_difference(sums[0], sums[1], weights, exponentiate=perplexity)
    if perplexity:
        values = [math.exp(min(value, 700.0)) for value in values]
    first, second = float(values[0]), float(values[1])
    return Comparison(first, second, second - first, low, high, *intervals[0], *intervals[1], len(base))


def wilson_interval(successes: float, trials: int) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927): unlike the normal one it is sensible at 0 and 1."""
    z = 1.959964
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return max(0.0, centre - half), min(1.0, centre + half)


def resample(rows: int) -> npt.NDArray[np.int64]:
    """Seeded bootstrap indices, shape (RESAMPLES, rows): the same data gives the same interval."""
    return np.random.default_rng(0).integers(0, rows, size=(RESAMPLES, rows))


def resample_ratios(sums: Floats, weights: Floats, *, exponentiate: bool) -> Floats:
    """Σ sums / Σ weights of each resample; its exponential where the values are perplexities."""
    picks = resample(len(sums))
    ratios: Floats = sums[picks].sum(axis=1) / weights[picks].sum(axis=1)
    return np.exp(np.minimum(ratios, 700.0)) if exponentiate else ratios


def bootstrap_ratio(sums: Floats, weights: Floats, *, exponentiate: bool) -> tuple[float, float]:
    """95 % percentile interval (Efron 1979)."""
    low, high = np.percentile(resample_ratios(sums, weights, exponentiate=exponentiate), [2.5, 97.5])
    return float(low), float(high)


def bootstrap_difference(base: Floats, tuned: Floats, weights: Floats, *, exponentiate: bool) -> tuple[float, float]:
    """95 % interval of tuned - base over the same resampled rows: pairing removes how hard the rows are."""
    after = resample_ratios(tuned, weights, exponentiate=exponentiate)
    low, high = np.percentile(after - resample_ratios(base, weights, exponentiate=exponentiate), [2.5, 97.5])
    return float(low), float(high)


def give_verdict(name: MetricName, comparison: Comparison) -> str:
    """One sentence: better, worse, not distinguishable, or too few rows to say."""
    text = f"{TITLES[name]} went from {format_value(name, comparison.base)} to {format_value(name, comparison.tuned)}"
    interval = f"95 % interval {format_change(name, comparison.low)} to {format_change(name, comparison.high)}"
    if comparison.rows < MIN_ROWS:
        return f"Cannot tell: {text}, but {comparison.rows} held-out rows are too few for an interval."
    if comparison.low <= 0 <= comparison.high:
        return f"No measurable change: {text} ({interval}, {comparison.rows} held-out rows)."
    better = (comparison.difference < 0) == (name in LOWER_IS_BETTER)
    return f"{'Better' if better else 'Worse'}: {text} ({interval}, {comparison.rows} held-out rows)."


def format_value(name: MetricName, value: float) -> str:
    """Percent for accuracies, three decimals otherwise."""
    return f"{100 * value:.1f} %" if name in BINARY else f"{value:.3f}"


def format_change(name: MetricName, value: float) -> str:
    """A difference with its sign."""
    return f"{100 * value:+.1f} points" if name in BINARY else f"{value:+.3f}"
