"""The one training loop, for every back end and method: schedule, step, log, evaluate, keep the best, stop."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from config.structured_config import TrainingSection
from utils.backends import StepResult, TrainStep
from utils.batching import Batch, halve_batches
from utils.checkpoint import rotate_checkpoints, save_checkpoint
from utils.cli import STARTED
from utils.exceptions import OutOfMemory, TrainingError
from utils.logging import get_logger
from utils.methods.sft import SftBatches
from utils.preflight import RunPlan
from utils.progress import Progress
from utils.run_folder import RunFolder
from utils.run_watch import SPIKE_WINDOW, RunWatch, find_spike
from utils.schedules import compute_learning_rate
from utils.skipped_steps import check_skips, keep_finite, shorten, write_skip
from utils.tracking import Tracker

Result = TypeVar("Result")


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation on held-out rows measured.

    Attributes:
        loss: mean loss, in nats per token where tokens are learned.
        numbers: what a method measures besides, by name.
    """

    loss: float
    numbers: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoopParts:
    """What the loop works with; every part can be replaced by another with the same shape.

    Attributes:
        step: takes one optimizer step.
        evaluate: measures the held-out rows, or None where no rows are held out.
        save_weights: writes the trained weights into a folder.
        watch: says what is wrong with a young run.
        rehearses: the heaviest step is tried before the first one, because it may not fit into memory.
        stop_after: step after which to stop and save nothing, for a replay; None takes all steps.
    """

    step: TrainStep
    batches: SftBatches
    plan: RunPlan
    training: TrainingSection
    evaluate: Callable[[], HeldOut] | None
    save_weights: Callable[[Path], None]
    folder: RunFolder
    tracker: Tracker
    watch: RunWatch | None = None
    rehearses: bool = False
    stop_after: int | None = None


@dataclass
class TrainingState:
    """How far the run is; the numbers end in run.json.

    Attributes:
        skips_in_a_row: steps up to now that were not taken, since the last one that was.
        recent_losses: of the last steps that were taken, the newest last.
    """

    step: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    loss_sum: float = 0.0
    loss_terms: int = 0
    last_loss: float = math.nan
    seconds: float = 0.0
    time_to_first_step_s: float = math.nan
    eval_loss: float | None = None
    best_loss: float = math.inf
    best_step: int | None = None
    evaluations_without_gain: int = 0
    evaluated_at: int = 0
    saved_at: int = 0
    halvings: int = 0
    skips_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)
    stop_reason: str | None = None
    signal_number: int | None = None

    @property
    def tokens_per_second(self) -> float:
        """Real tokens over the time spent in steps alone."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def mean_loss(self) -> float | None:
        """Over all that was learned; None where no step was taken."""
        return self.loss_sum / self.loss_terms if self.loss_terms else None


def train(parts: LoopParts) -> TrainingState:
    """Runs all steps, or until early stopping or a signal; whatever was trained until then is saved.

    Raises:
        TrainingError: several losses or gradients in a row are not finite; the last good weights are on disk.
    """
    state = TrainingState()
    if parts.rehearses:
        get_logger().info("Trying the heaviest step first: it may not fit into memory")
        take_fitting(state, parts.batches.find_heaviest_step(), parts.step.rehearse)
    with listen_for_signals(state), Progress("Training", parts.plan.total_steps, "steps") as progress:
        for epoch, micro_batches in iterate_steps(parts.batches, parts.plan.total_steps):
            take_step(parts, state, micro_batches, epoch)
            follow_up_step(parts, state, progress)
            if state.stop_reason:
                break
    finish_run(parts, state)
    return state


def follow_up_step(parts: LoopParts, state: TrainingState, progress: Progress) -> None:
    """Shows, evaluates and saves what is due after a step, and ends a replay; the same for every engine."""
    progress.advance(1, f"loss {state.last_loss:.3f}, {state.tokens_per_second:.0f} tokens/s")
    if parts.stop_after is not None:
        if state.step >= parts.stop_after:
            state.stop_reason = "replayed"
        return
    if is_due(state.step, parts.plan.eval_every):
        run_evaluation(parts, state)
    if is_due(state.step, parts.plan.save_every) or state.best_step == state.step:
        save(parts, state)


def finish_run(parts: LoopParts, state: TrainingState) -> None:
    """Evaluates and saves the last step, unless that is done; a signal is not made to wait for an evaluation."""
    if parts.stop_after is not None:
        return
    if state.evaluated_at != state.step and state.signal_number is None:
        run_evaluation(parts, state)
    if state.saved_at != state.step:
        save(parts, state)


def iterate_steps(batches: SftBatches, total_steps: int) -> Iterator[tuple[float, list[Batch]]]:
    """Yields progress in epochs after the step, and the step's micro-batches, across epochs."""
    done, epoch = 0, 0
    while done < total_steps:
        for micro_batches in batches.iterate_epoch(epoch):
            if done == total_steps:
                return
            done += 1
            yield done / batches.steps_per_epoch, micro_batches
        epoch += 1


