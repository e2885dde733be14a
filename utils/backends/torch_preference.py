"""What a step adds up, by method: token losses, or losses over pairs against a frozen reference."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel

from config.structured_config import Recipe
from utils.backends import PairScores, ignore
from utils.backends.torch_beginning import Beginning, score_side_by_side
from utils.backends.torch_dropout import silence_dropout
from utils.backends.torch_losses import (
    PairTerms,
    compute_hinge_losses,
    compute_ipo_losses,
    compute_kto_losses,
    compute_orpo_losses,
    compute_pair_log_probs,
    compute_reward_losses,
    compute_sigmoid_losses,
    compute_token_losses,
)
from utils.backends.torch_model import TorchModel
from utils.backends.torch_rewards import compute_rewards
from utils.batching import Batch, count_answer_tokens
from utils.exceptions import RunError
from utils.methods.rewards import Numbers, average_rewards


class Objective(Protocol):
    """What one optimizer step minimises: a sum over micro-batches, divided by one count over the whole step."""

    def prepare(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """Adds to the micro-batches what takes a look at the whole step, without gradient."""

    def count(self, micro_batches: Sequence[Batch]) -> int:
        """What the step's loss is a mean over."""

    def compute(self, batch: Batch, beginning: Beginning | None) -> tuple[torch.Tensor, Numbers]:
        """Loss summed over what is counted, and further sums for the log."""


