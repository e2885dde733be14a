"""A reward model ready to judge: rows that hold an answer → one number for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from utils.backends import Backend
from utils.batching import group_scored_rows, pad_rows
from utils.data_formats import read_examples
from utils.data_loading import load_rows
from utils.examples import Example
from utils.exceptions import DataError, Problem
from utils.piece_encoder import EncodedExample
from utils.progress import Progress
from utils.tokenizer_utils import TokenizerUtils


@dataclass(frozen=True)
class Judge:
    """A loaded reward model with all that is needed to score answers.

    Attributes:
        batch_size: answers of one forward pass.
        positions: longest conversation that the model was made for, in tokens; None where its config does not say.
    """

    backend: Backend
    model: Any
    tokenizer: TokenizerUtils
    batch_size: int
    positions: int | None

    def score(self, examples: Sequence[Example]) -> list[float]:
        """The reward of each conversation, in order; only differences between answers to one prompt mean something.

        Raises:
            DataError: rows that cannot be encoded, or that are longer than the model's positions.
        """
        encoded = self.encode(examples)
        pad = self.tokenizer.tokenizer.pad_token_id
        budget = self.backend.describe_machine(self.model).token_budget
        groups = group_scored_rows([len(example.input_ids) for example in encoded], self.batch_size, budget)
        batches = [pad_rows([encoded[index] for index in group], pad) for group in groups]
        with Progress("Rewards", len(encoded), "answers") as progress:
            rewards = self.backend.score_rows(self.model, batches, progress.advance)
        scores = np.empty_like(rewards)
        scores[list(chain.from_iterable(groups))] = rewards
        return [float(score) for score in scores]

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Whole conversations, as training saw them."""
        found: list[EncodedExample] = []
        problems: list[Problem] = []
        for rows in self.tokenizer.encode_batch(examples):
            if isinstance(rows, DataError):
                problems += rows.problems
                continue
            found.append(rows[-1])
            if self.positions is not None and len(rows[-1].input_ids) > self.positions:
                message = f"{len(rows[-1].input_ids)} tokens lie beyond the model's {self.positions} positions"
                problems.append(Problem("overlong", message, rows[-1].where, "shorten the row, or leave it out"))
        if problems:
            raise DataError.from_problems(problems)
        return found


def read_answers(path: Path) -> list[Example]:
    """Reads conversations that end with an answer, in any format of rows; a pair gives two, the chosen one first.

    Raises:
        DataError: rows of no known format, or of raw text.
    """
    return [answer for example in read_examples(load_rows(str(path))) for answer in iterate_answers(example)]


def iterate_answers(example: Example) -> Iterator[Example]:
    """Yields each answer of a row with its conversation."""
    if not example.messages:
        fix = "give rows with messages, or with prompt and completion"
        raise DataError("the row is raw text, and holds no answer to score", where=example.where, fix=fix)
    for messages in (example.messages, example.rejected):
        if messages:
            yield replace(example, messages=messages, rejected=())
