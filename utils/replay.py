"""The first steps of a run once more, from its own folder: the same losses, or what is not the same."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.structured_config import TrackingSection
from utils.exceptions import RunError
from utils.preflight import Preflight
from utils.prepared_data import hash_contents
from utils.run_comparison import Difference, find_environment_differences, find_input_differences
from utils.run_folder import RunFolder, collect_versions, find_git_state
from utils.tracking import Tracker
from utils.training_run import PreparedRun, make_parts, train_with_engine

# What a step measured and another machine or version may round otherwise; the counts must always be the same.
MEASURED = ("loss", "grad_norm")
COUNTED = ("tokens", "supervised_tokens")
# How far losses may lie apart where machine or versions are others, relative to the loss: float32 sums in another order, and
# coarser formats by the bits that they have.
TOLERANCE = {"float32": 1e-4}
COARSE_TOLERANCE = 2e-2

Row = Mapping[str, Any]


@dataclass(frozen=True)
class StepComparison:
    """A step as it was and as it is now.

    Attributes:
        distance: the largest relative difference among loss and gradient norm; 0 where all bits are the same, infinite
            where the step saw other tokens or only one of the two was finite.
    """

    step: int
    then: Row
    now: Row
    distance: float


def read_first_steps(folder: RunFolder, count: int) -> list[Row]:
    """The first steps of metrics.jsonl; of one that was taken twice, by a run that was killed and resumed, the last row.

    Raises:
        RunError: the run has no step.
    """
    rows: dict[int, Row] = {row["step"]: row for row in folder.read_metrics() if "loss" in row}
    first = [rows[step] for step in range(1, count + 1) if step in rows]
    if not first or first[0]["step"] != 1:
        message, fix = "metrics.jsonl does not have the first step", "name a run that has taken one"
        raise RunError(message, where=str(folder.path), fix=fix, code="no-steps")
    return first


def check_inputs(folder: RunFolder, preflight: Preflight) -> None:
    """Refuses to replay a run on something else than what it was trained on; the weights are checked by `check_base`.

    Raises:
        RunError: rows or template have changed.
    """
    contents, template = hash_contents(preflight.data.hashes), preflight.tokenizer.template
    now = {"data_hash": contents["train"], "eval_hash": contents["eval"], "template_hash": template.hash}
    if differences := find_input_differences(folder.read_facts(), now):
        names = ", ".join(difference.name.removesuffix("_hash") for difference in differences)
        message = f"what the run was trained on has changed since: {names}"
        raise RunError(message, where=str(folder.path), fix="restore the files, or train again", code="data-changed")


def find_changes(run: PreparedRun, facts: Row) -> list[Difference]:
    """What is another machine, version or code than that of the run."""
    machine = run.backend.describe_machine(run.model)
    now = {
        "device": machine.device,
        "device_name": machine.device_name,
        "dtype": machine.dtype,
        "threads": machine.threads,
        "versions": collect_versions(run.loaded.recipe.training.engine, machine.backend),
        "git": find_git_state(),
    }
    changes = find_environment_differences(facts, now)
    if facts.get("halvings"):  # a step in smaller passes is summed in another order
        changes.append(Difference("halvings", facts["halvings"], 0))
    return changes


def replay_steps(run: PreparedRun, recorded: Sequence[Row]) -> list[StepComparison]:
    """Takes the recorded steps again, by the code that took them, and compares.

    Args:
        run: freshly loaded, as if it were to be trained; its folder is only read.

    Raises:
        SystemExit: a signal ended it.
    """
    with tempfile.TemporaryDirectory(prefix="tunebook-replay-") as name:
        folder = RunFolder(Path(name))
        parts = make_parts(replace(run, folder=folder), Tracker(TrackingSection(), folder.path, {}))
        state = train_with_engine(run, replace(parts, evaluate=None, stop_after=recorded[-1]["step"]))
        if state.signal_number is not None:
            raise SystemExit(128 + state.signal_number)
        rows = {row["step"]: row for row in folder.read_metrics()}
    return [
        StepComparison(row["step"], row, rows[row["step"]], measure_distance(row, rows[row["step"]]))
        for row in recorded
    ]


def measure_distance(then: Row, now: Row) -> float:
    """The largest relative difference of what two steps measured; see `StepComparison`."""
    if any(then.get(name) != now.get(name) for name in COUNTED):
        return math.inf
    distances = [0.0]
    for name in MEASURED:
        old, new = then.get(name), now.get(name)
        if old is None or new is None:
            distances.append(0.0 if old is new else math.inf)
        elif old != new:
            distances.append(abs(new - old) / max(abs(old), abs(new)))
    return max(distances)


def judge_replay(steps: Sequence[StepComparison], changes: Sequence[Difference], dtype: str, where: str) -> str:
    """One sentence about a replay that succeeded.

    Args:
        changes: with none of them, every bit must be the same.

    Raises:
        RunError: a loss, gradient norm or count is not what it was.
    """
    same, count = sum(step.distance == 0 for step in steps), len(steps)
    if same == count:
        return f"reproduced: {count} of {count} losses bit for bit"
    farthest = max(steps, key=lambda step: step.distance)
    limit = TOLERANCE.get(dtype, COARSE_TOLERANCE) if changes else 0.0
    what = f"largest relative difference {farthest.distance:.1e} at step {farthest.step}"
    if farthest.distance <= limit:
        return f"reproduced: {count} of {count} losses within {limit:g} ({what}), {same} of them bit for bit"
    first = next(step for step in steps if step.distance > limit)
    others = "; ".join(str(change) for change in changes) or "machine, versions and code are the same"
    message = f"not reproduced: step {first.step} differs, {same} of {count} losses are the same ({what}); {others}"
    fix = "look at what differs; on CUDA, train with deterministic: true"
    raise RunError(message, where=where, fix=fix, code="not-reproduced")


def format_steps(steps: Sequence[StepComparison]) -> list[str]:
    """A table: step, loss and gradient norm then and now, and how far apart."""
    lines = [f"{'step':>5}  {'loss':>12}  {'now':>12}  {'grad norm':>12}  {'now':>12}  difference"]
    for step in steps:
        cells = [step.then.get("loss"), step.now.get("loss"), step.then.get("grad_norm"), step.now.get("grad_norm")]
        shown = "  ".join(f"{'skipped' if value is None else f'{value:.8g}':>12}" for value in cells)
        lines.append(f"{step.step:>5}  {shown}  {'none' if step.distance == 0 else f'{step.distance:.1e}'}")
    return lines
