"""What a run will take: download, disk, memory and time, told before it starts and compared with what it took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe
from utils.backends import choose_backend
from utils.downloads import DownloadStatus, find_download
from utils.exceptions import Problem
from utils.flat_batches import count_common_start
from utils.forecast import (
    DiskForecast,
    TimeForecast,
    check_disk,
    estimate_disk,
    measure_checkpoints,
    predict_seconds,
)
from utils.machine import Machine, inspect_machine
from utils.memory import MemoryEstimate, check_memory, estimate_memory, measure_stored_bytes, show_bytes
from utils.mlx_memory import estimate_mlx_memory
from utils.mlx_support import is_stored_quantised
from utils.model_shape import ModelShape, measure_shape, silence
from utils.model_source import ModelSource
from utils.prepared_data import PreparedData
from utils.progress import format_seconds
from utils.workload import Rows, plan_workload


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


def plan_resources(
    loaded: LoadedRecipe, source: ModelSource, data: PreparedData, steps: int, *, is_finished: bool = False
) -> tuple[LoadedRecipe, Resources]:
    """Predicts what the run will take.

    Args:
        steps: optimizer steps of the run.
        is_finished: the run is only measured, so this machine need not have what it took to train it.

    Returns:
        The recipe, with `gradient_checkpointing: auto` decided, and the predictions for it.

    Raises:
        MachineError: memory or disk cannot suffice.
    """
    machine, shape = inspect_machine(choose_backend(loaded.recipe, source.config)), measure_shape(source)
    if shape and loaded.recipe.training.silences_dropout:
        shape = silence(shape)
    download = find_download(loaded.recipe.model, loaded.find_origin("model.name"))
    predict = make_predictor(loaded.recipe, source, data, machine, shape) if shape else None
    loaded = decide_checkpointing(loaded, machine.available_bytes, predict)
    recipe, disk = loaded.recipe, None
    # TRL's trainer holds other tensors, which no table here knows.
    memory = predict(recipe) if predict and recipe.training.engine == "tunebook" else None
    problems: list[Problem] = []
    if shape is not None:
        disk = estimate_disk(recipe, shape, source.config)
    if disk is not None and not is_finished:
        problems += check_memory(memory, machine, loaded.find_origin("training.micro_batch_size")) if memory else []
        present = measure_checkpoints(loaded.path)
        problems += check_disk(disk, loaded.find_origin("training.keep_checkpoints"), present=present)
    tokens = float(np.mean(data.train.lengths)) * min(recipe.training.batch_size, len(data.train)) * steps
    time = predict_seconds(recipe, round(tokens), machine)
    return loaded, Resources(machine, shape, download, memory, disk, time, tuple(problems))


def make_predictor(
    recipe: Recipe, source: ModelSource, data: PreparedData, machine: Machine, shape: ModelShape
) -> Callable[[Recipe], MemoryEstimate]:
    """Gives a function that predicts the peak of this run under changed values, from the lengths of its examples."""
    train, held_out = (
        Rows(rows.lengths, rows.supervised, count_common_start(rows, rows.lengths))
        for rows in (data.train, data.evaluation)
    )
    workload = plan_workload(recipe, shape, machine, train, held_out)
    stored = measure_stored_bytes(source)
    if machine.backend == "mlx":
        kept = stored if is_stored_quantised(source.config) else None
        return lambda changed: estimate_mlx_memory(changed, shape, machine, workload, kept)
    return lambda changed: estimate_memory(changed, shape, machine, workload, stored)


def decide_checkpointing(
    loaded: LoadedRecipe, free: int | None, predict: Callable[[Recipe], MemoryEstimate] | None
) -> LoadedRecipe:
    """Replaces `gradient_checkpointing: auto`: on only where the run would not fit into free memory without it.

    It costs about a third more time, so where nothing can be predicted it stays off.

    Args:
        free: bytes of the device that are free now, or None where nobody knows.
        predict: recipe → its peak; None for an architecture that is not in the tables.
    """
    key = "training.gradient_checkpointing"
    if loaded.recipe.training.gradient_checkpointing != "auto":
        return loaded
    if predict is None or free is None:
        what = "free memory" if predict else "memory that this architecture needs"
        return loaded.with_automatic_value(key, False, f"the {what} is unknown")
    off, on = (predict(loaded.with_automatic_value(key, value, "").recipe).total for value in (False, True))
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
    why = "under TRL's trainer there is no estimate" if resources.shape else "this architecture is not in the tables"
    unknown = f"unknown: {why}"
    facts["predicted_memory"] = f"{show_bytes(memory.total)} ({memory.phase})" if memory else unknown
    if disk is not None:
        facts["predicted_disk"] = f"{show_bytes(disk.checkpoints)}, and {show_bytes(disk.merge)} for a merge"
    facts["predicted_training_time"] = (
        f"{format_seconds(time.seconds)}, as fast as {time.run}"
        if time
        else "unknown until a first run on this machine"
    )
    return facts
