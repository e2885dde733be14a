"""RMS norms on torch whose results are not kept: each is formed again from the norm's input, which autograd keeps anyway.

A layer's norms feed its projections, and for the gradient of its adapter each projection keeps what it reads: the norm's
result beside the norm's input. The modules of `torch_lora` keep the input and one number for each token instead, and the first
of them to need the result forms it for all (arXiv 2205.05198, section 5: what is cheap to compute need not be kept). The
backward pass of the norm itself is one formula in place of nine operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import nn

TRIED_ROWS = 3


@dataclass
class Memo:
    """The result of a norm while a backward pass needs it.

    Attributes:
        readers: modules that read the result.
        left: of them, those that have not asked for it yet.
        rows: the result, from the first that asks to the last.
    """

    readers: int = 0
    left: int = 0
    rows: torch.Tensor | None = None

    def form(self, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The result, as the forward pass had it to the last bit."""
        if self.rows is None:
            self.rows, self.left = compute_norm(x, scale, weight), self.readers
        rows = self.rows
        self.left -= 1
        if self.left <= 0:
            self.rows = None
        return rows


@dataclass(frozen=True)
class Normed:
    """What a norm's result is formed from; hangs on the result (`find_normed`).

    Attributes:
        x: what the norm read.
        scale: one over the root mean square of each row, float32.
        weight: of the norm.
        version: of the result, which torch counts up whenever it is changed in place.
    """

    x: torch.Tensor
    scale: torch.Tensor
    weight: torch.Tensor
    version: int
    memo: Memo = field(default_factory=Memo)


def find_normed(tensor: torch.Tensor) -> Normed | None:
    """Where a tensor comes from, if it is the result of such a norm and nobody has changed it since."""
    found: Normed | None = getattr(tensor, "normed", None)
    return found if found is not None and found.version == tensor._version else None


def form_norms_again(network: nn.Module) -> None:
    """Replaces the forward pass of every RMS norm that has the usual form; results stay what they are, to the last bit."""
    for module in network.modules():
        if is_rms_norm(module):
            module.forward = MethodType(forward, module)


def is_rms_norm(module: Any) -> bool:
    """True if a module computes what its name promises, tried on a few made-up rows. Gemma's have another form."""
    weights = dict(module.named_parameters())
    if list(weights) != ["weight"] or not type(module).__name__.endswith("RMSNorm"):
        return False
    weight, epsilon = weights["weight"], getattr(module, "variance_epsilon", None)
    if not isinstance(epsilon, float) or weight.dim() != 1 or not weight.is_floating_point():
        return False
    size = TRIED_ROWS * len(weight)
    rows = torch.linspace(-2, 3, size, device=weight.device, dtype=weight.dtype).view(TRIED_ROWS, -1)
    with torch.inference_mode():
        same: bool = torch.equal(module(rows), compute_norm(rows, compute_scale(rows, epsilon), weight))
    return same


def forward(module: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    """Takes the place of `forward` in transformers' RMS norms."""
    weight = module.weight
    if not torch.is_grad_enabled() or weight.requires_grad or weight.dtype != hidden_states.dtype:
        plain: torch.Tensor = type(module).forward(module, hidden_states)
        return plain
    scale = compute_scale(hidden_states.detach(), module.variance_epsilon)
    result: Any = FrozenNorm.apply(hidden_states, scale, weight)
    result.normed = Normed(hidden_states.detach(), scale, weight, result._version)
    return result


def compute_scale(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """One over the root mean square of each row in float32, shape (…, width) → (…, 1)."""
    return torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)


def compute_norm(x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The norm's result in the model's number format, shape (…, width)."""
    return (x.float() * scale).to(x.dtype).mul_(weight)


class FrozenNorm(torch.autograd.Function):  # type: ignore[misc]  # torch types it as Any
    """x * scale(x) * weight with a frozen weight (arXiv 1910.07467, equation 4)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Shape (…, width); `scale` is `compute_scale(x)`, and goes into the gradient as the function of x that it is."""
        ctx.save_for_backward(x, scale, weight)
        return compute_norm(x, scale, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """s (g w - x s² mean(g w x)) with s the scale."""
        x, scale, weight = ctx.saved_tensors
        outer, wide = (gradient * weight).float(), x.float()
        along = (outer * wide).mean(-1, keepdim=True) * scale.pow(3)
        return outer.mul_(scale).addcmul_(wide, along, value=-1).to(x.dtype), None, None
