"""Batches without padding: the tokens of all rows behind each other, and for each stretch of them what it may look at.

A forward pass over a flat batch computes no padding, and a beginning that all rows share (a system prompt) only one time, as
the two answers of a pair share their prompt. Attention is the one place where tokens meet, so it is told who sees whom
(`Span`); everything else in a transformer works on each token alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from utils.batching import Batch
from utils.piece_encoder import EncodedExample

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
# Sharing takes one more piece of attention for each row; below this many tokens it would cost more than it saves.
SHORTEST_SHARED = 8
# A pass of its own for what all rows of a step begin with costs about as much as computing so many tokens; below, it would cost
# more than it saves.
PASS_COST = 100
TRIED_ROWS = 1000  # of a set, spread over it, that are asked for what all rows begin with


@dataclass(frozen=True)
class Span:
    """A stretch of a flat batch: each of its tokens sees those before it in the stretch, and all of what comes before it.

    Attributes:
        start, end: where it lies.
        before: earlier stretches (start, end) that continue in this one, in their order; their tokens are the first positions.
    """

    start: int
    end: int
    before: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class FlatBatch:
    """What one forward pass computes.

    Attributes:
        input_ids, position_ids: int64, shape (tokens,).
        spans: cover all tokens once, in their order.
        sources: int64, shape (learned,): the index of the token that predicts each learned token.
        targets: int64, shape (learned,): the learned tokens in the order of the batch's rows.
    """

    input_ids: Ids
    position_ids: Ids
    spans: tuple[Span, ...]
    sources: Ids
    targets: Ids


@dataclass(frozen=True)
class Document:
    """A conversation or text of a batch, or a pair: a stem, and branches that go on from it.

    Attributes:
        parts: (ids, mask of learned tokens) of the stem and then of each branch.
    """

    parts: tuple[tuple[Ids, Mask], ...]


def flatten(batch: Batch, beginning: int = 0) -> FlatBatch:
    """Takes the padding out of a batch, and computes what its documents begin with together only once.

    The learned tokens keep the order that `batch.loss_mask` has, row by row.

    Args:
        beginning: first tokens of every document that another pass has computed (`find_beginning`): they are left out, and
            every span sees them before all else.
    """
    documents = list_documents(batch)
    shared = beginning or count_shared(documents)
    builder = FlatBuilder()
    before: tuple[tuple[int, int], ...] = ()
    if shared and not beginning:
        ids, mask = documents[0].parts[0]
        before = (builder.add(ids[:shared], mask[:shared], 0, ()),)
    for document in documents:
        (ids, mask), *branches = document.parts
        stem = builder.add(ids[shared:], mask[shared:], shared, before)
        for branch in branches:
            builder.add(*branch, len(ids), (*before, stem))
    return builder.build()


class FlatBuilder:
    """Puts stretches behind each other."""

    def __init__(self) -> None:
        self.ids: list[Ids] = []
        self.positions: list[Ids] = []
        self.spans: list[Span] = []
        self.sources: list[Ids] = []
        self.targets: list[Ids] = []
        self.tokens = 0

    def add(self, ids: Ids, mask: Mask, position: int, before: tuple[tuple[int, int], ...]) -> tuple[int, int]:
        """Adds a stretch whose first token has this position; returns where it lies."""
        start, end = self.tokens, self.tokens + len(ids)
        if len(ids):
            self.ids.append(ids)
            self.positions.append(np.arange(position, position + len(ids), dtype=np.int64))
            self.spans.append(Span(start, end, tuple(part for part in before if part[1] > part[0])))
            learned = np.flatnonzero(mask[1:]) + 1
            self.sources.append(learned + start - 1)
            self.targets.append(ids[learned])
            self.tokens = end
        return start, end

    def build(self) -> FlatBatch:
        """The batch of all stretches so far."""
        ids, positions, sources, targets = (
            np.concatenate(parts) for parts in (self.ids, self.positions, self.sources, self.targets)
        )
        return FlatBatch(ids, positions, tuple(self.spans), sources, targets)


def find_beginning(batches: Sequence[Batch]) -> Ids | None:
    """The tokens that all documents of some passes begin with, shape (tokens,); None where a pass for them does not pay."""
    documents = [document for batch in batches for document in list_documents(batch)]
    shared = count_shared(documents)
    return documents[0].parts[0][0][:shared] if pays_off(shared, len(batches)) else None


def pays_off(shared: int, passes: int) -> bool:
    """True if what so many passes share is better computed by one more pass than in each of them."""
    return shared >= SHORTEST_SHARED and shared * (passes - 1) > PASS_COST


def make_stretch(ids: Ids) -> FlatBatch:
    """A batch of one stretch in which nothing is learned."""
    builder = FlatBuilder()
    builder.add(ids, np.zeros(len(ids), dtype=np.bool_), 0, ())
    return builder.build()


def list_documents(batch: Batch) -> list[Document]:
    """The documents of a batch, row by row."""
    return [document for row in range(len(batch.input_ids)) for document in split_row(batch, row)]


def split_row(batch: Batch, row: int) -> list[Document]:
    """The documents of one row: several where it is packed, and the stem and both branches where it holds a pair."""
    length = int(batch.lengths[row])
    ids, mask = batch.input_ids[row, :length], batch.loss_mask[row, :length]
    if batch.segments is not None:
        segments = batch.segments[row, :length]
        starts = [0, *(int(np.searchsorted(segments, branch)) for branch in (1, 2)), length]
    elif batch.position_ids is not None:
        starts = [*np.flatnonzero(batch.position_ids[row, :length] == 0).tolist(), length]
    else:
        starts = [0, length]
    parts = [(ids[start:end], mask[start:end]) for start, end in pairwise(starts)]
    return [Document(tuple(parts))] if batch.segments is not None else [Document((part,)) for part in parts]


def count_shared(documents: Sequence[Document]) -> int:
    """Tokens that every document begins with and that are computed once; 0 where sharing does not pay.

    Nothing shared is learned, nor is the token behind it: each learned token is predicted inside its own stretch.
    """
    if len(documents) < 2:
        return 0
    stems = [document.parts[0] for document in documents]
    limit = min(min(len(ids) - 1, find_first(mask) - 1) for ids, mask in stems)
    first = stems[0][0]
    for ids, _ in stems[1:]:
        if limit < SHORTEST_SHARED:
            return 0
        different = ids[:limit] != first[:limit]
        limit = int(different.argmax()) if different.any() else limit
    return limit if limit >= SHORTEST_SHARED else 0


def count_common_start(examples: Sequence[EncodedExample], lengths: Ids) -> int:
    """Tokens that the passes over a set share whichever rows they hold; a rare row that begins otherwise may be missed.

    Args:
        lengths: tokens of each example, shape (examples,): none is shorter than what is shared.
    """
    if len(examples) < 2:
        return 0
    tried = np.unique(np.linspace(0, len(examples) - 1, min(TRIED_ROWS, len(examples)), dtype=np.int64))
    documents = []
    for index in tried:
        example = examples[int(index)]
        end = len(example.input_ids) if example.branch_starts is None else example.branch_starts[0]
        documents.append(Document(((example.input_ids[:end], np.append(False, example.loss_mask[1:end])),)))
    shared = count_shared(documents)
    return shared if shared < int(lengths.min()) else 0


def count_own_tokens(examples: Sequence[EncodedExample], *, runs_flat: bool) -> Ids:
    """Tokens that a pass over many examples computes for each alone, shape (examples,)."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    return lengths - count_common_start(examples, lengths) if runs_flat else lengths


def find_first(mask: Mask) -> int:
    """Index of the first learned token; the length where there is none."""
    return int(mask.argmax()) if mask.any() else len(mask)
