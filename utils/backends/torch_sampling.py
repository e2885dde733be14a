"""Logits → next tokens, by transformers' own processors; each row draws from a generator of its own."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from config.structured_config import GenerationSection


def make_processors(generation: GenerationSection) -> LogitsProcessorList:
    """What transformers' generate applies for these settings, in its order."""
    processors = LogitsProcessorList()
    if generation.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(generation.repetition_penalty))
    if generation.temperature > 0:
        if generation.temperature != 1.0:
            processors.append(TemperatureLogitsWarper(generation.temperature))
        if generation.top_k:
            processors.append(TopKLogitsWarper(generation.top_k))
        if generation.top_p is not None and generation.top_p < 1.0:
            processors.append(TopPLogitsWarper(generation.top_p))
    return processors


def draw_seed(generation: GenerationSection) -> int | None:
    """What the rows' generators are made from, drawn from torch's own; None where nothing is sampled."""
    return None if generation.temperature == 0 else int(torch.randint(2**63 - 1, ()))


def make_generator(seed: int | None, row: int) -> np.random.Generator | None:
    """A generator for the tokens of one row, so that its answer depends on no other row."""
    return None if seed is None else np.random.default_rng([seed, row])


def choose_tokens(
    logits: torch.Tensor,
    seen: Sequence[Sequence[int]],
    generators: Sequence[np.random.Generator],
    processors: LogitsProcessorList,
) -> list[int]:
    """The next token of each row.

    Args:
        logits: shape (rows, vocabulary).
        seen: prompt and answer so far of each row: what a repetition penalty looks at.
        generators: of each row; none take the likeliest token.
    """
    scores = logits.float()
    if processors:
        needs_ids = any(isinstance(processor, RepetitionPenaltyLogitsProcessor) for processor in processors)
        scores = processors(pad_seen(seen, scores.device) if needs_ids else None, scores)
    if not generators:
        return list(scores.argmax(dim=-1).tolist())
    if scores.device.type == "mps":
        scores = scores.cpu()  # Metal has no float64, and float32 loses the unlikely tokens of a large vocabulary
    cumulative = torch.softmax(scores, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    drawn = torch.tensor([[generator.random()] for generator in generators], dtype=torch.float64)
    # The first token whose cumulative probability is above the drawn one: none of probability 0 is ever chosen.
    found = torch.searchsorted(cumulative, drawn.to(cumulative.device) * cumulative[:, -1:], right=True)
    return list(found[:, 0].clamp(max=scores.shape[-1] - 1).tolist())


def pad_seen(seen: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """The rows' ids, int64, shape (rows, longest), filled up with each row's own first token: penalised once anyhow."""
    longest = max(map(len, seen))
    ids = np.empty((len(seen), longest), dtype=np.int64)
    for row, own in enumerate(seen):
        ids[row] = own[0]
        ids[row, : len(own)] = own
    return torch.from_numpy(ids).to(device)
