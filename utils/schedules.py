"""Learning rate over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

Scheduler = Literal["cosine", "linear", "constant", "wsd"]
MIN_WARMUP_STEPS = 5
# Share of a wsd run in which the rate falls. MiniCPM needs 10 % (arXiv 2404.06395, section 4.3), shorter runs gain from 20 %
# (arXiv 2405.18392, figure 5).
DECAY_SHARE = 0.2


def count_warmup_steps(total_steps: int, warmup_ratio: float) -> int:
    """Steps in which the learning rate rises: the ratio's share, but at least 5 where that is a tenth of the run or less."""
    if warmup_ratio == 0:
        return 0
    return max(math.ceil(warmup_ratio * total_steps), min(MIN_WARMUP_STEPS, total_steps // 10))


def count_decay_steps(total_steps: int, warmup_steps: int) -> int:
    """Steps of a wsd run in which the learning rate falls: the last 20 %, and never a step of the warmup."""
    return min(max(1, round(DECAY_SHARE * total_steps)), max(1, total_steps - warmup_steps))


def compute_learning_rate(
    step: int, total_steps: int, *, peak: float, scheduler: Scheduler, warmup_steps: int
) -> float:
    """Learning rate of one optimizer step.

    Args:
        step: from 1; the last one is `total_steps`.
        total_steps: optimizer steps of the whole run.
        peak: the rate at the end of the warmup.
        scheduler: cosine, linear and wsd fall towards 0, which they would reach one step after the last; wsd falls
            evenly in the last 20 % of the steps.
        warmup_steps: step k of the warmup runs at k / (warmup_steps + 1) of the peak, so no step is wasted at 0.
    """
    if step <= warmup_steps:
        return peak * step / (warmup_steps + 1)
    if scheduler == "constant":
        return peak
    if scheduler == "wsd":
        falling = count_decay_steps(total_steps, warmup_steps)
        return peak * min(1.0, (total_steps + 1 - step) / falling)
    progress = (step - warmup_steps - 1) / max(1, total_steps - warmup_steps)
    if scheduler == "cosine":
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (1 - progress)
