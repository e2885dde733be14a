"""One optimizer step on torch: gradients of all micro-batches added up in their order, clipped, and applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn

from config.structured_config import Recipe
from utils.backends import StepResult
from utils.backends.torch_losses import compute_token_losses
from utils.backends.torch_model import TorchModel
from utils.backends.torch_optimizer import attach_noise, build_optimizer, enable_checkpointing, set_learning_rate
from utils.batching import Batch
from utils.exceptions import TrainingError


class TorchTrainStep:
    """An optimizer over the trainable tensors, fed by micro-batches that run side by side on a CPU."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.model = model
        self.training = recipe.training
        self.parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
        self.optimizer = model.accelerator.prepare(build_optimizer(model.network, recipe))
        enable_checkpointing(model.network, recipe)
        self.noise = attach_noise(model.network, recipe)
        self.workers = 1 if self.noise or draws_random_numbers(model.network) else model.plan.workers
        # Each worker computes on one thread of its own; see DeviceManager.
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Takes one optimizer step.

        The loss is the sum over all supervised tokens of the step divided by their number, so the result does not depend
        on how the step was cut into micro-batches.

        Raises:
            TrainingError: loss or gradient is not finite; the weights are as they were before the step.
        """
        self.model.network.train()
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        if supervised == 0:
            raise TrainingError("a step has no supervised token", fix="run scripts/validate.py on the recipe")
        loss = self._accumulate(micro_batches, supervised)
        limit = self.training.max_grad_norm or math.inf
        norm = float(self.model.accelerator.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            fix = "lower training.learning_rate, or set model.dtype: float32"
            raise TrainingError(f"loss {loss} with gradient norm {norm}", fix=fix, code="not-finite")
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepResult(loss, norm, sum(batch.tokens for batch in micro_batches), supervised)

    def _accumulate(self, micro_batches: Sequence[Batch], supervised: int) -> float:
        """Adds up gradients and loss over the micro-batches, always in their order, whoever finishes first."""
        if self.workers == 1:
            total = 0.0
            for batch in micro_batches:
                if self.noise:
                    self.noise.lengths = torch.from_numpy(batch.lengths)
                loss = compute_token_losses(self.model, batch).sum() / supervised
                self.model.accelerator.backward(loss)
                total += float(loss.detach())
            return total

        def differentiate(batch: Batch) -> tuple[float, tuple[torch.Tensor, ...]]:
            loss = compute_token_losses(self.model, batch).sum() / supervised
            return float(loss.detach()), torch.autograd.grad(loss, self.parameters)

        total = 0.0
        for loss, gradients in self.pool.map(differentiate, micro_batches):
            total += loss
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total


def draws_random_numbers(network: nn.Module) -> bool:
    """True if a training forward pass depends on a generator, whose order parallel workers would not keep."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def make_step(model: TorchModel, recipe: Recipe) -> TorchTrainStep:
    """Builds the optimizer."""
    return TorchTrainStep(model, recipe)
