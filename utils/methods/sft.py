"""Supervised fine-tuning: examples → encoded examples → the micro-batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from config.structured_config import DataSection
from utils.batching import Batch, iterate_windows, make_micro_batches
from utils.data_formats import Example
from utils.data_loading import SHOWN_PROBLEMS, raise_problems
from utils.exceptions import DataError, Problem
from utils.logging import get_logger
from utils.tokenizer_utils import EncodedExample, TokenizerUtils, fit_length


def encode_examples(
    examples: Sequence[Example], tokenizer: TokenizerUtils, data: DataSection, purpose: str
) -> list[EncodedExample]:
    """Encodes all examples and applies `data.overlong`, always with counts.

    Args:
        purpose: what the rows are for, as the log calls them, such as `training`.

    Raises:
        DataError: rows that cannot be encoded, or that are too long under `overlong: error`.
    """
    encoded: list[EncodedExample] = []
    problems: list[Problem] = []
    dropped: list[str] = []
    cut = 0
    for example in examples:
        try:
            whole = tokenizer.encode_example(example)
        except DataError as error:
            problems += error.problems
            continue
        length = len(whole.input_ids)
        fitted = whole if length <= data.max_length else fit_length(whole, data.max_length)
        if length > data.max_length and data.overlong == "error":
            fix = "raise data.max_length, or set data.overlong: drop or truncate"
            message = f"{length} tokens are more than max_length {data.max_length}"
            problems.append(Problem("too-long", message, example.where, fix))
        elif fitted is None or (length > data.max_length and data.overlong == "drop"):
            dropped.append(example.where)
        else:
            cut += fitted is not whole
            encoded.append(fitted)
    raise_problems(problems)
    report_length_changes(purpose, dropped, cut, data.max_length)
    if not encoded:
        fix = "raise data.max_length"
        raise DataError(f"no {purpose} row is short enough", where="data.max_length", fix=fix, code="no-rows")
    return encoded


def report_length_changes(purpose: str, dropped: Sequence[str], cut: int, max_length: int) -> None:
    """Logs what overlong rows cost: nothing is left out in silence."""
    if dropped:
        shown = ", ".join(dropped[:SHOWN_PROBLEMS])
        get_logger().warning("%d %s rows left out, longer than %d tokens: %s", len(dropped), purpose, max_length, shown)
    if cut:
        get_logger().warning("%d %s rows cut to %d tokens; no answer was cut", cut, purpose, max_length)


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
    """

    examples: Sequence[EncodedExample]
    batch_size: int
    micro_batch_size: int
    pad_token_id: int
    pack_length: int | None
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which every example is seen once."""
        return -(-len(self.examples) // self.batch_size)

    def iterate_epoch(self, epoch: int) -> Iterator[list[Batch]]:
        """Yields the micro-batches of each optimizer step, in this epoch's order."""
        for window in iterate_windows(len(self.examples), self.batch_size, self.seed, epoch):
            chosen = [self.examples[index] for index in window]
            yield make_micro_batches(chosen, self.micro_batch_size, self.pad_token_id, pack_length=self.pack_length)


def make_evaluation_batches(examples: Sequence[EncodedExample], batch_size: int, pad_token_id: int) -> list[Batch]:
    """Batches of like length; a mean over all tokens does not care about the order."""
    return make_micro_batches(examples, batch_size, pad_token_id)
