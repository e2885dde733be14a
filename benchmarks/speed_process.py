"""A process that is measured from outside: its time, its peak memory, its last words, and what others did meanwhile."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

LOOK_EVERY = 0.01  # seconds between two looks at a run


@dataclass(frozen=True)
class Attempt:
    """Where and how long a run may take place.

    Attributes:
        number: the round, from 0; in the first one Tunebook's cache of tokens is empty.
        folder: empty, for this run alone.
        cache: Tunebook's cache folder for this work.
        limit: seconds after which the run is ended.
    """

    number: int
    folder: Path
    cache: Path
    limit: float


@dataclass(frozen=True)
class Execution:
    """What is seen of a process from outside.

    Attributes:
        started: seconds since the epoch, before the process was made.
        peak_bytes: resident memory of the largest process; never less than what this one held when it made the other, because
            Linux counts from the fork on.
        foreign: share of the machine's processor time that others took.
        error: last words if it failed.
    """

    started: float
    peak_bytes: int
    foreign: float | None
    error: str | None


def execute(command: list[str], variables: dict[str, str], attempt: Attempt, look: Callable[[], None]) -> Execution:
    """Runs a command to its end, or to the end of its time.

    Args:
        variables: of the environment, besides our own.
        look: called every 10 ms meanwhile.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", **variables}
    environment.pop("PYTHONPATH", None)
    with (attempt.folder / "output.txt").open("w+", encoding="utf-8", errors="replace") as output:
        before, started = read_busy_seconds(), time.time()
        process = subprocess.Popen(
            command, cwd=attempt.folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            look()
            time.sleep(LOOK_EVERY)
            if time.time() - started > attempt.limit:
                os.kill(process.pid, signal.SIGKILL)  # Popen's own would take the process away from wait4
        look()
        seconds, after = time.time() - started, read_busy_seconds()
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has taken it away from Popen
        output.seek(0)
        error = find_last_words(output.read()) if process.returncode else None
    if process.returncode == -signal.SIGKILL and seconds > attempt.limit:
        error = f"not done after {attempt.limit:.0f} s"
    foreign = None
    if before is not None and after is not None:
        own = usage.ru_utime + usage.ru_stime
        foreign = max(0.0, after - before - own) / (seconds * (os.cpu_count() or 1))
    return Execution(started, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024), foreign, error)


def read_busy_seconds() -> float | None:
    """Seconds in which the machine's processors have worked since it started, all added up; None without /proc/stat."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, interrupts, soft, stolen = map(int, path.read_text(encoding="utf-8").split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def watch_lines(path: Path, ends: list[float]) -> Callable[[], None]:
    """A look that notes the time whenever a file has grown by a line."""
    position = 0

    def look() -> None:
        nonlocal position
        if not path.exists() or path.stat().st_size == position:
            return
        with path.open("rb") as file:
            file.seek(position)
            grown = file.read()
        complete = grown[: grown.rfind(b"\n") + 1]
        position += len(complete)
        ends.extend([time.time()] * complete.count(b"\n"))

    return look


@contextmanager
def hold_lock(path: Path | None) -> Iterator[None]:
    """Waits until no other benchmark on this machine holds the same lock."""
    if path is None:
        yield
        return
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_last_words(text: str) -> str:
    """The last line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no message"
