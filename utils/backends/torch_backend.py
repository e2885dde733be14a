"""The torch back end: models and adapters from transformers and peft, devices through accelerate, the step is ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from config.structured_config import Recipe
from utils.backends import MachineFacts, ignore
from utils.backends.torch_generation import generate as generate
from utils.backends.torch_generation import stream as stream
from utils.backends.torch_losses import compute_token_losses
from utils.backends.torch_model import TorchModel, run_side_by_side
from utils.backends.torch_preference import compare_pairs as compare_pairs
from utils.backends.torch_preference import score_pairs as score_pairs
from utils.backends.torch_scratch import build_network
from utils.backends.torch_step import make_step as make_step
from utils.batching import Batch
from utils.device_manager import DeviceManager
from utils.device_manager import measure_peak_memory as measure_process_peak
from utils.exceptions import AdapterError, MachineError, ModelLoadingError, RecipeError
from utils.logging import get_logger
from utils.model_source import ModelSource

TOKEN_BUDGETS = {"cpu": 512, "mps": 2048, "cuda": 16_384}


def load_model(source: ModelSource, recipe: Recipe) -> TorchModel:
    """Looks at the machine and loads the base model on it, ready to infer.

    Raises:
        MachineError: the dtype, quantisation or number of processes cannot work here.
        ModelLoadingError: the files do not make a model.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "this version trains in one process, and WORLD_SIZE asks for more"
        raise MachineError(message, fix="start the script with python, without a launcher", code="processes")
    plan = DeviceManager().plan(recipe.model.dtype)
    get_logger().info("Device: %s (%s), %s", plan.device, plan.device_name, "; ".join(plan.reasons))
    transformers_logging.disable_progress_bar()
    accelerator = Accelerator(cpu=plan.device == "cpu")
    quantization = recipe.model.to_quantization_config(plan.dtype_name)
    try:
        network = build_network(source.config, source.seed) if source.seed is not None else None
        if network is None:
            network = AutoModelForCausalLM.from_pretrained(
                source.folder,
                dtype=plan.dtype,
                attn_implementation="sdpa",
                trust_remote_code=recipe.model.trust_remote_code,
                use_safetensors=True,
                local_files_only=True,
                quantization_config=quantization,
            )
    except ImportError as error:
        raise MachineError(str(error).strip().splitlines()[0], where="model", fix="run `make setup`") from error
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        message = f"the model cannot be loaded: {str(error).strip().splitlines()[0]}"
        raise ModelLoadingError(message, where=str(source.folder)) from error
    if quantization is None:
        network.to(accelerator.device)
    elif recipe.model.quantization != "int8":
        keep_quantised_weights_differentiable(network)
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return TorchModel(network, plan, accelerator, source.public_name)


def keep_quantised_weights_differentiable(network: nn.Module) -> None:
    """Forbids bitsandbytes' in-place repacking for AVX512-BF16, after which gradients vanish without an error.

    bitsandbytes 0.50.2, nn/modules.py: Linear4bit.forward repacks when it sees no gradient, as in an evaluation, and the
    packed kernel has no backward.
    """
    from bitsandbytes.nn import Linear4bit

    for module in network.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def describe_machine(model: TorchModel) -> MachineFacts:
    """What the model runs on, with the reason for each automatic choice."""
    plan = model.plan
    return MachineFacts(
        device=plan.device,
        device_name=plan.device_name,
        dtype=plan.dtype_name,
        memory_bytes=plan.memory_bytes,
        token_budget=TOKEN_BUDGETS[plan.device],
        workers=plan.workers,
        reasons=plan.reasons,
    )


def attach_lora(model: TorchModel, recipe: Recipe) -> TorchModel:
    """Adds fresh adapters in float32, or makes all weights trainable when the recipe has no lora section.

    Raises:
        RecipeError: a target matches no module; the ones that exist are named.
    """
    if recipe.lora is None:
        network = model.network.float()  # the trained weights are their own masters: bfloat16 would lose small updates
        for parameter in network.parameters():
            parameter.requires_grad_(True)
        return replace(model, network=network)
    check_targets(model.network, recipe)
    network = get_peft_model(model.network, recipe.lora.to_peft_config())
    # Loaded from a snapshot folder, peft would write that folder's path into the adapter.
    network.peft_config["default"].base_model_name_or_path = model.base_name
    trained = replace(model, network=network)
    if count_parameters(trained)[0] == 0:
        raise RecipeError("the adapters have no trainable parameter", where="lora.target_modules", code="lora-target")
    return trained


