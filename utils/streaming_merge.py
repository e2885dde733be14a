"""Writes a planned merge: one read and one write of the weights, a few megabytes in memory, float32 arithmetic.

The base's rows are read block by block, changed in buffers that stay in the processor's cache, rounded once to the stored
format and written at their place. What does not change is copied inside the kernel. numpy releases the interpreter's lock, so
that several workers compute at the same time.
"""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from utils.adapter_changes import Change, LowRank, Replacement, TokenRows
from utils.exceptions import AdapterError
from utils.merge_plan import MergePlan, PlannedFile, PlannedTensor
from utils.model_headers import INDEX_NAME
from utils.tensor_files import (
    ITEM_BYTES,
    Bytes,
    Floats,
    announce_read,
    copy_bytes,
    decode,
    encode,
    is_finite,
    read_exactly,
    read_floats,
    write_exactly,
)

BLOCK = 1 << 18  # numbers that a worker has in its buffers at a time: 1 MB of float32
SPAN = 1 << 22  # numbers of one task
WORKERS = max(2, min(8, os.cpu_count() or 2))
WAITING = 4 * WORKERS  # tasks ahead of the oldest one that is not done: each holds the factors of its tensor


class Workspace(threading.local):
    """Buffers of one thread, made once: fresh ones would be handed back to the system after each block."""

    def __init__(self) -> None:
        self.resize(BLOCK)

    def resize(self, numbers: int) -> None:
        """Makes room for a row that is longer than a block."""
        self.values, self.product = np.empty(numbers, np.float32), np.empty(numbers, np.float32)
        self.raw: Bytes = np.empty(4 * numbers, np.uint8)


@dataclass(frozen=True)
class Factors:
    """A change with its small tensors in memory.

    Attributes:
        left: (experts, rows of a matrix, rank), scaled.
        right: (experts, rank, columns).
        row_lengths: DoRA's magnitude, one for each row; None without it, and where columns are outputs.
        column_factors: magnitude over length for each column of a transposed matrix.
    """

    left: Floats
    right: Floats
    row_lengths: Floats | None = None
    column_factors: Floats | None = None


Prepared = Factors | Replacement | TokenRows
WORKSPACE = Workspace()


def write_plan(plan: MergePlan, folder: Path) -> Iterator[int]:
    """Writes all weight files and the index into an existing folder, and yields how many more bytes have been written.

    Raises:
        OSError: a disk is full or a file ends too early.
        AdapterError: a sum is not finite.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        for file in plan.files:
            yield from write_file(file, folder / file.name, pool)
    if plan.index is not None:
        (folder / INDEX_NAME).write_text(json.dumps(plan.index, indent=2) + "\n", encoding="utf-8")


def write_file(file: PlannedFile, path: Path, pool: ThreadPoolExecutor) -> Iterator[int]:
    """Writes one file; tensors are computed side by side, and the first failure ends all of them."""
    source = os.open(file.source.path, os.O_RDONLY)
    target = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    waiting: deque[Future[int]] = deque()
    try:
        os.ftruncate(target, file.size)
        write_exactly(target, np.frombuffer(file.header, np.uint8), 0)
        for task in list_tasks(file, source, target):
            waiting.append(pool.submit(task))
            if len(waiting) > WAITING:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
        wait(waiting)  # none may write into a file that is closed
        os.close(source)
        os.close(target)


def list_tasks(file: PlannedFile, source: int, target: int) -> Iterator[Callable[[], int]]:
    """Yields work that writes some bytes and returns their number; unchanged neighbours are one piece."""
    begin = end = target_begin = 0
    for tensor in (*file.tensors, None):
        if tensor is not None and tensor.is_copy and tensor.source and tensor.source.offset == end and end > begin:
            end += tensor.size
            continue
        if end > begin:
            yield from split_copy(source, target, (begin, end), target_begin)
            begin = end = 0
        if tensor is None:
            return
        if tensor.is_copy and tensor.source:
            begin, end, target_begin = tensor.source.offset, tensor.source.offset + tensor.size, tensor.offset
            continue
        yield from split_tensor(tensor, source, target)


def split_copy(source: int, target: int, span: tuple[int, int], target_begin: int) -> Iterator[Callable[[], int]]:
    """Copies of parts of a span of bytes."""
    size = 16 * SPAN
    for begin in range(span[0], span[1], size):

        def copy(begin: int = begin, count: int = min(size, span[1] - begin)) -> int:
            copy_bytes(source, target, count, begin, target_begin + begin - span[0])
            return count

        yield copy


def split_tensor(tensor: PlannedTensor, source: int, target: int) -> Iterator[Callable[[], int]]:
    """Parts of the rows of a changed tensor."""
    prepared = prepare(tensor, source)
    rows, columns = tensor.stored.rows, tensor.stored.columns
    step = max(1, SPAN // max(columns, 1))
    for start in range(0, rows, step):
        if tensor.source:  # the disk works while the tasks before this one compute
            width = columns * ITEM_BYTES[tensor.source.dtype]
            announce_read(source, tensor.source.offset + start * width, step * width)

        def merge(start: int = start, stop: int = min(rows, start + step)) -> int:
            write_rows(tensor, prepared, (source, target), start, stop)
            return (stop - start) * columns * ITEM_BYTES[tensor.dtype]

        yield merge


def prepare(tensor: PlannedTensor, source: int) -> tuple[Prepared, ...]:
    """Reads the factors of a tensor's changes, one after the other: lengths of columns depend on the changes before."""
    prepared: tuple[Prepared, ...] = ()
    for change in tensor.changes:
        prepared = (*prepared, prepare_change(tensor, change, prepared, source))
    return prepared


