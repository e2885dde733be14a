"""What moves the weights on torch: the groups of parameters, the optimizer, and what training adds to the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from config.structured_config import Recipe


class NeftuneNoise:
    """NEFTune (arXiv 2310.05914, section 2): uniform noise on the embeddings, scaled by alpha / sqrt(length x width).

    The length is that of the row's real tokens; the usual implementations take the padded one.
    """

    def __init__(self, network: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths = torch.ones(1)
        network.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook; does nothing in evaluation."""
        if not module.training:
            return output
        scale = self.alpha / torch.sqrt(self.lengths.to(output) * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[:, None, None]


def attach_noise(network: nn.Module, recipe: Recipe) -> NeftuneNoise | None:
    """Puts NEFTune's noise on the embeddings, where the recipe asks for it."""
    alpha = recipe.training.neftune_alpha
    return None if alpha is None else NeftuneNoise(network, alpha)


def enable_checkpointing(network: Any, recipe: Recipe) -> None:
    """Lets the backward pass compute activations again instead of keeping them, where the recipe asks for it."""
    if recipe.training.gradient_checkpointing:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the trainable tensors; `set_learning_rate` gives it its rate before each step."""
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    # Decay acts on matrices only: pulling biases and norms towards 0 has no regularising meaning.
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": recipe.training.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group the rate of the step that is about to be taken."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
