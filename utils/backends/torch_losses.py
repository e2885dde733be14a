"""Batches → losses on torch: one forward pass, the head only where a token is learned."""

from __future__ import annotations

import torch
from torch.nn import functional

from utils.backends.torch_model import TorchModel
from utils.batching import Batch


def compute_token_losses(model: TorchModel, batch: Batch) -> torch.Tensor:
    """Negative log-likelihood of every supervised token, in row order.

    The head runs only at the positions whose next token is supervised: with short answers that is most of its cost saved.

    Returns:
        float32 nats, shape (supervised_tokens,).
    """
    device = model.accelerator.device
    loss_mask = torch.from_numpy(batch.loss_mask)
    predicts_next = torch.zeros_like(loss_mask)
    predicts_next[:, :-1] = loss_mask[:, 1:]
    input_ids = torch.from_numpy(batch.input_ids)
    extra = {}
    if batch.attention_mask is not None:
        extra["attention_mask"] = torch.from_numpy(batch.attention_mask).to(device)
    if batch.position_ids is not None:
        # transformers builds the block-diagonal mask from restarting positions only when no attention mask is passed.
        extra["position_ids"] = torch.from_numpy(batch.position_ids).to(device)
    logits = model.network(
        input_ids=input_ids.to(device), logits_to_keep=predicts_next.to(device), use_cache=False, **extra
    ).logits
    targets = input_ids[loss_mask].to(device)
    return functional.cross_entropy(logits.float(), targets, reduction="none")
