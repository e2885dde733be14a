"""The one training loop, for every back end and method: schedule, step, log, evaluate, keep the best, stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from config.structured_config import TrainingSection
from utils.backends import StepResult, TrainStep
from utils.batching import Batch, halve_batches
from utils.checkpoint import Checkpoint
from utils.cli import STARTED
from utils.exceptions import OutOfMemory, TrainingError
from utils.logging import get_logger
from utils.loop_checkpoints import begin, restore, save
from utils.methods.sft import SftBatches
from utils.preflight import RunPlan
from utils.progress import Progress
from utils.run_folder import RunFolder
from utils.run_watch import SPIKE_WINDOW, RunWatch, find_spike
from utils.schedules import compute_learning_rate
from utils.skipped_steps import check_skips, keep_finite, shorten, write_skip
from utils.stop_signals import Interrupted, StopSignals
from utils.tracking import Tracker
from utils.training_state import TrainingState

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
        made_with: hashes and versions of what the run depends on; every checkpoint holds them.
        checkpoint: where an earlier process stopped.
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
    made_with: dict[str, Any] = field(default_factory=dict)
    checkpoint: Checkpoint | None = None


def train(parts: LoopParts) -> TrainingState:
    """Runs all steps, or until early stopping or a signal; whatever was trained until then is saved.

    Raises:
        TrainingError: several losses or gradients in a row are not finite; the last good weights are on disk.
    """
    signals, total = StopSignals(), parts.plan.total_steps
    with signals.listen():
        state = restore(parts, parts.checkpoint) if parts.checkpoint else begin(parts)
        state.signals = signals
        if parts.rehearses and not state.step:
            get_logger().info("Trying the heaviest step first: it may not fit into memory")
            take_fitting(state, parts.batches.find_heaviest_step(), parts.step.rehearse)
        if state.step:
            evaluate_and_save(parts, state)  # a signal may have put the evaluation off
        with Progress("Training", total, "steps", state.step) as progress:
            for epoch, micro_batches in iterate_steps(parts.batches, total, state.step):
                if state.must_stop:
                    break
                take_step(parts, state, micro_batches, epoch)
                follow_up_step(parts, state, progress)
        finish_run(parts, state)
    return state


def follow_up_step(parts: LoopParts, state: TrainingState, progress: Progress) -> None:
    """Shows, evaluates and saves what is due after a step, and ends a replay; the same for every engine."""
    progress.advance(1, f"loss {state.last_loss:.3f}, {state.tokens_per_second:.0f} tokens/s")
    if parts.stop_after is not None:
        if state.step >= parts.stop_after:
            state.stop_reason = "replayed"
        return
    evaluate_and_save(parts, state)


def evaluate_and_save(parts: LoopParts, state: TrainingState) -> None:
    """Does what is due at this step and not done yet."""
    if is_due(state.step, parts.plan.eval_every) and state.evaluated_at != state.step:
        run_evaluation(parts, state)
    if is_due(state.step, parts.plan.save_every) or state.best_step == state.step:
        save(parts, state)


def finish_run(parts: LoopParts, state: TrainingState) -> None:
    """Evaluates and saves the last step, unless that is done; a signal is not made to wait for an evaluation."""
    if parts.stop_after is not None:
        return
    if state.evaluated_at != state.step and state.signal_number is None:
        run_evaluation(parts, state)
    save(parts, state)
    if state.signal_number is not None:
        get_logger().warning("%s: stopped after step %d, and saved it", state.signals.name, state.step)


def iterate_steps(batches: SftBatches, total_steps: int, done: int = 0) -> Iterator[tuple[float, list[Batch]]]:
    """Yields progress in epochs after the step, and the step's micro-batches, across epochs.

    Args:
        done: steps that an earlier process has taken. The order of an epoch follows from the seed, so they are skipped at once.
    """
    while done < total_steps:
        epoch, start = divmod(done, batches.steps_per_epoch)
        for micro_batches in batches.iterate_epoch(epoch, start):
            if done == total_steps:
                return
            done += 1
            yield done / batches.steps_per_epoch, micro_batches


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
    try:
        with state.signals.interrupt():
            held_out = parts.evaluate()
    except Interrupted:
        get_logger().info("Step %d: the held-out loss will be measured when the run goes on", state.step)
        return
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
