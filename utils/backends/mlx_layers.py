"""What training adds to a network of mlx-lm's: noise on the embeddings, and layers that are computed twice to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx import nn


class NoisyEmbedding(nn.Embedding):  # type: ignore[misc]  # mypy does not follow mlx
    """An embedding with NEFTune's noise (arXiv 2310.05914, section 2): uniform, scaled by alpha / sqrt(length × width).

    Attributes:
        alpha: strength of the noise.
        lengths: real tokens of each row of the next pass, shape (rows,).
    """

    def __call__(self, ids: mx.array) -> mx.array:
        """Shape (rows, length) → (rows, length, width); without noise outside training."""
        vectors: mx.array = super().__call__(ids)
        if not self.training:
            return vectors
        scale = self.alpha / mx.sqrt(self.lengths * vectors.shape[-1])
        noise = mx.random.uniform(-1, 1, vectors.shape).astype(vectors.dtype)
        noisy: mx.array = vectors + noise * scale[:, None, None].astype(vectors.dtype)
        return noisy


def attach_noise(network: nn.Module, alpha: float | None) -> NoisyEmbedding | None:
    """Puts NEFTune's noise on the embeddings, where a recipe asks for it."""
    if alpha is None:
        return None
    body = network.model
    embedding = body.wte if "wte" in body else body.embed_tokens
    kind = type(embedding)
    embedding.__class__ = type(f"Noisy{kind.__name__}", (NoisyEmbedding, kind), {})
    # Beside the dict of the module's tensors: they are no weights, and nothing saves them.
    object.__setattr__(embedding, "alpha", alpha)
    object.__setattr__(embedding, "lengths", mx.ones(1))
    return embedding  # type: ignore[no-any-return]


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
    keys: Any = mx.random.state
    state = [mx.array(key) for key in keys]
    try:
        yield
    finally:
        for place, key in enumerate(state):
            keys[place] = key
