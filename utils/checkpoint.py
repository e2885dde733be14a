"""Checkpoints that are whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from utils.exceptions import RunError

STATE = "state.json"


def write_folder_atomically(folder: Path, write: Callable[[Path], None]) -> None:
    """Lets `write` fill a temporary folder, flushes it to disk and renames it: a kill leaves all of it or nothing.

    Raises:
        RunError: the folder exists already, or the disk is full or not writable.
    """
    if folder.exists():
        raise RunError("the folder exists already", where=str(folder), fix="name another one", code="exists")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                flush(path)
        temporary.rename(folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        message = f"cannot be written: {error}"
        raise RunError(
            message, where=str(folder), fix="free disk space, or name another folder", code="disk"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def flush(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(run: Path, step: int, save_weights: Callable[[Path], None], state: dict[str, Any]) -> Path:
    """Writes `checkpoints/step-N/` with the weights and what is known about them.

    Args:
        state: JSON values such as step, epoch and eval_loss.
    """

    def write(folder: Path) -> None:
        save_weights(folder)
        (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")

    folder = run / "checkpoints" / f"step-{step}"
    write_folder_atomically(folder, write)
    return folder


def rotate_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    folders = sorted((run / "checkpoints").glob("step-*"), key=lambda folder: int(folder.name.removeprefix("step-")))
    for folder in folders[:-keep]:
        if folder.name != f"step-{best_step}":
            shutil.rmtree(folder)
