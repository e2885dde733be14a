"""The MLX back end: models, LoRA layers and generation from mlx-lm, the loss and the step are ours."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten

from config.structured_config import Recipe
from utils.backends import MachineFacts, PairScores, ignore
from utils.backends.mlx_adapters import attach_lora as attach_lora
from utils.backends.mlx_adapters import load_adapter as load_adapter
from utils.backends.mlx_adapters import save_network
from utils.backends.mlx_adapters import save_weights as save_weights
from utils.backends.mlx_generation import generate as generate
from utils.backends.mlx_generation import stream as stream
from utils.backends.mlx_losses import (
    PairTerms,
    compute_dpo_losses,
    compute_pair_log_probs,
    compute_token_losses,
    place_batch,
    sum_rewards,
)
from utils.backends.mlx_merging import dequantize as dequantize
from utils.backends.mlx_merging import fold_adapter
from utils.backends.mlx_merging import merge_adapter as merge_adapter
from utils.backends.mlx_model import MlxModel, count_values, load_base
from utils.backends.mlx_model import measure_peak_memory as measure_peak_memory
from utils.backends.mlx_step import as_array
from utils.backends.mlx_step import make_step as make_step
from utils.batching import Batch
from utils.exceptions import RunError
from utils.machine import measure_memory
from utils.methods.rewards import average_rewards
from utils.model_source import ModelSource
from utils.threads import count_cores


def load_model(source: ModelSource, recipe: Recipe) -> MlxModel:
    """Loads the base model onto Apple's GPU, or elsewhere the CPU, with its adapter folded in, ready to infer.

    Raises:
        ModelLoadingError: the files do not make a model.
        AdapterError: the adapter that is folded in does not fit.
    """
    return fold_adapter(load_base(source, recipe))


def describe_machine(model: MlxModel) -> MachineFacts:
    """What the model runs on, with the reason for each automatic choice."""
    name = mx.device_info().get("device_name") if model.device == "metal" else None
    return MachineFacts(
        backend="mlx",
        device=model.device,
        device_name=str(name or f"{platform.processor() or platform.machine()}, {count_cores()} cores"),
        dtype=model.dtype_name,
        memory_bytes=measure_memory()[0],
        token_budget=model.token_budget,
        workers=1,
        reasons=model.reasons,
        quantization=model.quantization,
        threads=model.threads,
    )


def save_merged(model: MlxModel, folder: Path, dtype_name: str) -> None:
    """Writes a plain model as safetensors with its config and generation config."""
    save_network(model, folder, dtype_name)


def count_parameters(model: MlxModel) -> tuple[int, int]:
    """Trainable and all parameters; of a quantised matrix the numbers that it stands for."""
    trainable = sum(value.size for _, value in tree_flatten(model.network.trainable_parameters()))
    return trainable, count_values(model.network)


def evaluate(
    model: MlxModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> list[tuple[float, int]]:
    """Sum of the negative log-likelihood in nats, and supervised tokens, of every row in order."""
    model.network.eval()
    found: list[tuple[float, int]] = []
    for batch in batches:
        losses = np.array(compute_token_losses(model.network, place_batch(batch)), dtype=np.float64)
        ends = np.cumsum(batch.loss_mask.sum(axis=1))
        found += [(float(part.sum()), len(part)) for part in np.split(losses, ends[:-1])]
        on_batch(len(batch.lengths))
    return found


def score_pairs(
    model: MlxModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> npt.NDArray[np.float64]:
    """Log-probability of both answers of each pair in nats, in order, shape (pairs, 2)."""
    model.network.eval()
    found = [np.zeros((0, 2))]
    for batch in batches:
        found.append(np.array(compute_pair_log_probs(model.network, place_batch(batch)), dtype=np.float64))
        on_batch(len(batch.lengths))
    return np.concatenate(found)


def score_rows(
    model: MlxModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> npt.NDArray[np.float64]:
    """Of reward models, which this back end does not have.

    Raises:
        RunError: always.
    """
    raise RunError("backend mlx has no reward models", where="backend", fix="set backend: torch", code="mlx-method")


def compare_pairs(recipe: Recipe, scores: PairScores) -> dict[str, float]:
    """Loss, margin, accuracy and rewards of scored pairs, by the formulas of the training step.

    Raises:
        RunError: there are no pairs.
    """
    if not len(scores.policy) or recipe.dpo is None:
        raise RunError("there are no pairs to compare", code="no-eval")
    pairs = PairTerms(as_array(scores.policy), as_array(scores.reference), as_array(scores.tokens))
    loss, count = float(compute_dpo_losses(pairs, recipe.dpo).sum()), len(scores.policy)
    return {"loss": loss / count, **average_rewards(sum_rewards(pairs, recipe.dpo), count, (count, count))}


def compute_logits(model: MlxModel, batch: Batch) -> npt.NDArray[np.float32]:
    """Logits at every real position, shape (tokens, vocabulary), wherever the padding stands."""
    model.network.eval()
    real = np.ones_like(batch.loss_mask) if batch.attention_mask is None else batch.attention_mask
    rows = [model.network(mx.array(ids[mask][None]))[0] for ids, mask in zip(batch.input_ids, real, strict=True)]
    return np.concatenate([np.array(row.astype(mx.float32)) for row in rows])
