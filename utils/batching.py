"""Examples → batches, in numpy: order, padding and packing are decided here once, for every back end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from utils.piece_encoder import EncodedExample

Ids = npt.NDArray[np.int64]

# Tokens that a pass without gradients may have where a training pass has fewer: it keeps no layer's activations. More would be
# no faster on a CPU, and what a single layer computes would be the largest thing in memory.
SCORED_TOKENS = 1024


@dataclass(frozen=True)
class Batch:
    """What one forward pass sees.

    Attributes:
        input_ids: int64, shape (rows, length).
        attention_mask: bool, shape (rows, length), True at real tokens; None where there is no padding.
        loss_mask: bool, shape (rows, length), True at learned tokens; never True in column 0.
        position_ids: int64, shape (rows, length), restarting at each example of a packed row, and of pairs going on from the
            trunk in both branches; None without either.
        lengths: int64, shape (rows,), real tokens of each row.
        segments: of pairs, int8, shape (rows, length): 0 in the trunk, 1 and 2 in the chosen and the rejected branch, -1 in
            the padding. A token sees those before it in the trunk and in its own segment; a missing answer has no token.
            None without pairs.
        reference: of pairs, float64, shape (rows, 2): the reference's log-probability of both answers in nats; None where
            it is not known.
        mismatched: of pairs under KTO, the same prompts with the answers of other rows.
        places: of each row, `file:line` of the examples in it; empty where nobody asks.
    """

    input_ids: npt.NDArray[np.int64]
    attention_mask: npt.NDArray[np.bool_] | None
    loss_mask: npt.NDArray[np.bool_]
    position_ids: npt.NDArray[np.int64] | None
    lengths: npt.NDArray[np.int64]
    segments: npt.NDArray[np.int8] | None = None
    reference: npt.NDArray[np.float64] | None = None
    mismatched: Batch | None = None
    places: tuple[tuple[str, ...], ...] = ()

    @property
    def tokens(self) -> int:
        """Real tokens; padding never counts."""
        return int(self.lengths.sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens that the loss is summed over."""
        return int(self.loss_mask.sum())

    @property
    def answers(self) -> tuple[int, int]:
        """Chosen or desirable, and rejected or undesirable answers of its pairs; (0, 0) without pairs."""
        if self.segments is None:
            return 0, 0
        return int((self.segments == 1).any(axis=1).sum()), int((self.segments == 2).any(axis=1).sum())


def iterate_windows(count: int, batch_size: int, seed: int, epoch: int) -> Iterator[npt.NDArray[np.int64]]:
    """Yields the example indices of each optimizer step of an epoch; the last window may be smaller, never dropped.

    Args:
        count: number of examples.
        batch_size: examples per optimizer step.
        seed: with the epoch, the only thing the order depends on.
        epoch: from 0.
    """
    order = np.random.default_rng([seed, epoch]).permutation(count)
    for start in range(0, count, batch_size):
        yield order[start : start + batch_size]


def make_micro_batches(
    examples: Sequence[EncodedExample],
    micro_batch_size: int,
    pad_token_id: int,
    *,
    pack_length: int | None = None,
    evenly: bool = False,
) -> list[Batch]:
    """Splits the examples of one optimizer step into forward passes.

    The step's gradient is a sum over all its tokens, so the order inside a step changes nothing but the work.

    Args:
        pack_length: with packing, the longest packed row in tokens; None pads instead.
        evenly: see `group_rows`.
    """
    ordered = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
    if pack_length is not None:
        return [pack_row(group) for group in group_first_fit(ordered, pack_length)]
    groups = group_rows(len(ordered), micro_batch_size, evenly=evenly)
    return [pad_rows([ordered[index] for index in group], pad_token_id) for group in groups]


