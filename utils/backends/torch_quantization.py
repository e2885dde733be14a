"""Quantised bases on torch: gradients that stay true after an evaluation, and the way back to full precision.

bitsandbytes itself is imported by transformers, and only for 4- and 8-bit runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from utils.exceptions import TrainingError

if TYPE_CHECKING:
    from utils.backends.torch_model import TorchModel


def prepare_quantised(network: nn.Module) -> None:
    """Puts quantised modules into the state in which they train: differentiable, and safe for passes side by side.

    4 bits: forbids bitsandbytes' in-place repacking for AVX512-BF16, after which gradients vanish without an error.
    bitsandbytes 0.50.2, nn/modules.py: Linear4bit.forward repacks when it sees no gradient, as in an evaluation, and the
    packed kernel has no backward.

    8 bits: Linear8bitLt moves its scales in its first forward pass, and two first passes side by side would lose them: they
    are moved now.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        elif type(module).__name__ == "Linear8bitLt" and getattr(module.weight, "CB", None) is not None:
            initialise: Any = module
            initialise.init_8bit_state()


def find_repacked(network: nn.Module) -> list[str]:
    """Names of the 4-bit modules whose weights were repacked for inference."""
    return [
        name
        for name, module in network.named_modules()
        if hasattr(module, "support_avx512bf16_for_cpu")
        and getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False)
    ]


def refuse_repacked(network: nn.Module) -> None:
    """Looked at after every pass without gradients: what was repacked would train on gradients that are nearly zero.

    Raises:
        TrainingError: a version of bitsandbytes found another way to repack.
    """
    if found := find_repacked(network):
        message = (
            f"bitsandbytes has repacked {len(found)} modules for inference, such as {found[0]}: gradients vanish there"
        )
        fix = "install the pinned bitsandbytes (make setup), or set model.quantization: int8 or none"
        raise TrainingError(message, where="model.quantization", fix=fix, code="vanished-gradients")


def dequantize(model: TorchModel) -> TorchModel:
    """A quantised base as plain matrices that hold exactly what its few bits stand for; others are returned as they are."""
    if model.quantization == "none":
        return model
    network: Any = model.network
    network = network.dequantize(dtype=model.plan.dtype)
    network.eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return replace(model, network=network, quantization="none")
