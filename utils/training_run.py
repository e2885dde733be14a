"""One training run from a prepared model to a complete run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from config.recipe_io import LoadedRecipe
from utils import workload
from utils.atomic_files import explain_disk_errors, write_folder_atomically
from utils.backends import Backend, MachineFacts, TrainStep, load_engine
from utils.batching import pad_rows
from utils.checkpoint import NOT_PUBLISHED, Checkpoint
from utils.evaluation import compute_mean_loss, continue_text, make_scorer, measure_losses
from utils.flat_batches import count_common_start
from utils.logging import get_logger, hide_in_values
from utils.machine import inspect_machine
from utils.methods.preference import ReferenceCache, measure_held_out, reference_pairs
from utils.methods.sft import SftBatches
from utils.piece_encoder import EncodedExample
from utils.preflight import Preflight
from utils.report import plot_loss
from utils.resume import Resumption
from utils.run_facts import collect_facts, summarise
from utils.run_folder import RunFolder, mark_latest
from utils.run_identity import SAME, warn_about_changes
from utils.run_lock import hold_run
from utils.run_record import RunRecord
from utils.run_watch import Losses, PreferenceWatch, RunWatch
from utils.tracking import Tracker
from utils.training_loop import HeldOut, LoopParts, train
from utils.training_state import TrainingState


@dataclass(frozen=True)
class PreparedRun:
    """All that a run needs, checked and loaded.

    Attributes:
        resumption: of a run that goes on.
        checkpoint: that it goes on from; None begins with the first step.
    """

    loaded: LoadedRecipe
    preflight: Preflight
    backend: Backend
    model: Any
    folder: RunFolder
    resumption: Resumption | None = None
    checkpoint: Checkpoint | None = None


def choose_micro_batch_size(loaded: LoadedRecipe, preflight: Preflight, machine: MachineFacts) -> LoadedRecipe:
    """Replaces `micro_batch_size: auto` by what gives every worker a share and fits the token budget; packed rows have none."""
    training = loaded.recipe.training
    if training.micro_batch_size != "auto" or training.packing:
        return loaded
    lengths = preflight.data.train.lengths
    row = workload.find_usual_length(lengths, runs_flat=machine.runs_flat)
    budget = workload.find_token_budget(loaded.recipe, machine.device, machine.token_budget)
    shares = machine.runs_flat and training.engine == "tunebook"
    shared = count_common_start(preflight.data.train, lengths) if shares else 0
    size = workload.choose_micro_batch_size(training.batch_size, row, machine.workers, budget, shared)
    name = "mean" if machine.runs_flat else "longest"
    reason = f"{machine.workers} worker(s), {budget} tokens a forward pass, {name} example {row}"
    reason += f", {shared} at the beginning of all" if shared else ""
    get_logger().info("training.micro_batch_size: %d (%s)", size, reason)
    return loaded.with_automatic_value("training.micro_batch_size", size, reason)


def run_training(run: PreparedRun) -> TrainingState:
    """Trains, keeps run.json true at every moment, and leaves adapter/ (or model/) behind.

    Raises:
        TrainingError: the numbers stopped being finite; run.json then says `failed`.
        RunError: the disk is full or not writable; the last checkpoint is whole.
    """
    facts, fix = collect_facts(run), f"free disk space, then: {run.folder.resume_command}"
    on_disk = partial(explain_disk_errors, run.folder.path, fix)
    lock = nullcontext() if run.resumption else hold_run(run.folder.path)  # a run that goes on is held already
    with lock, on_disk(), RunRecord(run.folder, facts) as record, on_disk():
        mark_latest(run.folder)
        log_start(run, facts)
        settings = hide_in_values(run.loaded.recipe.model_dump(mode="json"))
        tracker = Tracker(run.loaded.recipe.tracking, run.folder.path, settings, facts["tracking_id"], facts["resumes"])
        try:
            made_with = {key: facts[key] for key in (*SAME, "code_hash", "versions")}
            state = train_with_engine(run, replace(make_parts(run, tracker), made_with=made_with))
        finally:
            tracker.close()
        publish_weights(run, state)
        if run.loaded.recipe.scratch and state.signal_number is None:
            prompt, text = continue_text(run.backend, run.model, run.preflight)
            get_logger().info("The held-out text begins: %s\nThe model of the last step goes on: %s", prompt, text)
        record.results = summarise(run, state)
        plot_loss(run.folder)
    return state


def train_with_engine(run: PreparedRun, parts: LoopParts) -> TrainingState:
    """Our loop, or the engine that the recipe names in its place."""
    recipe = run.loaded.recipe
    if recipe.training.engine == "tunebook":
        return train(parts)
    return load_engine(recipe.training.engine)(run.model, recipe, run.preflight.tokenizer.tokenizer, parts)


def make_parts(run: PreparedRun, tracker: Tracker) -> LoopParts:
    """Wires the recipe's parts together for the loop."""
    recipe, data, tokenizer = run.loaded.recipe, run.preflight.data, run.preflight.tokenizer.tokenizer
    micro_batch_size = recipe.training.micro_batch_size
    examples: Sequence[EncodedExample] = data.train
    evaluate = make_evaluate(run)
    if recipe.training.learns_pairs:
        examples, evaluate = prepare_pairs(run)
    batches = SftBatches(
        examples=examples,
        batch_size=recipe.training.batch_size,
        micro_batch_size=micro_batch_size if isinstance(micro_batch_size, int) else 1,
        pad_token_id=tokenizer.pad_token_id,
        pack_length=recipe.data.max_length if recipe.training.packing else None,
        seed=recipe.seed,
        evenly=run.backend.describe_machine(run.model).runs_flat,
    )

    def save_weights(target: Path) -> None:
        run.backend.save_weights(run.model, target)
        run.preflight.tokenizer.save(target)

    step = run.backend.make_step(run.model, recipe)
    return LoopParts(
        step=step,
        batches=batches,
        plan=run.preflight.plan,
        training=recipe.training,
        evaluate=evaluate if data.evaluation else None,
        save_weights=save_weights,
        folder=run.folder,
        tracker=tracker,
        watch=make_watch(run, step, batches),
        rehearses=may_not_fit(run),
        checkpoint=run.checkpoint,
    )


