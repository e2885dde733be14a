"""One optimizer step on MLX: gradients of all micro-batches added up in their order, clipped, and applied."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from config.structured_config import Recipe
from utils.backends import StepResult
from utils.backends.mlx_compile import Compiled
from utils.backends.mlx_layers import attach_noise, checkpoint_layers, draw_again
from utils.backends.mlx_losses import (
    Arrays,
    PairTerms,
    compute_dpo_losses,
    compute_pair_log_probs,
    compute_token_losses,
    place_batch,
    sum_rewards,
)
from utils.backends.mlx_model import MlxModel
from utils.backends.mlx_optimizer import MlxOptimizer
from utils.backends.mlx_state import load_state, save_state
from utils.batching import Batch, list_places, split_rows
from utils.exceptions import OutOfMemory, TrainingError
from utils.logging import get_logger
from utils.methods.rewards import Numbers, average_rewards
from utils.mlx_support import find_own_dropout

Tree = dict[str, Any]
SHAPES = 32  # lengths and numbers of learned tokens are padded to multiples of it where each shape is compiled


class MlxTrainStep:
    """An optimizer over the trainable tensors, fed by one micro-batch after the other."""

    def __init__(self, model: MlxModel, recipe: Recipe, *, compiles: bool = False) -> None:
        """Builds the optimizer.

        Args:
            compiles: loss and gradients are compiled, once for each shape of a micro-batch.
        """
        self.model, self.training, self.dpo = model, recipe.training, recipe.dpo
        self.network = model.network
        # Arrays never change in place, so these stay the untouched model's: DPO's reference, without a copy of what is frozen.
        self.start: Tree = self.network.trainable_parameters() if self.scores_references else {}
        self.sums: Numbers = {}
        self.silent = {name for name, _ in tree_flatten(self.network.trainable_parameters())}
        self.optimizer = MlxOptimizer(self.network, recipe)
        if recipe.training.gradient_checkpointing is True:
            checkpoint_layers(self.network)
        self.noise = attach_noise(self.network, recipe.training.neftune_alpha)
        differentiate = nn.value_and_grad(self.network, self._compute)
        self.multiple = SHAPES if compiles else 1
        self.differentiate = Compiled(self.network, differentiate) if compiles else differentiate

    @property
    def scores_references(self) -> bool:
        """True where the untouched model scores the pairs of each step."""
        return self.dpo is not None and self.dpo.reference != "precomputed"

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Takes one optimizer step, or none if loss or gradient is not finite: then nothing has changed (`skipped`).

        The loss is the sum over all supervised tokens (or pairs) of the step divided by their number, so the result does not
        depend on how the step was cut into micro-batches.

        Raises:
            TrainingError: there is nothing to learn from.
            OutOfMemory: a forward or backward pass does not fit; the weights are as they were.
        """
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        if supervised == 0:
            raise TrainingError("a step has no supervised token", fix="run scripts/validate.py on the recipe")
        with explain_memory():
            micro_batches = self._add_references(micro_batches)
            pairs = sum(len(batch.lengths) for batch in micro_batches) if self.dpo else 0
            self.network.train()
            loss, gradients = self._accumulate(micro_batches, pairs or supervised)
            norm = measure_norm(gradients)
            tokens, places = sum(batch.tokens for batch in micro_batches), list_places(micro_batches)
            result = StepResult(loss, norm, tokens, supervised, places=places)
            if not math.isfinite(loss) or not math.isfinite(norm):
                faulty = self._find_faulty_rows(micro_batches, pairs or supervised)
                self.network.eval()
                return replace(result, skipped=True, faulty=faulty)
            self._observe(gradients)
            if self.training.max_grad_norm and norm > self.training.max_grad_norm:
                factor = self.training.max_grad_norm / (norm + 1e-6)  # as torch.nn.utils.clip_grad_norm_
                gradients = tree_map(lambda gradient: gradient * factor, gradients)
            self.optimizer.update(gradients, learning_rate)
        self.network.eval()
        if not self.dpo:
            return result
        chosen, rejected = (sum(batch.answers[side] for batch in micro_batches) for side in (0, 1))
        numbers = average_rewards(self.sums, pairs, (chosen, rejected))
        return replace(result, pairs=pairs, answers=(chosen, rejected), numbers=numbers)

    def list_silent_tensors(self) -> list[str]:
        """Names of the tensors that should learn and whose gradient was zero in every step so far."""
        return sorted(self.silent)

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """Takes a step at rate 0 and forgets it: weights, optimizer and random numbers are what they were.

        Raises:
            OutOfMemory: a forward or backward pass does not fit.
        """
        weights = self.network.trainable_parameters()
        with draw_again():
            self.step(micro_batches, 0.0)
        self.network.update(weights)
        self.optimizer.forget()

    def save_state(self, folder: Path) -> None:
        """Writes the optimizer's memory; the trained tensors stand in the saved weights bit for bit."""
        save_state(self.optimizer, folder)

    def load_state(self, folder: Path) -> None:
        """Puts weights and optimizer of a checkpoint back.

        Raises:
            RunError: they are those of another model.
        """
        load_state(self.model, self.optimizer, folder)

    def _accumulate(self, micro_batches: Sequence[Batch], count: int) -> tuple[float, Tree]:
        """Loss, and gradients added up over the micro-batches; each is computed before the next one is begun."""
        self.sums, total, gradients = {}, 0.0, None
        for batch in micro_batches:
            arrays = place_batch(batch, self.multiple)
            (loss, policy), found = self.differentiate(arrays, mx.array(float(count)))
            gradients = found if gradients is None else tree_map(mx.add, gradients, found)
            mx.eval(loss, gradients, policy)
            total += float(loss)
            if self.dpo:
                pairs = PairTerms(policy, arrays["reference"], arrays["tokens"])
                for name, value in sum_rewards(pairs, self.dpo).items():
                    self.sums[name] = self.sums.get(name, 0.0) + value
        assert gradients is not None
        return total, gradients

    def _compute(self, arrays: Arrays, count: mx.array) -> tuple[mx.array, mx.array]:
        """A micro-batch's share of the step's loss; of pairs also their log-probabilities, shape (pairs, 2), else nothing."""
        if self.noise:
            self.noise.lengths = arrays["lengths"]
        if not self.dpo:
            return compute_token_losses(self.network, arrays).sum() / count, mx.zeros(0)
        policy = compute_pair_log_probs(self.network, arrays)
        losses = compute_dpo_losses(PairTerms(policy, arrays["reference"], arrays["tokens"]), self.dpo)
        return losses.sum() / count, policy

    def _add_references(self, micro_batches: Sequence[Batch]) -> Sequence[Batch]:
        """Adds the untouched model's log-probabilities where the recipe wants them computed in each step."""
        if not self.scores_references:
            return micro_batches
        weights, found = self.network.trainable_parameters(), []
        self.network.update(self.start)
        self.network.eval()
        for batch in micro_batches:
            scores = compute_pair_log_probs(self.network, place_batch(batch))
            found.append(replace(batch, reference=np.array(scores, dtype=np.float64)))
        self.network.update(weights)
        return found

    def _observe(self, gradients: Tree) -> None:
        """Strikes tensors off the list that have had a gradient. After two steps next to nothing is left to look at."""
        if self.silent:
            self.silent -= {
                name for name, value in tree_flatten(gradients) if name in self.silent and bool(mx.any(value != 0))
            }

    def _find_faulty_rows(self, micro_batches: Sequence[Batch], count: int) -> tuple[str, ...]:
        """`file:line` of the rows whose own loss or gradient is not finite; random numbers are what they were."""
        faulty = []
        with draw_again():
            for batch in split_rows(micro_batches):
                arrays = place_batch(batch, self.multiple)
                (loss, _), gradients = self.differentiate(arrays, mx.array(float(count)))
                if not math.isfinite(float(loss)) or not math.isfinite(measure_norm(gradients)):
                    faulty.append(batch)
        return list_places(faulty)


