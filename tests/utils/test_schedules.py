"""The learning rate rises, falls as the recipe says, and no step of a run is wasted at zero."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from utils.schedules import Scheduler, compute_learning_rate, count_warmup_steps

SCHEDULERS: tuple[Scheduler, ...] = ("cosine", "linear", "constant", "wsd")


def compute_rates(scheduler: Scheduler, total: int, warmup: int, peak: float = 1.0) -> list[float]:
    return [
        compute_learning_rate(step, total, peak=peak, scheduler=scheduler, warmup_steps=warmup)
        for step in range(1, total + 1)
    ]


@pytest.mark.parametrize(
    ("total", "ratio", "expected"),
    [
        (1000, 0.03, 30),
        (1000, 0.0, 0),
        (100, 0.03, 5),
        (50, 0.03, 5),
        (30, 0.03, 3),
        (5, 0.03, 1),
        (10, 0.5, 5),
        (101, 0.1, 11),
    ],
)
def test_warmup_is_the_ratios_share_and_at_least_five_steps_of_a_run_that_is_long_enough(
    total: int, ratio: float, expected: int
) -> None:
    assert count_warmup_steps(total, ratio) == expected


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_warmup_rises_evenly_to_just_under_the_peak(scheduler: Scheduler) -> None:
    assert compute_rates(scheduler, 20, 4)[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (1, 1), (2, 1), (10, 0), (10, 3), (10, 10), (200, 6)])
def test_no_step_runs_at_zero_or_above_the_peak(scheduler: Scheduler, total: int, warmup: int) -> None:
    assert all(0 < rate <= 4e-4 for rate in compute_rates(scheduler, total, warmup, peak=4e-4))


def test_linear_falls_evenly_and_would_reach_zero_one_step_after_the_last() -> None:
    assert compute_rates("linear", 6, 2)[2:] == pytest.approx([1.0, 0.75, 0.5, 0.25])
    assert compute_learning_rate(7, 6, peak=1.0, scheduler="linear", warmup_steps=2) == pytest.approx(0)


def test_cosine_is_half_a_wave() -> None:
    rates = compute_rates("cosine", 8, 0)
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)])
    assert rates[4] == pytest.approx(0.5)
    assert compute_learning_rate(9, 8, peak=1.0, scheduler="cosine", warmup_steps=0) == pytest.approx(0)


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_after_the_warmup_the_rate_only_falls(scheduler: Scheduler) -> None:
    rates = compute_rates(scheduler, 40, 5)[5:]
    assert all(first > second for first, second in pairwise(rates))


def test_constant_stays_at_the_peak_after_the_warmup() -> None:
    assert compute_rates("constant", 10, 2, peak=3e-4)[2:] == [3e-4] * 8


def test_wsd_stays_at_the_peak_and_falls_evenly_in_the_last_fifth() -> None:
    rates = compute_rates("wsd", 20, 2, peak=3e-4)
    assert rates[2:17] == [3e-4] * 15
    assert rates[16:] == pytest.approx([3e-4, 2.25e-4, 1.5e-4, 0.75e-4])
    assert compute_learning_rate(21, 20, peak=1.0, scheduler="wsd", warmup_steps=2) == pytest.approx(0)


def test_wsd_never_falls_within_its_warmup() -> None:
    assert compute_rates("wsd", 10, 9) == pytest.approx([step / 10 for step in range(1, 10)] + [1.0])
