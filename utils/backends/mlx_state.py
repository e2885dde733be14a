"""What a killed run needs beside its weights, on MLX: the optimizer's memory."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx

from utils.backends.mlx_adapters import fill_adapters, iterate_parts, list_adapters
from utils.backends.mlx_model import MlxModel, read_network_weights, read_tensors
from utils.backends.mlx_optimizer import MlxOptimizer
from utils.checkpoint import OPTIMIZER
from utils.exceptions import AdapterError, RunError


def save_state(optimizer: MlxOptimizer, folder: Path) -> None:
    """Writes optimizer.safetensors into a folder that holds the saved weights already."""
    mx.save_safetensors(str(folder / OPTIMIZER), optimizer.list_state())


def load_state(model: MlxModel, optimizer: MlxOptimizer, folder: Path) -> None:
    """Puts trained tensors and the optimizer's memory back, bit for bit.

    Raises:
        RunError: the checkpoint is not that of this model and optimizer.
    """
    try:
        if list_adapters(model.network):
            fill_adapters(model, dict(iterate_parts(model, folder)), folder)
        else:
            read_network_weights(model.network, folder)
        optimizer.restore_state(read_tensors(folder / OPTIMIZER))
    except (OSError, ValueError, LookupError, TypeError, RuntimeError, AdapterError) as error:
        message = f"the checkpoint does not fit this model: {str(error).strip().splitlines()[0]}"
        fix = "train again: the model's files or the project's code have changed since"
        raise RunError(message, where=str(folder), fix=fix, code="checkpoint-mismatch") from error