def measure_norm(gradients: Tree) -> float:
    """L2 norm over all tensors, summed in float32."""
    squares = [mx.square(value.astype(mx.float32)).sum() for _, value in tree_flatten(gradients)]
    return math.sqrt(total) if (total := float(mx.stack(squares).sum())) >= 0 else math.nan


def as_array(values: np.ndarray | None) -> mx.array:
    """Numbers for MLX, which has no float64 on a GPU."""
    assert values is not None
    return mx.array(values.astype(np.float32))


@contextmanager
def explain_memory() -> Iterator[None]:
    """Says what MLX's allocators mean.

    Raises:
        OutOfMemory: a tensor did not fit.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        words = ("malloc", "out of memory", "insufficient memory")
        if isinstance(error, RuntimeError) and not any(word in str(error).lower() for word in words):
            raise
        mx.clear_cache()
        message = "the memory does not hold the forward pass of one row and its gradients"
        fix = "lower data.max_length, set training.gradient_checkpointing: true, or take a smaller model"
        raise OutOfMemory(message, where="training.micro_batch_size", fix=fix) from error


def make_step(model: MlxModel, recipe: Recipe) -> MlxTrainStep:
    """Builds the optimizer, and says where torch would train otherwise.

    On Apple's GPU the step is compiled; on a CPU that took longer than it saved. Layers that are computed twice are not: they
    look at the generator's state, which a compiled graph does not know while it is made.
    """
    if recipe.dpo is None and (rate := find_own_dropout(model.source.config)):
        get_logger().info("The model's own dropout (%g) is off: mlx-lm's models have none", rate)
    compiles = model.device == "metal" and recipe.training.gradient_checkpointing is not True
    return MlxTrainStep(model, recipe, compiles=compiles)
