"""Checkpoints: whole or absent, each with a manifest of its files, checked before it is used.

checkpoints/step-N/ holds the weights, `optimizer.safetensors`, `state.json` and `manifest.json`; `checkpoints/latest` holds
the name of the newest.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.atomic_files import rename_aside, write_folder_atomically, write_text_atomically
from utils.exceptions import ModelLoadingError, RunError
from utils.logging import get_logger
from utils.model_headers import read_json_object
from utils.model_source import hash_file
from utils.training_state import TrainingState

STATE, OPTIMIZER, MANIFEST = "state.json", "optimizer.safetensors", "manifest.json"
# What a run needs to go on, and what is no part of the model that it publishes.
NOT_PUBLISHED = (STATE, OPTIMIZER, MANIFEST)
LATEST = "latest"
BROKEN = ".broken"
NAME = re.compile(r"step-(\d+)")
MAX_JSON_BYTES = 50_000_000


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what was written.

    Attributes:
        training: how far the run was.
        state: content of state.json.
    """

    folder: Path
    training: TrainingState
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that it holds."""
        return self.training.step

    @property
    def best(self) -> Path | None:
        """Folder of the best weights so far, or None without an evaluation."""
        best = self.training.best_step
        return None if best is None else self.folder.with_name(f"step-{best}")


def save_checkpoint(
    run: Path, step: int, save_files: Callable[[Path], None], state: dict[str, Any], fix: str = "free disk space"
) -> Path:
    """Writes `checkpoints/step-N/` with its manifest, and then names it in `checkpoints/latest`.

    Args:
        save_files: writes weights and optimizer into a folder.
        state: JSON values.
        fix: what to do where the disk is full or not writable.

    Raises:
        RunError: the disk is full or not writable; the older checkpoints are as they were.
    """

    def write(folder: Path) -> None:
        save_files(folder)
        (folder / STATE).write_text(json.dumps(state, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        write_manifest(folder)

    folder = run / "checkpoints" / f"step-{step}"
    write_folder_atomically(folder, write, replaces=True, fix=fix)
    write_text_atomically(folder.parent / LATEST, f"{folder.name}\n")
    return folder


def write_manifest(folder: Path) -> None:
    """Writes down size and SHA-256 of every file of a folder."""
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def find_damage(folder: Path) -> str | None:
    """Compares a checkpoint with its manifest.

    Returns:
        What is wrong with it, in words, or None.
    """
    try:
        files = read_json_object(folder / MANIFEST, MANIFEST, MAX_JSON_BYTES)["files"]
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (ModelLoadingError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is missing or damaged"
    for name in (STATE, OPTIMIZER):
        if name not in entries:
            return f"{MANIFEST} does not name {name}"
    for name, (size, sha256) in entries.items():
        path = folder / name
        try:
            if not path.is_file() or path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size:,} bytes instead of {size:,}"
            if hash_file(path) != sha256:
                return f"{name} is not what was written: its hash differs"
        except (OSError, ValueError) as error:
            return f"{name!r} cannot be read: {error}"
    return None


def read_checkpoint(folder: Path, made_with: dict[str, Any]) -> Checkpoint | str:
    """Checks a checkpoint and reads its state.

    Args:
        made_with: hashes that the run has, and so must its checkpoints.

    Returns:
        The checkpoint, or what is wrong with it, in words.
    """
    if folder.is_symlink():
        return "it is a link"
    if damage := find_damage(folder):
        return damage
    try:
        state = read_json_object(folder / STATE, STATE, MAX_JSON_BYTES)
        training = TrainingState.from_json(state.get("training"))
    except ModelLoadingError:
        return f"{STATE} is damaged"
    except ValueError as error:
        return f"{STATE} is damaged: {error}"
    own = state.get("made_with")
    if not isinstance(own, dict) or any(own.get(key) != value for key, value in made_with.items()):
        return "it belongs to another run"
    if folder.name != f"step-{training.step}":
        return f"{STATE} is that of step {training.step}"
    return Checkpoint(folder, training, state)


def find_checkpoint(run: Path, made_with: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint that is whole, and whose best one is; broken ones are set aside with a warning.

    Where the best weights of every checkpoint are lost, the newest whole one is taken, and the best is looked for anew.

    Returns:
        None for a run that has not saved one yet.

    Raises:
        RunError: there are some, and none is whole.
    """
    examined: dict[Path, Checkpoint | None] = {}

    def examine(folder: Path) -> Checkpoint | None:
        if folder not in examined:
            found = read_checkpoint(folder, made_with)
            examined[folder] = found if isinstance(found, Checkpoint) else None
            if isinstance(found, str):
                set_aside(folder, found)
        return examined[folder]

    folders = list_checkpoints(run)
    for folder in reversed(folders):
        found = examine(folder)
        if found is not None and (found.best is None or examine(found.best)):
            for newer in folders[folders.index(folder) + 1 :]:
                set_aside(newer, "the best weights that it names are lost")
            return found
    if whole := [found for folder in reversed(folders) if (found := examined[folder])]:
        message = "The best weights, of step %s, are lost: from step %d on the best are looked for anew"
        get_logger().warning(message, whole[0].training.best_step, whole[0].step)
        lost = replace(whole[0].training, best_step=None, best_loss=math.inf)
        return replace(whole[0], training=lost)
    if folders or any((run / "checkpoints").glob(f"step-*{BROKEN}*")):
        fix = "restore one of them from a copy, or train again"
        raise RunError(
            "no checkpoint of this run is whole", where=str(run / "checkpoints"), fix=fix, code="no-checkpoint"
        )
    return None


def set_aside(folder: Path, damage: str) -> None:
    """Renames a broken checkpoint, so that nothing takes it for a whole one and nothing of it is lost."""
    if not folder.exists():
        return  # the best one, which somebody has removed
    target, number = folder.with_name(f"{folder.name}{BROKEN}"), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{folder.name}{BROKEN}-{number}")
    folder.rename(target)
    get_logger().warning("%s is broken: %s. It is set aside as %s", folder, damage, target.name)


def list_checkpoints(run: Path) -> list[Path]:
    """Folders of all checkpoints, whole or not, in the order of their steps."""
    found = [path for path in (run / "checkpoints").glob("step-*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("step-")))


def rotate_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Removes all but the newest `keep` checkpoints and the best one."""
    for folder in list_checkpoints(run)[:-keep]:
        if folder.name != f"step-{best_step}":
            shutil.rmtree(rename_aside(folder))
