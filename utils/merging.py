"""Adapter + base → one folder that any tool loads, proven equal before it appears."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe
from utils.backends import Backend
from utils.batching import Batch, pad_prompts_left
from utils.checkpoint import write_folder_atomically
from utils.evaluation import load_trained_model
from utils.exceptions import AdapterError
from utils.model_source import ModelSource
from utils.run_folder import RunFolder
from utils.tokenizer_utils import TokenizerUtils

BaseName = Literal["full", "dequantized"]
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


@dataclass(frozen=True)
class Merge:
    """What a merge is proven by.

    Attributes:
        base: what the adapter was folded into, in words.
        drift: merged model, read back from disk, against the adapter on that same base.
        trained_drift: merged model against the quantised base with the adapter, which is what was trained; None where
            nothing was quantised.
    """

    base: str
    drift: MergeDrift
    trained_drift: MergeDrift | None = None


@dataclass(frozen=True)
class Trained:
    """A finished run and all that it takes to load it.

    Attributes:
        source: the base model.
        folder: holds adapter/ or model/.
        tokenizer: with the run's template and added tokens.
    """

    loaded: LoadedRecipe
    source: ModelSource
    folder: RunFolder
    tokenizer: TokenizerUtils


def merge_run(backend: Backend, run: Trained, target: Path, base: BaseName = "full") -> Merge:
    """Merges into `target`, reloads it from disk and compares its logits with those of base plus adapter.

    Args:
        base: what the adapter of a quantised run is folded into: the full-precision base, or the dequantised one, which is
            what was trained but for rounding.

    Raises:
        AdapterError: the merged model does not predict what the adapter predicts; nothing is left behind.
    """
    model = run.loaded.recipe.model
    plain = run.loaded.recipe.model_copy(update={"model": model.model_copy(update={"quantization": "none"})})
    batch = make_probe_batch(run.tokenizer)
    trained = compute_trained_logits(backend, run, batch) if model.quantization != "none" else None
    adapted, name = load_adapted(backend, run, plain, base)
    expected = backend.compute_logits(adapted, batch)
    merged = backend.merge_adapter(adapted)
    found: list[Merge] = []

    def write(temporary: Path) -> None:
        backend.save_merged(merged, temporary, find_stored_dtype(run.source))
        save_companions(run.tokenizer, temporary)
        reloaded = backend.load_model(ModelSource(str(temporary), temporary, {}), plain)
        got = backend.compute_logits(reloaded, batch)
        drift = measure_drift(expected, got)
        if not drift.mean_divergence <= MAX_DIVERGENCE:  # also true for NaN
            fix = "keep base and adapter apart: scripts/infer.py --run reads them"
            raise AdapterError(f"the merged model drifts: {drift}", where=str(target), fix=fix, code="merge-drift")
        found.append(Merge(name, drift, None if trained is None else measure_drift(trained, got)))

    write_folder_atomically(target, write)
    return found[0]


def load_adapted(backend: Backend, run: Trained, plain: Recipe, base: BaseName) -> tuple[Any, str]:
    """Base with adapter as it is going to be merged, and what it stands on in words; the whole model if all was trained.

    Args:
        plain: the recipe with a base that is not quantised.
    """
    if not run.folder.adapter.is_dir():
        return load_trained_model(backend, None, plain, run.folder), "a copy: all weights were trained"
    recipe = run.loaded.recipe
    if recipe.model.quantization != "none" and base == "dequantized":
        dequantised = backend.dequantize(backend.load_model(run.source, recipe))
        return backend.load_adapter(
            dequantised, run.folder.adapter
        ), f"into what {recipe.model.quantization} made of the base"
    full = backend.load_model(run.source, plain)
    return backend.load_adapter(full, run.folder.adapter), "into the full-precision base"


def compute_trained_logits(backend: Backend, run: Trained, batch: Batch) -> npt.NDArray[np.float32]:
    """What the run's model predicts as it was trained: the quantised base with the adapter beside it."""
    base = backend.load_model(run.source, run.loaded.recipe)
    return backend.compute_logits(backend.load_adapter(base, run.folder.adapter), batch)


def find_stored_dtype(source: ModelSource) -> str:
    """Number format of the base model's own files: the merged folder has the same size."""
    return str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")


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
