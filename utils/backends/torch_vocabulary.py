"""Added tokens on torch: the rows that they need in the embedding and in the head."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from config.structured_config import Recipe
from utils.added_tokens import find_added_ids
from utils.exceptions import ModelLoadingError
from utils.logging import get_logger
from utils.model_source import ModelSource
from utils.tokenizer_files import load_tokenizer


def grow_vocabulary(network: nn.Module, source: ModelSource, recipe: Recipe) -> tuple[int, ...]:
    """Gives the tokens that the model's own tokenizer lacks a row in the embedding and in the head.

    A row starts as the mean of all others, so that a new token is neither likelier nor stranger than an average one (Hewitt
    2021, «Initializing new word embeddings for pretrained language models»); a random row would differ in every script.

    Returns:
        Ids of the new tokens; empty where the folder's tokenizer has them already, as after training all weights.

    Raises:
        ModelLoadingError: the tokenizer belongs to another model.
    """
    if not recipe.data.added_tokens:
        return ()
    ids = find_added_ids(load_tokenizer(source.folder), recipe.data.added_tokens)
    if not ids:
        return ()
    whole: Any = network
    rows, embedding = whole.get_input_embeddings().weight.shape[0], whole.get_input_embeddings()
    if min(ids) > rows:
        message = f"the tokenizer has {min(ids)} tokens, and the model has embeddings for {rows}"
        fix = "use the tokenizer that came with the model"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix, code="foreign-tokenizer")
    known = min(ids)  # rows beyond the tokenizer's are padding of the matrix
    if max(ids) >= rows:
        whole.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        embedding = whole.get_input_embeddings()
    for matrix in iterate_matrices(embedding, whole.get_output_embeddings()):
        matrix.data[list(ids)] = matrix.data[:known].float().mean(dim=0).to(matrix.dtype)
    get_logger().info("data.added_tokens: ids %d to %d, started from the mean of %d rows", ids[0], ids[-1], known)
    return ids


def iterate_matrices(embedding: nn.Module, head: nn.Module) -> Iterator[torch.Tensor]:
    """What has a row for each token: the embedding, and the head with its bias where it has its own."""
    weights: list[Any] = [embedding.weight, head.weight, getattr(head, "bias", None)]
    seen: set[int] = set()
    for weight in weights:
        if weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            yield weight
