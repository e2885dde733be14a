"""How many cores this process may run on, and how many threads and workers share them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from utils.exceptions import MachineError

MAX_THREADS = 1024
MAX_WORKERS = 8  # micro-batches of a step are seldom more


def count_cores() -> int:
    """CPU cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def count_workers() -> int:
    """Micro-batches that run side by side on the CPU, one single-threaded worker for each core."""
    return max(1, min(count_cores(), MAX_WORKERS))


def read_asked_threads() -> int | None:
    """TUNEBOOK_THREADS; None where it is not set.

    Raises:
        MachineError: it is no number of threads.
    """
    asked = os.environ.get("TUNEBOOK_THREADS")
    if not asked:
        return None
    if not asked.isdecimal() or not 1 <= int(asked) <= MAX_THREADS:
        fix = f"set a number from 1 to {MAX_THREADS}, or nothing"
        raise MachineError(f"{asked!r} is no number of threads", where="TUNEBOOK_THREADS", fix=fix, code="environment")
    return int(asked)


@contextmanager
def keep_threads(threads: int | None) -> Iterator[None]:
    """Loads a model with as many threads as a run had: how many are quickest is measured anew in each process.

    Sums over large tensors are cut among the threads, so another number of them changes the last bits.

    Args:
        threads: `threads` of run.json; None, in runs of older versions, measures.
    """
    if threads is None or "TUNEBOOK_THREADS" in os.environ:
        yield
        return
    os.environ["TUNEBOOK_THREADS"] = str(threads)
    try:
        yield
    finally:
        del os.environ["TUNEBOOK_THREADS"]
