"""One optimizer step on torch: gradients of all micro-batches added up in their order, clipped, and applied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from config.structured_config import Recipe
from utils.backends import StepResult
from utils.backends.torch_beginning import Beginning, Gradients, compute_beginning
from utils.backends.torch_dropout import draws_random_numbers
from utils.backends.torch_gradients import SilentTensors, are_finite
from utils.backends.torch_model import TorchModel
from utils.backends.torch_optimizer import attach_noise, build_optimizer, enable_checkpointing, set_learning_rate
from utils.backends.torch_preference import make_objective
from utils.backends.torch_state import load_state, save_state
from utils.batching import Batch, list_places, split_rows
from utils.exceptions import OutOfMemory, TrainingError
from utils.methods.rewards import Numbers, average_rewards


class TorchTrainStep:
    """An optimizer over the trainable tensors, fed by micro-batches that run side by side on a CPU."""

    def __init__(self, model: TorchModel, recipe: Recipe) -> None:
        self.model = model
        self.training = recipe.training
        self.objective = make_objective(model, recipe)
        self.sums: Numbers = {}
        self.parameters = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
        self.silent = SilentTensors(model.network)
        self.optimizer = model.accelerator.prepare(build_optimizer(model.network, recipe))
        enable_checkpointing(model.network, recipe)
        self.noise = attach_noise(model.network, recipe)
        self.workers = 1 if self.noise or draws_random_numbers(model.network) else model.plan.workers
        # Each worker computes on one thread of its own; see DeviceManager.
        self.pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def step(self, micro_batches: Sequence[Batch], learning_rate: float) -> StepResult:
        """Takes one optimizer step, or none if loss or gradient is not finite: then nothing has changed (`skipped`).

        The loss is the sum over all supervised tokens (or pairs, or answers) of the step divided by their number, so the
        result does not depend on how the step was cut into micro-batches.

        Raises:
            TrainingError: there is nothing to learn from.
            OutOfMemory: a forward or backward pass does not fit; the weights are as they were.
        """
        supervised = sum(batch.supervised_tokens for batch in micro_batches)
        if supervised == 0:
            raise TrainingError("a step has no supervised token", fix="run scripts/validate.py on the recipe")
        micro_batches = self.objective.prepare(micro_batches)
        count = self.objective.count(micro_batches)
        self.model.network.train()
        try:
            loss = self._accumulate(micro_batches, count)
            norm = float(
                self.model.accelerator.clip_grad_norm_(self.parameters, self.training.max_grad_norm or math.inf)
            )
            tokens, places = sum(batch.tokens for batch in micro_batches), list_places(micro_batches)
            result = StepResult(loss, norm, tokens, supervised, places=places)
            if not math.isfinite(loss) or not math.isfinite(norm):
                self.optimizer.zero_grad()
                return replace(result, skipped=True, faulty=self._find_faulty_rows(micro_batches, count))
        except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
            self.optimizer.zero_grad()
            raise_if_out_of_memory(error)
            raise
        self.silent.observe()
        set_learning_rate(self.optimizer, learning_rate)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if not self.sums:
            return result
        chosen, rejected = (sum(batch.answers[side] for batch in micro_batches) for side in (0, 1))
        pairs = sum(len(batch.lengths) for batch in micro_batches)
        numbers = average_rewards(self.sums, pairs, (chosen, rejected))
        return replace(result, pairs=count, answers=(chosen, rejected), numbers=numbers)

    def list_silent_tensors(self) -> list[str]:
        """Names of the tensors that should learn and whose gradient was zero, or absent, in every step so far."""
        return list(self.silent.left)

    def rehearse(self, micro_batches: Sequence[Batch]) -> None:
        """Takes a step at rate 0 and forgets it: weights, optimizer and random numbers are what they were.

        Raises:
            OutOfMemory: a forward or backward pass does not fit.
        """
        with torch.random.fork_rng():
            self.step(micro_batches, 0.0)
        self.optimizer.state.clear()

    def save_state(self, folder: Path) -> None:
        """Writes the optimizer's memory, and what the saved weights beside it do not hold bit for bit."""
        save_state(self.model.network, self.optimizer.optimizer, folder)

    def load_state(self, folder: Path) -> None:
        """Puts weights and optimizer of a checkpoint back, in place.

        Raises:
            RunError: they are those of another model.
        """
        load_state(self.model.network, self.optimizer.optimizer, folder)

    def _accumulate(self, micro_batches: Sequence[Batch], count: int) -> float:
        """Adds up gradients, loss and further sums over the micro-batches, always in their order, whoever finishes first."""
        self.sums = {}
        total = 0.0
        beginning = compute_beginning(self.model, micro_batches)
        if self.workers == 1 and beginning is None:
            for batch in micro_batches:
                loss, numbers = self._compute(batch, count)
                self.model.accelerator.backward(loss)
                total += float(loss.detach())
                self._add(numbers)
            return total
        for value, numbers, gradients in self.pool.map(
            lambda batch: self._differentiate(batch, count, beginning), micro_batches
        ):
            total += value
            self._add(numbers)
            self._add_gradients(gradients[: len(self.parameters)])
            if beginning:
                beginning.add(gradients[len(self.parameters) :])
        if beginning:
            self._add_gradients(beginning.differentiate(self.parameters))
        return total

    def _compute(self, batch: Batch, count: int, beginning: Beginning | None = None) -> tuple[torch.Tensor, Numbers]:
        """A micro-batch's share of the step's loss, and its further sums."""
        if self.noise:
            self.noise.lengths = torch.from_numpy(batch.lengths)
        summed, numbers = self.objective.compute(batch, beginning)
        return summed / count, numbers

    def _differentiate(
        self, batch: Batch, count: int, beginning: Beginning | None = None
    ) -> tuple[float, Numbers, Gradients]:
        """The same with the gradient of every parameter and of the beginning; None where the loss does not depend on it."""
        loss, numbers = self._compute(batch, count, beginning)
        leaves = [*self.parameters, *(beginning.leaves if beginning else ())]
        return float(loss.detach()), numbers, torch.autograd.grad(loss, leaves, allow_unused=True)

    def _add_gradients(self, gradients: Gradients) -> None:
        """Adds gradients to those that the parameters have."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _find_faulty_rows(self, micro_batches: Sequence[Batch], count: int) -> tuple[str, ...]:
        """`file:line` of the rows whose own loss or gradient is not finite; random numbers are what they were."""
        faulty = []
        with torch.random.fork_rng():
            for batch in split_rows(micro_batches):
                loss, _, gradients = self._differentiate(batch, count)
                if not math.isfinite(loss) or not are_finite(gradients):
                    faulty.append(batch)
        return list_places(faulty)

    def _add(self, numbers: Numbers) -> None:
        """Adds a micro-batch's sums to those of the step."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value


def raise_if_out_of_memory(error: Exception) -> None:
    """Says in one word what CUDA, Metal and the CPU's allocator each say in their own.

    Raises:
        OutOfMemory: that is what the error means.
    """
    text = str(error)
    is_ours = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if is_ours or "can't allocate memory" in text or "out of memory" in text.lower():
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        message = "the memory does not hold the forward pass of one row and its gradients"
        fix = "lower data.max_length, set training.gradient_checkpointing: true, or take a smaller model"
        raise OutOfMemory(message, where="training.micro_batch_size", fix=fix) from error


def make_step(model: TorchModel, recipe: Recipe) -> TorchTrainStep:
    """Builds the optimizer."""
    return TorchTrainStep(model, recipe)
