"""Learning from pairs: what the reference thinks of them, and how they are scored.

A labelled row is a pair that lacks one of its answers (`utils/methods/pairs.py`); the scores of a missing answer are 0.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from config.structured_config import Recipe
from utils.backends import Backend, MachineFacts, PairScores
from utils.batching import group_scored_rows, pad_rows
from utils.cache_entries import open_or_build
from utils.cache_keys import describe_forward, hash_code
from utils.exceptions import TrainingError
from utils.flat_batches import count_own_tokens
from utils.methods.pairs import choose_partners, mismatch_pair
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.progress import Progress

Scores = npt.NDArray[np.float64]
Pairs = Sequence[EncodedExample]
FILE = "reference.f64"
# A reference of this code; other code may round otherwise.
CODE = (
    "batching.py",
    "flat_batches.py",
    "methods/pairs.py",
    "methods/preference.py",
)


class DerivedPairs(Sequence[EncodedExample]):
    """Pairs that are made from others when they are asked for."""

    def __init__(self, pairs: Pairs) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    @overload
    def __getitem__(self, index: int) -> EncodedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[EncodedExample]: ...
    def __getitem__(self, index: int | slice) -> EncodedExample | list[EncodedExample]:
        if isinstance(index, slice):
            return [self.derive(position) for position in range(len(self))[index]]
        return self.derive(index)

    @abstractmethod
    def derive(self, index: int) -> EncodedExample:
        """The pair at an index."""


class MismatchedPairs(DerivedPairs):
    """Every prompt of a set with answers to another one, as `choose_partners` has it; none is longer than the set's longest."""

    def __init__(self, pairs: Pairs) -> None:
        super().__init__(pairs)
        self.partners = choose_partners(pairs)
        self.max_length = max(pair.path_length for pair in pairs)

    def derive(self, index: int) -> EncodedExample:
        """A pair's prompt with another's answers."""
        return mismatch_pair(self.pairs[index], self.pairs[int(self.partners[index])], self.max_length)


class ReferencedPairs(DerivedPairs):
    """Pairs with the reference's log-probabilities, and under KTO with mismatched answers."""

    def __init__(self, pairs: Pairs, reference: Scores | None, mismatched_reference: Scores | None) -> None:
        """Takes pairs and, each of shape (pairs, 2), what the reference gives to their own and to mismatched answers."""
        super().__init__(pairs)
        self.reference = reference
        self.mismatched_reference = mismatched_reference
        self.mismatched = None if mismatched_reference is None else MismatchedPairs(pairs)

    def derive(self, index: int) -> EncodedExample:
        """The pair with what is known of it."""
        pair = self.pairs[index]
        if self.reference is not None:
            pair = replace(pair, reference=tuple(self.reference[index].tolist()))
        if self.mismatched is None:
            return pair
        assert self.mismatched_reference is not None
        reference = tuple(self.mismatched_reference[index].tolist())
        return replace(pair, mismatched=replace(self.mismatched[index], reference=reference))


@dataclass(frozen=True)
class Scorer:
    """A model that scores pairs.

    Attributes:
        batch_size: pairs of one forward pass.
        pad_token_id: fills short rows.
    """

    backend: Backend
    model: Any
    batch_size: int
    pad_token_id: int

    def score(self, pairs: Pairs, title: str) -> Scores:
        """Log-probability of both answers of each pair in nats, shape (pairs, 2), in the order of the pairs.

        Raises:
            TrainingError: one of them is not finite.
        """
        # Pairs of like length share a forward pass, and then return to their order.
        machine = self.backend.describe_machine(self.model)
        lengths = count_own_tokens(pairs, runs_flat=machine.runs_flat)
        groups = group_scored_rows(lengths, self.batch_size, machine.token_budget)
        batches = [pad_rows([pairs[index] for index in group], self.pad_token_id) for group in groups]
        with Progress(title, len(pairs), "pairs") as progress:
            sorted_scores = self.backend.score_pairs(self.model, batches, progress.advance)
        scores = np.empty_like(sorted_scores)
        scores[list(chain.from_iterable(groups))] = sorted_scores
        if (wrong := np.flatnonzero(~np.isfinite(scores).all(axis=1))).size:
            message = "the model gives an answer a log-probability that is not finite"
            fix = "set model.dtype: float32, or look at the row"
            raise TrainingError(message, where=pairs[int(wrong[0])].where, fix=fix, code="not-finite")
        return scores