def prepare_change(tensor: PlannedTensor, change: Change, before: tuple[Prepared, ...], source: int) -> Prepared:
    """Reads the factors of one change, and brings them into the orientation of the stored matrix."""
    if not isinstance(change, LowRank):
        return change
    a, b = read_floats(change.a), read_floats(change.b)
    rank = len(a) // change.experts
    a = a.reshape(change.experts, rank, -1)
    b = np.ascontiguousarray(b.reshape(len(b), rank, change.experts).transpose(2, 0, 1))
    b *= np.float32(change.scale)
    if change.transposed:
        a, b = np.ascontiguousarray(b.transpose(0, 2, 1)), np.ascontiguousarray(a.transpose(0, 2, 1))
    plain = Factors(b, a)
    if change.magnitude is None:
        return plain
    magnitude = read_floats(change.magnitude).reshape(-1)
    if not change.transposed:
        return Factors(b, a, row_lengths=magnitude)
    squares = np.zeros(tensor.stored.columns)
    for _, values in iterate_blocks(tensor, (*before, plain), source, 0, tensor.stored.rows):
        squares += np.square(values, dtype=np.float64).sum(axis=0)
    return Factors(b, a, column_factors=(magnitude / np.sqrt(squares)).astype(np.float32))


def write_rows(
    tensor: PlannedTensor, prepared: tuple[Prepared, ...], files: tuple[int, int], start: int, stop: int
) -> None:
    """Computes rows of a tensor and writes them at their place.

    Args:
        files: descriptors of the base's file and of the new one.

    Raises:
        AdapterError: a result is not finite.
    """
    space, width = WORKSPACE, tensor.stored.columns * ITEM_BYTES[tensor.dtype]
    for first, values in iterate_blocks(tensor, prepared, files[0], start, stop):
        raw = space.raw[: values.size * ITEM_BYTES[tensor.dtype]]
        encode(values.reshape(-1), tensor.dtype, raw, space.product[: values.size])
        if not is_finite(raw, tensor.dtype):
            message = f"{tensor.name} would hold numbers that are not finite"
            raise AdapterError(message, where="merge", fix="train again, or look at the adapter", code="not-finite")
        write_exactly(files[1], raw, tensor.offset + first * width)


def iterate_blocks(
    tensor: PlannedTensor, prepared: tuple[Prepared, ...], source: int, start: int, stop: int
) -> Iterator[tuple[int, Floats]]:
    """Yields (first row, changed rows) of a tensor; the array is the thread's buffer, valid until the next one."""
    space, columns = WORKSPACE, max(1, tensor.stored.columns)
    if columns > len(space.values):
        space.resize(columns)
    matrix = tensor.shape[-2] if len(tensor.shape) == 3 else tensor.stored.rows  # rows of one expert
    step = max(1, len(space.values) // columns)
    first = start
    while first < stop:
        count = min(step, stop - first, matrix - first % matrix)
        values = space.values[: count * columns].reshape(count, columns)
        read_rows(tensor, source, first, values)
        for change in prepared:
            apply_change(change, values, first, matrix)
        yield first, values
        first += count


def read_rows(tensor: PlannedTensor, source: int, first: int, values: Floats) -> None:
    """Rows of the base as float32; those that it does not have are zero until a change fills them."""
    count, columns = values.shape
    stored = tensor.source
    known = max(0, min(first + count, stored.rows) - first) if stored else 0
    values[known:] = 0.0
    if known == 0 or stored is None or (tensor.changes and isinstance(tensor.changes[-1], Replacement)):
        return
    item = ITEM_BYTES[stored.dtype]
    raw = WORKSPACE.raw[: known * columns * item]
    read_exactly(source, raw, stored.offset + first * columns * item)
    decode(raw, stored.dtype, values[:known].reshape(-1))


def apply_change(change: Prepared, values: Floats, first: int, matrix: int) -> None:
    """Changes rows in place.

    Args:
        values: rows from `first` on, all of one matrix.
        matrix: rows of a matrix.
    """
    if isinstance(change, Replacement):
        values[:] = read_floats(change.tensor, first, first + len(values)).reshape(values.shape)
    elif isinstance(change, TokenRows):
        for place, index in enumerate(change.indices):
            if first <= index < first + len(values):
                values[index - first] = read_floats(change.tensor, place, place + 1)[0]
    else:
        expert, row = divmod(first, matrix)
        product = WORKSPACE.product[: values.size].reshape(values.shape)
        np.matmul(change.left[expert, row : row + len(values)], change.right[expert], out=product)
        np.add(values, product, out=values)
        if change.row_lengths is not None:
            lengths = np.sqrt(np.square(values, dtype=np.float64).sum(axis=1))
            values *= (change.row_lengths[first : first + len(values)] / lengths).astype(np.float32)[:, None]
        elif change.column_factors is not None:
            values *= change.column_factors
