"""Tokenised examples on disk: Arrow files mapped into memory.

The files are in the format of the `datasets` library (`Dataset.from_file` reads them).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from utils.piece_encoder import EncodedExample

ROWS_PER_BATCH = 1000
NO_BRANCHES = (-1, -1)
SMALL_COLUMNS = ("where", "is_text", "source", "supervised", "chosen_start", "rejected_start")


@dataclass(frozen=True)
class TokenTable:
    """One record batch as numpy views of the mapped file.

    Attributes:
        input_ids: int32 ids of all examples behind each other, shape (tokens,).
        loss_mask: uint8 0/1, shape (tokens,).
        offsets: int64 where each example starts, shape (examples + 1,).
        columns: the small columns as lists: `where`, `is_text`, `source`, `supervised`, `chosen_start`, `rejected_start`.
    """

    input_ids: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    columns: Any


class EncodedSet(Sequence[EncodedExample]):
    """Encoded examples that stay on disk until they are asked for.

    Attributes:
        order: int64 index into the file for each position; examples of a mixture may stand in it twice, or not at all.
    """

    def __init__(self, tables: Sequence[TokenTable], order: npt.NDArray[np.int64] | None = None) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *(len(table.offsets) - 1 for table in tables)]).tolist()
        self.order = np.arange(self.starts[-1]) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> EncodedSet: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | EncodedSet:
        if isinstance(index, slice):
            return EncodedSet(self.tables, self.order[index])
        position = int(self.order[index])
        number = bisect.bisect_right(self.starts, position) - 1
        table, row = self.tables[number], position - self.starts[number]
        start, end = table.offsets[row], table.offsets[row + 1]
        chosen, rejected = (table.columns[name][row].as_py() for name in ("chosen_start", "rejected_start"))
        return EncodedExample(
            table.input_ids[start:end].astype(np.int64),
            table.loss_mask[start:end].astype(np.bool_),
            table.columns["where"][row].as_py(),
            is_text=bool(table.columns["is_text"][row].as_py()),
            branch_starts=None if chosen < 0 else (chosen, rejected),
        )

    def __iter__(self) -> Iterator[EncodedExample]:
        return (self[index] for index in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example, shape (examples,)."""
        return self._collect(lambda table: np.diff(table.offsets))

    @property
    def path_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of the longest conversation in each example, which `data.max_length` limits, shape (examples,)."""
        chosen, rejected = (self._read_numbers(name) for name in ("chosen_start", "rejected_start"))
        lengths = self.lengths
        return np.where(chosen < 0, lengths, chosen + np.maximum(rejected - chosen, lengths - rejected))

    @property
    def prompt_lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each example that are not learned; of a pair, those of its one prompt, shape (examples,)."""
        chosen = self._read_numbers("chosen_start")
        # The trunk of a pair is its prompt without the last token.
        return np.where(chosen < 0, self.lengths - self.supervised, chosen + 1)

    @property
    def supervised(self) -> npt.NDArray[np.int64]:
        """Learned tokens of each example, shape (examples,)."""
        return self._read_numbers("supervised")

    @property
    def largest_id(self) -> int:
        """Of all tokens in the file; -1 without any."""
        return max((int(table.input_ids.max(initial=-1)) for table in self.tables), default=-1)

    @property
    def sources(self) -> npt.NDArray[np.int64]:
        """Number of the source that each example came from, shape (examples,)."""
        return self._read_numbers("source")

    def _read_numbers(self, name: str) -> npt.NDArray[np.int64]:
        """A column of whole numbers."""
        return self._collect(lambda table: view_column(table.columns[name], "i4"))

    @property
    def answers(self) -> tuple[int, int]:
        """Chosen or desirable answers of its pairs, and rejected or undesirable ones."""
        chosen, rejected = (self._read_numbers(name) for name in ("chosen_start", "rejected_start"))
        is_pair = chosen >= 0
        return int((is_pair & (rejected > chosen)).sum()), int((is_pair & (self.lengths > rejected)).sum())

    def _collect(self, read: Callable[[TokenTable], Any]) -> npt.NDArray[np.int64]:
        """Joins a column of all tables and puts it into order."""
        parts = [np.asarray(read(table), dtype=np.int64) for table in self.tables]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])[self.order]