class TokenObjective:
    """Supervised fine-tuning: a mean over the supervised tokens of the step."""

    def __init__(self, model: TorchModel) -> None:
        self.model = model

    def prepare(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """Nothing to add."""
        return micro_batches

    def count(self, micro_batches: Sequence[Batch]) -> int:
        """Supervised tokens."""
        return sum(batch.supervised_tokens for batch in micro_batches)

    def compute(self, batch: Batch, beginning: Beginning | None) -> tuple[torch.Tensor, Numbers]:
        """Negative log-likelihood in nats."""
        return compute_token_losses(self.model, batch, beginning).sum(), {}


class PairObjective:
    """DPO, ORPO and reward models: a mean over the pairs of the step; KTO: over its answers."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        """Switches the model's own dropout off, and copies the model where the recipe asks for a second one."""
        self.model = model
        self.recipe = recipe
        self.reference_point = 0.0
        self.reference = recipe.dpo.reference if recipe.dpo else "precomputed"
        if recipe.training.silences_dropout:
            silence_dropout(model.network)
        self.frozen: TorchModel | None = None
        if self.reference == "model":
            network = copy.deepcopy(model.network).eval().requires_grad_(False)
            self.frozen = replace(model, network=network)

    def prepare(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """Adds the reference's log-probabilities where they are computed in each step, and KTO's reference point."""
        if self.frozen is not None:
            micro_batches = add_references(self.frozen, micro_batches)
        elif self.reference == "adapter_off":
            assert isinstance(self.model.network, PeftModel)
            # For the whole step at once: workers share the network, and a switch in one would hit the others.
            with self.model.network.disable_adapter():
                micro_batches = add_references(self.model, micro_batches)
        if self.recipe.kto is not None:
            mismatched = [batch.mismatched for batch in micro_batches if batch.mismatched is not None]
            policy = score_pairs(self.model, mismatched)
            tokens = np.concatenate([count_answer_tokens(batch) for batch in mismatched])
            self.reference_point = estimate_reference_point(policy, collect_references(mismatched), tokens)
        return micro_batches

    def count(self, micro_batches: Sequence[Batch]) -> int:
        """Pairs, or under KTO answers."""
        if self.recipe.kto is not None:
            return sum(sum(batch.answers) for batch in micro_batches)
        return sum(len(batch.lengths) for batch in micro_batches)

    def compute(self, batch: Batch, beginning: Beginning | None) -> tuple[torch.Tensor, Numbers]:
        """Loss, margins and rewards, summed over the pairs."""
        policy = judge_pairs(self.model, batch, beginning)
        tokens = torch.from_numpy(count_answer_tokens(batch)).to(policy)
        reference = None if batch.reference is None else torch.from_numpy(batch.reference).to(policy)
        pairs = PairTerms(policy, tokens, reference)
        losses = compute_pair_losses(self.recipe, pairs, self.reference_point)
        return losses.sum(), sum_rewards(self.recipe, pairs)


def make_objective(model: TorchModel, recipe: Recipe) -> Objective:
    """What the recipe's method minimises."""
    return PairObjective(model, recipe) if recipe.training.learns_pairs else TokenObjective(model)


def judge_pairs(model: TorchModel, batch: Batch, beginning: Beginning | None) -> torch.Tensor:
    """What a model makes of both answers of each pair: their rewards, or their log-probabilities in nats; shape (pairs, 2)."""
    return compute_rewards(model, batch) if model.is_reward else compute_pair_log_probs(model, batch, beginning)


def compute_pair_losses(recipe: Recipe, pairs: PairTerms, reference_point: float) -> torch.Tensor:
    """The recipe's loss of each pair, shape (pairs,); under KTO the sum over its answers."""
    if recipe.kto is not None:
        return compute_kto_losses(pairs, recipe.kto, reference_point)
    if recipe.orpo is not None:
        return compute_orpo_losses(pairs, recipe.orpo)
    if recipe.reward is not None:
        return compute_reward_losses(pairs, recipe.reward)
    assert recipe.dpo is not None
    losses = {"sigmoid": compute_sigmoid_losses, "ipo": compute_ipo_losses, "hinge": compute_hinge_losses}
    return losses[recipe.dpo.loss](pairs, recipe.dpo)


def find_rewards(recipe: Recipe, pairs: PairTerms) -> torch.Tensor:
    """Rewards, shape (pairs, 2): those of a reward model; or implicit ones, beta x log-ratio to the reference, and of ORPO beta
    x mean log-probability."""
    if recipe.reward is not None:
        return pairs.policy
    if (orpo := recipe.orpo) is not None:
        return orpo.beta * pairs.policy / pairs.tokens
    section = recipe.dpo or recipe.kto
    assert section is not None
    return section.beta * pairs.ratios


def sum_rewards(recipe: Recipe, pairs: PairTerms) -> Numbers:
    """Sums over the pairs: both rewards, and pairs whose chosen answer has the larger one; a tie counts half.

    A missing answer has the reward 0. So a labelled row is right where its reward lies on the right side of 0.
    """
    rewards = find_rewards(recipe, pairs).detach()
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "accuracy": float((margins.sign() + 1).sum() / 2),
        "chosen_reward": float(rewards[:, 0].sum()),
        "rejected_reward": float(rewards[:, 1].sum()),
    }


def score_pairs(
    model: TorchModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> npt.NDArray[np.float64]:
    """What `judge_pairs` finds, without gradient, in order, shape (pairs, 2)."""

    def score(batch: Batch, beginning: Beginning | None) -> npt.NDArray[np.float64]:
        return np.asarray(judge_pairs(model, batch, beginning).cpu().numpy(), dtype=np.float64)

    return np.concatenate([np.zeros((0, 2)), *score_side_by_side(model, score, batches, on_batch)])


def add_references(model: TorchModel, micro_batches: Sequence[Batch]) -> list[Batch]:
    """The micro-batches with log-probabilities of this model as their reference."""
    scores = score_pairs(model, micro_batches)
    ends = np.cumsum([len(batch.lengths) for batch in micro_batches])[:-1]
    parts = np.split(scores, ends)
    return [replace(batch, reference=part) for batch, part in zip(micro_batches, parts, strict=True)]


def collect_references(batches: Sequence[Batch]) -> npt.NDArray[np.float64]:
    """Reference log-probabilities of all batches, shape (pairs, 2)."""
    return np.concatenate([np.zeros((0, 2)), *(batch.reference for batch in batches if batch.reference is not None)])


def estimate_reference_point(
    policy: npt.NDArray[np.float64], reference: npt.NDArray[np.float64], tokens: npt.NDArray[np.int64]
) -> float:
    """KTO's z0 in nats: the mean log-ratio over mismatched answers, never below 0 (arXiv 2402.01306, section 4).

    The paper and TRL mismatch the answers of one micro-batch among each other; here the partner of a row is fixed for the
    whole run, so that the reference is computed once, and the mean goes over all micro-batches of the step.

    Args:
        policy, reference: log-probabilities, each of shape (pairs, 2).
        tokens: of each mismatched answer; those of none are missing and do not count.

    Returns:
        NaN if one of them is not finite, so that the step is not taken.
    """
    mean = float((policy - reference)[tokens > 0].mean())
    # max(0.0, nan) is 0.0: a broken reference point would look like an ordinary one.
    return max(0.0, mean) if math.isfinite(mean) else math.nan


def compare_pairs(recipe: Recipe, scores: PairScores) -> dict[str, float]:
    """Loss, margin, accuracy and rewards of scored pairs, by the formulas of the training step.

    Raises:
        RunError: there are no pairs.
    """
    if not len(scores.policy):
        raise RunError("there are no pairs to compare", code="no-eval")
    tensors = [None if each is None else torch.from_numpy(each) for each in (scores.policy, scores.reference)]
    policy, reference = tensors
    assert policy is not None
    point = 0.0
    if recipe.kto is not None:
        assert scores.mismatched is not None
        assert scores.mismatched_reference is not None
        assert scores.mismatched_tokens is not None
        point = estimate_reference_point(scores.mismatched, scores.mismatched_reference, scores.mismatched_tokens)
    pairs = PairTerms(policy, torch.from_numpy(scores.tokens).to(policy), reference)
    chosen, rejected = (scores.tokens > 0).sum(axis=0).tolist()
    loss = float(compute_pair_losses(recipe, pairs, point).sum())
    count = chosen + rejected if recipe.kto is not None else len(policy)
    return {"loss": loss / count, **average_rewards(sum_rewards(recipe, pairs), len(policy), (chosen, rejected))}