@dataclass(frozen=True)
class ReferenceCache:
    """Where the reference's log-probabilities are kept.

    Attributes:
        source: the untouched model.
        recipe: says how it is loaded.
        data_key: name of the pairs in the token cache.
        machine: on whose back end, device and number format the rounding depends.
    """

    source: ModelSource
    recipe: Recipe
    data_key: str
    machine: MachineFacts

    def open(self, scorer: Scorer, pairs: Pairs, name: str) -> Scores:
        """Finds the scores of a set, or computes and keeps them; shape (pairs, 2).

        Args:
            scorer: the model before its first step: fresh adapters change nothing.
            name: of the set, for the key and the progress bar.
        """

        def build(folder: Path) -> dict[str, Any]:
            scores = scorer.score(pairs, f"Reference, {name} pairs")
            folder.mkdir(parents=True, exist_ok=True)  # scoring takes minutes, in which a cache may be emptied
            scores.astype("<f8").tofile(folder / FILE)
            return {"pairs": len(scores)}

        folder, _ = open_or_build(self.make_key(name, len(pairs)), (FILE,), build)
        return np.fromfile(folder / FILE, dtype="<f8").astype(np.float64).reshape(-1, 2)

    def make_key(self, name: str, count: int) -> str:
        """Names everything that a log-probability depends on."""
        weights = {source["source"]: source["weight"] for source in list_weights(self.recipe)}
        facts = {
            "weights": [self.source.hash_weights(), self.source.hash_adapter(), self.source.config],
            "model": self.recipe.model.model_dump(mode="json", exclude={"dtype"}),  # `machine` has what auto became
            "lora": self.recipe.lora.model_dump(mode="json") if self.recipe.lora else None,
            "data": [self.data_key, name, count, weights, self.recipe.seed],
            "machine": [self.machine.device, self.machine.dtype],
            "code": hash_code(CODE),
            "forward": describe_forward(self.machine.backend, self.machine.quantization),
        }
        return "reference-" + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def list_weights(recipe: Recipe) -> list[dict[str, Any]]:
    """Sources of a mixture with their weights: they decide which pairs an epoch sees, and in which order."""
    train = recipe.model_dump(mode="json")["data"]["train"]
    return [source for source in (train if isinstance(train, list) else [train]) if isinstance(source, dict)]


def reference_pairs(recipe: Recipe, scorer: Scorer, cache: ReferenceCache, pairs: Pairs, name: str) -> ReferencedPairs:
    """Adds to the pairs what the recipe's method needs of the reference.

    Args:
        name: `training` or `held-out`. Of held-out pairs the reference is always computed once.

    KTO needs at least two prompts (`check_prompts` of the pre-flight).
    """
    if recipe.orpo is not None or recipe.reward is not None:
        return ReferencedPairs(pairs, None, None)
    in_steps = recipe.dpo is not None and recipe.dpo.reference != "precomputed" and name == "training"
    reference = None if in_steps else cache.open(scorer, pairs, name)
    if recipe.kto is None:
        return ReferencedPairs(pairs, reference, None)
    return ReferencedPairs(pairs, reference, cache.open(scorer, MismatchedPairs(pairs), f"mismatched {name}"))


def count_answers(pairs: Pairs) -> npt.NDArray[np.int64]:
    """Learned tokens of the chosen and the rejected answer of each pair, shape (pairs, 2); 0 of an answer that is missing."""
    counts = []
    for pair in pairs:
        assert pair.branch_starts is not None
        middle = pair.branch_starts[1]
        counts.append([int(pair.loss_mask[:middle].sum()), int(pair.loss_mask[middle:].sum())])
    return np.array(counts, dtype=np.int64).reshape(-1, 2)


def measure_held_out(recipe: Recipe, scorer: Scorer, held_out: ReferencedPairs) -> dict[str, float]:
    """Held-out `loss`, `margin`, `accuracy`, `chosen_reward`, `rejected_reward` of the model as it is now."""
    mismatched = mismatched_tokens = None
    if held_out.mismatched is not None:
        others = held_out.mismatched
        mismatched, mismatched_tokens = scorer.score(others, "Held-out reference point"), count_answers(others)
    scores = PairScores(
        policy=scorer.score(held_out.pairs, "Held-out loss"),
        tokens=count_answers(held_out.pairs),
        reference=held_out.reference,
        mismatched=mismatched,
        mismatched_reference=held_out.mismatched_reference,
        mismatched_tokens=mismatched_tokens,
    )
    return scorer.backend.compare_pairs(recipe, scores)
