"""What moves the weights on torch: the groups of parameters, the optimizer, and what training adds to the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.optimization import Adafactor

from config.structured_config import Recipe

# Key of a parameter group: its learning rate is this many times that of the step.
RATE_FACTOR = "rate_factor"


class NeftuneNoise:
    """NEFTune (arXiv 2310.05914, section 2): uniform noise on the embeddings, scaled by alpha / sqrt(length x width).

    The length is that of the row's real tokens; the usual implementations take the padded one.
    """

    def __init__(self, network: Any, alpha: float) -> None:
        self.alpha = alpha
        self.lengths = torch.ones(1)
        network.get_input_embeddings().register_forward_hook(self.add_noise)

    def add_noise(self, module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """Forward hook; does nothing in evaluation, nor in any pass without gradients, such as that of a reference model."""
        if not module.training or not torch.is_grad_enabled():
            return output
        scale = self.alpha / torch.sqrt(self.lengths.to(output) * output.shape[-1])
        return output + torch.empty_like(output).uniform_(-1, 1) * scale[:, None, None]


def attach_noise(network: nn.Module, recipe: Recipe) -> NeftuneNoise | None:
    """Puts NEFTune's noise on the embeddings, where the recipe asks for it."""
    alpha = recipe.training.neftune_alpha
    return None if alpha is None else NeftuneNoise(network, alpha)


def enable_checkpointing(network: Any, recipe: Recipe) -> None:
    """Lets the backward pass compute activations again instead of keeping them, where the recipe says so.

    The pre-flight has replaced `auto` by its decision; a recipe that never passed it is not checkpointed.
    """
    if recipe.training.gradient_checkpointing is True:
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def build_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer over the trainable tensors; `set_learning_rate` gives it its rate before each step."""
    groups, rate = group_parameters(network, recipe), recipe.training.learning_rate
    if recipe.training.optimizer == "adafactor":
        # torch.optim.Adafactor scales each step by the size of the tensor, and LoRA's B matrices start at 0: they would learn
        # a thousand times too slowly. transformers' scales only when asked to.
        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    if recipe.training.optimizer == "adamw_8bit":
        return build_8bit_optimizer(network, groups, rate)
    return torch.optim.AdamW(groups, lr=rate, fused=True)


def group_parameters(network: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Splits the trainable tensors by weight decay and learning rate; no group is empty.

    LoRA+ (arXiv 2402.12354, section 4.2) multiplies the rate of the B matrices alone.
    """
    ratio = (recipe.lora.plus_ratio if recipe.lora else None) or 1.0
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            # Decay acts on matrices only: pulling biases and norms towards 0 has no regularising meaning.
            decay = recipe.training.weight_decay if parameter.ndim >= 2 else 0.0
            factor = ratio if "lora_B" in name else 1.0
            groups.setdefault((decay, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": decay, RATE_FACTOR: factor}
        for (decay, factor), parameters in groups.items()
    ]


def build_8bit_optimizer(
    network: nn.Module, groups: list[dict[str, Any]], learning_rate: float
) -> torch.optim.Optimizer:
    """AdamW with both moments in blocks of 256 numbers of 8 bits (arXiv 2110.02861).

    Embeddings keep 32 bits, as in section 2.3 of the paper: their gradients are too uneven. So does every tensor of fewer than
    4096 numbers.
    """
    # Imported here because importing bitsandbytes is slow, and a run without it must not depend on it.
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager

    for module in network.modules():
        if isinstance(module, nn.Embedding) and module.weight.requires_grad:
            GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    optimizer: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every group the rate of the step that is about to be taken."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group[RATE_FACTOR]
