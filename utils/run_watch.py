"""What a run shows while there is still time to stop it: weights that do not learn, a wrong reference, a loss that jumps.

Each finding is a warning in words; nothing here changes a run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from config.structured_config import Recipe
from utils.backends import StepResult, TrainStep

# How far the first loss may lie from its value: rounding of sums over a few hundred tokens, times beta. A quantised base
# multiplies in fewer bits than float32, whatever the number format of the rest.
ROUNDING = {"float32": 1e-5}
COARSE_ROUNDING = 0.02
YOUNG_STEPS = 20
SMALLEST_MARGIN = 1e-3
SHOWN_NAMES = 5
# A spike lies more than SPIKE_DEVIATIONS median absolute deviations above the median of the last steps. Of 1,976 steps of 14
# real runs (SFT, preference, reward, from scratch; 2 to 16 rows a step) the farthest lay 5 away: twice that is no chance. The
# deviation counts as at least 2 % of the median, or the last steps of a run that has converged would all be spikes.
SPIKE_DEVIATIONS = 10.0
SPIKE_WINDOW = 50
SPIKE_LEAST = 20
SMALLEST_DEVIATION = 0.02

Losses = npt.NDArray[np.float64]


def find_spike(recent: Sequence[float], loss: float) -> str | None:
    """Says how far a loss lies above those of the last steps, where that is too far; None with few of them.

    Args:
        recent: losses of the steps before, the newest last; the last `SPIKE_WINDOW` count.
    """
    window = recent[-SPIKE_WINDOW:]
    if len(window) < SPIKE_LEAST:
        return None
    median = statistics.median(window)
    deviation = statistics.median(abs(value - median) for value in window)
    limit = median + SPIKE_DEVIATIONS * max(deviation, SMALLEST_DEVIATION * abs(median))
    if loss <= limit:
        return None
    return (
        f"loss {loss:.4g} is a spike: the median of the last {len(window)} steps is {median:.4g}, the limit {limit:.4g}"
    )


class RunWatch:
    """Says while a run is young that its first loss, its margins, its gradients or its effect are not what they must be."""

    def __init__(
        self,
        step: TrainStep,
        total_steps: int,
        measure: Callable[[], Losses],
        preference: PreferenceWatch | None = None,
    ) -> None:
        """Must be made before the first step.

        Args:
            total_steps: of the run; a shorter one than `YOUNG_STEPS` is judged at its last step.
            measure: losses or scores of a few rows by the model as it is now, any shape.
            preference: what else pairs must show.
        """
        self.step, self.measure, self.preference = step, measure, preference
        self.judged_at = min(YOUNG_STEPS, total_steps)
        self.taken = 0
        self.before = measure()

    def find_warnings(self, number: int, result: StepResult) -> list[str]:
        """What is wrong after a step that was taken, in words."""
        self.taken += 1
        found = [self.preference.find_warning(number, result)] if self.preference else []
        # Counted are the steps of this process: a run that was resumed needs as many to show anything.
        if self.taken == self.judged_at:
            # Of a fresh adapter's pair of matrices one is zero, and so the other's first gradient.
            found += [self.find_silent_tensors() if self.taken > 1 else None, self.find_no_effect()]
        return [warning for warning in found if warning]

    def find_silent_tensors(self) -> str | None:
        """Names the tensors that no step has given a gradient."""
        names = self.step.list_silent_tensors()
        if not names:
            return None
        shown = ", ".join(names[:SHOWN_NAMES]) + (
            f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else ""
        )
        return (
            f"{len(names)} tensor(s) that should be trained have had no gradient in {self.taken} steps, and do not learn: "
            f"{shown}; they are frozen, or the loss of these rows does not depend on them"
        )

    def find_no_effect(self) -> str | None:
        """Says if the model answers as it did before the first step."""
        if not np.array_equal(self.before, self.measure()):
            return None
        return (
            f"training has no effect yet: after {self.taken} steps the model is what it was before, to the last bit; "
            "raise training.learning_rate, or look at lora.target_modules"
        )


def compute_first_loss(recipe: Recipe, answers: tuple[int, int]) -> float | None:
    """The loss before the first update, where policy and reference are one model and all rewards are 0.

    Args:
        answers: chosen or desirable ones of the first step, and rejected or undesirable ones: under KTO they weigh differently.

    Returns:
        ln 2 for the sigmoid loss, with label smoothing too; None for ORPO, which has no reference, and for a reward model,
        which may go on from rewards that it has.
    """
    if (kto := recipe.kto) is not None:
        good, bad = answers
        return (kto.desirable_weight * good + kto.undesirable_weight * bad) / (2 * (good + bad))
    if (dpo := recipe.dpo) is not None:
        return {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (2 * dpo.beta) ** 2}[dpo.loss]
    return None


class PreferenceWatch:
    """Says while a run is young that its first loss or its margins are not what they must be."""

    def __init__(self, recipe: Recipe, dtype: str) -> None:
        """Takes the recipe and the number format of the frozen weights."""
        self.recipe = recipe
        self.rounding = COARSE_ROUNDING if recipe.model.quantization != "none" else ROUNDING.get(dtype, COARSE_ROUNDING)
        self.starts_equal = recipe.orpo is None  # whose margins are not 0 before the first step
        self.taken = 0
        self.largest_margin = 0.0

    def find_warning(self, step: int, result: StepResult) -> str | None:
        """What is wrong after a step, in words, or None.

        A first loss other than that of equal models means that the reference is another model, or that there is noise in
        one of the two.
        """
        self.taken += 1
        expected = compute_first_loss(self.recipe, result.answers)
        if step == 1 and expected is not None and abs(result.loss - expected) > self.rounding * max(1.0, expected):
            return (
                f"the first loss is {result.loss:.6f}, and {expected:.6f} where the reference is this very model: "
                "the reference is another one, and the margins start from a wrong place"
            )
        # A step whose answers all have one label has no margin: then it is their reward that must move.
        numbers = result.numbers
        moved = next(numbers[name] for name in ("margin", "chosen_reward", "rejected_reward") if name in numbers)
        self.largest_margin = max(self.largest_margin, abs(moved))
        if self.starts_equal and self.taken == YOUNG_STEPS and self.largest_margin < SMALLEST_MARGIN:
            return (
                f"after {self.taken} steps no margin exceeds {self.largest_margin:.1e}: nothing is learned yet; "
                "raise training.learning_rate, or look at the answers of the rows"
            )
        return None
