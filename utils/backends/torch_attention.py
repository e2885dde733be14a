"""Attention over a flat batch on torch: each stretch of tokens sees itself and what it continues, and no other.

transformers calls `attend` wherever a model's configuration names `NAME`. Without spans it does what transformers' own fused
attention does: generation, and models in hands other than ours, see no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from utils.flat_batches import Span

NAME = "tunebook"
KeysValues = tuple[torch.Tensor, torch.Tensor]


def register() -> None:
    """Makes `attend` known to transformers, with the masks of its own fused attention."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Sight:
    """What the tokens of a flat batch see.

    Attributes:
        spans: of the batch.
        first: keys and values that every span sees before all else, by attention module, each of shape (1, key heads, tokens,
            width); None where there are none.
        kept: takes keys and values of every module, for passes whose rows begin with these tokens; None keeps nothing.
        masks: those of the spans, by window, made once for all layers.
    """

    spans: Sequence[Span]
    first: Mapping[nn.Module, KeysValues] | None = None
    kept: dict[nn.Module, KeysValues] | None = None
    masks: dict[tuple[Span, int | None], torch.Tensor | None] = field(default_factory=dict)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sight: Sight | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: shape (1, heads, tokens, width) where there is a sight.
        key, value: the same with as many heads or fewer, each for a group of query heads.
        sight: of the flat batch, or None for a padded one.

    Returns:
        Shape (1, tokens, heads, width), and no probabilities.
    """
    if sight is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return padded
    if sight.kept is not None:
        sight.kept.setdefault(module, (key, value))  # checkpointing comes here twice
    scale, window = others.get("scaling"), others.get("sliding_window")
    first_keys, first_values = (None, None) if sight.first is None else sight.first[module]
    parts = []
    for span in sight.spans:
        keys, values = gather(key, first_keys, span), gather(value, first_values, span)
        mask = find_mask(sight, span, keys, window)
        result = functional.scaled_dot_product_attention(
            query[:, :, span.start : span.end],
            keys,
            values,
            mask,
            is_causal=mask is None,
            scale=scale,
            enable_gqa=key.shape[1] != query.shape[1],
        )
        parts.append(result)
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
    return whole.transpose(1, 2), None


def gather(tensor: torch.Tensor, first: torch.Tensor | None, span: Span) -> torch.Tensor:
    """Keys or values that a span sees, (1, heads, tokens, width) → (1, heads, seen, width)."""
    parts = [tensor[:, :, start:end] for start, end in (*span.before, (span.start, span.end))]
    parts = parts if first is None else [first, *parts]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def find_mask(sight: Sight, span: Span, keys: torch.Tensor, window: int | None) -> torch.Tensor | None:
    """The mask of a span's queries; made for the first layer with this window, and kept in the sight for the others.

    Args:
        keys: that the span sees, shape (1, heads, seen, width).
        window: tokens that a query sees, itself included; None for all before it.
    """
    name = span, window
    if name not in sight.masks:
        sight.masks[name] = make_mask(span.end - span.start, keys.shape[2], window, keys)
    return sight.masks[name]


def make_mask(own: int, seen: int, window: int | None, like: torch.Tensor) -> torch.Tensor | None:
    """What is added to the scores of each query and key: 0, or minus infinity where the query does not see the key.

    A mask of True and False would be turned into this one in every layer, and kept there for the backward pass.

    Returns:
        Shape (own, seen), in the number format of `like` and on its device; None for the plain triangle.
    """
    if seen == own and (window is None or window >= seen):
        return None
    visible = torch.ones(own, seen, dtype=torch.bool, device=like.device).tril_(seen - own)
    if window is not None:
        visible = visible.triu_(seen - own - window + 1)
    return torch.zeros(own, seen, dtype=like.dtype, device=like.device).masked_fill_(~visible, -math.inf)