def halve_batches(batches: Sequence[Batch]) -> list[Batch]:
    """The same rows in forward passes of half as many; a pass of one row stays as it is.

    The sum over all tokens of a step, and so its gradient, does not change.
    """
    halves = []
    for batch in batches:
        count = len(batch.lengths)
        middle = -(-count // 2)
        parts = [slice(0, middle), slice(middle, count)] if count > 1 else [slice(0, 1)]
        halves += [take_rows(batch, part) for part in parts]
    return halves


def split_rows(batches: Sequence[Batch]) -> list[Batch]:
    """Every row in a batch of its own, in order."""
    return [take_rows(batch, slice(row, row + 1)) for batch in batches for row in range(len(batch.lengths))]


def list_places(batches: Sequence[Batch]) -> tuple[str, ...]:
    """`file:line` of every example, in order; an example of several rows (a turn each) is named once."""
    return tuple(dict.fromkeys(place for batch in batches for row in batch.places for place in row))


def take_rows(batch: Batch, rows: slice) -> Batch:
    """Some rows of a batch, without the columns that were padding in all of them."""
    lengths = batch.lengths[rows]
    longest = int(lengths.max())
    mask = None if batch.attention_mask is None else batch.attention_mask[rows, :longest]
    return Batch(
        input_ids=batch.input_ids[rows, :longest],
        attention_mask=None if mask is None or mask.all() else mask,
        loss_mask=batch.loss_mask[rows, :longest],
        position_ids=None if batch.position_ids is None else batch.position_ids[rows, :longest],
        lengths=lengths,
        segments=None if batch.segments is None else batch.segments[rows, :longest],
        reference=None if batch.reference is None else batch.reference[rows],
        mismatched=None if batch.mismatched is None else take_rows(batch.mismatched, rows),
        places=batch.places[rows],
    )


def group_rows(count: int, size: int, *, evenly: bool) -> list[list[int]]:
    """Which rows share a forward pass, as indices into rows that are sorted by length, the longest first.

    Args:
        size: most rows of a pass.
        evenly: each pass gets long and short rows, to and fro, so that all take about as long: for models that compute no
            padding. Otherwise rows of like length share a pass, for little padding.
    """
    if not evenly or count <= size:
        return [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    groups: list[list[int]] = [[] for _ in range(-(-count // size))]
    for start in range(0, count, len(groups)):
        turn = range(start, min(start + len(groups), count))
        for group, index in zip(groups if start // len(groups) % 2 == 0 else reversed(groups), turn, strict=False):
            group.append(index)
    return groups


def group_scored_rows(lengths: Sequence[int] | Ids, size: int, token_budget: int) -> list[list[int]]:
    """Which rows share a forward pass without gradients, as indices, rows of like length together and the longest first.

    Args:
        lengths: tokens of each row.
        size: most rows of a pass.
        token_budget: of a training pass on this machine; a pass has fewer rows where they would come to more tokens, padding
            counted, than the larger of it and `SCORED_TOKENS`.
    """
    order, most = np.argsort(-np.asarray(lengths), kind="stable").tolist(), max(token_budget, SCORED_TOKENS)
    groups = []
    while order:
        count = max(1, min(size, most // max(1, int(lengths[order[0]]))))
        groups.append(order[:count])
        order = order[count:]
    return groups


def pad_rows(examples: Sequence[EncodedExample], pad_token_id: int) -> Batch:
    """Pads examples on the right to the longest of them."""
    lengths = np.array([len(example.input_ids) for example in examples], dtype=np.int64)
    shape = (len(examples), int(lengths.max()))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    loss_mask = np.zeros(shape, dtype=np.bool_)
    for row, example in enumerate(examples):
        input_ids[row, : lengths[row]] = example.input_ids
        loss_mask[row, 1 : lengths[row]] = example.loss_mask[1:]
    real = np.arange(shape[1]) < lengths[:, None]
    places = tuple((example.where,) for example in examples)
    batch = Batch(input_ids, None if real.all() else real, loss_mask, None, lengths, places=places)
    return batch if examples[0].branch_starts is None else add_branches(batch, examples, pad_token_id)


def add_branches(batch: Batch, pairs: Sequence[EncodedExample], pad_token_id: int) -> Batch:
    """Says which tokens of a padded batch belong to which answer of each pair."""
    segments = np.full(batch.input_ids.shape, -1, dtype=np.int8)
    positions = np.zeros(batch.input_ids.shape, dtype=np.int64)
    for row, pair in enumerate(pairs):
        assert pair.branch_starts is not None
        (chosen, rejected), length = pair.branch_starts, len(pair.input_ids)
        for segment, (start, end) in enumerate(((0, chosen), (chosen, rejected), (rejected, length))):
            segments[row, start:end] = segment
        positions[row, :rejected] = np.arange(rejected)
        positions[row, rejected:length] = np.arange(chosen, chosen + length - rejected)
    known = [pair.reference for pair in pairs if pair.reference is not None]
    others = [pair.mismatched for pair in pairs if pair.mismatched is not None]
    return replace(
        batch,
        position_ids=positions,
        segments=segments,
        reference=np.array(known, dtype=np.float64) if known else None,
        mismatched=pad_rows(others, pad_token_id) if others else None,
    )


def count_answer_tokens(batch: Batch) -> npt.NDArray[np.int64]:
    """Learned tokens of the chosen and the rejected answer of each pair, shape (rows, 2); 0 of an answer that is missing."""
    assert batch.segments is not None
    counts = [(batch.loss_mask & (batch.segments == branch)).sum(axis=1) for branch in (1, 2)]
    return np.stack(counts, axis=1).astype(np.int64)


def unroll_pairs(batch: Batch) -> Batch:
    """Pairs as plain rows: the chosen conversation of each and then its rejected one, so learned tokens keep their order.

    A missing answer has none.

    For models that cannot be told which tokens see each other; the prompt is then computed twice.
    """
    assert batch.segments is not None
    sides = []
    for ids, mask, segments in zip(batch.input_ids, batch.loss_mask, batch.segments, strict=True):
        for branch in (1, 2):
            if (segments == branch).any():
                own = (segments == 0) | (segments == branch)
                sides.append(EncodedExample(ids[own], mask[own], ""))
    return pad_rows(sides, 0)


def unpack_rows(batch: Batch) -> Batch:
    """The examples of packed rows as rows of their own, so learned tokens keep their order.

    For models that cannot be told where an example begins.
    """
    assert batch.position_ids is not None
    parts = []
    for ids, mask, positions in zip(batch.input_ids, batch.loss_mask, batch.position_ids, strict=True):
        starts = np.flatnonzero(positions == 0).tolist()
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            parts.append(EncodedExample(ids[start:end], mask[start:end], ""))
    return pad_rows(parts, 0)


def pad_prompts_left(prompts: Sequence[npt.NDArray[np.int64]], pad_token_id: int) -> Batch:
    """Pads prompts on the left, so that every row's next token is the same column."""
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    shape = (len(prompts), int(lengths.max()))
    input_ids = np.full(shape, pad_token_id, dtype=np.int64)
    for row, prompt in enumerate(prompts):
        input_ids[row, shape[1] - lengths[row] :] = prompt
    real = np.arange(shape[1]) >= shape[1] - lengths[:, None]
    return Batch(input_ids, None if real.all() else real, np.zeros(shape, dtype=np.bool_), None, lengths)


def group_first_fit(ordered: Sequence[EncodedExample], pack_length: int) -> list[list[EncodedExample]]:
    """First-fit decreasing: each example goes into the first row that has room (Johnson 1973)."""
    groups: list[list[EncodedExample]] = []
    room: list[int] = []
    for example in ordered:
        length = len(example.input_ids)
        fitting = next((index for index, left in enumerate(room) if left >= length), None)
        if fitting is None:
            groups.append([example])
            room.append(pack_length - length)
        else:
            groups[fitting].append(example)
            room[fitting] -= length
    return groups


def pack_row(examples: Sequence[EncodedExample]) -> Batch:
    """Puts examples behind each other into one row; positions restart, and no first token is learned."""
    input_ids = np.concatenate([example.input_ids for example in examples])
    loss_mask = np.concatenate([np.append(False, example.loss_mask[1:]) for example in examples]).astype(np.bool_)
    positions = np.concatenate([np.arange(len(example.input_ids)) for example in examples])
    lengths = np.array([len(input_ids)], dtype=np.int64)
    places = (tuple(example.where for example in examples),)
    return Batch(input_ids[None], None, loss_mask[None], positions[None], lengths, places=places)
