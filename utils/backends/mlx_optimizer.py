"""What moves the weights on MLX: one optimizer for each group of tensors that share rate and decay."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx import nn
from mlx.optimizers import Adafactor, AdamW, Optimizer
from mlx.utils import tree_flatten, tree_unflatten

from config.structured_config import Recipe


class MlxOptimizer:
    """The recipe's optimizer over the trainable tensors."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        self.network, self.recipe = network, recipe
        ratio = (recipe.lora.plus_ratio if recipe.lora else None) or 1.0
        # Decay acts on matrices only; LoRA+ (arXiv 2402.12354, section 4.2) multiplies the rate of the B matrices alone.
        self.groups: dict[str, tuple[float, float]] = {
            name: (recipe.training.weight_decay if value.ndim >= 2 else 0.0, ratio if name.endswith("lora_b") else 1.0)
            for name, value in tree_flatten(network.trainable_parameters())
        }
        self.optimizers = {key: self.build(key[0]) for key in dict.fromkeys(self.groups.values())}

    def build(self, decay: float) -> Optimizer:
        """An optimizer of one group; `update` gives it its rate before each step."""
        if self.recipe.training.optimizer == "adafactor":
            # Steps are not scaled by the size of a tensor: LoRA's B starts at zero, and would hardly learn.
            rate = self.recipe.training.learning_rate
            return Adafactor(rate, scale_parameter=False, relative_step=False, weight_decay=decay)
        # MLX leaves the correction of the moments' start off unless it is asked for; torch and the paper have it.
        return AdamW(self.recipe.training.learning_rate, weight_decay=decay, bias_correction=True)

    def update(self, gradients: dict[str, Any], learning_rate: float) -> None:
        """Moves every tensor along its gradient."""
        flat, weights = dict(tree_flatten(gradients)), dict(tree_flatten(self.network.trainable_parameters()))
        moved = []
        for key, optimizer in self.optimizers.items():
            names = [name for name, group in self.groups.items() if group == key]
            optimizer.learning_rate = learning_rate * key[1]
            found = optimizer.apply_gradients(
                {name: flat[name] for name in names}, {name: weights[name] for name in names}
            )
            moved += list(found.items())
        self.network.update(tree_unflatten(moved))
        mx.eval(self.network.trainable_parameters(), [optimizer.state for optimizer in self.optimizers.values()])

    def forget(self) -> None:
        """Begins anew, as before the first step."""
        self.optimizers = {key: self.build(key[0]) for key in self.optimizers}

    def list_state(self) -> dict[str, mx.array]:
        """All that is remembered between steps, by name; empty before the first step."""
        return {
            f"{place}:{name}": value
            for place, optimizer in enumerate(self.optimizers.values())
            for name, value in tree_flatten(optimizer.state, destination={}).items()
            if name != "learning_rate"
        }

    def restore_state(self, tensors: dict[str, mx.array]) -> None:
        """Takes back what `list_state` gave.

        Raises:
            LookupError: it belongs to other tensors, or to another optimizer.
        """
        weights = dict(tree_flatten(self.network.trainable_parameters()))
        for key, optimizer in self.optimizers.items():
            optimizer.init({name: weights[name] for name, group in self.groups.items() if group == key})
        wanted = self.list_state()
        if lost := sorted({*wanted} ^ {*tensors}):
            raise LookupError(f"{'it lacks' if lost[0] in wanted else 'nothing is called'} {lost[0]}")
        for name, tensor in tensors.items():
            if tensor.shape != wanted[name].shape or tensor.dtype != wanted[name].dtype:
                raise LookupError(f"{name} has another shape or format")
        for place, optimizer in enumerate(self.optimizers.values()):
            own = {name.partition(":")[2]: value for name, value in tensors.items() if name.startswith(f"{place}:")}
            optimizer.state = {**optimizer.state, **nest_state(own)}


def nest_state(flat: dict[str, mx.array]) -> dict[str, Any]:
    """`{"step": …, "model.layers.0.….lora_a.m": …}` as the optimizer keeps it: a dict for each tensor, whose name has dots."""
    nested: dict[str, Any] = {}
    for name, value in flat.items():
        owner, dot, part = name.rpartition(".")
        if dot:
            nested.setdefault(owner, {})[part] = value
        else:
            nested[part] = value
    return nested
