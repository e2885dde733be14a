"""Adapter + base → one folder that any tool loads, read back and compared before it appears."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from config.structured_config import ModelSection, Recipe
from utils.adapter_changes import NeedsFramework
from utils.added_tokens import find_added_ids
from utils.atomic_files import write_folder_atomically
from utils.backends import Backend, choose_backend, load_backend
from utils.batching import Batch, pad_prompts_left
from utils.exceptions import AdapterError, RunError
from utils.logging import get_logger
from utils.memory import show_bytes
from utils.merge_checks import MergeCheck, check_merge
from utils.merge_companions import plan_config, save_companions, save_config
from utils.merge_plan import MergePlan, plan_copy, plan_merge
from utils.merge_sources import Trained
from utils.model_safety import strip_code_keys
from utils.model_source import ModelSource, find_model, iterate_tensor_shapes, open_folder, read_config
from utils.progress import Progress
from utils.streaming_merge import write_plan
from utils.tokenizer_files import load_tokenizer
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
        check: what was read back and recomputed; None where the framework merged.
        drift: merged model, read back from disk, against the adapter on that same base; None where it was not asked for.
        trained_drift: merged model against the quantised base with the adapter, which is what was trained; None where
            nothing was quantised, or where it was not asked for.
    """

    base: str
    check: MergeCheck | None = None
    drift: MergeDrift | None = None
    trained_drift: MergeDrift | None = None

    def describe(self, quantization: str) -> list[str]:
        """What was verified, in lines; a run on a quantised base was trained on something else than was merged."""
        lines = [f"Merged ({self.base}) and read back: {self.check}"] if self.check else []
        lines += [f"Merged ({self.base}), loaded and compared: {self.drift}"] if self.drift else []
        base = f"the {quantization} base"
        if self.trained_drift:
            lines.append(f"Against what was trained, {base} with the adapter: {self.trained_drift}")
        elif quantization != "none":
            lines.append(f"The adapter was trained on {base}: --compare measures how far the merged model is from that")
        return lines


@dataclass(frozen=True)
class StreamedMerge:
    """A merge that is decided: the weight files, and config.json."""

    weights: MergePlan
    config: dict[str, Any]


def merge_run(run: Trained, target: Path, base: BaseName = "full", *, compare: bool = False) -> Merge:
    """Merges into `target`: file to file without a framework where that can be done, else on the back end.

    What is written is read back before the folder appears. On the back end, or with `compare`, the merged model is loaded
    and its logits are compared with those of base plus adapter.

    Args:
        base: what the adapter of a quantised run is folded into: the full-precision base, or the dequantised one, which is
            what was trained but for rounding.

    Raises:
        AdapterError: the adapter does not fit, or the merged model does not predict what the adapter predicts; nothing is
            left behind.
    """
    try:
        streamed = plan_streaming(run, base)
    except NeedsFramework as reason:
        get_logger().info("The merge loads the whole model: %s", reason)
        return merge_on_backend(open_backend(run), run, target, base)
    comparison = Comparison(open_backend(run), run, "full") if compare else None
    found: list[Merge] = []

    def write(temporary: Path) -> None:
        total = sum(file.size for file in streamed.weights.files)
        with Progress("Merging", total >> 20, "MB") as progress:
            done = 0
            for count in write_plan(streamed.weights, temporary):
                progress.advance(((done + count) >> 20) - (done >> 20))
                done += count
        save_config(run.source, streamed.config, temporary)
        save_companions(run.tokenizer, temporary)
        check = check_merge(streamed.weights, temporary)
        drifts = comparison.measure(temporary, target) if comparison else (None, None)
        found.append(Merge(describe_base(run, base), check, *drifts))

    check_room(target, sum(file.size for file in streamed.weights.files))
    write_folder_atomically(target, write)
    return found[0]


def open_backend(run: Trained) -> Backend:
    """The framework that loads the run's model."""
    return load_backend(choose_backend(run.recipe, run.source.config))


def plan_streaming(run: Trained, base: BaseName) -> StreamedMerge:
    """Decides a merge without a framework, before anything is written.

    Raises:
        NeedsFramework: it cannot be done without one.
        AdapterError: the adapter does not fit.
    """
    recipe, source = run.recipe, run.source
    if base == "dequantized":
        raise NeedsFramework("only the library that quantised the base knows what it stands for")
    if not run.is_adapter:
        dtype = find_stored_dtype(source)
        config = read_config(run.folder, str(run.folder))
        if not recipe.model.trust_remote_code:
            config, _ = strip_code_keys(config)
        return StreamedMerge(plan_copy(run.folder, dtype), {**config, "dtype": dtype})
    if choose_backend(recipe, source.config) == "mlx" and hides_from_mlx(source):
        raise NeedsFramework("mlx-lm's tools read GPT-2 only under the names of its first files")
    added_ids: tuple[int, ...] = ()
    if recipe.data.added_tokens:
        added_ids = find_added_ids(load_tokenizer(source.folder), recipe.data.added_tokens)
    adapters = [*([source.adapter] if source.adapter else []), run.folder]
    weights = plan_merge(source, adapters, added_ids, recipe.reward is not None)
    return StreamedMerge(weights, plan_config(source, run.tokenizer, weights.vocabulary, recipe.reward is not None))


