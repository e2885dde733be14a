"""Pairs of answers: preference rows → encoded pairs, whose prompt stands there once.

A pair is one `EncodedExample`: trunk, chosen branch, rejected branch. What counts examples, lengths and supervised tokens
works on pairs as on anything else; what computes (`utils/batching.py`, the back ends) looks at `branch_starts`.

A labelled row is a pair that lacks an answer: a desirable answer is the chosen branch and an undesirable one the rejected
branch, and the other branch has no token. An answer that is not there has log-probability 0 in every model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from config.structured_config import DataSection
from utils.examples import Example
from utils.exceptions import DataError, Problem
from utils.methods.sft import EncodingCounts, fit_row
from utils.piece_encoder import EncodedExample, cut_trunk
from utils.problem_log import ProblemLog
from utils.tokenizer_utils import TokenizerUtils


def encode_pairs(
    rows: Sequence[Example], tokenizer: TokenizerUtils, data: DataSection, counts: EncodingCounts, problems: ProblemLog
) -> list[EncodedExample]:
    """Encodes preference and labelled rows and applies `data.overlong`, which never cuts an answer.

    Args:
        tokenizer: with `loss_on: last`, for the last answer is what differs.
        counts: is added to.
        problems: collects rows that cannot be encoded, or that are too long under `overlong: error`.

    Returns:
        One example for each pair that is kept, in order.
    """
    sides = [split_row(row) for row in rows]
    encoded = iter(tokenizer.encode_batch([side for own in sides for side in own]))
    kept: list[EncodedExample] = []
    for row, own in zip(rows, sides, strict=True):
        counts.rows += 1
        found = [next(encoded) for _ in own]
        if broken := [side for side in found if isinstance(side, DataError)]:
            for problem in broken[0].problems:
                problems.add(problem)
            continue
        answers = [side[-1] for side in found if isinstance(side, list)]
        pair = join_pair(*answers) if row.label is None else mark_answer(*answers, is_desirable=row.label)
        if pair is None:
            fix = "give the row a prompt, or set data.template to one that writes something before the answer"
            problems.add(Problem("no-prompt", "nothing stands before the answer", row.where, fix))
        else:
            kept += fit_row([pair], data, counts, problems, tokenizer.begin_token_id)
    counts.examples += len(kept)
    return kept


def split_row(row: Example) -> list[Example]:
    """The conversations of a row: with the chosen and with the rejected answer, or the one that has a label."""
    conversations = (row.messages, row.rejected) if row.label is None else (row.messages,)
    return [replace(row, messages=messages, rejected=()) for messages in conversations]


def join_pair(chosen: EncodedExample, rejected: EncodedExample) -> EncodedExample | None:
    """Two encoded conversations with one prompt as a pair.

    The trunk ends before the last token that both share and neither learns, so the two branches never share a learned token:
    every answer keeps all of its log-probability.

    Returns:
        None if not even one token comes before both answers.
    """
    first = min(int(np.argmax(side.loss_mask)) for side in (chosen, rejected))
    same = chosen.input_ids[:first] == rejected.input_ids[:first]
    shared = first if same.all() else int(np.argmin(same))
    if shared == 0:
        return None
    trunk = shared - 1
    ids = [chosen.input_ids, rejected.input_ids[trunk:]]
    masks = [chosen.loss_mask, rejected.loss_mask[trunk:]]
    return EncodedExample(
        np.concatenate(ids), np.concatenate(masks), chosen.where, branch_starts=(trunk, len(chosen.input_ids))
    )


def mark_answer(answer: EncodedExample, *, is_desirable: bool) -> EncodedExample | None:
    """An encoded conversation as a pair without the other answer.

    Returns:
        None if not even one token comes before the answer.
    """
    trunk = int(np.argmax(answer.loss_mask)) - 1
    if trunk < 0:
        return None
    return replace(answer, branch_starts=(trunk, len(answer.input_ids) if is_desirable else trunk))


def has_answers(pair: EncodedExample) -> tuple[bool, bool]:
    """Whether the chosen (or desirable) and the rejected (or undesirable) answer is there."""
    assert pair.branch_starts is not None
    chosen, rejected = pair.branch_starts
    return rejected > chosen, len(pair.input_ids) > rejected


def split_pair(pair: EncodedExample) -> tuple[EncodedExample, EncodedExample]:
    """The two whole conversations of a pair, chosen first: what `join_pair` joined; the trunk alone for a missing answer."""
    assert pair.branch_starts is not None
    trunk, middle = pair.branch_starts
    ends = ((trunk, middle), (middle, len(pair.input_ids)))

    def take(start: int, end: int) -> EncodedExample:
        ids = np.concatenate([pair.input_ids[:trunk], pair.input_ids[start:end]])
        return EncodedExample(ids, np.concatenate([pair.loss_mask[:trunk], pair.loss_mask[start:end]]), pair.where)

    return take(*ends[0]), take(*ends[1])


def read_prompt(pair: EncodedExample) -> bytes:
    """The tokens of a pair's prompt, for comparisons."""
    assert pair.branch_starts is not None
    return pair.input_ids[: pair.branch_starts[0]].tobytes()


def have_one_prompt(pairs: Sequence[EncodedExample]) -> bool:
    """True if no pair has another prompt than the first one; the rest is not read as soon as one has."""
    first = read_prompt(pairs[0])
    return all(read_prompt(pair) == first for pair in pairs)


def choose_partners(pairs: Sequence[EncodedExample]) -> npt.NDArray[np.int64]:
    """For each pair the index of the nearest one before it, round the end, that has another prompt; shape (pairs,).

    Copies of a row, which a weighted mixture has, and other answers to the same prompt are no mismatch.
    """
    prompts = [hashlib.blake2b(read_prompt(pair), digest_size=8).digest() for pair in pairs]
    count = len(prompts)
    partners = np.empty(count, dtype=np.int64)
    other = next(index for index in range(count - 1, -1, -1) if prompts[index] != prompts[0])
    for index in range(count):
        if prompts[index] != prompts[index - 1]:
            other = (index - 1) % count
        partners[index] = other
    return partners


def mismatch_pair(pair: EncodedExample, other: EncodedExample, max_length: int) -> EncodedExample:
    """The prompt of one pair with the answers of another, as many as that has: what KTO estimates its reference point on.

    Args:
        max_length: a longer conversation loses tokens of its prompt from the left, behind the first one, which may be a BOS;
            as long as the other pair itself at least.
    """
    assert pair.branch_starts is not None
    assert other.branch_starts is not None
    trunk, start = pair.branch_starts[0], other.branch_starts[0]
    ids, mask = other.input_ids[start:].copy(), other.loss_mask[start:]
    for branch, is_there in zip(other.branch_starts, has_answers(other), strict=True):
        if is_there:
            ids[branch - start] = pair.input_ids[trunk]  # each branch begins with the last token of its own prompt
    found = EncodedExample(
        np.concatenate([pair.input_ids[:trunk], ids]),
        np.concatenate([pair.loss_mask[:trunk], mask]),
        pair.where,
        branch_starts=(trunk, trunk + other.branch_starts[1] - start),
    )
    excess = found.path_length - max_length
    return (cut_trunk(found, excess, 1) or cut_trunk(found, excess, 0) or found) if excess > 0 else found
