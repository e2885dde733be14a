"""One training run from a prepared model to a complete run folder."""

from __future__ import annotations

import math
import secrets
import shutil
import time
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
from utils.cli import STARTED
from utils.evaluation import compute_mean_loss, continue_text, make_scorer, measure_losses
from utils.logging import get_logger, hide_in_values
from utils.machine import count_cores, inspect_machine
from utils.methods.preference import ReferenceCache, measure_held_out, reference_pairs
from utils.methods.sft import SftBatches
from utils.piece_encoder import EncodedExample
from utils.preflight import Preflight
from utils.prepared_data import hash_contents
from utils.report import plot_loss
from utils.resume import Resumption
from utils.run_folder import RunFolder, RunRecord, collect_versions, find_git_state, mark_latest
from utils.run_identity import RECIPE_FACTS, SAME, identify_inputs, identify_recipe, warn_about_changes
from utils.run_lock import hold_run
from utils.run_watch import Losses, PreferenceWatch, RunWatch
from utils.tracking import Tracker
from utils.training_loop import HeldOut, LoopParts, train
from utils.training_state import TrainingState

RESULTS = (
    "steps",
    "tokens",
    "supervised_tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "time_to_first_step_s",
    "train_loss",
    "eval_loss",
    "best_step",
    "skipped_steps",
)


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
    size = workload.choose_micro_batch_size(training.batch_size, row, machine.workers, budget)
    name = "mean" if machine.runs_flat else "longest"
    reason = f"{machine.workers} worker(s), {budget} tokens a forward pass, {name} example {row}"
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
    predicted, free = run.preflight.resources.memory, inspect_machine().available_bytes
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
    cache = ReferenceCache(preflight.source, recipe, key, (machine.device, machine.dtype))
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


def collect_facts(run: PreparedRun) -> dict[str, Any]:
    """What is known before the first step; unknown numbers are null, so readers find every key."""
    machine = run.backend.describe_machine(run.model)
    trainable, total = run.backend.count_parameters(run.model)
    contents = hash_contents(run.preflight.data.hashes)
    earlier = run.resumption.facts if run.resumption else {}
    return {
        "status": "running",
        "recipe": earlier.get("recipe", run.loaded.name),
        "engine": run.loaded.recipe.training.engine,
        "device": machine.device,
        "device_name": machine.device_name,
        "memory_bytes": machine.memory_bytes,
        "dtype": machine.dtype,
        "threads": machine.threads,
        "automatic_choices": list(machine.reasons),
        **dict.fromkeys(RESULTS),
        "predicted_memory": predicted.to_json() if (predicted := run.preflight.resources.memory) else None,
        "trainable_parameters": trainable,
        "parameters": total,
        "quantization": machine.quantization,
        "trust_remote_code": run.loaded.recipe.model.trust_remote_code,
        "ignored_config_keys": list(run.preflight.source.ignored),
        "data_hash": contents["train"],
        "eval_hash": contents["eval"],
        "row_formats": run.preflight.scan.formats,
        "strategy": run.preflight.tokenizer.strategy,
        **identify_inputs(run.preflight),
        "workers": machine.workers,
        "cores": count_cores(),
        "started": earlier.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(STARTED)),
        "resumes": earlier.get("resumes", 0) + 1 if run.resumption else 0,
        "tracking_id": earlier.get("tracking_id") or secrets.token_hex(4),
        "versions": collect_versions(run.loaded.recipe.training.engine),
        "git": find_git_state(),
        **({key: earlier[key] for key in RECIPE_FACTS} if run.resumption else identify_recipe(run.loaded)),
    }


def summarise(run: PreparedRun, state: TrainingState) -> dict[str, Any]:
    """The results of a run that ended by itself or by a signal."""
    peak, predicted = run.backend.measure_peak_memory(run.model), run.preflight.resources.memory
    if predicted:
        message = "Peak memory: %.2f GB, predicted %.2f GB (%+.0f %%)"
        get_logger().info(message, peak / 1e9, predicted.total / 1e9, 100 * (predicted.total / peak - 1))
    if skipped := run.folder.count_skipped_steps():
        get_logger().warning(
            "%d of %d steps were not taken; their rows: %s", skipped, state.step, run.folder.skipped_file
        )
    return {
        "status": "stopped" if state.signal_number is not None else "finished",
        "stop_reason": f"stopped by {state.signals.name}" if state.signals.name else state.stop_reason,
        "halvings": state.halvings,
        "skipped_steps": skipped,
        "steps": state.step,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "tokens_per_second": state.tokens_per_second,
        "peak_memory_bytes": peak,
        "memory_error": predicted.total / peak - 1 if predicted else None,
        "time_to_first_step_s": state.time_to_first_step_s,
        "train_loss": state.mean_loss,
        "eval_loss": state.eval_loss,
        "best_step": state.best_step,
        "best_eval_loss": state.best_loss if math.isfinite(state.best_loss) else None,
        "seconds": state.elapsed_s,
    }