def make_watch(run: PreparedRun, step: TrainStep, batches: SftBatches) -> RunWatch:
    """What looks at the run while it is young; measures one training row before the first step and after the last of them."""
    recipe, is_pair = run.loaded.recipe, run.loaded.recipe.training.learns_pairs
    probe = [pad_rows(batches.examples[:1], batches.pad_token_id)]

    def measure() -> Losses:
        if is_pair:
            return run.backend.score_pairs(run.model, probe)
        return np.array(run.backend.evaluate(run.model, probe), dtype=np.float64)

    preference = PreferenceWatch(recipe, run.backend.describe_machine(run.model).dtype) if is_pair else None
    return RunWatch(step, run.preflight.plan.total_steps, measure, preference)


def may_not_fit(run: PreparedRun) -> bool:
    """True if `micro_batch_size` was chosen automatically and memory may not hold it: more than half of what is free is
    predicted to be needed, or nothing is."""
    is_automatic = run.loaded.origins.get("training.micro_batch_size", "").startswith("auto")
    backend = run.backend.describe_machine(run.model).backend
    predicted, free = run.preflight.resources.memory, inspect_machine(backend).available_bytes
    return is_automatic and (predicted is None or free is None or predicted.total > free / 2)


def make_evaluate(run: PreparedRun) -> Callable[[], HeldOut]:
    """The held-out loss in nats per token."""

    def evaluate() -> HeldOut:
        size = run.loaded.recipe.evaluation.batch_size
        return HeldOut(compute_mean_loss(measure_losses(run.backend, run.model, run.preflight, size, "Held-out loss")))

    return evaluate


def prepare_pairs(run: PreparedRun) -> tuple[Sequence[EncodedExample], Callable[[], HeldOut]]:
    """Training pairs with what their method needs of the reference, and the measurement of the held-out ones.

    Must be called before the first step: until then, the model is its own reference.
    """
    recipe, preflight = run.loaded.recipe, run.preflight
    machine = run.backend.describe_machine(run.model)
    scorer = make_scorer(run.backend, run.model, preflight)
    key = preflight.data.key
    cache = ReferenceCache(preflight.source, recipe, key, machine)
    training = reference_pairs(recipe, scorer, cache, preflight.data.train, "training")
    if not preflight.data.evaluation:
        return training, make_evaluate(run)
    held_out = reference_pairs(recipe, scorer, cache, preflight.data.evaluation, "held-out")

    def evaluate() -> HeldOut:
        numbers = measure_held_out(recipe, scorer, held_out)
        return HeldOut(numbers.pop("loss"), numbers)

    return training, evaluate


def log_start(run: PreparedRun, facts: dict[str, Any]) -> None:
    """Says what is about to happen, in numbers, and what has changed since the run began."""
    logger, plan, data = get_logger(), run.preflight.plan, run.preflight.data
    trainable, total = run.backend.count_parameters(run.model)
    logger.info("Run folder: %s", run.folder.path)
    if run.resumption:
        warn_about_changes(run.resumption.facts, facts)
    logger.info("Trainable: %s of %s parameters (%.2f %%)", f"{trainable:,}", f"{total:,}", 100 * trainable / total)
    logger.info(
        "%d training rows, %d held-out rows; %d steps, %d of warmup",
        len(data.train),
        len(data.evaluation),
        plan.total_steps,
        plan.warmup_steps,
    )


def publish_weights(run: PreparedRun, state: TrainingState) -> None:
    """Puts the best weights into adapter/ or model/: the best held-out loss where the run was measured to its end."""
    best = state.step if state.signal_number is not None or state.best_step is None else state.best_step
    source = run.folder.path / "checkpoints" / f"step-{best}"
    target = run.folder.adapter if run.loaded.recipe.lora else run.folder.model

    def copy(folder: Path) -> None:
        for path in source.iterdir():
            if path.name not in NOT_PUBLISHED:
                shutil.copy2(path, folder / path.name)

    # A run that a signal had stopped has published its weights of then.
    fix = f"free disk space, then: {run.folder.resume_command}"
    write_folder_atomically(target, copy, replaces=True, fix=fix)
    if best != state.step:
        get_logger().info("Kept the weights of step %d, the best on held-out rows", best)
