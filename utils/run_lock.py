"""One process at a time trains in a run folder."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.exceptions import RunError
from utils.logging import get_logger

LOCK = ".lock"


@contextmanager
def hold_run(run: Path) -> Iterator[None]:
    """Keeps other processes out of a run folder as long as it is open, or until this process ends, however it ends.

    Raises:
        RunError: another process is at work there, or the folder is not ours to write.
    """
    try:
        descriptor = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        message, fix = f"the run folder cannot be written: {error.strerror}", "make it writable, or copy it elsewhere"
        raise RunError(message, where=str(run), fix=fix, code="disk") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.pread(descriptor, 20, 0).decode(errors="replace").strip() or "unknown"
            message = f"process {owner} is training in this run folder"
            fix = "wait until it ends, or end it: it saves on SIGTERM"
            raise RunError(message, where=str(run), fix=fix, code="run-locked") from error
        except OSError as error:  # network file systems without locks
            get_logger().warning("%s cannot be locked (%s): start no second process on it", run, error.strerror)
        else:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)  # which gives the lock back; the file stays, for removing it would be a race
