"""Gated MLPs on torch that keep two tensors for the backward pass, where autograd keeps four.

`down(act(gate(x)) * up(x))` leaves the gate, its activation, the other projection and the product of both in memory: in the
models of today more than half of what a layer keeps. The activation and the product are cheap to form again from the two
projections (Liger Kernel, arXiv 2410.10989, section 3.2, does the same for SwiGLU), so they are not kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

TRIED_ROWS = 2


@dataclass(frozen=True)
class Form:
    """How a family writes its MLP.

    Attributes:
        activation: name of the child that activates the gate.
        project: (module, input) → gate and other projection.
    """

    activation: str
    project: Callable[[Any, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def project_apart(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two matrices: Llama, Mistral, Qwen, Gemma."""
    return module.gate_proj(x), module.up_proj(x)


def project_together(module: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One matrix for both: Phi-3."""
    gate, up = module.gate_up_proj(x).chunk(2, dim=-1)
    return gate, up


# By the names of a module's children. A module that has them and computes something else is found out by `is_gated`.
FORMS = {
    frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"}): Form("act_fn", project_apart),
    frozenset({"gate_up_proj", "down_proj", "activation_fn"}): Form("activation_fn", project_together),
}


def keep_less(network: nn.Module) -> None:
    """Replaces the forward pass of every gated MLP; results and gradients stay what they are."""
    for module in network.modules():
        form = FORMS.get(frozenset(name for name, _ in module.named_children()))
        if form is not None and is_gated(module, form):
            module.forward = MethodType(make_forward(form), module)


def is_gated(module: Any, form: Form) -> bool:
    """True if a module computes what its children's names promise, tried on a few made-up rows."""
    weight, activation = next(module.parameters()), module.get_submodule(form.activation)
    if not weight.is_floating_point() or any(True for _ in activation.parameters()):
        return False  # quantised, or an activation that could be trained (xIELU)
    width = module.down_proj.out_features
    rows = torch.linspace(-1, 1, TRIED_ROWS * width, device=weight.device, dtype=weight.dtype).view(TRIED_ROWS, width)
    with torch.inference_mode():
        gate, up = form.project(module, rows)
        expected: torch.Tensor = module.down_proj(activation(gate) * up)
        same: bool = torch.equal(module(rows), expected)
    return same


def make_forward(form: Form) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """The forward pass of an MLP that is written in this form."""

    def forward(module: Any, x: torch.Tensor) -> torch.Tensor:
        activation = module.get_submodule(form.activation)
        gate, up = form.project(module, x)
        product = GatedProduct.apply(gate, up, activation)
        if not product.requires_grad:
            return module.down_proj(product)
        with recompute_instead_of_keeping(product, lambda: activation(gate.detach()) * up.detach()):
            return module.down_proj(product)

    return forward


def recompute_instead_of_keeping(tensor: torch.Tensor, recompute: Callable[[], torch.Tensor]) -> saved_tensors_hooks:
    """Within this context, whatever would keep a tensor for its backward pass gets it formed anew there."""
    place, size, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype

    def pack(kept: torch.Tensor) -> Any:
        is_same = kept.data_ptr() == place and kept.numel() == size and kept.dtype == dtype and kept.is_contiguous()
        return (kept.shape,) if is_same else kept

    def unpack(packed: Any) -> torch.Tensor:
        return packed if isinstance(packed, torch.Tensor) else recompute().view(packed[0])

    return saved_tensors_hooks(pack, unpack)


class GatedProduct(torch.autograd.Function):  # type: ignore[misc]  # torch types it as Any
    """act(gate) * up, of which nothing but gate and up is kept."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        """All of one shape."""
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of gate and up."""
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            leaf = gate.detach().requires_grad_()
            activated = ctx.activation(leaf)
        (d_gate,) = torch.autograd.grad(activated, leaf, gradient * up)
        return d_gate, activated.detach() * gradient, None
