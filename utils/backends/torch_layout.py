"""Whether a model may take flat batches (`utils/flat_batches.py`): tried on a few tokens when it is loaded, never assumed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from config.structured_config import Recipe
from utils.backends import torch_attention
from utils.backends.torch_beginning import Beginning
from utils.backends.torch_dropout import draws_random_numbers
from utils.backends.torch_losses import compute_token_losses
from utils.backends.torch_model import TorchModel
from utils.batching import Batch, pad_rows
from utils.logging import get_logger
from utils.piece_encoder import EncodedExample

# Tokens of the two rows that are tried, and of what they begin with together.
LENGTHS, SHARED = (29, 18), 11
# How far a loss may lie from that of the plain path: rounding. A neighbour that is seen, or a head that is computed otherwise,
# moves losses of a trained model by tenths.
ROUNDING = {"float32": 1e-3}
COARSE_ROUNDING = 0.1


def choose_layout(model: TorchModel, recipe: Recipe) -> TorchModel:
    """Lets a model take flat batches where its losses stay what they are.

    Not on accelerators, whose fused attention wants rows; nor where random numbers are drawn, of which rows that share a
    beginning would share some; nor without transformers' fused attention, whose place ours takes.
    """
    network: Any = model.network
    draws = recipe.training.neftune_alpha is not None or (recipe.lora is not None and recipe.lora.dropout > 0)
    is_plain = model.is_reward or network.config._attn_implementation != "sdpa"
    if model.plan.device != "cpu" or is_plain or draws or draws_random_numbers(network):
        return model
    expected = try_losses(model)
    torch_attention.register()
    network.set_attn_implementation(torch_attention.NAME)
    flat = replace(model, runs_flat=True)
    got = try_losses(flat)
    rounding = ROUNDING.get(model.plan.dtype_name, COARSE_ROUNDING)
    if got is not None and expected is not None and torch.allclose(got, expected, rtol=rounding, atol=rounding):
        return flat
    network.set_attn_implementation("sdpa")
    get_logger().info("Rows are padded: this architecture computes something else without padding")
    return model


def try_losses(model: TorchModel) -> torch.Tensor | None:
    """Losses of two rows that begin alike, shape (learned,); None if the architecture cannot compute them like this."""
    model.network.eval()
    trial = make_trial(model)
    with torch.inference_mode():
        try:
            beginning = Beginning(model, trial.input_ids[0, :SHARED]) if model.runs_flat else None
            return compute_token_losses(model, trial, beginning).float()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return None


def make_trial(model: TorchModel) -> Batch:
    """Two rows of made-up tokens."""
    network: Any = model.network
    size = min(1000, network.get_input_embeddings().weight.shape[0])
    rows = []
    for number, length in enumerate(LENGTHS):
        ids = np.arange(1, length + 1, dtype=np.int64) * 37
        ids[SHARED:] += 11 * number
        mask = np.arange(length) > SHARED
        rows.append(EncodedExample(ids % size, mask, ""))
    return pad_rows(rows, 0)
