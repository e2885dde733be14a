"""What training adds to a network of mlx-lm's: noise on the embeddings, and layers that are computed twice to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn

from utils.seed_manager import join_key


@dataclass
class Noise:
    """NEFTune's noise (arXiv 2310.05914, section 2): uniform, scaled by alpha / sqrt(length × width).

    Attributes:
        lengths: real tokens of each row of the next pass, shape (rows,).
    """

    alpha: float
    lengths: mx.array


class NoisyEmbedding(nn.Embedding):  # type: ignore[misc]  # mypy does not follow mlx
    """An embedding with noise on what it gives in training.

    Attributes:
        noise: an object of ours, because MLX takes an array among a module's attributes for a weight.
    """

    def __call__(self, ids: mx.array) -> mx.array:
        """Shape (rows, length) → (rows, length, width)."""
        vectors: mx.array = super().__call__(ids)
        if not self.training:
            return vectors
        scale = self.noise.alpha / mx.sqrt(self.noise.lengths * vectors.shape[-1])
        noise = mx.random.uniform(-1, 1, vectors.shape).astype(vectors.dtype)
        noisy: mx.array = vectors + noise * scale[:, None, None].astype(vectors.dtype)
        return noisy


def attach_noise(network: nn.Module, alpha: float | None) -> Noise | None:
    """Puts NEFTune's noise on the embeddings, where a recipe asks for it; who computes a pass gives it the lengths first."""
    if alpha is None:
        return None
    body = network.model
    embedding = body.wte if "wte" in body else body.embed_tokens
    kind = type(embedding)
    embedding.__class__ = type(f"Noisy{kind.__name__}", (NoisyEmbedding, kind), {})
    embedding.noise = Noise(alpha, mx.ones(1))
    noise: Noise = embedding.noise
    return noise


def checkpoint_layers(network: nn.Module) -> None:
    """Lets the backward pass compute each layer again instead of keeping what is inside it.

    mlx-lm changes the class of the layers, and with it every other model of the process; here it is these layers alone.
    """
    for layer in network.layers:
        kind = type(layer)
        layer.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": make_checkpointed_call(kind)})


def make_checkpointed_call(kind: type[nn.Module]) -> Any:
    """The call of a layer, computed again in the backward pass from its inputs and trained tensors."""

    def call(layer: nn.Module, *arguments: Any, **options: Any) -> Any:
        def compute(weights: dict[str, Any], *arguments: Any, **options: Any) -> Any:
            layer.update(weights)
            return kind.__call__(layer, *arguments, **options)

        return mx.checkpoint(compute)(layer.trainable_parameters(), *arguments, **options)

    return call


@contextmanager
def draw_again() -> Iterator[None]:
    """Gives MLX's generator back the state that it had."""
    state: Any = mx.random.state
    key = join_key(np.array(state[0]))
    try:
        yield
    finally:
        mx.random.seed(key)
