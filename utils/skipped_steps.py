"""Steps that are not taken because their loss or gradient is not finite: said, counted, and the end of a run if they go on."""

from __future__ import annotations

import math

from utils.backends import StepResult
from utils.exceptions import TrainingError
from utils.logging import get_logger
from utils.run_folder import RunFolder

# One can be a row, two a coincidence; three in a row are the weights or the rate, and go on.
MAX_IN_A_ROW = 3
SHOWN_PLACES = 3


def keep_finite(value: float) -> float | None:
    """The value, or None for what JSON has no word for."""
    return value if math.isfinite(value) else None


def write_skip(folder: RunFolder, step: int, epoch: float, result: StepResult) -> None:
    """Says that a step was not taken, and adds it to skipped.jsonl with the rows that did it, or all of its rows."""
    numbers = f"loss {result.loss:.4g}, gradient norm {result.gradient_norm:.4g}"
    cause = "because of" if result.faulty else "though no row alone is at fault; its rows:"
    get_logger().warning(
        "Step %d is not taken (%s), %s %s", step, numbers, cause, shorten(result.faulty or result.places)
    )
    row = {
        "step": step,
        "epoch": round(epoch, 4),
        "loss": keep_finite(result.loss),
        "grad_norm": keep_finite(result.gradient_norm),
        "message": numbers,
        "faulty_rows": list(result.faulty),
        "rows": list(result.places),
    }
    folder.append_skipped(row)


def shorten(places: tuple[str, ...]) -> str:
    """The first places; all of them stand in skipped.jsonl."""
    rest = len(places) - SHOWN_PLACES
    return ", ".join(places[:SHOWN_PLACES]) + (f" and {rest} more" if rest > 0 else "")


def check_skips(folder: RunFolder, in_a_row: int, step: int, total_steps: int) -> None:
    """Stops a run that has stopped learning.

    Raises:
        TrainingError: too many steps in a row were not taken, or all of a short run.
    """
    if in_a_row < min(MAX_IN_A_ROW, total_steps):
        return
    message = (
        f"{in_a_row} step(s) in a row had a loss or gradient that is not finite; the weights are those before them"
    )
    fix = f"look at the rows in {folder.skipped_file}, lower training.learning_rate, or set model.dtype: float32"
    raise TrainingError(message, where=f"step {step}", fix=fix, code="not-finite")
