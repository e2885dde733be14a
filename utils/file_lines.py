"""Bytes → lines: files plain or gzipped, a chunk in memory at a time, with what is wrong below the level of rows."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from utils.exceptions import DataError, Problem

CHUNK = 1 << 20  # bytes read at once
LONGEST_LINE = 64 << 20  # bytes; whatever is longer was meant to be several lines
# Text shrinks to a tenth, and repetitive rows to a fiftieth; a file that unpacks to more than this was made to fill a disk.
MOST_UNPACKED = 200  # times its own size
UNPACKED_BYTES = 64 << 20  # below, nobody counts
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
UTF_16_MARKS = (b"\xff\xfe", b"\xfe\xff")


def iterate_chunks(path: Path) -> Iterator[bytes]:
    """Yields the bytes of a file, unpacked if it is gzipped, without a byte order mark.

    Raises:
        DataError: the file cannot be read, is damaged, unpacks to a giant, or is UTF-16.
    """
    is_first, unpacked = True, 0
    try:
        limit = max(UNPACKED_BYTES, MOST_UNPACKED * path.stat().st_size)
        with open_bytes(path) as file:
            while chunk := file.read(CHUNK):
                unpacked += len(chunk)
                if unpacked > limit:
                    text = f"unpacks to more than {MOST_UNPACKED} times its size"
                    raise DataError(
                        text, where=str(path), fix="unpack it yourself, if it is what you want", code="bomb"
                    )
                if is_first and chunk.startswith(UTF_16_MARKS):
                    raise DataError("is UTF-16 text", where=str(path), fix="save it as UTF-8", code="unreadable")
                yield chunk.removeprefix(BYTE_ORDER_MARK) if is_first else chunk
                is_first = False
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fix = "download or compress it anew"
        raise DataError(f"is a damaged gzip file: {error}", where=str(path), fix=fix, code="unreadable") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), code="unreadable") from error


def open_bytes(path: Path) -> BinaryIO:
    """Opens a file for reading, gzipped or not."""
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else path.open("rb")


def iterate_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yields (number, line without its line feed); None stands for a line longer than `LONGEST_LINE`."""
    number, size = 1, 0
    pieces: list[bytes] = []
    for chunk in iterate_chunks(path):
        # Not splitlines(): it also breaks at U+2028 and form feeds, which are legal inside a JSON string.
        head, *lines = chunk.split(b"\n")
        size += len(head)
        pieces = [*pieces, head] if size <= LONGEST_LINE else []
        if not lines:
            continue
        yield number, b"".join(pieces) if size <= LONGEST_LINE else None
        tail = lines.pop()
        yield from enumerate(lines, start=number + 1)
        number += len(lines) + 1
        pieces, size = [tail], len(tail)
    if size:
        yield number, b"".join(pieces) if size <= LONGEST_LINE else None


def make_line_problem(where: str, *, is_long: bool) -> Problem:
    """What is wrong with a line before anyone looks at its meaning."""
    if is_long:
        text = f"a line of more than {LONGEST_LINE >> 20} MiB"
        return Problem("long-line", text, where, "write one row a line; split very long texts")
    return Problem("unreadable", "is not UTF-8 text", where, "save it as UTF-8")


def read_utf8(path: Path) -> str:
    """The whole text of a file."""
    content = b"".join(iterate_chunks(path))
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError.from_problems([make_line_problem(f"{path}:{line}", is_long=False)]) from error
