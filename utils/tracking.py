"""Experiment trackers behind one small interface; what they receive is ours to choose, and holds no environment."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from config.structured_config import TrackingSection
from utils.exceptions import MachineError

Numbers = dict[str, float]


class Tracker:
    """Sends metrics to the trackers that a recipe asks for; with none it does nothing."""

    def __init__(self, tracking: TrackingSection, run: Path, settings: dict[str, Any]) -> None:
        self.wandb_run = start_wandb(tracking, run, settings) if tracking.wandb else None
        self.tensorboard = start_tensorboard(run / "tensorboard") if tracking.tensorboard else None

    def log(self, step: int, numbers: Numbers) -> None:
        """Records numbers of one optimizer step."""
        if self.wandb_run is not None:
            self.wandb_run.log(numbers, step=step)
        if self.tensorboard is not None:
            write_event(self.tensorboard, step, numbers)

    def close(self) -> None:
        """Flushes everything."""
        if self.wandb_run is not None:
            self.wandb_run.finish()
        if self.tensorboard is not None:
            self.tensorboard.close()


def check_tracking(tracking: TrackingSection, where: str) -> None:
    """Refuses a tracker that could not start, before there is a run.

    Raises:
        MachineError: no key in the environment while wandb is online.
    """
    if tracking.wandb and os.environ.get("WANDB_MODE", "online") == "online" and not os.environ.get("WANDB_API_KEY"):
        fix = "put WANDB_API_KEY=… into .env, set WANDB_MODE=offline, or tracking.wandb: false"
        raise MachineError("wandb needs a key", where=where, fix=fix, code="no-key")


def start_wandb(tracking: TrackingSection, run: Path, settings: dict[str, Any]) -> Any:
    """Starts a wandb run that records the metrics and the recipe, and nothing of the machine, the code or the console."""
    import wandb

    quiet = wandb.Settings(
        console="off",
        host="hidden",  # the machine's name is nobody's business
        disable_code=True,
        disable_git=True,
        save_code=False,
        silent=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
    )
    return wandb.init(project=tracking.project, name=run.name, dir=str(run), config=settings, settings=quiet)


def start_tensorboard(folder: Path) -> Any:
    """Opens an event file; written with tensorboard's own classes, so no framework is needed."""
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    return EventFileWriter(str(folder))


def write_event(writer: Any, step: int, numbers: Numbers) -> None:
    """Adds scalars to the event file."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
