"""Files → rows, one at a time. A row is a plain dictionary that remembers its `file:line`.

Nothing but a JSON array is ever in memory as a whole, so a file may be larger than the machine's memory.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.exceptions import DataError, Problem
from utils.file_lines import iterate_chunks, iterate_lines, make_line_problem, read_utf8

SHOWN_PROBLEMS = 5
SUFFIXES = (".csv", ".json", ".jsonl", ".ndjson", ".parquet")


class Row(NamedTuple):
    """One row of a data file. A tuple, because it is made a hundred thousand times a second.

    Attributes:
        fields: the row as written, columns already renamed.
        where: `file:line`.
    """

    fields: dict[str, Any]
    where: str


def load_rows(paths: str | Sequence[str]) -> list[Row]:
    """Reads every row of one or several data files into memory, in order.

    Args:
        paths: file, or list of files.

    Raises:
        DataError: a file is missing, unreadable or empty, or holds bad rows; all of them are counted.
    """
    rows: list[Row] = []
    problems: list[Problem] = []
    for path in [paths] if isinstance(paths, str) else paths:
        for row in iterate_file(Path(path)):
            if isinstance(row, Row):
                rows.append(row)
            else:
                problems.append(row)
    raise_problems(problems)
    return rows


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raises one DataError that shows the first problems and counts the rest; does nothing when there are none."""
    if not problems:
        return
    shown = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > len(shown):
        shown.append(Problem("more", f"… and {len(problems) - len(shown)} more rows with problems"))
    raise DataError.from_problems(shown)


def iterate_file(path: Path) -> Iterator[Row | Problem]:
    """Yields the rows of one file in order; a bad row is yielded as a problem, so that all of them can be reported.

    Raises:
        DataError: no such file, a kind that is not read, or a file that breaks off, is damaged or holds no rows.
    """
    kind = check_file(path)
    if kind in (".csv", ".parquet"):
        # Behind the suffix, so that JSONL never loads a table reader.
        from utils.table_files import iterate_csv, iterate_parquet

        found = iterate_csv(path) if kind == ".csv" else iterate_parquet(path)
    elif starts_with_bracket(path):
        found = iterate_json_array(path)
    else:
        found = iterate_json_lines(path, is_json=kind == ".json")
    first = next(found, None)
    if first is None:
        fix = "put rows into it, or leave it out"
        raise DataError("holds no rows", where=str(path), fix=fix, code="no-rows")
    yield first
    yield from found


def check_file(path: Path) -> str:
    """Refuses what is no data file.

    Returns:
        The suffix that says how it is read, one of `SUFFIXES`.
    """
    if not path.exists():
        raise DataError("no such data file", where=str(path), fix=suggest_path(path), code="no-file")
    if path.is_dir():
        raise DataError("is a folder, not a file", where=str(path), fix=suggest_files(path), code="no-file")
    if not path.is_file():
        fix = "write the rows into a file first: they are read more than once"
        raise DataError("is a pipe or a device, not a file", where=str(path), fix=fix, code="no-file")
    kind = find_kind(path)
    if kind is None:
        fix = f"convert it to JSONL; read here: {', '.join(SUFFIXES)}, and .gz of all but .parquet"
        text = f"files that end in {path.suffix or 'nothing'} cannot be read"
        raise DataError(text, where=str(path), fix=fix, code="unknown-file")
    return kind


