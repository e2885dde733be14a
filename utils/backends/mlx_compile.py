"""A compiled gradient on MLX, compared with the plain one before it is trusted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_flatten

from utils.backends.mlx_layers import draw_again
from utils.logging import get_logger

Gradients = tuple[tuple[mx.array, mx.array], dict[str, Any]]
Differentiate = Callable[..., Gradients]
TOLERANCE = 0.01  # of the gradient's norm: fused kernels round otherwise, and a wrong one is wrong by more


class Compiled:
    """Loss and gradients by one compiled graph for each shape of a micro-batch.

    The first micro-batch of a run is computed both ways. If the two disagree, the plain way is taken for the whole run, with a
    warning: a quick gradient that is wrong would train something else, in silence.
    """

    def __init__(self, network: nn.Module, plain: Differentiate) -> None:
        self.plain = plain
        # What a graph reads and changes beside its arguments: the weights, and the generator behind dropout and noise.
        state = [network.state, mx.random.state]
        self.compiled: Differentiate | None = mx.compile(plain, inputs=state, outputs=state)
        self.is_trusted = False

    def __call__(self, *arguments: Any) -> Gradients:
        """What the plain function gives."""
        if self.compiled is None:
            return self.plain(*arguments)
        if not self.is_trusted:
            return self.compare(*arguments)
        return self.compiled(*arguments)

    def compare(self, *arguments: Any) -> Gradients:
        """Computes both ways with the same random numbers, and decides."""
        assert self.compiled is not None
        with draw_again():
            quick = self.compiled(*arguments)
            mx.eval(quick)
        plain = self.plain(*arguments)
        mx.eval(plain)
        self.is_trusted = are_close(quick[1], plain[1]) and bool(mx.allclose(quick[0][0], plain[0][0], rtol=TOLERANCE))
        if not self.is_trusted:
            get_logger().warning(
                "The compiled gradient differs from the plain one here: the run goes on without compiling"
            )
            self.compiled = None
        return plain


def are_close(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """True if the distance of two gradients is small beside their norm; also true of two that are not finite."""
    others = dict(tree_flatten(found))
    pairs = [(others[name].astype(mx.float32), value.astype(mx.float32)) for name, value in tree_flatten(wanted)]
    distance = mx.stack([mx.square(one - other).sum() for one, other in pairs]).sum()
    norm = mx.stack([mx.square(other).sum() for _, other in pairs]).sum()
    return not bool(mx.isfinite(norm)) or bool(mx.sqrt(distance) <= TOLERANCE * mx.sqrt(norm))
