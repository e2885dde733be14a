"""Rows → files, one row at a time: JSONL, JSON, CSV and Parquet, gzipped or not. A file appears whole or not at all.

CSV and Parquet hold lists and objects as JSON text, which `utils/table_files.py` and the formats read back.
"""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

from utils.data_loading import SUFFIXES, find_kind
from utils.exceptions import RunError

ROWS_PER_BATCH = 1000
Kind = Literal["text", "integer", "number", "truth"]


def check_target(path: Path) -> str:
    """Refuses an output that exists, or whose kind cannot be written.

    Returns:
        The suffix that says how it is written.

    Raises:
        RunError: with what to name instead.
    """
    kind = find_kind(path)
    if kind is None:
        fix = f"end it in {', '.join(SUFFIXES)}, or in .gz behind one of them but .parquet"
        raise RunError(f"cannot write files that end in {path.suffix or 'nothing'}", where=str(path), fix=fix)
    if path.exists():
        raise RunError("exists already", where=str(path), fix="name another file, or remove it", code="exists")
    if not path.parent.is_dir():
        raise RunError("its folder does not exist", where=str(path), fix=f"mkdir -p {path.parent}", code="no-folder")
    return kind


def encode_cell(value: Any) -> str:
    """A value as the text of a cell; text stays as it is."""
    return value if isinstance(value, str) else encode_json(value)


def encode_json(value: Any) -> str:
    """JSON in one line, with characters rather than escapes."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, default=encode_date)


def encode_date(value: Any) -> str:
    """Dates of a Parquet file as ISO 8601 text."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    raise TypeError(f"a value of the type {type(value).__name__} cannot be written as JSON")


def name_kind(value: Any) -> Kind:
    """The type of Parquet column that holds a value."""
    if isinstance(value, bool):
        return "truth"
    return (
        "integer" if isinstance(value, int) and abs(value) < 2**63 else "number" if isinstance(value, float) else "text"
    )


class RowWriter:
    """Writes rows into a temporary file beside the target, which takes its name when all went well.

    Use it as a context manager.
    """

    def __init__(self, target: Path, columns: Mapping[str, Kind]) -> None:
        """Prepares to write.

        Args:
            target: file that does not exist yet; its suffix says how rows are written.
            columns: name → type of all columns that rows may have; only tables need them.
        """
        self.target, self.columns = target, columns
        self.kind = check_target(target)
        self.temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
        self.rows = 0
        self.text: TextIO | None = None
        self.table: Any = None
        self.batch: list[dict[str, Any]] = []

    def __enter__(self) -> RowWriter:
        try:
            if self.kind == ".parquet":
                self.table = open_parquet(self.temporary, self.columns)
            else:
                self.text = open_text(self.temporary, is_gzip=self.target.suffix.lower() == ".gz")
                if self.kind == ".csv":
                    csv.writer(self.text, lineterminator="\r\n").writerow(self.columns)
        except OSError as error:
            raise RunError(f"cannot be written: {error.strerror}", where=str(self.target)) from error
        return self

    def write(self, fields: dict[str, Any]) -> None:
        """Adds a row."""
        self.rows += 1
        if self.text is None:
            self.batch.append(fields)
            if len(self.batch) == ROWS_PER_BATCH:
                self._flush()
        elif self.kind == ".csv":
            cells = ["" if fields.get(name) is None else encode_cell(fields[name]) for name in self.columns]
            csv.writer(self.text, lineterminator="\r\n").writerow(cells)
        elif self.kind == ".json":
            self.text.write(("[\n" if self.rows == 1 else ",\n") + encode_json(fields))
        else:
            self.text.write(encode_json(fields) + "\n")

    def _flush(self) -> None:
        """Writes the gathered rows as one Parquet row group."""
        import pyarrow

        arrays = []
        for name, kind in self.columns.items():
            values = [row.get(name) for row in self.batch]
            if kind == "text":
                values = [None if value is None else encode_cell(value) for value in values]
            arrays.append(pyarrow.array(values, type=find_arrow_type(kind)))
        self.table.write_table(pyarrow.table(dict(zip(self.columns, arrays, strict=True))))
        self.batch = []

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.kind == ".json" and self.text is not None:
                self.text.write("\n]\n" if self.rows else "[]\n")
            if error is None and self.batch:
                self._flush()
            (self.text or self.table).close()
            if error is None:
                self.temporary.replace(self.target)
        except OSError as failure:
            raise RunError(f"cannot be written: {failure.strerror}", where=str(self.target)) from failure
        finally:
            self.temporary.unlink(missing_ok=True)


def open_text(path: Path, *, is_gzip: bool) -> TextIO:
    """Opens a text file for writing; gzip without name and time, so that equal rows give equal bytes."""
    if not is_gzip:
        return path.open("w", encoding="utf-8", newline="")
    return io.TextIOWrapper(OwningGzip(path), encoding="utf-8", newline="")


class OwningGzip(gzip.GzipFile):
    """A gzip file that closes the file below it too."""

    def __init__(self, path: Path) -> None:
        """Opens the file for writing."""
        self.below = path.open("wb")
        super().__init__(filename="", fileobj=self.below, mode="wb", mtime=0)

    def close(self) -> None:
        """Ends the stream, and closes the file."""
        super().close()
        self.below.close()


def open_parquet(path: Path, columns: Mapping[str, Kind]) -> Any:
    """A Parquet file for writing."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema({name: find_arrow_type(kind) for name, kind in columns.items()})
    return parquet.ParquetWriter(str(path), schema, compression="zstd")


def find_arrow_type(kind: Kind) -> Any:
    """Arrow's name for a type of column."""
    import pyarrow

    types = {"integer": pyarrow.int64, "number": pyarrow.float64, "truth": pyarrow.bool_, "text": pyarrow.string}
    return types[kind]()
