"""Small networks as transformers has them and with a module of ours in them, and what both compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from utils.backends.torch_lora import FUSED_MODULES

SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
IDS = torch.arange(1, 25).view(2, 12) % 64


def adapt(networks: Sequence[nn.Module], targets: str | list[str], *, fused: bool) -> tuple[nn.Module, ...]:
    """The same made-up adapter around each network, of peft's modules or of ours."""
    adapted = []
    for network in networks:
        config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
        if fused:
            config._register_custom_module(FUSED_MODULES)
        torch.manual_seed(1)
        adapted.append(get_peft_model(network, config))
    return tuple(adapted)


def differentiate(network: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits of `IDS`, shape (2, 12, 64), and the gradient of everything that is trained."""
    logits = network(input_ids=IDS).logits
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    return logits, {name: tensor.grad for name, tensor in network.named_parameters() if tensor.requires_grad}
