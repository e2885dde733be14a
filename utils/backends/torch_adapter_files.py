"""Adapters on torch: saved, loaded back without losing a tensor, and folded into the weights (peft)."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from utils.adapter_source import read_adapter_config
from utils.backends.torch_adapters import ADAPTER, limit_workers
from utils.backends.torch_model import TorchModel
from utils.exceptions import AdapterError
from utils.logging import get_logger
from utils.model_source import ADAPTER_WEIGHTS, ModelSource


def save_weights(model: TorchModel, folder: Path) -> None:
    """Writes what was trained: adapters in PEFT format, or the whole model when everything was."""
    network: Any = model.network
    if model.started_from:
        save_converted(network, model.started_from, folder)
    elif isinstance(network, PeftModel):
        # "auto" would ask the hub whether the vocabulary was resized; the rows of added tokens are saved in any case.
        network.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        network.save_pretrained(str(folder))


def save_converted(network: PeftModel, start: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Writes a PiSSA adapter as a plain one that stands on the untouched base.

    The base has lost s·B₀A₀ when training began, so what was learned is s·(BA − B₀A₀) = s·[B, −B₀]·[A; A₀]: a LoRA of twice
    the rank (arXiv 2404.02948, appendix C; peft's subtract_mutated_init).
    """
    state = get_peft_model_state_dict(network, save_embedding_layers=False)
    tensors = {}
    for name, tensor in state.items():
        if ".lora_A." in name:
            tensor = torch.cat([tensor, start[name]], dim=0)
        elif ".lora_B." in name:
            tensor = torch.cat([tensor, -start[name]], dim=1)
        tensors[name] = tensor.detach().cpu().contiguous()
    config = copy.deepcopy(network.peft_config[ADAPTER])
    config.init_lora_weights, config.inference_mode = True, True
    config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
    folder.mkdir(parents=True, exist_ok=True)
    network.create_or_update_model_card(str(folder))
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def load_adapter(model: TorchModel, folder: Path) -> TorchModel:
    """Adds a saved adapter to a base model, frozen.

    Raises:
        AdapterError: no adapter there, or one that was made for another model.
    """
    network = read_adapter(model.network, folder, str(model.accelerator.device))
    return replace(model, network=network, plan=limit_workers(model.plan, network))


def read_adapter(network: nn.Module, folder: Path, device: str) -> PeftModel:
    """Puts a saved adapter on a network; every tensor of the file finds its place, and every place its tensor.

    peft alone only warns about what is missing, and says nothing about what is left over.

    Raises:
        AdapterError: as `load_adapter`, or a configuration that makes peft run or read what a file names.
    """
    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        fix = "name a run folder that finished training"
        raise AdapterError("there is no adapter", where=str(folder), fix=fix, code="no-adapter")
    read_adapter_config(folder, str(folder))
    try:
        config = PeftConfig.from_pretrained(str(folder))
        if config.task_type == "CAUSAL_LM" and not hasattr(network, "prepare_inputs_for_generation"):
            config.task_type = None  # a language model's adapter under a reward model: the layers are the same
        adapted = PeftModel.from_pretrained(network, str(folder), torch_device=device, config=config)
        with safe_open(path, framework="pt") as file:
            found = {*file.keys()}
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError, SafetensorError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        message = f"the adapter does not fit this model: {lines[0]}"
        raise AdapterError(message, where=str(folder), code="adapter-mismatch") from error
    places = {*get_peft_model_state_dict(adapted, save_embedding_layers=False)}
    base = {f"base_model.model.{name}" for name in network.state_dict()}
    if lost := sorted((places - found) | (found - places - base)):
        what = "has no" if lost[0] in places else "has no place for"
        message = f"the adapter does not fit this model: {'it' if lost[0] in places else 'the model'} {what} {lost[0]}"
        raise AdapterError(message, where=str(folder), code="adapter-mismatch")
    adapted.eval()
    return adapted


def merge_adapter(model: TorchModel) -> TorchModel:
    """Folds the adapters into the weights and returns the plain model.

    Raises:
        AdapterError: the base is quantised, and the sum would be rounded to its few values.
    """
    if not isinstance(model.network, PeftModel):
        return model
    if model.quantization != "none":
        message = f"an adapter cannot be folded into {model.quantization} weights"
        raise AdapterError(message, where="model.quantization", fix="dequantise the base first", code="quantised-merge")
    return replace(model, network=model.network.merge_and_unload(safe_merge=True), started_from={})


def fold_adapter(network: nn.Module, source: ModelSource, device: str) -> nn.Module:
    """Folds the adapter that `model.adapter` names into a freshly loaded base."""
    if source.adapter is None:
        return network
    get_logger().info("model.adapter: %s is folded into the base; what is trained on it needs both", source.adapter)
    adapted = read_adapter(network, source.adapter, device)
    try:
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except ValueError as error:  # safe_merge looks for numbers that are not finite
        message = "the adapter holds numbers that are not finite"
        raise AdapterError(
            message, where=str(source.adapter), fix="use another copy of it", code="not-finite"
        ) from error
    return merged
