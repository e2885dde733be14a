"""A linear module with a LoRA adapter as one operation on torch: fewer passes over the activations, and less to keep.

peft computes `base(x) + B(A(x.float())) * scaling` as five operations, each with a tensor of the output's size and a backward
pass of its own. Here the adapter's product is added into the output where it stands, the input is kept once, and a 16-bit base
has its adapter computed in 16 bits from float32 masters, whose gradients stay float32.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from utils.backends.torch_norms import Normed, find_normed


class FusedLinear(Linear):  # type: ignore[misc]  # peft types it as Any
    """peft's module with a forward pass of ours wherever the adapter is a plain one."""

    def forward(self, x: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        """The same numbers as peft's up to rounding, shape (…, inputs) → (…, outputs)."""
        names = self.active_adapters
        if arguments or options or self.disable_adapters or self.merged or len(names) != 1 or self.lora_variant:
            return super().forward(x, *arguments, **options)
        (name,) = names
        down, up = self.lora_A[name], self.lora_B[name]
        if up.bias is not None or not isinstance(self.lora_dropout[name], nn.Identity):
            return super().forward(x)
        base = self.get_base_layer()
        weight = base.weight.t() if self.is_target_conv_1d_layer else base.weight
        scaling, normed = self.scaling[name], find_normed(x)
        product: torch.Tensor = LoraProduct.apply(x, weight, base.bias, down.weight, up.weight, scaling, normed)
        return product


class FusedConv1D(FusedLinear):
    """The same on GPT-2's Conv1D, whose matrix stands transposed."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, is_target_conv_1d_layer=True, **options)


# What peft is told to put around each type of module (`LoraConfig._register_custom_module`).
FUSED_MODULES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FusedLinear, Conv1D: FusedConv1D}


class LoraProduct(torch.autograd.Function):  # type: ignore[misc]  # torch types it as Any
    """x W^T + b + s (x A^T) B^T with a frozen W (arXiv 2106.09685, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
        normed: Normed | None,
    ) -> torch.Tensor:
        """Shape (…, inputs) → (…, outputs); weight (outputs, inputs), down (r, inputs), up (outputs, r).

        With `normed`, what x comes from is kept and not x.
        """
        rows = x.reshape(-1, x.shape[-1])
        result = functional.linear(rows, weight, bias)
        inner = rows @ down.to(rows.dtype).t()
        result.addmm_(inner, up.to(rows.dtype).t(), alpha=scaling)
        if normed is not None:
            normed.memo.readers += 1
        kept = (rows,) if normed is None else (normed.x, normed.scale, normed.weight)
        ctx.save_for_backward(inner, weight, down, up, *kept)
        ctx.scaling, ctx.shape, ctx.memo = scaling, x.shape, None if normed is None else normed.memo
        return result.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, A and B."""
        inner, weight, down, up, *kept = ctx.saved_tensors
        rows = (kept[0] if ctx.memo is None else ctx.memo.form(*kept)).reshape(len(inner), -1)
        outer = gradient.reshape(-1, gradient.shape[-1])
        d_inner = (outer @ up.to(outer.dtype)).mul_(ctx.scaling)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (outer @ weight).addmm_(d_inner, down.to(outer.dtype)).view(ctx.shape)
        d_down = (d_inner.t() @ rows).to(down.dtype)
        d_up = (outer.t() @ inner).mul_(ctx.scaling).to(up.dtype)
        return d_x, None, None, d_down, d_up, None, None
