"""Files → rows. A row is a plain dictionary that remembers its `file:line`."""

from __future__ import annotations

import difflib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.exceptions import DataError, Problem

SHOWN_PROBLEMS = 5
SUFFIXES = (".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        fields: the row as written, columns already renamed.
        where: `file:line`.
    """

    fields: dict[str, Any]
    where: str


def load_rows(paths: str | Sequence[str], columns: Mapping[str, str] | None = None) -> list[Row]:
    """Reads every row of one or several JSON or JSONL files, in order.

    Args:
        paths: file, or list of files.
        columns: old name → new name.

    Raises:
        DataError: a file is missing, unreadable or empty, or rows are not JSON objects; all bad rows are counted.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for path in [paths] if isinstance(paths, str) else paths:
        found_rows, found_problems = read_file(Path(path))
        rows += found_rows
        problems += found_problems
    raise_problems(problems)
    return rename_rows(rows, columns) if columns else rows


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one DataError that shows the first problems and counts the rest; does nothing when there are none."""
    if not problems:
        return
    shown = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > len(shown):
        shown.append(Problem("more", f"… and {len(problems) - len(shown)} more rows with problems"))
    raise DataError.from_problems(shown)


def read_file(path: Path) -> tuple[list[Row], list[Problem]]:
    """Reads one file completely; bad rows become problems, so that all of them can be reported at once."""
    text = read_data_text(path)
    if text.lstrip()[:1] == "[":
        return read_json_array(text, path)
    rows: list[Row] = []
    problems: list[Problem] = []
    # Not splitlines(): it also breaks at U+2028 and form feeds, which are legal inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            rows.append(make_row(json.loads(line), where))
        except (ValueError, RecursionError) as error:
            fix = "each line must be one JSON object"
            problems.append(Problem("not-json", f"not JSON: {describe_json_error(error)}", where, fix))
        except DataError as error:
            problems += error.problems
    if not rows and not problems:
        raise DataError("holds no rows", where=str(path), fix="write one JSON object per line", code="no-rows")
    return rows, problems


def read_data_text(path: Path) -> str:
    """Reads a data file as UTF-8 text."""
    if not path.exists():
        raise DataError("no such data file", where=str(path), fix=suggest_path(path), code="no-file")
    if not path.is_file():
        raise DataError("is a folder, not a file", where=str(path), fix="name a .jsonl file in it", code="no-file")
    if path.suffix not in SUFFIXES:
        fix = f"convert it to JSONL; read here: {', '.join(SUFFIXES)}"
        raise DataError(f"files that end in {path.suffix or 'nothing'} cannot be read", where=str(path), fix=fix)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=str(path), code="unreadable") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(
            "is not UTF-8 text", where=f"{path}:{line}", fix="save it as UTF-8", code="unreadable"
        ) from error


def read_text_lines(path: Path) -> list[str]:
    """Non-empty lines of a UTF-8 text file."""
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix=suggest_path(path), code="no-file")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read as UTF-8 text: {error}", where=str(path), code="unreadable") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise DataError("holds no lines", where=str(path), fix="write one prompt a line", code="no-rows")
    return found


def suggest_path(path: Path) -> str:
    """Did-you-mean for a path: a file with a similar name in the nearest folder that exists."""
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either; paths are relative to {Path.cwd()}"
    names = [entry.name for entry in parent.iterdir() if entry.suffix in SUFFIXES]
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"data files there: {', '.join(sorted(names)[:8]) or 'none'}; paths are relative to {Path.cwd()}"


def read_json_array(text: str, path: Path) -> tuple[list[Row], list[Problem]]:
    """Reads a file that is one JSON array, keeping the line on which each element starts."""
    rows: list[Row] = []
    problems: list[Problem] = []
    decoder = json.JSONDecoder()
    position, line = text.index("[") + 1, 1
    counted = 0
    while True:
        while text[position : position + 1] and text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            if rest := text[position + 1 :].lstrip():
                line += text.count("\n", counted, len(text) - len(rest))
                problems.append(Problem("not-json", "something follows the end of the array", f"{path}:{line}"))
            break
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            problems.append(Problem("not-json", f"not JSON: {describe_json_error(error)}", f"{path}:{line}"))
            return rows, problems
        try:
            rows.append(make_row(value, f"{path}:{line}"))
        except DataError as error:
            problems += error.problems
    if not rows and not problems:
        raise DataError("holds no rows", where=str(path), fix="put objects into the array", code="no-rows")
    return rows, problems


def describe_json_error(error: Exception) -> str:
    """The decoder's complaint in one short line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


def make_row(value: Any, where: str) -> Row:
    """Wraps a decoded value, which must be a JSON object."""
    if not isinstance(value, dict):
        message = f"a row must be a JSON object, not {type(value).__name__}"
        raise DataError(message, where=where, fix='write {"messages": […]} or {"text": …}', code="not-object")
    return Row(value, where)


def rename_rows(rows: Sequence[Row], columns: Mapping[str, str]) -> list[Row]:
    """Applies `data.columns` to every row; a name that a row lacks is an error, for it is a typo more often than not.

    Raises:
        DataError: rows that lack a named column, or have one of the new name already.
    """
    renamed: list[Row] = []
    problems: list[Problem] = []
    for row in rows:
        fix = f"columns here: {', '.join(row.fields)}"
        missing = [name for name in columns if name not in row.fields]
        names = [columns.get(name, name) for name in row.fields]
        if missing:
            text = f"data.columns names {missing[0]!r}, which this row lacks"
            problems.append(Problem("missing-column", text, row.where, fix))
        elif len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            text = f"data.columns would put two columns into {twice!r}"
            problems.append(Problem("column-collision", text, row.where, fix))
        else:
            renamed.append(Row(dict(zip(names, row.fields.values(), strict=True)), row.where))
    raise_problems(problems)
    return renamed


def split_rows(rows: Sequence[Row], eval_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Holds out a seeded share of the rows: at least one, and never all of them.

    Returns:
        Training rows and held-out rows, each in file order.
    """
    if eval_fraction == 0 or len(rows) < 2:
        return list(rows), []
    count = min(max(1, round(len(rows) * eval_fraction)), len(rows) - 1)
    # random.sample's algorithm is stable across Python versions for a given seed, so a split can be repeated.
    held_out = set(random.Random(seed).sample(range(len(rows)), count))  # noqa: S311 - a split, not a secret
    return (
        [row for index, row in enumerate(rows) if index not in held_out],
        [row for index, row in enumerate(rows) if index in held_out],
    )


def iterate_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