def is_due(step: int, every: int) -> bool:
    """True at every multiple."""
    return step % every == 0


def take_step(parts: LoopParts, state: TrainingState, micro_batches: Sequence[Batch], epoch: float) -> None:
    """One optimizer step, written down as one row of metrics.jsonl."""
    learning_rate = find_learning_rate(parts, state.step + 1)
    started = time.perf_counter()
    result = take_fitting(state, micro_batches, lambda batches: parts.step.step(batches, learning_rate))
    record_step(parts, state, result, learning_rate, epoch, time.perf_counter() - started)


def take_fitting(
    state: TrainingState, micro_batches: Sequence[Batch], take: Callable[[Sequence[Batch]], Result]
) -> Result:
    """Takes a step; where memory runs out, takes it again with half the rows in each forward pass, from then on.

    The rows of the step, and so its gradient, stay the same.

    Raises:
        OutOfMemory: a single row does not fit.
    """
    for _ in range(state.halvings):
        micro_batches = halve_batches(micro_batches)
    while True:
        try:
            return take(micro_batches)
        except OutOfMemory:
            largest = max(len(batch.lengths) for batch in micro_batches)
            if largest == 1:
                raise
            micro_batches = halve_batches(micro_batches)
            state.halvings += 1
            message = (
                "Step %d: out of memory with %d rows in a forward pass; going on with %d, and the same rows in a step"
            )
            get_logger().warning(message, state.step + 1, largest, -(-largest // 2))


def find_learning_rate(parts: LoopParts, step: int) -> float:
    """The rate of a step, counted from 1."""
    return compute_learning_rate(
        step,
        parts.plan.total_steps,
        peak=parts.training.learning_rate,
        scheduler=parts.training.lr_scheduler,
        warmup_steps=parts.plan.warmup_steps,
    )


def record_step(
    parts: LoopParts, state: TrainingState, result: StepResult, learning_rate: float, epoch: float, seconds: float
) -> None:
    """Adds a step to the totals, and to metrics.jsonl and the trackers as one row.

    Args:
        epoch: passes over the rows after the step.
        seconds: spent in the step alone.
    """
    if state.step == 0:
        state.time_to_first_step_s = time.time() - STARTED
    spike = None if result.skipped else find_spike(state.recent_losses, result.loss)
    update_state(state, result, seconds)
    row = {
        "step": state.step,
        "epoch": round(epoch, 4),
        "loss": keep_finite(result.loss),
        "learning_rate": learning_rate,
        "grad_norm": keep_finite(result.gradient_norm),
        "tokens": result.tokens,
        "supervised_tokens": result.supervised_tokens,
        "tokens_per_second": result.tokens / seconds,
        **result.numbers,
        **({"skipped": True} if result.skipped else {}),
        **({"spike": True} if spike else {}),
    }
    parts.folder.append_metrics(row)
    numbers = {f"train/{name}": float(value) for name, value in row.items() if name != "step" and value is not None}
    parts.tracker.log(state.step, numbers)
    if result.skipped:
        write_skip(parts.folder, state.step, epoch, result)
        stop_at_skips(parts, state)
    else:
        warn(parts, state, result, spike)


def warn(parts: LoopParts, state: TrainingState, result: StepResult, spike: str | None) -> None:
    """Logs what is suspicious about a step that was taken."""
    warnings = parts.watch.find_warnings(state.step, result) if parts.watch else []
    if spike:
        warnings.insert(0, f"{spike}; its rows: {shorten(result.places)}" if result.places else spike)
    for warning in warnings:
        get_logger().warning("Step %d: %s", state.step, warning)


def stop_at_skips(parts: LoopParts, state: TrainingState) -> None:
    """Ends a run whose last steps were not taken; if nothing was saved yet, what was learned before them is.

    Raises:
        TrainingError: too many of them.
    """
    try:
        check_skips(parts.folder, state.skips_in_a_row, state.step, parts.plan.total_steps)
    except TrainingError:
        if not state.saved_at and state.loss_terms:
            save(parts, state)
        raise


def update_state(state: TrainingState, result: StepResult, seconds: float) -> None:
    """Adds a step's numbers to the totals."""
    state.step += 1
    state.tokens += result.tokens
    state.supervised_tokens += result.supervised_tokens
    state.last_loss = result.loss
    state.seconds += seconds
    if result.skipped:
        state.skips_in_a_row += 1
        return
    state.skips_in_a_row = 0
    state.loss_sum += result.loss * result.terms
    state.loss_terms += result.terms
    state.recent_losses = [*state.recent_losses, result.loss][-SPIKE_WINDOW:]


def run_evaluation(parts: LoopParts, state: TrainingState) -> None:
    """Measures the held-out loss, remembers the best, and decides on early stopping."""
    if parts.evaluate is None:
        return
    held_out = parts.evaluate()
    loss = held_out.loss
    state.eval_loss, state.evaluated_at = loss, state.step
    numbers = {"loss": loss, **held_out.numbers}
    parts.folder.append_metrics({"step": state.step, **{f"eval_{name}": value for name, value in numbers.items()}})
    parts.tracker.log(state.step, {f"eval/{name}": value for name, value in numbers.items()})
    if loss < state.best_loss - parts.training.early_stopping_threshold:
        state.best_loss, state.best_step, state.evaluations_without_gain = loss, state.step, 0
    else:
        state.evaluations_without_gain += 1
    get_logger().info("Step %d: held-out loss %.4f, best %.4f", state.step, loss, state.best_loss)
    patience = parts.training.early_stopping_patience
    if patience is not None and state.evaluations_without_gain >= patience:
        state.stop_reason = f"no better held-out loss in {patience} evaluations"
        get_logger().info("Stopping early: %s", state.stop_reason)


def save(parts: LoopParts, state: TrainingState) -> None:
    """Writes a checkpoint and removes the ones that are neither among the newest nor the best."""
    facts: dict[str, Any] = {"step": state.step, "eval_loss": state.eval_loss, "best_step": state.best_step}
    save_checkpoint(parts.folder.path, state.step, parts.save_weights, facts)
    rotate_checkpoints(parts.folder.path, parts.training.keep_checkpoints, state.best_step)
    state.saved_at = state.step


@contextmanager
def listen_for_signals(state: TrainingState) -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM finish the step and save; a second one stops at once."""

    def stop(number: int, frame: FrameType | None) -> None:
        if state.signal_number is not None:
            raise KeyboardInterrupt
        state.signal_number = number
        state.stop_reason = f"stopped by {signal.Signals(number).name}"
        get_logger().warning("%s: finishing this step and saving; once more stops at once", signal.Signals(number).name)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