def find_kind(path: Path) -> str | None:
    """The suffix below `.gz`, in small letters; None when such files are not read."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = Path(path.stem).suffix.lower()
        return suffix if suffix in SUFFIXES and suffix != ".parquet" else None
    return suffix if suffix in SUFFIXES else None


def suggest_path(path: Path) -> str:
    """Did-you-mean for a path: a file with a similar name in the nearest folder that exists."""
    parent = path.parent
    if not parent.is_dir():
        return f"the folder {parent} does not exist either; paths are relative to {Path.cwd()}"
    names = list_data_files(parent)
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {parent / near[0]}?"
    return f"data files there: {', '.join(names[:8]) or 'none'}; paths are relative to {Path.cwd()}"


def suggest_files(folder: Path) -> str:
    """What to write instead of a folder: one of its files, or a glob."""
    names = list_data_files(folder)
    if not names:
        return "name a data file; there is none in this folder"
    return f"name one of {', '.join(names[:8])}; or {folder / ('*' + Path(names[0]).suffix)}"


def list_data_files(folder: Path) -> list[str]:
    """Names of the files in a folder that can be read as rows."""
    return sorted(entry.name for entry in folder.iterdir() if find_kind(entry))


def iterate_json_lines(path: Path, *, is_json: bool) -> Iterator[Row | Problem]:
    """Yields the rows of a file with one JSON object a line; blank lines are skipped but counted.

    Args:
        is_json: the file ends in `.json`, so that its first line may be the beginning of one large object.
    """
    decode = json.JSONDecoder().raw_decode
    name = str(path)
    for number, line in iterate_lines(path):
        if line is None:
            yield make_line_problem(f"{name}:{number}", is_long=True)
            continue
        line = line.strip(b" \t\r")
        if not line:
            continue
        try:
            text = line.decode()
            fields, end = decode(text)
            if end == len(text) and type(fields) is dict:
                yield Row(fields, f"{name}:{number}")
                is_json = False
                continue
            yield make_row(json.loads(text), f"{name}:{number}")  # not an object, or something follows it
        except UnicodeDecodeError:
            yield make_line_problem(f"{name}:{number}", is_long=False)
        except (ValueError, RecursionError) as error:
            if not text.strip():
                continue
            if is_json and isinstance(error, json.JSONDecodeError) and error.pos >= len(text) - 1:
                fix = "write an array [ … ] of objects, or one object a line"
                raise DataError("is one object over several lines", where=name, fix=fix, code="not-json") from error
            is_json = False
            fix = "each line must be one JSON object"
            yield Problem("not-json", f"not JSON: {describe_json_error(error)}", f"{name}:{number}", fix)


def starts_with_bracket(path: Path) -> bool:
    """True for a file that is one JSON array, whatever its suffix."""
    return next(iterate_chunks(path), b"").lstrip()[:1] == b"["


def iterate_json_array(path: Path) -> Iterator[Row | Problem]:
    """Yields the elements of a file that is one JSON array, with the line on which each starts; reads it whole."""
    text = read_utf8(path)
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
                yield Problem("not-json", "something follows the end of the array", f"{path}:{line}")
            return
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = error.lineno if isinstance(error, json.JSONDecodeError) else line
            yield Problem("not-json", f"not JSON: {describe_json_error(error)}", f"{path}:{line}")
            return
        yield make_row(value, f"{path}:{line}")


def describe_json_error(error: Exception) -> str:
    """The decoder's complaint in one short line."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number with too many digits"


def make_row(value: Any, where: str) -> Row | Problem:
    """Wraps a decoded value, which must be a JSON object."""
    if isinstance(value, dict):
        return Row(value, where)
    message = f"a row must be a JSON object, not {type(value).__name__}"
    return Problem("not-object", message, where, 'write {"messages": […]} or {"text": …}')


def rename_row(row: Row, columns: Mapping[str, str]) -> Row | Problem:
    """Applies `data.columns` to a row, which may lack a name as an empty cell is absent (`find_unknown_columns`)."""
    names = [columns.get(name, name) for name in row.fields]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        fix = f"columns here: {', '.join(row.fields)}"
        return Problem("column-collision", f"data.columns would put two columns into {twice!r}", row.where, fix)
    return Row(dict(zip(names, row.fields.values(), strict=True)), row.where)


def read_text_lines(path: Path) -> list[str]:
    """Non-empty lines of a UTF-8 text file."""
    if not path.is_file():
        raise DataError("no such file", where=str(path), fix=suggest_path(path), code="no-file")
    found = [line for line in read_utf8(path).replace("\r\n", "\n").split("\n") if line.strip()]
    if not found:
        raise DataError("holds no lines", where=str(path), fix="write one prompt a line", code="no-rows")
    return found


def iterate_batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Yields consecutive slices of at most `size` items."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
