"""What gradients say about a run on torch: tensors that get none, and rows that give one that is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

ADAPTER = "lora_"  # in the name of every tensor of an adapter, in all of peft's variants


class SilentTensors:
    """The tensors that should learn and have had no gradient yet: cut off from the loss, or frozen by mistake."""

    def __init__(self, network: nn.Module) -> None:
        """Expects a gradient of every tensor that requires one, and of an adapter's tensors whether they do or not."""
        self.left = {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in network.named_parameters()
            if parameter.requires_grad or ADAPTER in name
        }

    def observe(self) -> None:
        """Looks at the gradients of a step. After two steps next to nothing is left to look at."""
        self.left = {
            name: parameter
            for name, parameter in self.left.items()
            if parameter.grad is None or not bool(parameter.grad.any())
        }


def are_finite(gradients: Iterable[torch.Tensor | None]) -> bool:
    """True if no number is infinite or NaN; a tensor that the loss does not depend on has no gradient."""
    return all(gradient is None or bool(torch.isfinite(gradient).all()) for gradient in gradients)
