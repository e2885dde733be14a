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

    def __init__(
        self, tracking: TrackingSection, run: Path, settings: dict[str, Any], tracking_id: str = "", resumes: int = 0
    ) -> None:
        """Starts the trackers, or lets them go on.

        Args:
            settings: of the recipe.
            tracking_id: the run's name there, the same for every process of it.
            resumes: how often the run has gone on.
        """
        self.wandb_run = start_wandb(tracking, run, settings, tracking_id) if tracking.wandb else None
        self.tensorboard = start_tensorboard(run / "tensorboard") if tracking.tensorboard else None
        self.must_purge = resumes > 0

    def log(self, step: int, numbers: Numbers) -> None:
        """Records numbers of one optimizer step."""
        if self.wandb_run is not None:
            self.wandb_run.log(numbers, step=step)
        if self.tensorboard is not None:
            if self.must_purge:  # what a killed process has written of this step and later ones
                purge_events(self.tensorboard, step)
                self.must_purge = False
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


def start_wandb(tracking: TrackingSection, run: Path, settings: dict[str, Any], tracking_id: str) -> Any:
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
    return wandb.init(
        project=tracking.project,
        name=run.name,
        id=tracking_id,
        resume="allow",
        dir=str(run),
        config=settings,
        settings=quiet,
    )


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


def purge_events(writer: Any, step: int) -> None:
    """Lets TensorBoard forget events of this step and later ones that are in the folder already."""
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog

    writer.add_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
    writer.add_event(Event(wall_time=time.time(), step=step, session_log=SessionLog(status=SessionLog.START)))
