"""Reads a written merge back and compares it with the plan, by its own arithmetic: float64, one row at a time.

Nothing of `streaming_merge` is used here, so that a fault in it shows. Rows of every changed tensor are recomputed from base
and adapter, bytes of every other tensor are compared with the base's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from utils.adapter_changes import Change, LowRank, Replacement
from utils.exceptions import AdapterError
from utils.merge_plan import MergePlan, PlannedTensor
from utils.tensor_files import StoredTensor, read_floats, read_tensor_file

ROWS = 8  # of every changed tensor
SAMPLES, SAMPLE_BYTES = 3, 4096  # of every other one
# Digits behind the first one of the mantissa, and the exponent of the smallest normal number.
PRECISION = {"BF16": (7, -126), "F16": (10, -14), "F32": (23, -126)}
Row = npt.NDArray[np.float64]


@dataclass(frozen=True)
class MergeCheck:
    """What was read back and found right.

    Attributes:
        changed: tensors whose rows were recomputed.
        rows: how many rows that were.
        copied: tensors whose bytes were compared with the base's.
        rounding: size of the rounding to the stored format over the size of the adapter's change, both as root mean square over
            the recomputed rows; 0 where nothing was added.
    """

    changed: int
    rows: int
    copied: int
    rounding: float

    def __str__(self) -> str:
        text = f"{self.rows:,} rows of {self.changed} changed tensors equal base + adapter within rounding"
        text += f", {self.copied} others equal the base's bytes where sampled" if self.copied else ""
        return text + (
            f"; rounding moves weights by {100 * self.rounding:.2g} % of the change" if self.rounding else ""
        )


def check_merge(plan: MergePlan, folder: Path) -> MergeCheck:
    """Compares the files in a folder with the plan that they were written from.

    Raises:
        AdapterError: a file is not what was planned; the tensor is named.
    """
    changed = rows = copied = 0
    noise = signal = 0.0
    for file in plan.files:
        written = read_tensor_file(folder / file.name)
        found = [(one.name, one.dtype, one.shape, one.offset) for one in written.tensors]
        if found != [(one.name, one.dtype, one.shape, one.offset) for one in file.tensors]:
            raise refuse(f"the header of {file.name} is not the planned one")
        if written.metadata != file.source.metadata:
            raise refuse(f"{file.name} lost its metadata")
        for tensor, stored in zip(file.tensors, written.tensors, strict=True):
            if tensor.is_copy and tensor.source:
                check_copy(tensor.source, stored)
                copied += 1
                continue
            for got, exact, start in check_rows(tensor, stored):
                noise += float(np.square(got - exact).sum())
                signal += float(np.square(exact - start).sum()) if tensor.changes else 0.0
                rows += 1
            changed += 1
    return MergeCheck(changed, rows, copied, (noise / signal) ** 0.5 if signal else 0.0)


def refuse(message: str) -> AdapterError:
    """The error for files that are not what was planned."""
    return AdapterError(f"the merge was not written as planned: {message}", fix="merge again", code="merge-check")


def check_copy(source: StoredTensor, written: StoredTensor) -> None:
    """Compares bytes at the beginning, in the middle and at the end of a tensor."""
    with source.path.open("rb") as expected, written.path.open("rb") as got:
        for part in range(SAMPLES):
            begin = max(0, source.size - SAMPLE_BYTES) * part // (SAMPLES - 1)
            expected.seek(source.offset + begin)
            got.seek(written.offset + begin)
            count = min(SAMPLE_BYTES, source.size)
            if expected.read(count) != got.read(count):
                raise refuse(f"{source.name} is not the base's")


def check_rows(tensor: PlannedTensor, written: StoredTensor) -> Iterator[tuple[Row, Row, Row]]:
    """Yields (written, expected, base's) of some rows of a changed tensor.

    Raises:
        AdapterError: a written number is further from the exact one than float32 arithmetic and one rounding explain.
    """
    calculations = [RowCalculation(tensor, place) for place in range(len(tensor.changes))]
    for row in np.unique(np.linspace(0, max(0, written.rows - 1), min(ROWS, written.rows)).astype(int)).tolist():
        start = read_base_row(tensor, row)
        exact, size = start, np.abs(start)
        for calculation in calculations:
            exact, size = calculation.apply(row, exact, size)
        got = read_row(written, row)
        allowed = compute_half_steps(exact, written.dtype) + size * 2.0**-22
        if wrong := int((~(np.abs(got - exact) <= allowed)).sum()):  # the negation also finds NaN
            raise refuse(f"{wrong} numbers in row {row} of {tensor.name} are not base + adapter")
        yield got, exact, start


def read_base_row(tensor: PlannedTensor, row: int) -> Row:
    """A row of the base; zeros where it has none."""
    source = tensor.source
    if source is None or row >= source.rows:
        return np.zeros(tensor.stored.columns)
    return read_row(source, row)


def read_row(tensor: StoredTensor, row: int) -> Row:
    """A stored row in float64."""
    values: Row = read_floats(tensor, row, row + 1)[0].astype(np.float64)
    return values


class RowCalculation:
    """One change of a tensor, a row at a time."""

    def __init__(self, tensor: PlannedTensor, place: int) -> None:
        """Reads the small tensors of change number `place`."""
        self.change: Change = tensor.changes[place]
        self.factor: Row | None = None
        if isinstance(self.change, LowRank):
            self.a = read_floats(self.change.a).astype(np.float64)
            self.matrix = tensor.shape[-2]
            if self.change.magnitude is not None:
                self.magnitude = read_floats(self.change.magnitude).reshape(-1).astype(np.float64)
            if self.change.transposed:
                self.b = read_floats(self.change.b).astype(np.float64)
                if self.change.magnitude is not None:
                    self.factor = self.magnitude / self.compute_column_lengths(tensor, place)

    def compute_column_lengths(self, tensor: PlannedTensor, place: int) -> Row:
        """Lengths of all columns of W + s·B·A, in a pass over the rows."""
        before = [RowCalculation(tensor, earlier) for earlier in range(place)]
        squares = np.zeros(tensor.stored.columns)
        for row in range(tensor.stored.rows):
            values = read_base_row(tensor, row)
            for calculation in before:
                values, _ = calculation.apply(row, values, values)
            squares += np.square(values + self.compute_delta(row)[0])
        return np.sqrt(squares)

    def compute_delta(self, row: int) -> tuple[Row, Row]:
        """A row of s·B·A, and the sum of the absolute values behind each of its numbers."""
        assert isinstance(self.change, LowRank)
        expert, inner = divmod(row, self.matrix)
        rank, scale = len(self.a) // self.change.experts, self.change.scale
        a = self.a[expert * rank : (expert + 1) * rank]
        places = expert + self.change.experts * np.arange(rank)  # experts vary fastest in B's columns
        if self.change.transposed:
            left, right = a[:, inner], self.b[:, places].T
        else:
            left, right = read_row(self.change.b, inner)[places], a
        return scale * (left @ right), abs(scale) * (np.abs(left) @ np.abs(right))

    def apply(self, row: int, values: Row, size: Row) -> tuple[Row, Row]:
        """The row after this change, and the size that float32 rounding is relative to."""
        if isinstance(self.change, Replacement):
            new = read_row(self.change.tensor, row)
            return new, np.abs(new)
        if not isinstance(self.change, LowRank):
            if row not in self.change.indices:
                return values, size
            place = self.change.indices.index(row)
            new = read_row(self.change.tensor, place)
            return new, np.abs(new)
        delta, terms = self.compute_delta(row)
        values, size = values + delta, size + terms
        if self.change.magnitude is None:
            return values, size
        factor = self.factor if self.factor is not None else self.magnitude[row] / np.linalg.norm(values)
        return values * factor, np.abs(size * factor)


def compute_half_steps(values: Row, dtype: str) -> Row:
    """Half the distance between neighbouring numbers of a format at these values: the most that rounding moves them."""
    digits, smallest = PRECISION[dtype]
    exponents = np.frexp(values)[1] - 1
    steps: Row = np.ldexp(0.5, np.maximum(exponents, smallest) - digits)
    return steps
