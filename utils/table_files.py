"""Tables → rows: CSV and Parquet. A cell holds text, so lists of messages stand in it as JSON text."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from utils.data_loading import Row
from utils.exceptions import DataError, Problem
from utils.file_lines import LONGEST_LINE, iterate_lines, make_line_problem

# The first may be texts or lists of messages; the others are always lists.
MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected")
LIST_COLUMNS = ("messages", "conversations", "tools", "history")
# A CSV file has no types: these are the ways in which programs and spreadsheets write the truth of a label.
LABELS = {**dict.fromkeys(("true", "True", "TRUE"), True), **dict.fromkeys(("false", "False", "FALSE"), False)}
ROWS_PER_BATCH = 1024


def iterate_csv(path: Path) -> Iterator[Row | Problem]:
    """Yields the rows below the header, with the line on which each starts; an empty cell counts as absent."""
    bad_lines: list[Problem] = []

    def decode_lines() -> Iterator[str]:
        for number, line in iterate_lines(path):
            try:
                text = "" if line is None else line.decode()
            except UnicodeDecodeError:
                text = line.decode(errors="replace") if line else ""
                bad_lines.append(make_line_problem(f"{path}:{number}", is_long=False))
            if line is None:
                bad_lines.append(make_line_problem(f"{path}:{number}", is_long=True))
            yield f"{text}\n"

    csv.field_size_limit(LONGEST_LINE)
    reader = csv.reader(decode_lines(), strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise DataError(f"not CSV: {error}", where=f"{path}:{number}", code="not-csv") from error
            fix = "put cells with commas, quotes or line breaks into quotes, and double the quotes inside them"
            yield Problem("not-csv", f"not CSV: {error}", f"{path}:{number}", fix)
            continue
        if bad_lines:
            yield from bad_lines
            bad_lines.clear()
        elif cells is None:
            return
        elif header is None and any(cells):
            header = check_header(cells, f"{path}:{number}")
        elif header is not None and cells:
            yield make_csv_row(header, cells, f"{path}:{number}")


def check_header(cells: list[str], where: str) -> list[str]:
    """The names of the columns, each there once."""
    if len(cells) == 1 and (";" in cells[0] or "\t" in cells[0]):
        fix = "save it with commas between the columns"
        raise DataError("the columns are not separated by commas", where=where, fix=fix, code="not-csv")
    return check_names([cell.strip() for cell in cells], where)


def check_names(names: list[str], where: str) -> list[str]:
    """Refuses a name that two columns have: the later one would win in silence."""
    if twice := [name for name in names if names.count(name) > 1]:
        fix = "give each column a name of its own"
        raise DataError(f"two columns are called {twice[0]!r}", where=where, fix=fix, code="column-collision")
    return names


def make_csv_row(header: list[str], cells: list[str], where: str) -> Row | Problem:
    """A line as a row; the number of its cells must be that of the header."""
    if len(cells) != len(header):
        text = f"{len(cells)} cells under {len(header)} columns"
        return Problem("ragged-row", text, where, "put cells with commas into quotes")
    fields: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
    if "label" in fields:
        fields["label"] = LABELS.get(fields["label"], fields["label"])
    return make_table_row(fields, where)


def iterate_parquet(path: Path) -> Iterator[Row | Problem]:
    """Yields the rows, numbered from 1, a batch in memory at a time; a null counts as absent."""
    import pyarrow
    from pyarrow import parquet

    numbers = count(1)
    try:
        with parquet.ParquetFile(path) as file:
            check_names(list(file.schema_arrow.names), str(path))
            for batch in file.iter_batches(batch_size=ROWS_PER_BATCH):
                for fields, number in zip(batch.to_pylist(), numbers, strict=False):
                    yield make_table_row(fields, f"{path}:{number}")
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, KeyError) as error:
        text = f"cannot be read as Parquet: {' '.join(str(error).split())[:200]}"
        raise DataError(text, where=str(path), fix="write or download it anew", code="unreadable") from error


def make_table_row(fields: dict[str, Any], where: str) -> Row:
    """A row of a table: nulls are absent, and message lists that stand in it as JSON text become lists."""
    present = drop_nulls(fields)
    for name in MESSAGE_COLUMNS:
        if isinstance(present.get(name), str) and present[name].startswith("["):
            present[name] = parse_messages(present[name])
    for name in LIST_COLUMNS:
        if isinstance(present.get(name), str) and present[name].startswith(("[", "{")):
            present[name] = parse_json(present[name])
    return Row(present, where)


def drop_nulls(value: Any) -> Any:
    """Without the keys that Arrow adds: all structs of a column have the same ones, null where a row has none."""
    if isinstance(value, dict):
        return {key: drop_nulls(inner) for key, inner in value.items() if inner is not None}
    return [drop_nulls(inner) for inner in value] if isinstance(value, list) else value


def parse_messages(text: str) -> Any:
    """The list of messages that a text spells, or the text itself: a prompt may begin with a bracket."""
    value = parse_json(text)
    is_messages = isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value)
    return value if is_messages else text


def parse_json(text: str) -> Any:
    """What a text says as JSON, or the text itself: the format complains where it needs a list."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
