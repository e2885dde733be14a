"""How long a run will take and how much disk it will fill, before it starts."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from config.structured_config import Recipe
from utils.activations import BYTES, MASTER, count_adapters
from utils.exceptions import MachineError, Problem, TunebookError
from utils.machine import Machine
from utils.memory import show_bytes
from utils.model_shape import ModelShape
from utils.optimizer_memory import count_optimizer_bytes
from utils.run_folder import OUTPUTS, RunFolder

TOKENIZER_BYTES = (
    4_000_000  # each checkpoint carries the tokenizer; 3.5 MB for the embedded model, up to 17 MB elsewhere
)
PAST_RUNS = 100  # the newest ones that are looked through


@dataclass(frozen=True)
class TimeForecast:
    """Predicted duration of the training steps.

    Attributes:
        seconds: training tokens ÷ tokens per second of the past run; evaluations and loading come on top.
        run: the finished run that it is based on.
    """

    seconds: float
    run: Path


@dataclass(frozen=True)
class DiskForecast:
    """Bytes that a run writes.

    Attributes:
        checkpoint: one checkpoint, optimizer included.
        checkpoints: the most that lie side by side: the newest, the best, the one in writing, and the result.
        merge: the model that `scripts/merge.py` would write; 0 when all weights are trained.
    """

    checkpoint: int
    checkpoints: int
    merge: int


def predict_seconds(recipe: Recipe, tokens: int, machine: Machine, outputs: Path = OUTPUTS) -> TimeForecast | None:
    """Finds the newest finished run of the same model, back end, device and method, and divides by its speed.

    Args:
        tokens: training tokens of the whole run, padding not counted.
        outputs: the folder of all runs.

    Returns:
        None if there was no such run yet.
    """
    for path in islice(sorted(outputs.glob("*/*/run.json"), key=read_time, reverse=True), PAST_RUNS):
        folder = RunFolder(path.parent)
        try:
            facts = folder.read_facts()
            if not is_comparable(facts, machine):
                continue
            past = folder.load_recipe(trusts_code=True).recipe  # compared, and nothing of it is loaded
        except TunebookError:
            continue  # unreadable, or a recipe of an older version
        if describe_work(past) == describe_work(recipe):
            return TimeForecast(tokens / facts["tokens_per_second"], path.parent)
    return None


def read_time(path: Path) -> float:
    """When a file was written; 0 if it has just been removed."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def is_comparable(facts: dict[str, Any], machine: Machine) -> bool:
    """A run that ended by itself on this back end and device, with a speed; runs of older versions were all on torch."""
    place = facts.get("backend", "torch"), facts.get("device")
    is_here = place == (machine.backend, machine.device)
    return facts.get("status") == "finished" and is_here and bool(facts.get("tokens_per_second"))


def describe_work(recipe: Recipe) -> tuple[object, ...]:
    """What decides the work for a token."""
    model, training = recipe.model, recipe.training
    kind = "full" if recipe.lora is None else recipe.lora.variant
    weights, steps = (model.name, model.dtype, model.quantization), (training.engine, training.method)
    return *weights, *steps, kind, training.gradient_checkpointing, recipe.scratch


def estimate_disk(recipe: Recipe, shape: ModelShape, config: dict[str, Any]) -> DiskForecast:
    """Bytes of checkpoints, result and merge."""
    result = MASTER * (count_adapters(recipe.lora, shape) or shape.parameters) + TOKENIZER_BYTES
    checkpoint = result + count_optimizer_bytes(recipe, shape)
    # Newest ones, the best one, the one in writing; and the copy of the weights that becomes adapter/ or model/.
    checkpoints = checkpoint * (recipe.training.keep_checkpoints + 2) + result
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    merge = BYTES.get(dtype, MASTER) * shape.parameters if recipe.lora else 0
    return DiskForecast(checkpoint, checkpoints, merge)


def measure_checkpoints(recipe: Path) -> int:
    """Bytes of the checkpoints beside a recipe: they are those of a run that goes on, and make room for the next ones."""
    files = [path for path in (recipe.parent / "checkpoints").glob("step-*/*") if path.is_file()]
    return sum(path.stat().st_size for path in files)


def check_disk(disk: DiskForecast, where: str, outputs: Path = OUTPUTS, present: int = 0) -> list[Problem]:
    """Compares what a run writes with the free space of the folder of runs.

    Args:
        where: `file:line` of training.keep_checkpoints.
        present: bytes of checkpoints that the run has already.

    Returns:
        A warning if the checkpoints fit but the merge would not, else nothing.

    Raises:
        MachineError: not even the checkpoints fit.
    """
    folder = next(path for path in (outputs.absolute(), *outputs.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    missing = disk.checkpoints - present
    if missing > free:
        message = f"checkpoints will need {show_bytes(missing)}, and {show_bytes(free)} are free in {folder}"
        fix = "lower training.keep_checkpoints, free some space, or name another folder with --run"
        raise MachineError(message, where=where, fix=fix, code="disk")
    if disk.merge and missing + disk.merge > free:
        message = (
            f"merging will need {show_bytes(disk.merge)} more than the run, and {show_bytes(free)} are free in {folder}"
        )
        fix = "free some space before scripts/merge.py, or write to another disk with its --out"
        return [Problem("disk", message, where, fix, "warning")]
    return []
