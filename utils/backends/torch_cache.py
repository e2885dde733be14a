"""The key/value cache of rows that are answered together: one slot for each, written in place.

transformers' own cache is made anew at every token, and its rows end together. Here a row lies in its slot from column 0 on,
so that columns are positions; a row that ends is overwritten by the next one, and nothing else moves. What all rows begin with,
such as a system turn or worked examples, is kept once, in no slot. The cache stands behind transformers' `Cache` interface, so
that each architecture's own forward pass fills it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 1.5  # a cache that is too short gets half of its length more: answers seldom use all that they may


@dataclass
class Window:
    """What the next forward pass reads and writes. Columns count from a row's first token on, what all begin with included.

    Attributes:
        slot: first slot of the rows.
        start: columns that are filled already.
        width: columns that are seen, new ones included.
        capacity: columns that every slot of every layer holds.
        shared: columns of what all rows begin with, which are in no slot.
        is_sharing: whether the pass reads these.
        apart: whether the attention adds these when answering; otherwise they come before the columns of every row.
        positions: when answering, the column of each row's one new token, int64, shape (rows,); None for prompts.
        rows: 0, 1, … beside `positions`.
    """

    slot: int = 0
    start: int = 0
    width: int = 0
    capacity: int = 0
    shared: int = 0
    is_sharing: bool = False
    apart: bool = False
    positions: torch.Tensor | None = None
    rows: torch.Tensor | None = None


def lengthen(states: torch.Tensor, columns: int) -> torch.Tensor:
    """A copy with room for more columns behind."""
    longer = states.new_zeros(*states.shape[:2], columns, states.shape[3])
    longer[:, :, : states.shape[2]] = states
    return longer


@dataclass(repr=False, eq=False)
class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # transformers ships no types
    """Keys and values of one layer, shape (slots, heads, columns, head size); for the shared columns, with one slot for all."""

    slots: int
    window: Window
    shared: tuple[torch.Tensor, torch.Tensor] | None = None
    keys: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    values: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    is_initialized: bool = False
    is_sliding = False  # a sliding layer keeps all columns, too: the mask hides those behind its window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Takes heads, sizes, dtype and device from the first keys and values."""
        self.keys, self.values = (
            states.new_zeros(self.slots, states.shape[1], self.window.capacity, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *others: object, **named: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes new keys and values of shape (rows, heads, tokens, head size); returns all that the rows see."""
        window, rows = self.window, slice(self.window.slot, self.window.slot + len(key_states))
        if window.is_sharing:
            self.shared = key_states, value_states
            return self.shared
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.grow()
        width = window.width - window.shared
        if window.positions is None:
            self.keys[rows, :, :width], self.values[rows, :, :width] = key_states, value_states
            keys, values = key_states, value_states
        else:
            columns = window.positions - window.shared
            self.keys[window.rows, :, columns] = key_states[:, :, 0]
            self.values[window.rows, :, columns] = value_states[:, :, 0]
            keys, values = self.keys[rows, :, :width], self.values[rows, :, :width]
        if self.shared is None or window.apart:
            return keys, values
        first_keys, first_values = (states.expand(len(keys), -1, -1, -1) for states in self.shared)
        return torch.cat([first_keys, keys], dim=2), torch.cat([first_values, values], dim=2)

    def grow(self) -> None:
        """Copies into longer tensors if the cache's capacity has grown."""
        if self.keys.shape[2] < self.window.capacity:
            self.keys, self.values = (lengthen(states, self.window.capacity) for states in (self.keys, self.values))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that are seen, and the first of them."""
        return self.window.width, 0

    def get_seq_length(self) -> int:
        """Columns before the new ones."""
        return self.window.start

    def get_max_length(self) -> int:
        """-1: it grows."""
        return -1


class SlotCache(Cache):  # type: ignore[misc]  # transformers ships no types
    """Slots for the rows of one decoder, and what all rows begin with.

    Args:
        layers: of the model.
        slots: rows that it can hold.
        capacity: columns of a slot to begin with.
        longest: columns of a slot that a row can need.
    """

    def __init__(self, layers: int, slots: int, capacity: int, longest: int) -> None:
        self.window = Window(capacity=min(capacity, longest))
        self.longest = longest
        super().__init__(layers=[SlotLayer(slots, self.window) for _ in range(layers)])

    def read_shared(self, width: int) -> None:
        """The next pass reads what all rows begin with."""
        self.window.shared = self.window.width = width
        self.window.is_sharing = True

    def read_prompts(self, slot: int, width: int) -> None:
        """The next pass reads columns behind the shared ones, before `width`, of the prompts in the slots from `slot` on."""
        window = self.window
        window.slot, window.start, window.width, window.positions = slot, window.shared, width, None
        window.apart = False
        self.reserve()

    def read_tokens(self, positions: torch.Tensor, width: int, *, apart: bool) -> None:
        """The next pass reads one token of every row, at its own column.

        Args:
            positions: int64, shape (rows,).
            width: the largest of them + 1.
            apart: whether the attention adds the shared columns.
        """
        window = self.window
        window.apart = apart
        window.slot, window.start, window.width, window.positions = 0, width - 1, width, positions
        if window.rows is None or len(window.rows) != len(positions):
            window.rows = torch.arange(len(positions), device=positions.device)
        self.reserve()

    def reserve(self) -> None:
        """Makes the window fit."""
        window = self.window
        window.is_sharing = False
        columns = window.width - window.shared
        if columns > window.capacity:
            window.capacity = min(max(int(window.capacity * GROWTH), columns), self.longest)

    def move(self, source: int, target: int, columns: int) -> None:
        """Copies the first columns of a row into another slot."""
        columns -= self.window.shared
        for layer in self.layers:
            layer.keys[target, :, :columns] = layer.keys[source, :, :columns]
            layer.values[target, :, :columns] = layer.values[source, :, :columns]
