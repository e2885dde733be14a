"""Signals that end a run: the step is finished and saved, an evaluation is left for later, a second signal stops at once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Windows has no SIGUSR1.
NUMBERS = [signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGUSR1") if name in signal.Signals.__members__]


# Numbers of the signals that have raised `SignalExit`. Some libraries written in C replace it by an error of their own.
received: list[int] = []


class SignalExit(SystemExit):
    """A signal ends the process, with 128 plus its number; it passes every `finally`, so nothing half-written stays."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number
        received.append(number)


class Interrupted(KeyboardInterrupt):
    """A signal has arrived in work that can be done again later; no library takes it for an error that it may catch."""


class StopSignals:
    """Listens for signals while a run trains.

    Attributes:
        number: of the first signal, or None.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.may_interrupt = False
        self.previous: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    @property
    def name(self) -> str:
        """Of the first signal."""
        return "" if self.number is None else signal.Signals(self.number).name

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Handles the signals as long as it is open."""
        self.previous = {number: signal.signal(number, self.handle) for number in NUMBERS}
        try:
            yield
        finally:
            for number, handler in self.previous.items():
                signal.signal(number, handler)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remembers the first signal; a second one ends the process."""
        if self.number is not None:
            raise SignalExit(number)
        self.number = number
        # Written past all buffers: the signal may have come in the middle of a print, which cannot be entered twice.
        os.write(
            sys.__stderr__.fileno() if sys.__stderr__ else 2,
            f"\n{self.name}: saving; once more stops at once\n".encode(),
        )
        if self.may_interrupt:
            raise Interrupted

    @contextmanager
    def interrupt(self) -> Iterator[None]:
        """Inside, a signal raises `Interrupted` at once, also one that came before."""
        self.may_interrupt = True
        try:
            if self.number is not None:
                raise Interrupted
            yield
        finally:
            self.may_interrupt = False


def end_script(number: int, frame: FrameType | None) -> None:
    """Ends a script that has nothing to save."""
    raise SignalExit(number)
