"""Batches → losses on MLX: one forward pass, the head only where a token is learned; and DPO's losses over pairs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_flatten

from config.structured_config import DpoSection
from utils.batching import Batch, count_answer_tokens, unpack_rows, unroll_pairs

# Numbers of a chunk of logits. MLX lays out memory some operations ahead of their turn: chunks of a few may be there together.
CHUNK = 8_388_608
Losses = Callable[[mx.array, mx.array], mx.array]
Arrays = dict[str, mx.array]


@dataclass(frozen=True)
class PairTerms:
    """What DPO's losses are made of; each has the shape (pairs, 2), the chosen answers first.

    Attributes:
        policy, reference: log-probabilities of the answers, sums over their tokens, in nats.
        tokens: of each answer.
    """

    policy: mx.array
    reference: mx.array
    tokens: mx.array


class KnownBody:
    """Stands in the place of a network's body and gives hidden states that are there already.

    The outer network then computes its head on them, as its architecture has it: tied or not, capped or not.
    """

    def __init__(self, body: nn.Module, hidden: mx.array) -> None:
        self.hidden = hidden
        self.__dict__ |= {name: module for name, module in body.items() if isinstance(module, nn.Module)}

    def __call__(self, *arguments: Any, **options: Any) -> mx.array:
        """Shape (1, tokens, hidden), whatever the body is asked."""
        return self.hidden


def see_plain_rows(batch: Batch) -> Batch:
    """A batch as rows of one text each, padded on the right: mlx-lm's models take neither masks nor positions of a row.

    Examples of a packed row become rows of their own, and so do the two answers of a pair, with their prompt. Learned tokens
    keep their order.
    """
    if batch.segments is not None:
        return unroll_pairs(batch)
    return unpack_rows(batch) if batch.position_ids is not None else batch


def place_batch(batch: Batch, multiple: int = 1) -> Arrays:
    """A batch as MLX takes it.

    Args:
        multiple: rows and learned tokens are padded to multiples of it, so that few shapes occur and each is compiled once.

    Returns:
        `ids` of shape (rows, length), `lengths` of the rows; of every learned token, in row order, `sources` (the place that
        predicts it, counted over all rows), `targets`, and `weights`, 0 where it is padding. Of pairs also `answers`, the place
        of each token's answer among all, and `reference` and `tokens`, both of shape (pairs, 2).
    """
    seen = see_plain_rows(batch)
    rows, columns = np.nonzero(seen.loss_mask)
    ids = np.pad(seen.input_ids, ((0, 0), (0, -seen.input_ids.shape[1] % multiple)))
    extra = (0, -len(rows) % multiple)
    arrays = {
        "ids": ids,
        "sources": np.pad(rows * ids.shape[1] + columns - 1, extra),  # a token is predicted at the one before it
        "targets": np.pad(seen.input_ids[rows, columns], extra),
        "weights": np.pad(np.ones(len(rows), dtype=np.float32), extra),
        "lengths": seen.lengths.astype(np.float32),
    }
    if batch.segments is not None:
        counts = count_answer_tokens(batch)
        arrays["answers"] = np.pad(np.repeat(np.arange(counts.size), counts.reshape(-1)), extra)
        arrays["tokens"] = counts.astype(np.float32)
        if batch.reference is not None:
            arrays["reference"] = batch.reference.astype(np.float32)  # MLX has no float64 on a GPU
    return {name: mx.array(value) for name, value in arrays.items()}


def compute_token_losses(network: nn.Module, arrays: Arrays) -> mx.array:
    """Negative log-likelihood of every learned token of a placed batch, in row order; of a pair those of its chosen and then of
    its rejected answer.

    A token sees those before it only, so padding on the right changes no real one and needs no mask.

    Returns:
        float32 nats, shape (learned tokens,).
    """
    hidden = network.model(arrays["ids"], None)  # phi asks for a cache, whatever it is
    chosen = hidden.reshape(-1, hidden.shape[-1])[arrays["sources"]]
    return compute_head_losses(network, chosen, arrays["targets"]) * arrays["weights"]


def compute_head_losses(network: nn.Module, hidden: mx.array, targets: mx.array) -> mx.array:
    """Negative log-likelihood of each target in float32 nats, shape (tokens,).

    With a frozen head the gradient by the hidden states is formed in the forward pass, chunk by chunk, so that the logits of
    all tokens are never there together (Liger Kernel, arXiv 2410.10989, section 3.2).

    Args:
        hidden: what the head reads, shape (tokens, hidden).
        targets: shape (tokens,).
    """

    def score(part: mx.array, wanted: mx.array) -> mx.array:
        outer = copy.copy(network)
        outer["model"] = KnownBody(network.model, part[None])
        logits = outer(mx.zeros((1, 1), dtype=mx.int32))[0].astype(mx.float32)
        return mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]

    size = max(1, CHUNK // find_vocabulary(network))
    if len(targets) <= size or trains_head(network):
        return score(hidden, targets)
    compute, found = compute_chunk if network.training else compute_alone, [mx.zeros(0)]
    for start in range(0, len(targets), size):
        # MLX takes up to 20 independent branches at once: the logits of as many chunks would be there together.
        (part,) = mx.depends([hidden[start : start + size]], [found[-1]])
        found.append(compute(score, part, targets[start : start + size]))
    return mx.concatenate(found)


def compute_alone(score: Losses, hidden: mx.array, targets: mx.array) -> mx.array:
    """Losses of a chunk without a gradient."""
    return score(hidden, targets)


def compute_chunk(score: Losses, hidden: mx.array, targets: mx.array) -> mx.array:
    """Losses of a chunk, whose gradient is formed at once: each depends on its own row, so that of the sum has them all."""

    @mx.custom_function
    def compute(hidden: mx.array) -> tuple[mx.array, mx.array]:
        def add_up(part: mx.array) -> tuple[mx.array, mx.array]:
            losses = score(part, targets)
            return losses.sum(), losses

        (_, losses), slopes = mx.value_and_grad(add_up)(hidden)
        return losses, mx.stop_gradient(slopes)

    @compute.vjp
    def differentiate(hidden: mx.array, cotangents: Sequence[mx.array], outputs: Sequence[mx.array]) -> mx.array:
        return outputs[1] * cotangents[0][:, None].astype(outputs[1].dtype)

    both: Any = compute
    losses: mx.array = both(hidden)[0]
    return losses


def find_vocabulary(network: nn.Module) -> int:
    """Rows of the input embedding."""
    body = network.model
    return int((body.wte if "wte" in body else body.embed_tokens).weight.shape[0])


def trains_head(network: nn.Module) -> bool:
    """True if a gradient is asked for of the head, or of the embedding whose matrix it shares."""
    names = [name for name, _ in tree_flatten(network.trainable_parameters())]
    return any(name.startswith(("lm_head.", "model.embed_tokens.", "model.wte.")) for name in names)


def compute_pair_log_probs(network: nn.Module, arrays: Arrays) -> mx.array:
    """Log-probability of both answers of each placed pair: the sum over their tokens, in nats, shape (pairs, 2)."""
    losses = compute_token_losses(network, arrays)
    sums = mx.zeros(arrays["tokens"].size, dtype=losses.dtype).at[arrays["answers"]].add(-losses)
    return sums.reshape(-1, 2)


def log_sigmoid(x: mx.array) -> mx.array:
    """log(1 / (1 + exp(-x))) without overflow."""
    return -mx.logaddexp(mx.zeros_like(x), -x)


def compute_dpo_losses(pairs: PairTerms, dpo: DpoSection) -> mx.array:
    """DPO's losses, shape (pairs,): sigmoid (arXiv 2305.18290, equation 7, with label smoothing), IPO on means over tokens
    (arXiv 2310.12036, equation 17) and SLiC's hinge (arXiv 2305.10425, equation 1)."""
    ratios = pairs.policy - pairs.reference
    if dpo.loss == "ipo":
        ratios = ratios / pairs.tokens
        return mx.square(ratios[:, 0] - ratios[:, 1] - 1 / (2 * dpo.beta))
    margin = dpo.beta * (ratios[:, 0] - ratios[:, 1])
    if dpo.loss == "hinge":
        return mx.maximum(1 - margin, 0)
    return -(1 - dpo.label_smoothing) * log_sigmoid(margin) - dpo.label_smoothing * log_sigmoid(-margin)


def sum_rewards(pairs: PairTerms, dpo: DpoSection) -> dict[str, float]:
    """Sums over the pairs: both implicit rewards, beta × log-ratio, and pairs whose chosen answer has the larger one; a tie
    counts half."""
    rewards = np.array(dpo.beta * (pairs.policy - pairs.reference), dtype=np.float64)
    margins = rewards[:, 0] - rewards[:, 1]
    return {
        "accuracy": float((np.sign(margins) + 1).sum() / 2),
        "chosen_reward": float(rewards[:, 0].sum()),
        "rejected_reward": float(rewards[:, 1].sum()),
    }
