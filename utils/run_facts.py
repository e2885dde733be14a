"""What run.json says of a run: what is known before the first step, and what came of it."""

from __future__ import annotations

import math
import secrets
import time
from typing import TYPE_CHECKING, Any

from utils.cli import STARTED
from utils.logging import get_logger
from utils.prepared_data import hash_contents
from utils.run_folder import collect_versions, find_git_state
from utils.run_identity import RECIPE_FACTS, identify_inputs, identify_recipe
from utils.threads import count_cores
from utils.training_state import TrainingState

if TYPE_CHECKING:
    from utils.training_run import PreparedRun

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


def collect_facts(run: PreparedRun) -> dict[str, Any]:
    """What is known before the first step; unknown numbers are null, so readers find every key."""
    machine = run.backend.describe_machine(run.model)
    trainable, total = run.backend.count_parameters(run.model)
    contents = hash_contents(run.preflight.data.hashes)
    earlier = run.resumption.facts if run.resumption else {}
    return {
        "status": "running",
        "recipe": earlier.get("recipe", run.loaded.name),
        "backend": machine.backend,
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
        "versions": collect_versions(run.loaded.recipe.training.engine, machine.backend),
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
