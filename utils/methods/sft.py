"""Supervised fine-tuning: examples → encoded examples → the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from config.structured_config import DataSection
from utils.batching import Batch, iterate_windows, make_micro_batches
from utils.examples import Example
from utils.exceptions import DataError, Problem
from utils.piece_encoder import EncodedExample
from utils.problem_log import ProblemLog
from utils.tokenizer_utils import TokenizerUtils, fit_length

SHOWN_PLACES = 5
MAX_WINDOWS = 5000  # of which the heaviest step is looked for


@dataclass
class EncodingCounts:
    """What became of the rows of one set.

    Attributes:
        rows: rows read.
        examples: sequences to learn from; a conversation can become several, one for each turn.
        dropped: rows that were left out, or turns of which were, because they are longer than `data.max_length`.
        cut: rows that were shortened to it, never in their answer.
        dropped_places: `file:line` of the first ones left out.
    """

    rows: int = 0
    examples: int = 0
    dropped: int = 0
    cut: int = 0
    dropped_places: list[str] = field(default_factory=list)


def encode_rows(
    rows: Sequence[Example], tokenizer: TokenizerUtils, data: DataSection, counts: EncodingCounts, problems: ProblemLog
) -> list[EncodedExample]:
    """Encodes rows and applies `data.overlong`.

    Args:
        counts: is added to.
        problems: collects rows that cannot be encoded, or that are too long under `overlong: error`.

    Returns:
        What can be learned from, in order.
    """
    kept: list[EncodedExample] = []
    for encoded in tokenizer.encode_batch(rows):
        counts.rows += 1
        if isinstance(encoded, DataError):
            for problem in encoded.problems:
                problems.add(problem)
            continue
        fitted = fit_row(encoded, data, counts, problems, tokenizer.begin_token_id)
        kept += fitted
    counts.examples += len(kept)
    return kept


def fit_row(
    row: Sequence[EncodedExample],
    data: DataSection,
    counts: EncodingCounts,
    problems: ProblemLog,
    bos_token_id: int | None,
) -> list[EncodedExample]:
    """Applies `data.overlong` to the sequences of one row, which counts once however many of them are too long."""
    longest = max(row, key=lambda example: example.path_length)
    if longest.path_length <= data.max_length:
        return list(row)
    if data.overlong == "error":
        fix = "raise data.max_length, or set data.overlong: drop or truncate"
        message = f"{longest.path_length} tokens are more than max_length {data.max_length}"
        problems.add(Problem("too-long", message, longest.where, fix))
        return []
    fitted = [fit_length(whole, data.max_length, bos_token_id) for whole in row]
    if data.overlong == "drop":
        fitted = [whole if whole.path_length <= data.max_length else None for whole in row]
    kept = [example for example in fitted if example is not None]
    if len(kept) < len(row):
        counts.dropped += 1
        if len(counts.dropped_places) < SHOWN_PLACES:
            counts.dropped_places.append(longest.where)
    counts.cut += any(example is not None and example is not whole for example, whole in zip(fitted, row, strict=True))
    return kept


@dataclass(frozen=True)
class SftBatches:
    """The training set as optimizer steps.

    Attributes:
        examples: encoded rows.
        batch_size: examples of one optimizer step.
        micro_batch_size: examples of one forward pass.
        pad_token_id: fills short rows.
        pack_length: tokens of a packed row, or None for padding.
        seed: of the order.
        evenly: forward passes of a step take about as long as each other, whatever their rows' lengths (`group_rows`).
    """

    examples: Sequence[EncodedExample]
    batch_size: int
    micro_batch_size: int
    pad_token_id: int
    pack_length: int | None
    seed: int
    evenly: bool = False

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is seen once."""
        return -(-len(self.examples) // self.batch_size)

    def find_heaviest_step(self) -> list[Batch]:
        """The micro-batches of the first epoch's step that has the most tokens."""
        windows = iterate_windows(len(self.examples), self.batch_size, self.seed, 0)
        lengths = np.array([len(example.input_ids) for example in self.examples])
        heaviest = max(islice(windows, MAX_WINDOWS), key=lambda window: int(lengths[window].sum()))
        return self.cut([self.examples[index] for index in heaviest])

    def cut(self, chosen: Sequence[EncodedExample]) -> list[Batch]:
        """The micro-batches of a step."""
        return make_micro_batches(
            chosen, self.micro_batch_size, self.pad_token_id, pack_length=self.pack_length, evenly=self.evenly
        )

    def iterate_epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each optimizer step, in this epoch's order, from step `start` of it on."""
        for window in islice(iterate_windows(len(self.examples), self.batch_size, self.seed, epoch), start, None):
            yield self.cut([self.examples[index] for index in window])
