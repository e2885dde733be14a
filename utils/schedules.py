"""Learning rate over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

MIN_WARMUP_STEPS = 5


def count_warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps in which the learning rate rises: the ratio's share, but at least 5 where that is a tenth of the run or less."""
    if warmup_ratio == 0:
        return 0
    return max(math.ceil(warmup_ratio * total_steps), min(MIN_WARMUP_STEPS, total_steps // 10))


def compute_learning_rate(
    step: int, total_steps: int, *, peak: float, scheduler: Literal["cosine", "linear", "constant"], warmup_steps: int
) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: from 1; the last one is `total_steps`.
        total_steps: optimizer steps of the whole run.
        peak: the rate at the end of the warmup.
        scheduler: cosine and linear fall towards 0, which they would reach one step after the last.
        warmup_steps: step k of the warmup runs at k / (warmup_steps + 1) of the peak, so no step is wasted at 0.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    progress = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)
    if scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if scheduler == "linear":
        return peak * (1 - progress)
    return peak
