"""The torch back end: models and adapters from transformers and peft, devices through accelerate, the step is ours."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from config.structured_config import Recipe
from utils.backends import MachineFacts, ignore
from utils.backends.torch_adapter_files import fold_adapter
from utils.backends.torch_adapter_files import load_adapter as load_adapter
from utils.backends.torch_adapter_files import merge_adapter as merge_adapter
from utils.backends.torch_adapter_files import save_weights as save_weights
from utils.backends.torch_adapters import attach_lora as attach_lora
from utils.backends.torch_beginning import Beginning, score_side_by_side
from utils.backends.torch_gated import keep_less
from utils.backends.torch_generation import generate as generate
from utils.backends.torch_generation import stream as stream
from utils.backends.torch_layout import choose_layout
from utils.backends.torch_losses import compute_token_losses
from utils.backends.torch_model import TorchModel
from utils.backends.torch_norms import form_norms_again
from utils.backends.torch_preference import compare_pairs as compare_pairs
from utils.backends.torch_preference import score_pairs as score_pairs
from utils.backends.torch_quantization import dequantize as dequantize
from utils.backends.torch_quantization import prepare_quantised
from utils.backends.torch_rewards import compute_reward_logits, start_head
from utils.backends.torch_rewards import score_rows as score_rows
from utils.backends.torch_scratch import build_network
from utils.backends.torch_step import make_step as make_step
from utils.backends.torch_vocabulary import grow_vocabulary
from utils.batching import Batch
from utils.device_manager import DeviceManager, MachinePlan
from utils.device_manager import measure_peak_memory as measure_process_peak
from utils.exceptions import MachineError, ModelLoadingError
from utils.logging import get_logger
from utils.machine import TOKEN_BUDGETS
from utils.model_safety import strip_code_keys
from utils.model_shape import refuse_oversized
from utils.model_source import ModelSource, read_config
from utils.threads import keep_threads

# What transformers raises on files that make no model; some of it are faults of a stranger's config, met deep in its code.
LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, ArithmeticError, TypeError, AttributeError, AssertionError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip


def load_model(source: ModelSource, recipe: Recipe) -> TorchModel:
    """Looks at the machine and loads the base model on it, with its adapter folded in and its tokens added, ready to infer.

    Raises:
        MachineError: the dtype, quantisation or number of processes cannot work here.
        ModelLoadingError: the files do not make a model.
        AdapterError: the adapter that is folded in does not fit.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = "this version trains in one process, and WORLD_SIZE asks for more"
        raise MachineError(message, fix="start the script with python, without a launcher", code="processes")
    with keep_threads(1 if recipe.deterministic else None):
        plan = DeviceManager().plan(recipe.model.dtype)
    get_logger().info("Device: %s (%s), %s", plan.device, plan.device_name, "; ".join(plan.reasons))
    transformers_logging.disable_progress_bar()
    accelerator = Accelerator(cpu=plan.device == "cpu")
    network = read_network(source, recipe, plan, str(accelerator.device))
    network = fold_adapter(network, source, str(accelerator.device))
    added_ids = grow_vocabulary(network, source, recipe)
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if recipe.training.gradient_checkpointing is not True:  # which forms all of a layer anew
        keep_less(network)
        form_norms_again(network)
    is_reward = recipe.reward is not None
    model = TorchModel(network, plan, accelerator, source.public_name, recipe.model.quantization, added_ids, is_reward)
    return choose_layout(model, recipe)


def read_network(source: ModelSource, recipe: Recipe, plan: MachinePlan, device: str) -> nn.Module:
    """Reads weights onto the device, quantised where the recipe says so; those of a new model are drawn from its seed."""
    if source.seed is not None:
        return build_network(source.config, source.seed).to(device)
    network, missing = read_files(source, recipe, plan, device)
    if recipe.reward:
        missing -= start_head(network, source, missing)
    if missing:
        message = f"the files lack {len(missing)} of the model's tensors, such as {min(missing)}: they would be random"
        fix = "use another copy of the model"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix, code="incomplete")
    if recipe.model.quantization == "none":
        return network.to(device)
    prepare_quantised(network)
    return network


