"""Progress of downloads: a bar for each file on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any

from utils.logging import get_logger
from utils.progress import SECONDS_BETWEEN_LINES, format_seconds


class DownloadStopped(Exception):
    """Ends the download threads after an error or Ctrl-C; it never leaves them."""


class DownloadProgress:
    """Shows name, size, progress and speed of several files that arrive side by side.

    Args:
        title: what is downloaded.
        total: bytes of all files.
        done: bytes of these that an earlier attempt left.
    """

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.received = 0
        self.started = self.last_line = time.monotonic()
        self.lock = threading.Lock()
        self.stopped = False
        self.bars: Any = None

    def __enter__(self) -> DownloadProgress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
            from rich.progress import TransferSpeedColumn as SpeedColumn

            columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), SpeedColumn()]
            times = [TextColumn("left"), TimeRemainingColumn()]
            self.bars = Progress(*columns, *times, console=Console(stderr=True), transient=True)
            self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bars is not None:
            self.bars.stop()
        seconds = time.monotonic() - self.started
        what = "interrupted, the next attempt goes on here" if error else f"in {format_seconds(seconds)}"
        text = f"{self.title}: {format_bytes(self.done)} of {format_bytes(self.total)} {what}"
        get_logger().info("%s", f"{text} ({self.format_speed()})")

    def open_bar(self, name: str, total: int, done: int) -> FileBar:
        """A bar for one file, of which an earlier attempt left some bytes."""
        task = self.bars.add_task(name, total=total, completed=done) if self.bars is not None else None
        return FileBar(self, task)

    def stop(self) -> None:
        """Ends downloads at their next piece."""
        self.stopped = True

    def advance(self, task: Any, count: int) -> None:
        """Counts bytes that arrived; fewer than none when a server makes us begin again."""
        if self.stopped:
            raise DownloadStopped
        with self.lock:
            self.done += count
            self.received += max(count, 0)
            if self.bars is not None:
                self.bars.update(task, advance=count)
            elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES:
                self.last_line = time.monotonic()
                text = f"{self.title}: {format_bytes(self.done)} of {format_bytes(self.total)}, {self.format_speed()}"
                get_logger().info("%s", text)

    def format_speed(self) -> str:
        """Mean speed since the beginning."""
        return f"{format_bytes(int(self.received / max(time.monotonic() - self.started, 1e-3)))}/s"


class FileBar:
    """The part of one file."""

    def __init__(self, progress: DownloadProgress, task: Any) -> None:
        self.progress, self.task = progress, task

    def update(self, count: int) -> None:
        """Counts bytes."""
        self.progress.advance(self.task, count)


def format_bytes(count: int) -> str:
    """`512 bytes`, `35 kB`, `1.2 MB` or `3.09 GB`, in powers of 1000 as disks and networks count."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 1000 * size else f"{count / size:.0f} {unit}"
    return f"{count} bytes"
