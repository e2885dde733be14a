"""Adapter + base → one folder that any tool loads, proven equal before it appears."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe
from utils.backends import Backend
from utils.batching import Batch, pad_prompts_left
from utils.checkpoint import write_folder_atomically
from utils.exceptions import AdapterError
from utils.model_source import ModelSource
from utils.run_folder import RunFolder
from utils.tokenizer_utils import TokenizerUtils

MAX_DIVERGENCE = 0.02  # nats; rounding to bfloat16 moves a 135M model by about 0.001, a wrong merge by more than 1
PROBES = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "items(id, name, price)\nHow many items are there?",
    "2 + 2 =",
)


@dataclass(frozen=True)
class MergeDrift:
    """How far the merged model's predictions are from the adapter's.

    Attributes:
        largest_logit_difference: over all probe positions and the whole vocabulary.
        mean_divergence: KL(adapter ‖ merged) in nats per position.
        agreement: share of positions with the same likeliest token.
    """

    largest_logit_difference: float
    mean_divergence: float
    agreement: float

    def __str__(self) -> str:
        return (
            f"largest logit difference {self.largest_logit_difference:.4f}, KL divergence {self.mean_divergence:.2e} nats "
            f"per token, same likeliest token at {100 * self.agreement:.1f} % of positions"
        )


def merge_run(
    backend: Backend,
    loaded: LoadedRecipe,
    source: ModelSource,
    folder: RunFolder,
    tokenizer: TokenizerUtils,
    target: Path,
) -> MergeDrift:
    """Merges into `target`, reloads it from disk and compares its logits with those of base plus adapter.

    A quantised run merges into the full-precision base.

    Raises:
        AdapterError: the merged model does not predict what the adapter predicts; nothing is left behind.
    """
    values = loaded.recipe.model_dump(exclude_unset=True)
    values["model"] = {**values["model"], "quantization": "none"}
    recipe = Recipe(**values)
    batch = make_probe_batch(tokenizer)
    adapted = backend.load_adapter(backend.load_model(source, recipe), folder.adapter)
    expected = backend.compute_logits(adapted, batch)
    merged = backend.merge_adapter(adapted)
    dtype_name = str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")
    drifts: list[MergeDrift] = []

    def write(temporary: Path) -> None:
        backend.save_merged(merged, temporary, dtype_name)
        save_companions(tokenizer, temporary)
        reloaded = backend.load_model(ModelSource(str(temporary), temporary, {}), recipe)
        drifts.append(measure_drift(expected, backend.compute_logits(reloaded, batch)))
        if not drifts[0].mean_divergence <= MAX_DIVERGENCE:  # also true for NaN
            fix = "keep base and adapter apart: scripts/infer.py --run reads them"
            raise AdapterError(f"the merged model drifts: {drifts[0]}", where=str(target), fix=fix, code="merge-drift")

    write_folder_atomically(target, write)
    return drifts[0]


def make_probe_batch(tokenizer: TokenizerUtils) -> Batch:
    """The probe prompts as the run's model is asked them."""
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": text}]) for text in PROBES]
    return pad_prompts_left(prompts, tokenizer.tokenizer.pad_token_id)


def save_companions(tokenizer: TokenizerUtils, folder: Path) -> None:
    """Tokenizer with the template of the training, and a generation config that stops where the training stopped."""
    tokenizer.save(folder)
    path = folder / "generation_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config["eos_token_id"] = tokenizer.find_stop_ids()
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def measure_drift(expected: npt.NDArray[np.float32], got: npt.NDArray[np.float32]) -> MergeDrift:
    """Compares logits of shape (positions, vocabulary)."""
    log_p, log_q = log_softmax(expected), log_softmax(got)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()
    agreement = (expected.argmax(axis=1) == got.argmax(axis=1)).mean()
    return MergeDrift(float(np.abs(expected - got).max()), float(divergence), float(agreement))


def log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result
