"""Attention over a flat batch on torch: each stretch of tokens sees itself and what it continues, and no other.

transformers calls `attend` wherever a model's configuration names `NAME`. Without spans it does what transformers' own fused
attention does: generation, and models in hands other than ours, see no difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.flat_batches import Span

NAME = "tunebook"


def register() -> None:
    """Makes `attend` known to transformers, with the masks of its own fused attention."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    spans: Sequence[Span] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: shape (1, heads, tokens, width) where there are spans.
        key, value: the same with as many heads or fewer, each for a group of query heads.
        spans: of the flat batch, or None for a padded one.

    Returns:
        Shape (1, tokens, heads, width), and no probabilities.
    """
    if spans is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return padded
    scale, window = others.get("scaling"), others.get("sliding_window")
    parts = [attend_span(query, key, value, span, scale, window) for span in spans]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole.transpose(1, 2), None


def attend_span(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, span: Span, scale: float | None, window: int | None
) -> torch.Tensor:
    """Attention of one span, shape (1, heads, tokens of the span, width).

    Args:
        scale: of the products of queries and keys; None for 1 / sqrt(width).
        window: tokens that a query sees, itself included; None for all before it.
    """
    keys, values = gather(key, span), gather(value, span)
    mask = make_mask(span, keys.shape[2], window, key.device)
    return functional.scaled_dot_product_attention(
        query[:, :, span.start : span.end],
        keys,
        values,
        mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )


def gather(tensor: torch.Tensor, span: Span) -> torch.Tensor:
    """Keys or values that a span sees, (1, heads, tokens, width) → (1, heads, seen, width)."""
    parts = [tensor[:, :, start:end] for start, end in (*span.before, (span.start, span.end))]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def make_mask(span: Span, seen: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """Which keys each query sees, bool, shape (tokens of the span, seen); None for the plain triangle."""
    own = span.end - span.start
    if seen == own and (window is None or window >= seen):
        return None
    mask = torch.ones(own, seen, dtype=torch.bool, device=device).tril_(seen - own)
    return mask if window is None else mask.triu_(seen - own - window + 1)