def read_files(source: ModelSource, recipe: Recipe, plan: MachinePlan, device: str) -> tuple[nn.Module, set[str]]:
    """A model as transformers reads it, and the names of its tensors that no file has."""
    quantization = recipe.model.to_quantization_config(plan.dtype_name)
    kind: Any = AutoModelForSequenceClassification if recipe.reward else AutoModelForCausalLM
    refuse_oversized(source)
    try:
        network, loading = kind.from_pretrained(
            source.folder,
            config=load_config(source, recipe),
            dtype=plan.dtype,
            # Left open, transformers takes fused attention where the architecture has it, and Gemma 2 has not.
            attn_implementation=None,
            trust_remote_code=recipe.model.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
            quantization_config=quantization,
            # Left out, transformers takes a GPU wherever there is one, also when the run is meant for the CPU.
            device_map=None if quantization is None else {"": device},
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # left to it, transformers says to look «at the above report», which is not shown
        )
    except ImportError as error:
        raise MachineError(str(error).strip().splitlines()[0], where="model", fix="run `make setup`") from error
    except LOADING_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # transformers checks config.json field by field, and says on the second line what is wrong with one.
        text = " ".join(lines).replace("    ", " ") if isinstance(error, StrictDataclassError) else lines[0]
        fix = "use another copy of the model: config.json and weights must belong together"
        message = f"the model cannot be loaded: {text}"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix) from error
    if loading["mismatched_keys"]:
        name, stored, wanted = min(
            (str(name), tuple(stored), tuple(wanted)) for name, stored, wanted in loading["mismatched_keys"]
        )
        message = f"{name} has the shape {stored} in the files, and config.json asks for {wanted}"
        fix = "use another copy of the model: config.json and weights must belong together"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix, code="bad-config")
    return network, {str(name) for name in loading["missing_keys"]}


def load_config(source: ModelSource, recipe: Recipe) -> Any:
    """The model's config as transformers reads it, but for the keys that choose code or files.

    It is handed over as a file: AutoConfig knows more than the class of an architecture (which Mistral is a Ministral).
    """
    trusted = recipe.model.trust_remote_code
    settings: dict[str, Any] = {"local_files_only": True, **({"num_labels": 1} if recipe.reward else {})}
    if trusted:
        get_logger().warning("model.trust_remote_code is true: Python code that comes with %s is run", source.name)
        return AutoConfig.from_pretrained(source.folder, trust_remote_code=trusted, **settings)
    kept, ignored = strip_code_keys(read_config(source.folder, str(source.folder)))
    if ignored:
        names = ", ".join(dict.fromkeys(ignored))
        get_logger().info("config.json of %s chooses code or files, which is ignored: %s", source.name, names)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, **settings)
    config.name_or_path = str(source.folder)
    return config


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
        quantization=model.quantization,
        runs_flat=model.runs_flat,
        threads=plan.threads,
    )


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

    def score(batch: Batch, beginning: Beginning | None) -> list[tuple[float, int]]:
        losses = compute_token_losses(model, batch, beginning).double().cpu()
        counts = batch.loss_mask.sum(axis=1)
        return [(float(part.sum()), len(part)) for part in torch.split(losses, counts.tolist())]

    return [row for rows in score_side_by_side(model, score, batches, on_batch) for row in rows]


def compute_logits(model: TorchModel, batch: Batch) -> npt.NDArray[np.float32]:
    """Logits at every real position, shape (tokens, vocabulary); of a reward model (tokens, 2)."""
    device = model.accelerator.device
    real = np.ones_like(batch.loss_mask) if batch.attention_mask is None else batch.attention_mask
    mask = torch.from_numpy(real)
    model.network.eval()
    with torch.inference_mode():
        ids = torch.from_numpy(batch.input_ids).to(device)
        compute = compute_reward_logits if model.is_reward else compute_vocabulary_logits
        logits = compute(model, ids, mask.to(device))
        return logits[mask.to(device)].float().cpu().numpy()  # type: ignore[no-any-return]


def compute_vocabulary_logits(model: TorchModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Logits at every position, shape (rows, length, vocabulary)."""
    logits: torch.Tensor = model.network(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
    return logits


def measure_peak_memory(model: TorchModel) -> int:
    """Peak bytes so far: device memory on CUDA, resident memory elsewhere."""
    return measure_process_peak(model.plan.device)
