"""Text files as rows: each is one document."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from config.scratch_rules import TEXT_SUFFIX
from utils.data_loading import Row
from utils.exceptions import DataError, Problem
from utils.file_lines import read_utf8


def is_text_file(path: Path) -> bool:
    """True for a file that is one text without rows; the recipe's rules keep it for models that learn from a corpus."""
    return path.suffix.lower() == TEXT_SUFFIX and path.is_file()


def iterate_text(path: Path) -> Iterator[Row | Problem]:
    """Yields a text file as one row `{"text": …}`, its line ends as `\\n`.

    Raises:
        DataError: it cannot be read, is not UTF-8, or holds nothing but white space.
    """
    text = read_utf8(path).replace("\r\n", "\n")
    if not text.strip():
        raise DataError("holds no text", where=str(path), fix="put text into it, or leave it out", code="no-rows")
    yield Row({"text": text}, f"{path}:1")
