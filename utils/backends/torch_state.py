"""What a killed run needs beside its weights, on torch: the optimizer's memory, and tensors that no weight file holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from utils.backends.torch_adapters import ADAPTER
from utils.checkpoint import OPTIMIZER
from utils.exceptions import RunError

# Names in optimizer.safetensors: `exp_avg:<parameter>`, and of a trained tensor itself `weight:<parameter>`. Numbers that are
# no tensors, such as Adafactor's count of steps, stand in its metadata as JSON.
WEIGHT = "weight"
NUMBERS = "numbers"
FORMATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def save_state(network: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes optimizer.safetensors into a folder that holds the saved weights already.

    A trained tensor is written too unless a weight file holds it under its name with its shape and format: PiSSA's matrices
    are saved converted, and peft gives rows of added tokens and DoRA's magnitudes other names.
    """
    names = {parameter: name for name, parameter in list_trained(network)}
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, int | float] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                # bitsandbytes shares its tables between all parameters, and safetensors refuses tensors that share memory.
                tensors[f"{key}:{names[parameter]}"] = value.detach().cpu().clone()
            elif value is not None:
                numbers[f"{key}:{names[parameter]}"] = value
    saved = dict(iterate_saved(folder))
    for parameter, name in names.items():
        if saved.get(name_in_file(network, name)) != (list(parameter.shape), parameter.dtype):
            tensors[f"{WEIGHT}:{name}"] = parameter.detach().cpu().contiguous()
    save_file(tensors, folder / OPTIMIZER, metadata={NUMBERS: json.dumps(numbers)})


def load_state(network: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Puts trained tensors and the optimizer's memory back, in place and bit for bit.

    Args:
        network: as it was before the first step of the run.

    Raises:
        RunError: the checkpoint is not that of this model and optimizer.
    """
    try:
        load_weights(network, folder)
        load_optimizer(network, optimizer, folder)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
        message = f"the checkpoint does not fit this model: {str(error).strip().splitlines()[0]}"
        fix = "train again: the model's files or the project's code have changed since"
        raise RunError(message, where=str(folder), fix=fix, code="checkpoint-mismatch") from error


def load_weights(network: nn.Module, folder: Path) -> None:
    """Copies every trained tensor from the file that has it.

    Raises:
        LookupError: a tensor that no file has, or in another shape or format.
    """
    places = {name: path for path in folder.glob("*.safetensors") for name in list_names(path)}
    for name, parameter in list_trained(network):
        own, in_file = f"{WEIGHT}:{name}", name_in_file(network, name)
        found = own if own in places else in_file
        if found not in places:
            raise LookupError(f"it lacks {name}")
        with safe_open(places[found], framework="pt") as file:
            tensor = file.get_tensor(found)
        if (tensor.shape, tensor.dtype) != (parameter.shape, parameter.dtype):
            raise LookupError(f"{name} has another shape or format")
        parameter.data.copy_(tensor)


def load_optimizer(network: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Gives the optimizer what it remembered of every trained tensor; its rates and groups are those of the recipe."""
    names = {parameter: name for name, parameter in list_trained(network)}
    ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    with safe_open(folder / OPTIMIZER, framework="pt") as file:
        entries: dict[str, Any] = dict(json.loads(file.metadata()[NUMBERS]))
        entries |= {name: file.get_tensor(name) for name in file.keys() if not name.startswith(f"{WEIGHT}:")}  # noqa: SIM118
    for entry, value in entries.items():
        key, _, name = entry.partition(":")
        state.setdefault(ordered.index(name), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def list_trained(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and tensors that training changes."""
    return [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]


def iterate_saved(folder: Path) -> Iterator[tuple[str, tuple[list[int], torch.dtype | None]]]:
    """Yields name, shape and format of every tensor in the safetensors files of a folder."""
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safe_open is no dict
                part = file.get_slice(name)
                yield name, (part.get_shape(), FORMATS.get(part.get_dtype()))


def list_names(path: Path) -> list[str]:
    """Names of the tensors in a file."""
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def name_in_file(network: nn.Module, name: str) -> str:
    """What a parameter is called in the saved weights: peft leaves out the adapter's name and its wrapper."""
    if not isinstance(network, PeftModel):
        return name
    return name.replace(f".modules_to_save.{ADAPTER}.", ".").replace(f".{ADAPTER}.", ".")