class TokenWriter:
    """Writes encoded examples into one Arrow stream, a record batch at a time.

    Use it as a context manager.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.schema = pa.schema(
            {
                "input_ids": pa.list_(pa.int32()),
                "loss_mask": pa.list_(pa.uint8()),
                "where": pa.string(),
                "is_text": pa.uint8(),
                "source": pa.int32(),
                "supervised": pa.int32(),
                "chosen_start": pa.int32(),
                "rejected_start": pa.int32(),
            }
        )
        self.file = pa.OSFile(str(path), "wb")
        self.stream = pa.ipc.new_stream(self.file, self.schema)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.stream.close()
        self.file.close()

    def write(self, examples: Sequence[EncodedExample], source: int) -> None:
        """Adds examples that came from the numbered source."""
        import pyarrow as pa

        if not examples:
            return
        starts = make_column(np.cumsum([0, *(len(example.input_ids) for example in examples)]), "i4")
        ids = make_column(np.concatenate([example.input_ids for example in examples]), "i4")
        mask = make_column(np.concatenate([example.loss_mask for example in examples]), "u1")
        columns = [
            pa.ListArray.from_arrays(starts, ids),
            pa.ListArray.from_arrays(starts, mask),
            make_text_column([example.where.encode() for example in examples]),
            make_column([example.is_text for example in examples], "u1"),
            make_column([source] * len(examples), "i4"),
            make_column([example.supervised_tokens for example in examples], "i4"),
            *(
                make_column([(example.branch_starts or NO_BRANCHES)[side] for example in examples], "i4")
                for side in (0, 1)
            ),
        ]
        self.stream.write_batch(pa.record_batch(columns, schema=self.schema))


def make_column(values: npt.NDArray[Any] | Sequence[int], kind: str) -> Any:
    """Numbers as an Arrow array without a copy; `pyarrow.array` would import pandas, a quarter of a second.

    Args:
        kind: numpy's name of a type, such as `i4`.
    """
    import pyarrow as pa

    numbers = np.asarray(values, dtype=kind)
    return pa.Array.from_buffers(pa.from_numpy_dtype(numbers.dtype), len(numbers), [None, pa.py_buffer(numbers)])


def make_text_column(values: Sequence[bytes]) -> Any:
    """UTF-8 texts as an Arrow array."""
    import pyarrow as pa

    ends = np.cumsum([0, *(len(value) for value in values)], dtype="i4")
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(values))]
    return pa.Array.from_buffers(pa.string(), len(values), buffers)


def read_tokens(path: Path) -> EncodedSet:
    """Maps an Arrow stream that TokenWriter wrote into memory; nothing is copied."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file, pa.ipc.open_stream(file) as reader:
        return EncodedSet([view_batch(batch) for batch in reader])


def view_batch(batch: Any) -> TokenTable:
    """numpy views of one record batch."""
    ids, mask = batch.column("input_ids"), batch.column("loss_mask")
    columns = {name: batch.column(name) for name in SMALL_COLUMNS}
    return TokenTable(
        view_column(ids.values, "i4"),
        view_column(mask.values, "u1"),
        view_column(ids.offsets, "i4").astype("i8"),
        columns,
    )


def view_column(array: Any, kind: str) -> npt.NDArray[Any]:
    """Numbers of an Arrow array without a copy; `to_numpy` would import pandas."""
    numbers = np.dtype(kind)
    return np.frombuffer(array.buffers()[1], numbers, count=len(array), offset=array.offset * numbers.itemsize)
