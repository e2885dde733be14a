"""Dropout of a network, wherever an architecture keeps it: in a module, as a number of a module, or in its config."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from utils.logging import get_logger

# Keys of the config that forward passes read there (Falcon, GPT-Neo, GPT-J, Persimmon); all others end in modules.
CONFIG_RATES = ("attention_dropout", "hidden_dropout", "attn_pdrop")


class Rate(NamedTuple):
    """A dropout that acts in training passes.

    Attributes:
        module: draws the random numbers, or is the dropout itself.
        key: attribute of the module, or of its config.
        value: above 0.
        in_config: the module reads it in its config.
        of_adapter: it was put there with the adapters.
    """

    module: Any
    key: str
    value: float
    in_config: bool = False
    of_adapter: bool = False


def find_rates(network: nn.Module) -> Iterator[Rate]:
    """Yields every dropout of a network that is not 0.

    GPT-2 has modules; Llama and its kin keep `attention_dropout` as a number of each attention module, OPT `dropout` and
    `layerdrop`, Bloom `hidden_dropout`; Falcon reads its rates in the config.
    """
    for name, module in network.named_modules():
        own = vars(module)
        for key, value in own.items():
            if isinstance(value, float) and value > 0 and ("drop" in key or (key == "p" and is_dropout(module))):
                yield Rate(module, key, value, of_adapter="lora_dropout" in name)
        if "config" not in own or hasattr(module, "save_pretrained"):  # whole models only hand their config on
            continue
        for key in CONFIG_RATES:
            if isinstance(value := getattr(own["config"], key, None), float) and value > 0:
                yield Rate(module, key, value, in_config=True)


def is_dropout(module: nn.Module) -> bool:
    """True for nn.Dropout and its kin."""
    return isinstance(module, _DropoutNd)


def draws_random_numbers(network: nn.Module) -> bool:
    """True if a training forward pass depends on a generator, whose order parallel workers would not keep."""
    return any(True for _ in find_rates(network))


def silence_dropout(network: nn.Module) -> None:
    """Switches the pretrained model's dropout off: reference and policy would otherwise differ by noise from the start.

    Dropout of the adapters stays: while they are zero it changes nothing. The config that is saved with a model stays too.
    """
    found = [rate for rate in find_rates(network) if not rate.of_adapter]
    for rate in found:
        if rate.in_config:
            rate.module.config = copy.copy(rate.module.config)
        setattr(rate.module.config if rate.in_config else rate.module, rate.key, 0.0)
    if found:
        message = "The model's own dropout (%g) is off: the reference would otherwise differ by noise"
        get_logger().info(message, max(rate.value for rate in found))
