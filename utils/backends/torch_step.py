"""One optimizer step on torch: gradients of all micro-batches added up in their order, clipped, and applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from config.structured_config import Recipe
from utils.backends import StepResult
from utils.backends.torch_model import TorchModel
from utils.backends.torch_preference import Numbers, make_objective
from utils.batching import Batch
from utils.exceptions import TrainingError


class NeftuneNoise:
    """NEFTune (arXiv 2310.05914, section 2): uniform noise on the embeddings, scaled by alpha / sqrt(length x width).

    The length is that of the row's real tokens; the usual implementations take the padded one.
    """

    def __init__(self, network: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths = torch.ones(1)
        network.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook; does nothing in evaluation."""
        if not module.training:
            return output
        scale = self.alpha / torch.sqrt(self.lengths.to(output) * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[:, None, None]


class TorchTrainStep:
    """AdamW over the trainable tensors, fed by micro-batches that run side by side on a CPU."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.model = model
        self.training = recipe.training
        self.objective = make_objective(model, recipe)
        self.sums: Numbers = {}
        self.parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
        # Decay acts on matrices only: pulling biases and norms towards 0 has no regularising meaning.
        matrices = [parameter for parameter in self.parameters if parameter.ndim >= 2]
        vectors = [parameter for parameter in self.parameters if parameter.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.training.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], fused=True)
        self.optimizer = model.accelerator.prepare(optimizer)
        if self.training.gradient_checkpointing:
            model.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.noise = None
        if self.training.neftune_alpha is not None:
            self.noise = NeftuneNoise(model.network, self.training.neftune_alpha)
        self.workers = 1 if self.noise or draws_random_numbers(model.network) else model.plan.workers
        # Each worker computes on one thread of its own; see DeviceManager.
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Takes one optimizer step.

        The loss is the sum over all supervised tokens (or pairs) of the step divided by their number, so the result does not
        depend on how the step was cut into micro-batches.

        Raises:
            TrainingError: loss or gradient is not finite; the weights are as they were before the step.
        """
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        if supervised == 0:
            raise TrainingError("a step has no supervised token", fix="run scripts/validate.py on the recipe")
        micro_batches = self.objective.prepare(micro_batches)
        count = self.objective.count(micro_batches)
        self.model.network.train()
        loss = self._accumulate(micro_batches, count)
        limit = self.training.max_grad_norm or math.inf
        norm = float(self.model.accelerator.clip_grad_norm_(self.parameters, limit))
        if not math.isfinite(loss) or not math.isfinite(norm):
            self.optimizer.zero_grad()
            fix = "lower training.learning_rate, or set model.dtype: float32"
            raise TrainingError(f"loss {loss} with gradient norm {norm}", fix=fix, code="not-finite")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(batch.tokens for batch in micro_batches)
        numbers = {name: value / count for name, value in self.sums.items()}
        return StepResult(loss, norm, tokens, supervised, pairs=count if numbers else 0, numbers=numbers)

    def _accumulate(self, micro_batches: Sequence[Batch], count: int) -> float:
        """Adds up gradients, loss and further sums over the micro-batches, always in their order, whoever finishes first."""
        self.sums = {}
        if self.workers == 1:
            total = 0.0
            for batch in micro_batches:
                if self.noise:
                    self.noise.lengths = torch.from_numpy(batch.lengths)
                summed, numbers = self.objective.compute(batch)
                loss = summed / count
                self.model.accelerator.backward(loss)
                total += float(loss.detach())
                self._add(numbers)
            return total

        def differentiate(batch: Batch) -> tuple[float, Numbers, tuple[torch.Tensor, ...]]:
            summed, numbers = self.objective.compute(batch)
            loss = summed / count
            return float(loss.detach()), numbers, torch.autograd.grad(loss, self.parameters)

        total = 0.0
        for loss, numbers, gradients in self.pool.map(differentiate, micro_batches):
            total += loss
            self._add(numbers)
            for parameter, gradient in zip(self.parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def _add(self, numbers: Numbers) -> None:
        """Adds a micro-batch's sums to those of the step."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


def draws_random_numbers(network: nn.Module) -> bool:
    """True if a training forward pass depends on a generator, whose order parallel workers would not keep."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in network.modules())


def make_step(model: TorchModel, recipe: Recipe) -> TorchTrainStep:
    """Builds the optimizer."""
    return TorchTrainStep(model, recipe)
