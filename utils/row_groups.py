"""Which rows are copies of each other, and which of them are held out: arithmetic on arrays of 8-byte fingerprints."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, log
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers = npt.NDArray[np.uint64]

LARGEST_GROUP = 0.05  # share of the rows that one prompt may have where rows are held out by prompt


@dataclass(frozen=True)
class RowGroups:
    """Rows with the same fingerprint.

    Attributes:
        fingerprints: uint64, shape (rows,).
        copies: rows that repeat an earlier one.
    """

    fingerprints: Numbers
    copies: int

    @property
    def rows(self) -> int:
        """All rows."""
        return len(self.fingerprints)

    def measure_largest(self) -> int:
        """Rows of the largest group."""
        import numpy as np

        return int(np.unique(self.fingerprints, return_counts=True)[1].max()) if self.copies else min(1, self.rows)

    def find_firsts(self) -> Any:
        """Indices of the rows that repeat no earlier one, ascending."""
        import numpy as np

        if not self.copies:
            return np.arange(self.rows)
        return np.sort(np.unique(self.fingerprints, return_index=True)[1])

    def list_pairs(self, count: int) -> Iterator[tuple[int, int]]:
        """Yields (index of a copy, index of the first such row) for the first copies."""
        import numpy as np

        is_copy = np.ones(self.rows, dtype=np.bool_)
        is_copy[self.find_firsts()] = False
        for index in np.flatnonzero(is_copy)[:count].tolist():
            yield index, int(np.flatnonzero(self.fingerprints == self.fingerprints[index])[0])


@dataclass(frozen=True)
class SharedRows:
    """Rows of one set that also stand in another.

    Attributes:
        indices: of these rows in the first set, ascending.
    """

    indices: Any
    fingerprints: Numbers
    others: Numbers

    @property
    def count(self) -> int:
        """How many rows they are."""
        return len(self.indices)

    def list_pairs(self, count: int) -> Iterator[tuple[int, int]]:
        """Yields (index in the first set, index of the first such row in the other) for the first ones."""
        import numpy as np

        for index in self.indices[:count].tolist():
            yield index, int(np.flatnonzero(self.others == self.fingerprints[index])[0])


def view_fingerprints(content: bytearray) -> Numbers:
    """Fingerprints as numbers, without a copy."""
    import numpy as np

    return np.frombuffer(content, dtype="<u8")


def find_groups(content: bytearray) -> RowGroups:
    """Counts copies."""
    import numpy as np

    fingerprints = view_fingerprints(content)
    ordered = np.sort(fingerprints)
    return RowGroups(fingerprints, int((ordered[1:] == ordered[:-1]).sum()))


def find_shared(content: bytearray, other: bytearray) -> SharedRows:
    """Finds the rows of the first set that also stand in the other."""
    import numpy as np

    fingerprints, others = view_fingerprints(content), view_fingerprints(other)
    if not len(others):
        return SharedRows(np.zeros(0, dtype=np.int64), fingerprints, others)
    ordered = np.sort(others)
    places = np.minimum(np.searchsorted(ordered, fingerprints), len(ordered) - 1)
    return SharedRows(np.flatnonzero(ordered[places] == fingerprints), fingerprints, others)


def find_split_groups(prompts: bytearray, copies: RowGroups) -> RowGroups:
    """Rows that fall on the same side when some are held out: those with the same prompt, as one question with many answers.

    Where few prompts stand over most rows, a split by prompt would be far from the share that was asked for: then only
    copies stay together.

    Args:
        prompts: 8 bytes for each row.
        copies: what whole rows are equal.
    """
    groups = find_groups(prompts)
    if not groups.rows or groups.measure_largest() > max(1, groups.rows * LARGEST_GROUP):
        return copies
    return groups


def choose_held_out(groups: RowGroups, eval_fraction: float, seed: int) -> frozenset[int]:
    """Holds out a seeded share of the rows; copies of one row fall on the same side.

    `random.sample` gives the same rows on every machine and Python, so the split of an old run can be repeated.

    Returns:
        Indices of held-out rows: at least one row and never all, unless fewer than two rows differ.
    """
    import numpy as np

    firsts = groups.find_firsts()
    if eval_fraction == 0 or len(firsts) < 2:
        return frozenset()
    count = min(max(1, round(len(firsts) * eval_fraction)), len(firsts) - 1)
    chosen = firsts[np.frombuffer(sample_indices(len(firsts), count, seed), dtype=np.uint32)]
    if groups.copies:
        chosen = np.flatnonzero(np.isin(groups.fingerprints, groups.fingerprints[chosen]))
    return frozenset(chosen.tolist())


def sample_indices(size: int, count: int, seed: int) -> array[int]:
    """What `random.Random(seed).sample(range(size), count)` gives, in 4 bytes an index instead of 36.

    `random.sample` copies its population into a list, which for a million rows is more than all else that is kept of them.
    """
    generator = random.Random(seed)  # noqa: S311 - a split, not a secret
    pool_limit = 21 + (4 ** ceil(log(count * 3, 4)) if count > 5 else 0)
    if size > pool_limit:
        return array("I", generator.sample(range(size), count))
    pool = array("I", range(size))
    chosen = array("I")
    for drawn in range(count):
        place = generator.randrange(size - drawn)
        chosen.append(pool[place])
        pool[place] = pool[size - drawn - 1]
    return chosen