def hides_from_mlx(source: ModelSource) -> bool:
    """True for a GPT-2 whose tensors begin with `transformer.`, as transformers names them today."""
    return source.model_type == "gpt2" and any(
        name.startswith("transformer.") for name, _ in iterate_tensor_shapes(source)
    )


def check_room(target: Path, size: int) -> None:
    """Refuses a merge that the disk cannot hold, before it is filled.

    Raises:
        RunError: not enough free space.
    """
    folder = next(path for path in target.absolute().parents if path.is_dir())
    if size > (free := shutil.disk_usage(folder).free):
        message = f"the merged model needs {show_bytes(size)}, and {show_bytes(free)} are free in {folder}"
        raise RunError(
            message, where=str(target), fix="free disk space, or name another folder with --out", code="disk"
        )


class Comparison:
    """The adapter's logits on its base, and the comparison of a merged folder with them."""

    def __init__(self, backend: Backend, run: Trained, base: BaseName) -> None:
        """Loads base and adapter, and computes what they predict."""
        model = run.recipe.model
        plain = model.model_copy(update={"quantization": "none"})
        self.backend, self.plain = backend, run.recipe.model_copy(update={"model": plain})
        self.batch = make_probe_batch(run.tokenizer)
        quantised = model.quantization != "none"
        self.trained = compute_trained_logits(backend, run, self.batch) if quantised else None
        self.adapted = load_adapted(backend, run, self.plain, base)
        self.expected = backend.compute_logits(self.adapted, self.batch)

    def measure(self, folder: Path, target: Path) -> tuple[MergeDrift, MergeDrift | None]:
        """Loads a merged folder and compares it: with the adapter on its base, and with what was trained if that differs.

        Raises:
            AdapterError: it drifts.
        """
        reloaded = self.backend.load_model(open_folder(ModelSection(name=str(folder)), folder, str(folder)), self.plain)
        got = self.backend.compute_logits(reloaded, self.batch)
        drift = measure_drift(self.expected, got)
        if not drift.mean_divergence <= MAX_DIVERGENCE:  # also true for NaN
            fix = "keep base and adapter apart: scripts/infer.py --run reads them"
            raise AdapterError(f"the merged model drifts: {drift}", where=str(target), fix=fix, code="merge-drift")
        return drift, None if self.trained is None else measure_drift(self.trained, got)


def merge_on_backend(backend: Backend, run: Trained, target: Path, base: BaseName) -> Merge:
    """Merges with the whole model in memory, reloads it from disk and compares its logits.

    Raises:
        AdapterError: as `merge_run`.
    """
    comparison = Comparison(backend, run, base)
    merged = backend.merge_adapter(comparison.adapted)
    found: list[Merge] = []

    def write(temporary: Path) -> None:
        backend.save_merged(merged, temporary, find_stored_dtype(run.source))
        save_companions(run.tokenizer, temporary)
        drift, trained_drift = comparison.measure(temporary, target)
        found.append(Merge(describe_base(run, base), None, drift, trained_drift))

    write_folder_atomically(target, write)
    return found[0]


def describe_base(run: Trained, base: BaseName) -> str:
    """What the adapter was folded into, in words."""
    if not run.is_adapter:
        return "a copy: all weights were trained"
    if base == "dequantized":
        return f"into what {run.recipe.model.quantization} made of the base"
    return "into the full-precision base"


def load_adapted(backend: Backend, run: Trained, plain: Recipe, base: BaseName) -> Any:
    """Base with adapter as it is going to be merged; the whole model if all was trained.

    Args:
        plain: the recipe, most often with a base that is not quantised.
    """
    if not run.is_adapter:
        whole = find_model(ModelSection(name=str(run.folder)), str(run.folder), with_weights=True)
        return backend.load_model(whole, plain)
    if base == "dequantized":
        model = backend.dequantize(backend.load_model(run.source, run.recipe))
    else:
        model = backend.load_model(run.source, plain)
    return backend.load_adapter(model, run.folder)


def compute_trained_logits(backend: Backend, run: Trained, batch: Batch) -> npt.NDArray[np.float32]:
    """What the run's model predicts as it was trained: the quantised base with the adapter beside it."""
    return backend.compute_logits(load_adapted(backend, run, run.recipe, "full"), batch)


def find_stored_dtype(source: ModelSource) -> str:
    """Number format of the base model's own files: the merged folder has the same size."""
    return str(source.config.get("dtype") or source.config.get("torch_dtype") or "float32")


def make_probe_batch(tokenizer: TokenizerUtils) -> Batch:
    """The probe prompts as the run's model is asked them."""
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": text}]) for text in PROBES]
    return pad_prompts_left(prompts, tokenizer.tokenizer.pad_token_id)


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
