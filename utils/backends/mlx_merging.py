"""Adapters folded into the weights on MLX, and quantised weights in full precision."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
from mlx import nn
from mlx.utils import tree_unflatten

from utils.backends.mlx_adapters import list_adapters, load_adapter
from utils.backends.mlx_model import DTYPES, MlxModel, is_quantised
from utils.exceptions import AdapterError
from utils.logging import get_logger


def fold_adapter(model: MlxModel) -> MlxModel:
    """Folds the adapter that `model.adapter` names into a freshly loaded base.

    Raises:
        AdapterError: it does not fit, or the files of the base are quantised.
    """
    folder = model.source.adapter
    if folder is None:
        return model
    if model.quantization != "none":
        message = f"the files of the base are {model.quantization}, and an adapter cannot be folded into them"
        fix = "name a base that is not quantised in model.name"
        raise AdapterError(message, where="model.adapter", fix=fix, code="quantised-merge")
    get_logger().info("model.adapter: %s is folded into the base; what is trained on it needs both", folder)
    return merge_adapter(load_adapter(model, folder))


def merge_adapter(model: MlxModel) -> MlxModel:
    """Folds the adapters into the weights, in float32, and returns the plain model.

    The weights of a quantised base become those that its few bits stand for first: rounded again, they would lose the change.

    Raises:
        AdapterError: a sum is not finite.
    """
    if not (adapters := list_adapters(model.network)):
        return model
    if model.quantization != "none":
        model = dequantize(model)
        adapters = list_adapters(model.network)
    dtype, merged = DTYPES[model.dtype_name], []
    for name, adapter in adapters.items():
        adapter.linear.set_dtype(mx.float32)
        plain = adapter.fuse()
        plain.set_dtype(dtype)
        mx.eval(plain.parameters())  # one module after the other, so that one is in float32 at a time
        if not bool(mx.isfinite(plain.weight).all()):
            message, fix = "the adapter holds numbers that are not finite", "use another copy of it"
            raise AdapterError(message, where=name, fix=fix, code="not-finite")
        merged.append((name, plain))
    model.network.update_modules(tree_unflatten(merged))
    model.network.freeze()
    model.network.eval()
    return model


def dequantize(model: MlxModel) -> MlxModel:
    """A quantised base in full precision: plain matrices of the values that its few bits stand for."""
    plain = []
    for name, module in model.network.named_modules():
        if not is_quantised(module):
            continue
        weight = mx.dequantize(
            module.weight, module.scales, module.get("biases"), module.group_size, module.bits, mode=module.mode
        ).astype(DTYPES[model.dtype_name])
        made: nn.Module
        if isinstance(module, nn.QuantizedEmbedding):
            made = nn.Embedding(1, 1)
        else:
            made = nn.Linear(1, 1, bias="bias" in module)
            if "bias" in module:
                made.bias = module.bias
        made.weight = weight
        made.freeze()
        plain.append((name, made))
    model.network.update_modules(tree_unflatten(plain))
    mx.eval(model.network.parameters())
    return replace(model, quantization="none")
