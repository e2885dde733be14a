"""Entries of the cache on disk: built once under a name that says all they depend on, published whole or not at all.

A folder appears in one step, so two processes may build the same one at once: the second finds it there and throws its own
away.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from utils.exceptions import MachineError
from utils.logging import get_logger
from utils.model_source import get_cache_folder

FACTS = "facts.json"
UNUSED_DAYS = 30


def find_cache_entry(key: str, kind: str = "tokens") -> Path:
    """Folder of the entry with this key, whether it exists or not."""
    return get_cache_folder() / kind / key


def open_or_build(
    key: str, names: Sequence[str], build: Callable[[Path], dict[str, Any]], kind: str = "tokens"
) -> tuple[Path, dict[str, Any]]:
    """Finds the folder of a key, or builds it.

    Args:
        key: names everything that the content depends on.
        names: files that the folder must hold.
        build: writes them into an empty folder and returns facts about them; what it raises leaves nothing behind.
        kind: folder of the cache that such entries are in.

    Returns:
        The folder and its facts.
    """
    target = find_cache_entry(key, kind)
    if (facts := read_facts(target, names)) is not None:
        os.utime(target)
        return target, facts
    remove_unused(target.parent)
    temporary = target.with_name(f".{key}.tmp-{uuid.uuid4().hex}")  # two containers may have the same process number
    try:
        temporary.mkdir(parents=True)
        facts = build(temporary)
        facts["bytes"] = {name: (temporary / name).stat().st_size for name in names}
        (temporary / FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        publish(temporary, target, names)
    except OSError as error:
        fix = "free some space, or set TUNEBOOK_CACHE to a folder elsewhere"
        message = f"the cache of {kind} cannot be written: {error.strerror or error}"
        raise MachineError(message, where=str(target.parent), fix=fix, code="disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target, facts


def publish(temporary: Path, target: Path, names: Sequence[str]) -> None:
    """Gives a finished folder its name; a whole one that another process put there meanwhile stays."""
    for _ in range(2):
        try:
            temporary.rename(target)
            return
        except OSError:
            if not target.is_dir():
                raise
        if read_facts(target, names) is not None:
            return
        shutil.rmtree(target, ignore_errors=True)  # damaged: a file is missing or has another size
    temporary.rename(target)


def read_facts(folder: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Facts of a whole entry; None where there is none, or one whose files are not what was written."""
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        sizes = facts["bytes"]
        whole = all((folder / name).stat().st_size == sizes[name] for name in names)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        get_logger().warning("%s is damaged and will be built anew", folder)
        return None
    return facts


def remove_unused(folder: Path) -> None:
    """Deletes entries that no run has opened for a month, and what killed processes left."""
    oldest = time.time() - UNUSED_DAYS * 86_400
    for entry in folder.iterdir() if folder.is_dir() else ():
        with suppress(FileNotFoundError):  # another process has renamed or removed it meanwhile
            if entry.stat().st_mtime < oldest:
                shutil.rmtree(entry, ignore_errors=True)
