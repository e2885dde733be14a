"""What all parts of the MLX back end work on: a network of mlx-lm's with its machine, loaded from files of either layout."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from huggingface_hub.errors import StrictDataclassError
from mlx import nn
from mlx.utils import tree_flatten
from mlx_lm import utils as mlx_utils
from transformers import AutoConfig

from config.structured_config import Recipe
from utils.backends.mlx_architectures import correct_architecture, find_classes
from utils.backends.mlx_start import settle_threads
from utils.exceptions import ModelLoadingError
from utils.logging import get_logger
from utils.machine import TOKEN_BUDGETS, guess_device, measure_memory, measure_peak_resident
from utils.mlx_names import MLX_MODEL_TYPES
from utils.mlx_support import find_config_trouble, is_stored_quantised, translate_config
from utils.model_shape import refuse_oversized
from utils.model_source import ModelSource

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32}
BITS = {"int8": 8, "int4": 4}
# Weights that share a scale and an offset: MLX's own default, and half of it for narrow matrices.
GROUP_SIZES = (64, 32)
# Freed buffers that MLX keeps for later ones, as a share of the memory: left alone, it keeps as much as the whole of it.
# They fit rows of about their own length only. On a CPU keeping them saved no time and filled that share within five steps.
CACHE_SHARES = {"metal": 0.1, "cpu": 0.0}
LOADING_ERRORS = (
    OSError, ValueError, LookupError, RuntimeError, ArithmeticError, TypeError, AttributeError, StrictDataclassError,
)  # fmt: skip


@dataclass(frozen=True)
class MlxModel:
    """A network with the machine it lives on.

    Attributes:
        network: of mlx-lm's, adapters included.
        source: the files of the base.
        device: `metal` or `cpu`.
        dtype_name: number format of the frozen weights.
        quantization: how they are stored, as in the recipe; `int4` or `int8` also where the files were so already.
        reasons: what was chosen automatically, and why.
        threads: that share a matrix product on a CPU, which decides how its sums are rounded.
    """

    network: nn.Module
    source: ModelSource
    device: str
    dtype_name: str
    quantization: str
    reasons: tuple[str, ...]
    threads: int = 1

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return self.source.model_type

    @property
    def token_budget(self) -> int:
        """Tokens that one forward pass should hold when micro_batch_size is auto."""
        return TOKEN_BUDGETS[self.device]


def load_base(source: ModelSource, recipe: Recipe) -> MlxModel:
    """Loads a model's own files onto Apple's GPU, or elsewhere the CPU, quantised where the recipe says so, ready to infer.

    Raises:
        ModelLoadingError: the files do not make a model.
    """
    device = guess_device("mlx")
    mx.set_default_device(mx.gpu if device == "metal" else mx.cpu)
    mx.set_cache_limit(int(CACHE_SHARES[device] * measure_memory()[0]))
    dtype_name, reasons = choose_dtype(recipe.model.dtype, device)
    get_logger().info("Device: %s", ", ".join((f"{device} ({platform.machine()}) through MLX", *reasons)))
    threads = settle_threads(1 if recipe.deterministic else None)
    network = read_network(source)
    network.set_dtype(DTYPES[dtype_name])
    quantization: str = recipe.model.quantization
    if is_stored_quantised(source.config):
        quantization = f"int{source.config['quantization'].get('bits', 4)}"
    elif quantization != "none":
        quantize_layers(network, BITS[quantization])
    network.freeze()
    network.eval()
    mx.eval(network.parameters())
    return MlxModel(network, source, device, dtype_name, quantization, reasons, threads)


def choose_dtype(asked: str, device: str) -> tuple[str, tuple[str, ...]]:
    """The number format of the frozen weights, with the reason where it was chosen here."""
    if asked != "auto":
        return asked, ()
    if device == "metal":
        return "bfloat16", ("dtype bfloat16: Apple's GPU computes it natively",)
    return "float32", ("dtype float32: MLX computes bfloat16 on a CPU far slower",)


def read_network(source: ModelSource) -> nn.Module:
    """A network as mlx-lm builds and fills it, from the config as mlx-lm has to read it.

    Raises:
        ModelLoadingError: the files do not make a model.
    """
    refuse_oversized(source)
    try:
        config = complete_config(source.config)
        if trouble := find_config_trouble(config):
            message = f"backend mlx cannot run this model: {trouble}"
            raise ModelLoadingError(message, where=str(source.folder), fix="set backend: torch", code="mlx-model")
        network, _ = mlx_utils.load_model(
            source.folder,
            lazy=True,
            model_config=translate_config(config),
            get_model_classes=find_classes,
            trust_remote_code=False,
        )
    except LOADING_ERRORS as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        fix = "use another copy of the model: config.json and weights must belong together"
        message = f"mlx-lm cannot load the model: {' '.join(lines[:2])}"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix) from error
    correct_architecture(network, source.model_type)
    return network


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json with transformers' defaults for what it leaves out: mlx-lm's are others, or it has none.

    Raises:
        StrictDataclassError, TypeError, ValueError, AttributeError: a value of another kind.
    """
    if config.get("model_type") not in MLX_MODEL_TYPES:
        return dict(config)
    own = {key: value for key, value in config.items() if key not in ("model_type", "quantization_config")}
    return {**config, **AutoConfig.for_model(config["model_type"], **own).to_dict()}


def read_tensors(path: Path) -> dict[str, mx.array]:
    """All tensors of a safetensors file, read when they are used.

    Raises:
        ValueError: it holds something else.
    """
    found = mx.load(str(path))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no tensors")  # noqa: TRY004 - of the file, not of an argument
    return found


def read_network_weights(network: nn.Module, folder: Path) -> None:
    """Fills a network from the files of a saved one, all of it.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    weights: dict[str, mx.array] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        weights |= read_tensors(path)
    network.load_weights(list(network.sanitize(weights).items()), strict=True)
    mx.eval(network.parameters())


def quantize_layers(network: nn.Module, bits: int) -> None:
    """Stores the linear modules of the layers in few bits; embedding and head stay as they are, as bitsandbytes leaves them.

    A matrix whose rows no group size divides stays as it is, with a line in the log.
    """
    skipped = []

    def choose(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if not isinstance(module, nn.Linear) or ("layers." not in path and ".h." not in path):
            return False
        size = next((size for size in GROUP_SIZES if module.weight.shape[-1] % size == 0), None)
        if size is None:
            skipped.append(path)
            return False
        return {"group_size": size, "bits": bits, "mode": "affine"}

    nn.quantize(network, bits=bits, class_predicate=choose)
    if skipped:
        get_logger().warning("%d matrices stay unquantised: their width is no multiple of 32", len(skipped))


def is_quantised(module: nn.Module) -> bool:
    """True for a linear module or an embedding in few bits."""
    return isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding)


def count_values(network: nn.Module) -> int:
    """Numbers in a network; of a quantised matrix those that its few bits stand for."""
    packed = {name: module for name, module in network.named_modules() if is_quantised(module)}
    total = sum(
        module.weight.size * 32 // module.bits + ("bias" in module and module.bias.size) for module in packed.values()
    )
    for name, value in tree_flatten(network.parameters()):
        if name.rpartition(".")[0] not in packed:
            total += value.size
    return int(total)


def measure_peak_memory(model: MlxModel) -> int:
    """Peak bytes so far: what MLX allocated on Apple's GPU, resident memory of the process elsewhere."""
    if model.device == "metal":
        return int(mx.get_peak_memory())
    return measure_peak_resident()
