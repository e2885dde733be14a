"""Files and folders that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from safetensors import SafetensorError

from utils.exceptions import RunError

# What a disk, and not the program, has against a write; ours or a library's.
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
DISK_FIX = "free disk space, or name another folder"
UNFINISHED = (".*.tmp-*", ".*.old-*")


def write_folder_atomically(
    folder: Path, write: Callable[[Path], None], *, replaces: bool = False, fix: str = DISK_FIX
) -> None:
    """Lets `write` fill a temporary folder, flushes it to disk and renames it: a kill leaves all of it or nothing.

    Args:
        replaces: an older folder of that name is renamed aside first and removed afterwards.
        fix: what to do where the disk is full or not writable.

    Raises:
        RunError: the folder exists already, or the disk is full or not writable.
    """
    if folder.exists() and not replaces:
        raise RunError("the folder exists already", where=str(folder), fix="name another one", code="exists")
    temporary = folder.with_name(f".{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with RustErrors():
            write(temporary)
        for path in (*temporary.rglob("*"), temporary):
            flush(path)
        older = rename_aside(folder) if replaces and folder.exists() else None
        temporary.rename(folder)
        flush(folder.parent)
        if older:
            shutil.rmtree(older)
    except (OSError, SafetensorError) as error:
        raise RunError(f"cannot be written: {error}", where=str(folder), fix=fix, code="disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a reader, a kill or a power cut never leaves half of it."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """fsync of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename_aside(folder: Path) -> Path:
    """Takes a folder out of sight in one step, so that a kill while it is removed leaves no half of it under its name."""
    aside = folder.with_name(f".{folder.name}.old-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left; only for whoever holds the run's lock, so that no other process is at work."""
    for pattern in UNFINISHED:
        for path in folder.glob(pattern):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def explain_disk_errors(folder: Path, fix: str) -> Iterator[None]:
    """Turns what a disk has against a write into an error with the file and a fix.

    Raises:
        RunError: the disk is full, read-only or over its quota, or the folder is not ours to write.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where, reason = str(error.filename or folder), error.strerror or str(error)
        raise RunError(f"cannot be read or written: {reason}", where=where, fix=fix, code="disk") from error


class RustErrors:
    """Turns a bare `Exception` of tokenizers, which holds the system's error as text, into the OSError that it is."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        found = re.search(r"\(os error (\d+)\)", str(error)) if kind is Exception else None
        if found:
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
