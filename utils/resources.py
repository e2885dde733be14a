"""What a run will take: download, disk, memory and time, told before it starts and compared with what it took."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe
from utils.downloads import DownloadStatus, find_download
from utils.exceptions import Problem
from utils.forecast import DiskForecast, TimeForecast, check_disk, estimate_disk, predict_seconds
from utils.machine import Machine, inspect_machine
from utils.memory import MemoryEstimate, check_memory, estimate_memory, measure_stored_bytes, show_bytes
from utils.model_shape import ModelShape, measure_shape
from utils.model_source import ModelSource
from utils.prepared_data import PreparedData
from utils.progress import format_seconds
from utils.workload import plan_workload


@dataclass(frozen=True)
class Resources:
    """Predictions; None where nobody can say, such as for an architecture that the tables do not know.

    Attributes:
        download: what is missing of a hub model; None for local and embedded ones.
        memory: of the device at the peak.
        disk: what the run writes.
        time: of the training steps, after a past run on this machine.
    """

    machine: Machine
    shape: ModelShape | None
    download: DownloadStatus | None
    memory: MemoryEstimate | None
    disk: DiskForecast | None
    time: TimeForecast | None
    problems: tuple[Problem, ...]


def plan_resources(loaded: LoadedRecipe, source: ModelSource, data: PreparedData, steps: int) -> Resources:
    """Predicts what the run will take.

    Args:
        steps: optimizer steps of the run.

    Raises:
        MachineError: memory or disk cannot suffice.
    """
    recipe, machine, shape = loaded.recipe, inspect_machine(), measure_shape(source)
    download = find_download(recipe.model, loaded.find_origin("model.name"))
    memory = disk = None
    problems: list[Problem] = []
    if shape is not None:
        memory = predict_memory(recipe, source, data, machine, shape)
        disk = estimate_disk(recipe, shape, source.config)
        problems += check_memory(memory, machine, loaded.find_origin("training.micro_batch_size"))
        problems += check_disk(disk, loaded.find_origin("training.keep_checkpoints"))
    tokens = float(np.mean(data.train.lengths)) * min(recipe.training.batch_size, len(data.train)) * steps
    time = predict_seconds(recipe, round(tokens), machine.device)
    return Resources(machine, shape, download, memory, disk, time, tuple(problems))


def predict_memory(
    recipe: Recipe, source: ModelSource, data: PreparedData, machine: Machine, shape: ModelShape
) -> MemoryEstimate:
    """Predicts the run's peak from the lengths of its examples."""
    held_out = (data.evaluation.lengths, data.evaluation.supervised)
    workload = plan_workload(recipe, shape, machine, (data.train.lengths, data.train.supervised), held_out)
    return estimate_memory(recipe, shape, machine, workload, measure_stored_bytes(source))


def decide_checkpointing(loaded: LoadedRecipe, source: ModelSource, data: PreparedData) -> LoadedRecipe:
    """Replaces `gradient_checkpointing: auto`: on only where the run would not fit into free memory without it.

    It costs about a third more time, so where nothing can be predicted it stays off.
    """
    if loaded.recipe.training.gradient_checkpointing != "auto":
        return loaded
    key, machine, shape = "training.gradient_checkpointing", inspect_machine(), measure_shape(source)
    free = machine.available_bytes
    if shape is None or free is None:
        what = "the memory of this architecture" if shape is None else "the free memory of this machine"
        return loaded.with_automatic_value(key, False, f"{what} is unknown")
    off, on = (
        predict_memory(loaded.with_automatic_value(key, value, "").recipe, source, data, machine, shape).total
        for value in (False, True)
    )
    needs = f"{show_bytes(off)} needed without it, {show_bytes(free)} free"
    if off > free and on < off:
        return loaded.with_automatic_value(key, True, f"{needs}; {show_bytes(on)} with it")
    return loaded.with_automatic_value(key, False, needs)


def summarise_resources(resources: Resources) -> dict[str, Any]:
    """The predictions as people read them."""
    download, memory, disk, time = resources.download, resources.memory, resources.disk, resources.time
    facts: dict[str, Any] = {}
    if download is not None:
        missing = "unknown" if download.missing_bytes is None else show_bytes(download.missing_bytes)
        facts["download"] = (
            "nothing, the model is in the cache" if download.cached else f"{missing} to {download.target}"
        )
    unknown = "unknown: this architecture is not in the tables"
    facts["predicted_memory"] = f"{show_bytes(memory.total)} ({memory.phase})" if memory else unknown
    if disk is not None:
        facts["predicted_disk"] = f"{show_bytes(disk.checkpoints)}, and {show_bytes(disk.merge)} for a merge"
    facts["predicted_training_time"] = (
        f"{format_seconds(time.seconds)}, as fast as {time.run}"
        if time
        else "unknown until a first run on this machine"
    )
    return facts
