"""A new model on torch: the architecture from its config, the weights from a seed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

STANDARD_DEVIATION = 0.02
# The last matrix of attention and of the MLP: what they write is added to the residual stream.
RESIDUAL_PROJECTIONS = ("c_proj", "o_proj", "down_proj")


def build_network(config: dict[str, Any], seed: int) -> nn.Module:
    """Builds a causal language model in float32 with fresh weights.

    Args:
        config: content of config.json.
        seed: the weights depend on it and on the config alone, whatever was drawn before.
    """
    settings = {key: value for key, value in config.items() if key != "model_type"}
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own, which are replaced below
        network: nn.Module = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **settings),
            attn_implementation="sdpa",
            dtype=torch.float32,
            trust_remote_code=False,
        )
    initialise_weights(network, network.config.num_hidden_layers, seed)
    return network


def initialise_weights(network: nn.Module, layers: int, seed: int) -> None:
    """Draws the weights as GPT-2 does: normal with 0.02, residual projections divided by sqrt(2 x layers), biases 0, norms 1.

    Radford et al. 2019, section 2.3: the scale keeps the variance of the residual stream, which every layer adds to twice.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, module in network.named_modules():
        # A tied head is the embedding itself, which has had its turn.
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and not is_tied_head(network, module):
            deviation = STANDARD_DEVIATION
            if name.rpartition(".")[2] in RESIDUAL_PROJECTIONS:
                deviation /= math.sqrt(2 * layers)
            nn.init.normal_(module.weight, 0.0, deviation, generator=generator)
    for name, parameter in network.named_parameters():
        if name.endswith(".bias"):
            nn.init.zeros_(parameter)
        elif parameter.ndim == 1:
            nn.init.ones_(parameter)


def is_tied_head(network: Any, module: nn.Module) -> bool:
    """True for an output head that shares its weights with the input embedding."""
    embedding = network.get_input_embeddings()
    return module is not embedding and module.weight is embedding.weight
