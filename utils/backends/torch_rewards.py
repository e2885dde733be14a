"""Reward models on torch: a network that ends in one number instead of a vocabulary, and that number for each answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftModel
from torch import nn

from utils.backends import ignore
from utils.backends.torch_losses import place_batch
from utils.backends.torch_model import TorchModel, run_side_by_side
from utils.batching import Batch
from utils.model_source import ModelSource
from utils.tokenizer_files import load_tokenizer

HEAD = "score"  # transformers' name of it in every architecture


def start_head(network: nn.Module, source: ModelSource, missing: set[str]) -> set[str]:
    """Makes a freshly read network a reward model.

    A head that the files do not have starts at zero: the untouched model then has no opinion instead of a random one, and the
    first loss is ln 2. transformers reads the reward at the last token that is not padding, so the network must know it.

    Args:
        missing: names of the tensors that the files do not have.

    Returns:
        Those of them that are a new head's.
    """
    whole: Any = network
    whole.config.pad_token_id = load_tokenizer(source.folder).pad_token_id
    new = {name for name in missing if name.startswith(f"{HEAD}.")}
    if new:
        whole.score.weight.data.zero_()
    return new


def split_network(network: nn.Module) -> tuple[Any, Any]:
    """What computes hidden states, with its adapters, and the head."""
    whole: Any = network.get_base_model() if isinstance(network, PeftModel) else network
    return getattr(whole, whole.base_model_prefix), whole.score


def compute_rewards(model: TorchModel, batch: Batch) -> torch.Tensor:
    """The reward of every answer, read where transformers reads it: at the last token that is not padding.

    Returns:
        float32, shape (pairs, 2), the chosen answers first; of plain rows (rows,).
    """
    body, head = split_network(model.network)
    seen, inputs = place_batch(model, batch)
    ends = torch.from_numpy(find_ends(seen, body.config.pad_token_id)).to(model.accelerator.device)
    hidden = body(**inputs, use_cache=False).last_hidden_state
    picked = hidden[torch.arange(len(ends), device=ends.device)[:, None], ends]
    rewards = head(picked).float()
    return rewards.view(-1) if batch.segments is None else rewards.view(-1, 2)


def find_ends(batch: Batch, pad_token_id: int) -> npt.NDArray[np.int64]:
    """Column of the last token of each answer that is not the padding token, shape (pairs, 2), or (rows, 1) of plain rows.

    Some templates end an answer with the very token that the tokenizer pads with; transformers takes it for padding too.
    """
    columns = np.arange(batch.input_ids.shape[1])
    real = [columns < batch.lengths[:, None]]
    if batch.segments is not None:
        real = [batch.segments == branch for branch in (1, 2)]
    is_text = batch.input_ids != pad_token_id
    return np.stack([np.where(own & is_text, columns, 0).max(axis=1) for own in real], axis=1)


def score_rows(
    model: TorchModel, batches: Sequence[Batch], on_batch: Callable[[int], None] = ignore
) -> npt.NDArray[np.float64]:
    """The reward of every row, in order, shape (rows,)."""

    def score(batch: Batch) -> npt.NDArray[np.float64]:
        return np.asarray(compute_rewards(model, batch).cpu().numpy(), dtype=np.float64)

    return np.concatenate([np.zeros(0), *run_side_by_side(model, score, batches, on_batch)])


def compute_reward_logits(model: TorchModel, input_ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Reward and 0 at every position, shape (rows, length, 2): log-odds, so that two models can be compared as predictors."""
    body, head = split_network(model.network)
    rewards = head(body(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state)
    return torch.cat([rewards, torch.zeros_like(rewards)], dim=-1)