def check_targets(network: nn.Module, recipe: Recipe) -> None:
    """Each named target must exist: peft alone accepts a list of which one name matches."""
    if recipe.lora is None or isinstance(recipe.lora.target_modules, str):
        return
    names = {name.rsplit(".", 1)[-1] for name, module in network.named_modules() if is_linear(module)}
    full_names = [name for name, module in network.named_modules() if is_linear(module)]
    for target in recipe.lora.target_modules:
        if target not in names and not any(name.endswith(f".{target}") for name in full_names):
            fix = f"modules here: {', '.join(sorted(names))}"
            raise RecipeError(
                f"no module is called {target!r}", where="lora.target_modules", fix=fix, code="lora-target"
            )


def is_linear(module: nn.Module) -> bool:
    """True for nn.Linear, its quantised kin, and GPT-2's transposed Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def load_adapter(model: TorchModel, folder: Path) -> TorchModel:
    """Adds saved adapters to a base model, frozen.

    Raises:
        AdapterError: no adapter there, or one that was made for another model.
    """
    if not (folder / "adapter_model.safetensors").is_file():
        fix = "name a run folder that finished training"
        raise AdapterError("there is no adapter", where=str(folder), fix=fix, code="no-adapter")
    try:
        network = PeftModel.from_pretrained(model.network, str(folder), torch_device=str(model.accelerator.device))
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        message = f"the adapter does not fit this model: {str(error).strip().splitlines()[0]}"
        raise AdapterError(message, where=str(folder), code="adapter-mismatch") from error
    network.eval()
    return replace(model, network=network)


def save_weights(model: TorchModel, folder: Path) -> None:
    """Writes what was trained: adapters in PEFT format, or the whole model when everything was."""
    if isinstance(model.network, PeftModel):
        # "auto" would ask the hub whether the vocabulary was resized; it never is.
        model.network.save_pretrained(str(folder), save_embedding_layers=False)
    else:
        model.network.save_pretrained(str(folder))


def merge_adapter(model: TorchModel) -> TorchModel:
    """Folds the adapters into the weights and returns the plain model."""
    if not isinstance(model.network, PeftModel):
        return model
    return replace(model, network=model.network.merge_and_unload(safe_merge=True))


def save_merged(model: TorchModel, folder: Path, dtype_name: str) -> None:
    """Writes a plain model as safetensors with its config and generation config."""
    model.network.to(getattr(torch, dtype_name)).save_pretrained(str(folder))


def count_parameters(model: TorchModel) -> tuple[int, int]:
    """Trainable and all parameters."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.network.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def evaluate(
    model: TorchModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> list[tuple[float, int]]:
    """Sum of the negative log-likelihood in nats, and supervised tokens, of every row in order."""

    def score(batch: Batch) -> list[tuple[float, int]]:
        losses = compute_token_losses(model, batch).double().cpu()
        counts = batch.loss_mask.sum(axis=1)
        return [(float(part.sum()), len(part)) for part in torch.split(losses, counts.tolist())]

    return [row for rows in run_side_by_side(model, score, batches, on_batch) for row in rows]


def compute_logits(model: TorchModel, batch: Batch) -> npt.NDArray[np.float32]:
    """Logits at every real position, shape (tokens, vocabulary)."""
    device = model.accelerator.device
    real = np.ones_like(batch.loss_mask) if batch.attention_mask is None else batch.attention_mask
    mask = torch.from_numpy(real)
    model.network.eval()
    with torch.inference_mode():
        ids = torch.from_numpy(batch.input_ids).to(device)
        logits = model.network(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits
        return logits[mask.to(device)].float().cpu().numpy()  # type: ignore[no-any-return]


def measure_peak_memory(model: TorchModel) -> int:
    """Peak bytes so far: device memory on CUDA, resident memory elsewhere."""
    return measure_process_peak(model.plan.device)
