"""Attention that knows what rows have in common, on torch.

In a flat batch each stretch of tokens sees itself and what it continues, and no other. Rows that are answered together look at
what all begin with once. transformers calls `attend` wherever a model's configuration names `NAME`; without a `Sight` it does
what transformers' own fused attention does: models in hands other than ours see no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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


@contextmanager
def use(network: Any) -> Iterator[bool]:
    """`attend` in place of transformers' fused attention; whether the network takes it, which has to be fused for that."""
    former = network.config._attn_implementation
    if former != "sdpa":
        yield former == NAME
        return
    register()
    network.set_attn_implementation(NAME)
    try:
        yield True
    finally:
        network.set_attn_implementation(former)


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


@dataclass(frozen=True)
class RowSight:
    """What rows that are answered, one token of each, see before their own keys.

    Attributes:
        first: keys and values by attention module, each of shape (1, key heads, tokens, width).
        is_hidden: whether a sliding window may hide some of them, as the mask then says.
    """

    first: Mapping[nn.Module, KeysValues]
    is_hidden: bool


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    sight: Sight | RowSight | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface.

    Args:
        query: shape (rows, heads, tokens, width), with one row for a flat batch.
        key, value: the same with as many heads or fewer, each for a group of query heads.
        sight: None for a padded batch without anything in common.

    Returns:
        Shape (rows, tokens, heads, width), and no probabilities.
    """
    if sight is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **others)
        return padded
    scale, window = others.get("scaling"), others.get("sliding_window")
    if isinstance(sight, RowSight):
        first = sight.first[module]
        return attend_apart(query, key, value, first, attention_mask, scale, is_hidden=sight.is_hidden), None
    if sight.kept is not None:
        sight.kept.setdefault(module, (key, value))  # checkpointing comes here twice
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


def attend_apart(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    shared: KeysValues,
    mask: torch.Tensor | None,
    scale: float | None,
    *,
    is_hidden: bool,
) -> torch.Tensor:
    """One token of each row sees keys that all rows share, which are read once for all, and then its own.

    The scores of both stand side by side in one softmax, so that the result is that of plain attention (the decomposition of
    Hydragen, arXiv 2402.05099, without its second softmax).

    Args:
        query: shape (rows, heads, 1, width).
        key, value: own ones, shape (rows, key heads, own, width).
        shared: keys and values, shape (1, key heads, shared, width).
        mask: what each row sees, bool, shape (rows, 1, 1, shared + own); None for everything.
        scale: of the scores; None for 1/√width.
        is_hidden: whether the mask hides some of the shared ones; if not, that part of it is not looked at.

    Returns:
        Shape (rows, 1, heads, width).
    """
    rows, heads, _, width = query.shape
    key_heads, (first_keys, first_values) = key.shape[1], shared
    first = first_keys.shape[2]
    grouped = query.reshape(rows, key_heads, heads // key_heads, width) * (width**-0.5 if scale is None else scale)

    def meet(every_row: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """(rows, key heads, group, a) times (key heads, a, b), as one product for each key head."""
        together = every_row.transpose(0, 1).flatten(1, 2) @ states
        return together.unflatten(1, (rows, -1)).transpose(0, 1)

    first_scores, own_scores = meet(grouped, first_keys[0].mT), grouped @ key.mT
    if mask is not None:
        own_scores.masked_fill_(~mask[..., first:], -math.inf)
        if is_hidden:
            first_scores.masked_fill_(~mask[..., :first], -math.inf)
    scores = torch.cat([first_scores, own_scores], dim=-1)
    shares = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    result = meet(shares[..., :first], first_values[0]) + shares[..., first:] @ value
    return result.reshape(rows, 1, heads, -1)


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
