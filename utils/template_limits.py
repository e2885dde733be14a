"""How much time and memory a chat template may use, and the checks that see to it.

A chat template needs a millisecond and writes a few kilobytes. The limits are far above that, so they only ever meet a template
that is broken or hostile.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any

import jinja2

MAX_SECONDS = 2.0
SLOW = f"it runs for more than {MAX_SECONDS:.0f} seconds"
MAX_STOPS = 1  # a template that was stopped more often is not begun again: a thousand rows would be an hour
SUSPICIOUS_SECONDS = 0.02
MAX_OUTPUT = 1_000_000
OUTPUT_PER_INPUT = 16
MAX_CHARACTERS = 16 * 1024 * 1024
MAX_ITEMS = 200_000
MAX_NUMBER = 1_000_000
MAX_BITS = 4096
# Text methods and filters whose result is no longer than their inputs together.
SHORTENING = frozenset(
    {"startswith", "endswith", "strip", "lstrip", "rstrip", "removeprefix", "removesuffix", "trim", "split", "rsplit"}
    | {"splitlines", "partition", "rpartition", "find", "rfind", "index", "rindex", "count", "center", "ljust", "rjust"}
    | {"zfill", "default", "d", "truncate", "attr"}
)
MEMORY_HEADROOM = 2 * 1024**3


class TemplateLimitError(jinja2.TemplateError):
    """The template wants more time or memory than any chat template needs."""


class MemoryLimit:
    """Lets the process grow by MEMORY_HEADROOM and no more; does nothing where the system cannot."""

    def __init__(self) -> None:
        self.before: tuple[int, int] | None = None

    def set(self) -> None:
        """Sets the limit above what the process has now."""
        if self.before is not None or sys.platform != "linux":
            return
        import resource  # absent on Windows

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        if soft == resource.RLIM_INFINITY or soft > size + MEMORY_HEADROOM:
            self.before = soft, hard
            resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_HEADROOM, hard))

    def remove(self) -> None:
        """Restores what was before."""
        if self.before is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_AS, self.before)
            self.before = None


class Limits:
    """What one rendering has used so far."""

    def __init__(self) -> None:
        self.suspicious = self.deadline = float("inf")
        self.stops = 0
        self.written = 0
        self.allowed = MAX_OUTPUT
        self.given: Any = None
        self.memory = MemoryLimit()

    def start(self, given: Any) -> None:
        """Begins a rendering; `given` is what the template sees."""
        if self.stops > MAX_STOPS:
            raise TemplateLimitError(SLOW)
        now = time.monotonic()
        self.suspicious, self.deadline = now + SUSPICIOUS_SECONDS, now + MAX_SECONDS
        self.written = 0
        self.allowed = MAX_OUTPUT
        self.given = given

    def stop(self) -> None:
        """Ends a rendering."""
        self.suspicious = self.deadline = float("inf")
        self.given = None
        self.memory.remove()

    def check_output(self, length: int, times: int = 1) -> None:
        """Refuses output that is out of proportion to the input; the input is measured only when it matters."""
        if length > self.allowed * times and self.given is not None:
            self.allowed = max(MAX_OUTPUT, OUTPUT_PER_INPUT * measure(self.given)[1])
            self.given = None
        if length > self.allowed * times:
            raise TemplateLimitError(f"it writes more than {self.allowed:,} characters")

    def check_time(self) -> None:
        """Called at every loop iteration and call."""
        now = time.monotonic()
        if now > self.suspicious:
            self.memory.set()  # only here, because it costs as much as rendering a short conversation
            self.suspicious = float("inf")
        if now > self.deadline:
            self.stops += 1
            raise TemplateLimitError(SLOW)

    def tick(self, items: Iterable[Any]) -> Iterator[Any]:
        """Passes the items of a loop on and looks at the clock for each."""
        for item in items:
            self.check_time()
            yield item

    def check(self, value: Any) -> Any:
        """Passes a result on if it is not too large; large ones set the limit of the memory, lazy ones are looked at later."""
        if isinstance(value, Iterator):
            return self.watch(value)
        if isinstance(value, str) and len(value) > MAX_OUTPUT:
            self.memory.set()
        return check_size(value)

    def watch(self, items: Iterator[Any]) -> Iterator[Any]:
        """Passes the items of a lazy result on and counts what they add up to."""
        total = 0
        for item in self.tick(items):
            total += len(item) if isinstance(item, str) else 1
            if total > MAX_CHARACTERS:
                raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
            yield item

    def count_output(self, value: Any) -> Any:
        """Sees every value on its way into the text, also inside macros and `set` blocks."""
        if type(value) is not str:
            value = check_size(value) if isinstance(value, (list, tuple, dict)) else value
            value = str(value)
        self.written += len(value)
        if self.written > MAX_OUTPUT:
            self.check_output(self.written, times=4)  # text that goes through macros is counted once for each
        return value


def measure(value: Any) -> tuple[int, int]:
    """Items and characters of a value, shared parts counted as often as they are reached."""
    items = characters = 0
    stack = [value]
    while stack:
        value = stack.pop()
        items += 1
        if isinstance(value, str):
            characters += len(value)
        elif isinstance(value, Mapping):
            stack += value.keys()
            stack += value.values()
        elif isinstance(value, (list, tuple)):
            stack += value
        if items + len(stack) > 10 * MAX_ITEMS:
            raise TemplateLimitError(f"it makes a list of more than {MAX_ITEMS:,} items")
    return items, characters


def check_size(value: Any) -> Any:
    """Passes a value on unless it is larger than any chat template needs."""
    if isinstance(value, str):
        if len(value) > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
    elif isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateLimitError(f"it makes a number of more than {MAX_BITS:,} bits")
    elif isinstance(value, (list, tuple, dict)):
        items, characters = measure(value)
        if items > MAX_ITEMS or characters > MAX_CHARACTERS:
            raise TemplateLimitError(f"it makes a list of more than {MAX_ITEMS:,} items")
    return value


def check_arguments(arguments: Iterable[Any]) -> None:
    """Refuses numbers that ask for giant results, such as `center(10 ** 9)`."""
    for argument in arguments:
        if isinstance(argument, int) and abs(argument) > MAX_NUMBER:
            raise TemplateLimitError(f"it asks for {argument:,} of something")


def check_pattern(pattern: Any) -> None:
    """Refuses format strings with giant fields, such as `'%999999999d'`."""
    if isinstance(pattern, str) and re.search(r"\d{5}", pattern):
        raise TemplateLimitError("it asks for a giant field width")


def concatenate(parts: Sequence[Any]) -> str:
    """The `~` operator."""
    texts, total = [], 0
    for part in parts:
        text = str(check_size(part))
        total += len(text)
        texts.append(text)
        if total > MAX_CHARACTERS:
            check_size(" " * (MAX_CHARACTERS + 1))
    return "".join(texts)


def check_product(text: Any, name: str, arguments: Sequence[Any]) -> None:
    """Text methods and filters whose result can be a product of their inputs."""
    if not isinstance(text, str) or not arguments or name in SHORTENING:
        return
    first = arguments[0]
    if name == "replace" and len(arguments) >= 2 and isinstance(first, str) and isinstance(arguments[1], str):
        size = len(text) + text.count(first) * len(arguments[1])
    elif name == "join":
        size = len(text) * (len(first) if isinstance(first, Sized) else 1) + measure(first)[1]
    else:
        numbers = [argument for argument in arguments if isinstance(argument, int)]
        size = len(text) * max(1, measure(list(arguments))[1])
        size = max(size, len(text) * max(numbers, default=0)) if name in ("expandtabs", "indent") else size
    if size > MAX_CHARACTERS:
        raise TemplateLimitError(f"it makes a text of more than {MAX_CHARACTERS:,} characters")
