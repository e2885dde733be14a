"""What training adds to a network of mlx-lm's: noise on the embeddings, and layers that are computed twice to save memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm.models import gemma3_text


@dataclass
class Noise:
    """NEFTune's noise (arXiv 2310.05914, section 2): uniform, scaled by alpha / sqrt(length × width).

    Attributes:
        lengths: real tokens of each row of the next pass, shape (rows,).
    """

    alpha: float
    lengths: mx.array


class NoisyEmbedding:
    """Noise on what an embedding gives in training; it stands before the embedding's own class, quantised or not.

    Attributes:
        noise: an object of ours, because MLX takes an array among a module's attributes for a weight.
    """

    noise: Noise
    training: bool

    def __call__(self, ids: mx.array) -> mx.array:
        """Shape (rows, length) → (rows, length, width)."""
        vectors: mx.array = super().__call__(ids)  # type: ignore[misc]  # of the embedding's class
        if not self.training:
            return vectors
        scale = self.noise.alpha / mx.sqrt(self.noise.lengths * vectors.shape[-1])
        noise = mx.random.uniform(-1, 1, vectors.shape).astype(vectors.dtype)
        return vectors + noise * scale[:, None, None].astype(vectors.dtype)


def attach_noise(network: nn.Module, alpha: float | None) -> Noise | None:
    """Puts NEFTune's noise on the embeddings, where a recipe asks for it; who computes a pass gives it the lengths first."""
    if alpha is None:
        return None
    body = network.model
    embedding = body.wte if "wte" in body else body.embed_tokens
    if isinstance(body, gemma3_text.Gemma3Model):
        # transformers' embedding multiplies by the root of the width before the noise, and mlx-lm's body after it.
        alpha /= body.args.hidden_size**0.5
    kind = type(embedding)
    embedding.__class__ = type(f"Noisy{kind.__name__}", (NoisyEmbedding, kind), {})
    embedding.noise = noise = Noise(alpha, mx.ones(1))
    return noise


def checkpoint_layers(network: nn.Module) -> None:
    """Lets the backward pass compute each layer again instead of keeping what is inside it.

    mlx-lm changes the class of the layers, and with it every other model of the process; here it is these layers alone.
    """
    for layer in network.layers:
        kind = type(layer)
        layer.__class__ = type(f"Checkpointed{kind.__name__}", (kind,), {"__call__": make_checkpointed_call(kind)})


def make_checkpointed_call(kind: type[nn.Module]) -> Any:
    """The call of a layer, computed again in the backward pass from its inputs and trained tensors.

    The second time the generator begins where it began the first time: `mx.checkpoint` leaves it where it is, and adapters
    with dropout got the gradients of another mask.
    """

    def call(layer: nn.Module, *arguments: Any, **options: Any) -> Any:
        start, passes = read_generator(), [0]

        def compute(weights: dict[str, Any], *arguments: Any, **options: Any) -> Any:
            layer.update(weights)
            passes[0] += 1
            if passes[0] == 1:
                return kind.__call__(layer, *arguments, **options)
            with draw_again(start):
                return kind.__call__(layer, *arguments, **options)

        return mx.checkpoint(compute)(layer.trainable_parameters(), *arguments, **options)

    return call


def read_generator() -> int:
    """The state of MLX's generator, as the seed that gives it: its two halves are all there is of it."""
    state: Any = mx.random.state
    high, low = state[0].tolist()
    return int(high) << 32 | int(low)


@contextmanager
def draw_again(start: int | None = None) -> Iterator[None]:
    """Gives MLX's generator back the state that it had.

    Args:
        start: state to begin with; None begins with the present one.
    """
    state = read_generator()
    try:
        if start is not None:
            mx.random.seed(start)
        yield
    finally:
        mx.random.seed(state)  # the state takes no assignment
