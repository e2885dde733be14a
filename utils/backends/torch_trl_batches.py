"""Our examples in our order as TRL's trainer takes them: a batch sampler, a loader and a collator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from utils.batching import iterate_windows
from utils.methods.pairs import split_pair
from utils.methods.sft import SftBatches
from utils.piece_encoder import EncodedExample

IGNORED = -100  # the label that transformers and TRL leave out of every loss
COUNTS = "counts"  # of a batch: rows, tokens and learned tokens; taken out again before TRL sees it
TrlBatch = dict[str, torch.Tensor]


class Windows:
    """Batch sampler: the indices of each micro-batch, in the order of our own loop.

    The micro-batches of a step stand behind each other. Every step of an epoch but the last has the same number of them, and
    transformers takes what is left of an epoch as its last step: its steps are ours.
    """

    def __init__(self, batches: SftBatches) -> None:
        self.batches = batches
        self.epoch = 0

    def __len__(self) -> int:
        size, whole = self.batches.batch_size, len(self.batches.examples)
        return sum(-(-min(size, whole - start) // self.batches.micro_batch_size) for start in range(0, whole, size))

    def __iter__(self) -> Iterator[list[int]]:
        examples, size = self.batches.examples, self.batches.micro_batch_size
        for window in iterate_windows(len(examples), self.batches.batch_size, self.batches.seed, self.epoch):
            by_length = sorted(window.tolist(), key=lambda index: len(examples[index].input_ids), reverse=True)
            yield from (by_length[start : start + size] for start in range(0, len(by_length), size))


class WindowLoader(DataLoader):  # type: ignore[misc]  # torch has no types here
    """A data loader that draws no random number, and passes the epoch on to the order."""

    def __init__(self, batches: SftBatches, collate: Any) -> None:
        # Without a generator of its own the loader would draw its workers' seed from the one that dropout uses.
        rows = Dataset.from_dict({"index": list(range(len(batches.examples)))})
        super().__init__(rows, batch_sampler=Windows(batches), collate_fn=collate, generator=torch.Generator())

    def set_epoch(self, epoch: int) -> None:
        """Called by transformers before each epoch."""
        self.batch_sampler.epoch = epoch


class LabelCollator:
    """Rows of the loader → TRL's batch: our ids, and as labels the ids of what is learned; TRL pads."""

    def __init__(self, examples: Sequence[EncodedExample], pad_token_id: int) -> None:
        self.examples = examples
        self.pad = DataCollatorForLanguageModeling(pad_token_id=pad_token_id)

    def __call__(self, rows: Sequence[dict[str, int]]) -> TrlBatch:
        chosen = [self.examples[row["index"]] for row in rows]
        labelled = [
            {
                "input_ids": example.input_ids.tolist(),
                "labels": np.where(example.loss_mask, example.input_ids, IGNORED).tolist(),
            }
            for example in chosen
        ]
        return add_counts(cast(TrlBatch, self.pad(labelled)), chosen)


class PairCollator:
    """Rows of the loader → TRL's batch of pairs: all chosen conversations, then all rejected ones; TRL pads.

    What is learned is what our mask says, and so may leave out the end of an answer's turn.
    """

    def __init__(self, examples: Sequence[EncodedExample], pad_token_id: int, *, with_reference: bool) -> None:
        self.examples = examples
        self.pad = DataCollatorForPreference(pad_token_id=pad_token_id)
        self.with_reference = with_reference

    def __call__(self, rows: Sequence[dict[str, int]]) -> TrlBatch:
        pairs = [self.examples[row["index"]] for row in rows]
        batch = cast(TrlBatch, self.pad([make_row(pair, with_reference=self.with_reference) for pair in pairs]))
        sides = [split_pair(pair) for pair in pairs]
        masks = [side.loss_mask for column in zip(*sides, strict=True) for side in column]
        for row, mask in zip(batch["completion_mask"], masks, strict=True):
            row[: len(mask)] = torch.from_numpy(mask)
        return add_counts(batch, pairs)


def make_row(pair: EncodedExample, *, with_reference: bool) -> dict[str, Any]:
    """A pair in TRL's words: the shared prompt, then each answer."""
    assert pair.branch_starts is not None
    chosen, rejected = split_pair(pair)
    prompt = pair.branch_starts[0] + 1  # each branch begins with a copy of the prompt's last token
    row: dict[str, Any] = {
        "prompt_ids": chosen.input_ids[:prompt].tolist(),
        "chosen_ids": chosen.input_ids[prompt:].tolist(),
        "rejected_ids": rejected.input_ids[prompt:].tolist(),
    }
    if with_reference:
        assert pair.reference is not None
        row |= {"ref_chosen_logps": pair.reference[0], "ref_rejected_logps": pair.reference[1]}
    return row


def add_counts(batch: TrlBatch, examples: Sequence[EncodedExample]) -> TrlBatch:
    """Adds what the rows of metrics.jsonl count, as our own loop counts it: the prompt of a pair once."""
    tokens, learned = (sum(len(e.input_ids) for e in examples), sum(e.supervised_tokens for e in examples))
    return {**batch, COUNTS: torch.tensor([len(examples), tokens, learned])}
