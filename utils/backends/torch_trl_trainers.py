"""TRL's trainers fed from outside: our order and rate come in, what a step measured goes out, nothing leaves the machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from transformers import TrainerCallback
from trl import DPOTrainer, SFTTrainer

from utils.backends import StepResult
from utils.backends.torch_gradients import are_finite
from utils.backends.torch_model import TorchModel
from utils.backends.torch_optimizer import set_learning_rate
from utils.backends.torch_step import TorchTrainStep
from utils.backends.torch_trl_batches import COUNTS, TrlBatch, WindowLoader
from utils.exceptions import TrainingError
from utils.progress import Progress
from utils.training_loop import LoopParts, find_learning_rate, follow_up_step, record_step
from utils.training_state import TrainingState

# Our name of what a step over pairs measures → TRL's. Under TRL a tie, as in the first step, is no accuracy; ours counts half.
REWARDS = {
    "margin": "rewards/margins",
    "accuracy": "rewards/accuracies",
    "chosen_reward": "rewards/chosen",
    "rejected_reward": "rewards/rejected",
}


def find_step(parts: LoopParts) -> TorchTrainStep:
    """Our own step, whose optimizer TRL is given: the same groups, decay and precision."""
    if not isinstance(parts.step, TorchTrainStep):
        raise TypeError(f"TRL runs on torch, and this step is a {type(parts.step).__name__}")
    return parts.step


class RecipeSchedule(LRScheduler):  # type: ignore[misc]  # a class of a library that is not type-checked
    """The recipe's learning rate behind torch's interface; it also serves groups with a rate of their own."""

    def __init__(self, optimizer: torch.optim.Optimizer, parts: LoopParts) -> None:
        self.parts = parts
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        """Rates of all groups for the next step; `last_epoch` counts the steps taken."""
        set_learning_rate(self.optimizer, find_learning_rate(self.parts, self.last_epoch + 1))
        return [group["lr"] for group in self.optimizer.param_groups]


class StepRecorder(TrainerCallback):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Writes down what TRL's trainer did, as our loop does, and stops it where our loop would stop."""

    def __init__(self, model: TorchModel, parts: LoopParts, state: TrainingState, progress: Progress) -> None:
        self.model, self.parts, self.state, self.progress = model, parts, state, progress
        self.base = model.base
        self.kept = copy.deepcopy((vars(self.base.config), vars(self.base.generation_config)))
        self.random = torch.get_rng_state()
        self.started = self.seconds = 0.0
        self.has_finite_losses = True
        self.counts = torch.zeros(0, 3, dtype=torch.long)

    def on_train_begin(self, *arguments: Any, **_: Any) -> None:
        """Takes back what the trainer has changed so far: the model's settings, which are saved with it, and the seed."""
        for section, values in zip((self.base.config, self.base.generation_config), self.kept, strict=True):
            vars(section).update(values)
        torch.set_rng_state(self.random)

    def count(self, micro_batches: Sequence[TrlBatch]) -> None:
        """Takes the counts out of what the trainer has collected for a step."""
        self.counts = torch.stack([batch.pop(COUNTS) for batch in micro_batches]) if micro_batches else self.counts[:0]

    def on_step_begin(self, *arguments: Any, **_: Any) -> None:
        """Starts the clock, behind the collection of the batch."""
        self.started = time.perf_counter()

    def on_pre_optimizer_step(self, *arguments: Any, **_: Any) -> None:
        """Refuses numbers that are not finite while the weights are still good."""
        has_finite_gradients = are_finite(parameter.grad for parameter in self.model.network.parameters())
        if not (self.has_finite_losses and has_finite_gradients):
            where, fix = (
                f"step {self.state.step + 1}",
                "lower training.learning_rate, or set engine: tunebook, which skips it",
            )
            raise TrainingError("a loss or gradient is not finite", where=where, fix=fix, code="not-finite")
        find_step(self.parts).silent.observe()

    def on_step_end(self, *arguments: Any, **_: Any) -> None:
        """Stops the clock."""
        self.seconds = time.perf_counter() - self.started

    def on_log(
        self, arguments: Any, trainer_state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any
    ) -> None:
        """Takes over the numbers of a step, as the trainer reports them; then evaluates, saves and stops as our loop does."""
        if logs is None or "loss" not in logs:
            return  # the summary of the whole run
        rows, tokens, learned = self.counts.sum(dim=0).tolist()
        numbers = {name: float(logs[theirs]) for name, theirs in REWARDS.items() if theirs in logs}
        loss, norm = float(logs["loss"]), float(logs["grad_norm"])
        result = StepResult(loss, norm, tokens, learned, pairs=rows if numbers else 0, numbers=numbers)
        rate, epoch = float(logs["learning_rate"]), (self.state.step + 1) / self.parts.batches.steps_per_epoch
        record_step(self.parts, self.state, result, rate, epoch, self.seconds)
        follow_up_step(self.parts, self.state, self.progress)
        control.should_training_stop = control.should_training_stop or self.state.must_stop


class FedTrainer:
    """What both trainers share; stands before TRL's class among the bases."""

    def __init__(self, loader: WindowLoader, recorder: StepRecorder, **settings: Any) -> None:
        self.loader, self.recorder = loader, recorder
        super().__init__(train_dataset=loader.dataset, data_collator=loader.collate_fn, **settings)  # type: ignore[call-arg]

    def _send_telemetry(self) -> None:
        """TRL reports each run to its makers; ours leave the machine only where the recipe says so."""

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Notes a loss that is not finite, for its gradient may be. Raising here would leave accelerate's state amid a step."""
        loss: torch.Tensor = super().training_step(*arguments, **options)  # type: ignore[misc]
        self.recorder.has_finite_losses &= bool(torch.isfinite(loss))
        return loss

    def get_train_dataloader(self) -> WindowLoader:
        """Our order."""
        return self.loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> Any:
        """Collects a step's micro-batches as transformers does, and counts them."""
        micro_batches = [batch for _, batch in zip(range(num_batches), epoch_iterator, strict=False)]
        self.recorder.count(micro_batches)
        return super().get_batch_samples(iter(micro_batches), num_batches, device)  # type: ignore[misc]


class FedSftTrainer(FedTrainer, SFTTrainer):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Supervised fine-tuning."""


class FedDpoTrainer(FedTrainer, DPOTrainer):  # type: ignore[misc]  # a class of a library that is not type-checked
    """Direct preference optimisation, in which every pair of a step weighs the same.

    TRL averages the means of micro-batches, so that in a step of 3 pairs cut into 2 and 1 the last pair would weigh double.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        """Our rows are numbers of encoded pairs already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
        """Ours come with the batches."""
        return dataset

    def compute_loss(self, model: Any, inputs: TrlBatch, *rest: Any, **options: Any) -> Any:
        """The mean over the micro-batch, times its share of the step's pairs."""
        rows, counts = len(inputs["input_ids"]) / 2, self.recorder.counts
        return super().compute_loss(model, inputs, *rest, **options) * (rows * len(counts) / int(counts[:, 0].sum()))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Averages margins and rewards over the step's pairs, where TRL would average over its micro-batches."""
        rows = self.recorder.counts[:, 0].tolist()
        for name in REWARDS.values():
            values = self._metrics["train"].get(name, [])
            if len(values) == len(rows):
                mean = sum(value * count for value, count in zip(values, rows, strict=True)) / sum(rows)
                self._metrics["train"][name] = [mean]
        super().log(logs, start_time)
