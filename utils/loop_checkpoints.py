"""What the loop writes into checkpoints, and how it begins again from one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.checkpoint import Checkpoint, rotate_checkpoints, save_checkpoint
from utils.logging import get_logger
from utils.seed_manager import capture_generators, restore_generators
from utils.training_state import TrainingState

if TYPE_CHECKING:
    from utils.training_loop import LoopParts


def begin(parts: LoopParts) -> TrainingState:
    """The state before the first step; lines of a process that was killed before its first checkpoint are taken back."""
    parts.folder.cut_lines({})
    return TrainingState()


def restore(parts: LoopParts, checkpoint: Checkpoint) -> TrainingState:
    """Brings weights, optimizer, random numbers and files of the run to where a checkpoint was saved.

    Raises:
        RunError: the checkpoint is that of another model.
    """
    parts.step.load_state(checkpoint.folder)
    parts.folder.cut_lines(checkpoint.state.get("lines"))
    restore_generators(checkpoint.state.get("random"))
    get_logger().info("Going on after step %d of %d", checkpoint.step, parts.plan.total_steps)
    return checkpoint.training


def save(parts: LoopParts, state: TrainingState) -> None:
    """Writes a checkpoint, unless this step has one, and removes the ones that are neither among the newest nor the best."""
    if state.saved_at != state.step:
        state.saved_at = state.step

        def save_files(folder: Path) -> None:
            parts.save_weights(folder)
            parts.step.save_state(folder)

        fix = f"free disk space, and go on from the last checkpoint: {parts.folder.resume_command}"
        save_checkpoint(parts.folder.path, state.step, save_files, describe_state(parts, state), fix)
    rotate_checkpoints(parts.folder.path, parts.training.keep_checkpoints, state.best_step)


def describe_state(parts: LoopParts, state: TrainingState) -> dict[str, Any]:
    """Content of state.json: all that a later process needs beside the tensors."""
    epoch, taken = divmod(state.step, parts.batches.steps_per_epoch)
    return {
        "training": replace(state, earlier_s=state.elapsed_s).to_json(),
        "epoch": epoch,
        "position": taken * parts.batches.batch_size,  # in the epoch's permutation, which follows from seed and epoch
        "lines": parts.folder.measure_lines(),
        "made_with": parts.made_with,
        "random": capture_generators(),
    }
