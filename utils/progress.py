"""Progress of long work: a bar on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from utils.logging import get_logger

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Shows how far some work is, how fast it goes and when it will be done.

    Use it as a context manager; `advance` moves it and replaces its note.
    """

    def __init__(self, title: str, total: int, unit: str, done: int = 0) -> None:
        """Takes what an earlier process has done of the work; it counts for no speed."""
        self.title, self.total, self.unit = title, total, unit
        self.done = self.before = done
        self.started = self.last_line = time.monotonic()
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(self.unit)]
            times = [TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}")]
            self.bar = RichProgress(*columns, *times, console=Console(stderr=True), transient=True)
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, note="")
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()
        if error is None:
            seconds = time.monotonic() - self.started
            get_logger().info(
                "%s: %d %s in %s", self.title, self.done - self.before, self.unit, format_seconds(seconds)
            )

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.started

    def advance(self, count: int = 1, note: str = "") -> None:
        """Counts finished work; `note` shows what else is worth watching."""
        self.done += count
        if self.bar is not None:
            self.bar.update(self.task, advance=count, note=note)
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES and self.done < self.total:
            self.last_line = time.monotonic()
            left = (self.last_line - self.started) / (self.done - self.before) * (self.total - self.done)
            text = f"{self.title}: {self.done}/{self.total} {self.unit}, {format_seconds(left)} left"
            get_logger().info("%s", f"{text}, {note}" if note else text)


def format_seconds(seconds: float) -> str:
    """`42 s` or `3 min 05 s`."""
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"
