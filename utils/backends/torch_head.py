"""The output head and its loss on torch, at learned positions only and a few rows at a time.

The logits of a whole batch are the largest tensors of a run: rows x vocabulary, three times over. Here they exist for some
rows at a time. While they are there, the gradient of each row's loss by its hidden state is formed too, so the backward pass
only multiplies by what each loss counts: nothing is computed twice, for any loss that is made of token losses (Liger Kernel,
arXiv 2410.10989, section 3.2, has the same for a mean).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from utils.machine import count_logit_rows

# Rows of the head's weights that are multiplied at once on a CPU: the library's copies of them then stay in the cache.
BLOCK = 1024


@dataclass(frozen=True)
class Head:
    """A linear map to the vocabulary, and what some families do to its result.

    Attributes:
        weight: shape (vocabulary, hidden).
        bias: shape (vocabulary,), or None.
        scale: logits are multiplied by it (Cohere, Granite).
        softcap: logits x become softcap * tanh(x / softcap) (Gemma 2); None for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def compute(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in the model's number format, shape (rows, hidden) → (rows, vocabulary)."""
        logits = project(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def project(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + b, shape (rows, hidden) → (rows, vocabulary)."""
    is_plain = hidden.device.type == "cpu" and hidden.dtype == weight.dtype == torch.float32
    if not is_plain or (torch.is_grad_enabled() and hidden.requires_grad):
        return functional.linear(hidden, weight, bias)
    logits = hidden.new_empty(len(hidden), len(weight))
    for start in range(0, len(weight), BLOCK):
        part = slice(start, start + BLOCK)
        torch.mm(hidden, weight[part].t(), out=logits[:, part])
    return logits if bias is None else logits.add_(bias)


def find_head(network: nn.Module) -> Head | None:
    """The head of a language model, or None where it is trained, adapted or quantised: then autograd has to see it."""
    whole: Any = network
    module = whole.get_output_embeddings()
    if type(module) is not nn.Linear or any(each.requires_grad for each in module.parameters()):
        return None
    if not module.weight.is_floating_point():
        return None
    settings = whole.config.to_dict()
    scale = settings.get("logit_scale") or 1.0
    if divisor := settings.get("logits_scaling"):
        scale /= divisor
    return Head(module.weight, module.bias, scale, settings.get("final_logit_softcapping"))


def compute_losses(hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
    """Negative log-likelihood of each target in float32 nats, shape (rows,).

    Args:
        hidden: what the head reads, shape (rows, hidden).
        targets: shape (rows,).
    """
    return ChunkedLoss.apply(hidden, targets, head)


class ChunkedLoss(torch.autograd.Function):  # type: ignore[misc]  # torch types it as Any
    """Token losses, and their gradients by the hidden states, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, head: Head) -> torch.Tensor:
        """Losses, shape (rows,); the gradients are formed only where they will be asked for."""
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        rows = count_logit_rows(len(head.weight), hidden.device.type)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = head.compute(hidden[part])
            losses[part], probabilities = split_softmax(logits, targets[part], keeps_logits=head.softcap is not None)
            if slopes is None:
                continue
            probabilities.scatter_add_(1, targets[part, None], probabilities.new_full((len(logits), 1), -1.0))
            if head.softcap is not None:
                probabilities.mul_(1 - (logits.float() / head.softcap).square())
            slopes[part] = probabilities.to(hidden.dtype) @ head.weight
        if slopes is not None:
            ctx.save_for_backward(slopes if head.scale == 1.0 else slopes * head.scale)
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Each row's own gradient times what its loss counts."""
        (slopes,) = ctx.saved_tensors
        return slopes * gradient[:, None].to(slopes.dtype), None, None


def split_softmax(
    logits: torch.Tensor, targets: torch.Tensor, *, keeps_logits: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of the targets, shape (rows,), and all probabilities in float32, shape (rows, vocabulary).

    Args:
        keeps_logits: otherwise the probabilities take their place in memory.
    """
    logits = logits.float()
    largest = logits.amax(1, keepdim=True)
    wanted = logits.gather(1, targets[:, None])
    # Row by row: the largest number, the exponentials, their sum. Each number is read before its place is written.
    probabilities = torch.softmax(logits, 1, out=None if keeps_logits else logits)
    # The likeliest token's probability is never 0, so the denominator is exact however far the target lies below.
    normalisers = largest - probabilities.amax(1, keepdim=True).log_()
    return (normalisers - wanted)[:, 0], probabilities
