"""mlx-lm's architectures as transformers computes them, filled from files with transformers' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
from mlx import nn
from mlx_lm import utils as mlx_utils
from mlx_lm.models import gemma, gemma2, gemma3_text

from utils.mlx_names import to_mlx_module


class TanhMlp(gemma.MLP):  # type: ignore[misc]  # mlx-lm ships no types
    """Gemma's MLP with the approximate GELU that transformers and Gemma's own code have; mlx-lm's takes the exact one."""

    def __call__(self, x: mx.array) -> mx.array:
        """Shape (rows, length, hidden) in and out."""
        product: mx.array = self.down_proj(nn.gelu_approx(self.gate_proj(x)) * self.up_proj(x))
        return product


class GroupedAttention(gemma2.Attention):  # type: ignore[misc]  # mlx-lm ships no types
    """Gemma 2's attention with a mask for each row of a batch.

    mlx-lm's has an axis more where heads share keys, and so takes the rows of such a mask for heads: batched answers were
    wrong.
    """

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """Shape (rows, length, hidden) in and out; a mask has the shape (length, keys) or (rows, 1, length, keys)."""
        is_for_rows = isinstance(mask, mx.array) and mask.ndim == 4 and self.repeats > 1
        seen: mx.array = super().__call__(x, mask[:, :, None] if is_for_rows else mask, cache)
        return seen


class ScaledBody(gemma3_text.Gemma3Model):  # type: ignore[misc]  # mlx-lm ships no types
    """Gemma 3's layers behind embeddings that are multiplied by the root of their width, as transformers does it.

    mlx-lm rounds that root to bfloat16 whatever the weights are: by up to 0.2 %, which moved the logits in the third digit.
    """

    def __call__(self, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
        """Shape (rows, length) → (rows, length, hidden)."""
        vectors = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        if vectors.dtype != mx.bfloat16:
            root = self.args.hidden_size**0.5
            vectors = vectors * (root / float(mx.array(root, mx.bfloat16)))
        hidden: mx.array = super().__call__(inputs, cache, vectors)
        return hidden


def correct_architecture(network: nn.Module, model_type: str) -> None:
    """Gives this network, and no other of its class, the parts that mlx-lm computes otherwise than transformers."""
    if model_type == "gemma3_text":
        network.model.__class__ = ScaledBody
    for layer in network.layers:
        if model_type == "gemma":
            layer.mlp.__class__ = TanhMlp
        if model_type == "gemma2":
            layer.self_attn.__class__ = GroupedAttention


def find_classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], type]:
    """mlx-lm's classes of an architecture, with a network that takes transformers' names of tensors."""
    network_class, arguments_class = mlx_utils._get_classes(config)
    model_type = str(config["model_type"])
    sanitize: Callable[[Any, dict[str, mx.array]], dict[str, mx.array]] | None
    sanitize = network_class.__dict__.get("sanitize")

    class Network(network_class):  # type: ignore[misc, valid-type]  # its base is chosen at run time
        """The architecture, filled from files in transformers' layout or in mlx-lm's."""

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            """Weights under mlx-lm's names; those of a head that shares the embedding's matrix are left out."""
            if model_type == "gpt2":
                return sanitize_gpt2(weights)
            kept = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
            kept = {to_mlx_module(model_type, name): value for name, value in kept.items()}
            if config["tie_word_embeddings"]:
                kept = {name: value for name, value in kept.items() if not name.startswith("lm_head.")}
            return sanitize(self, kept) if sanitize else kept

    return Network, arguments_class


def sanitize_gpt2(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """GPT-2's weights under mlx-lm's names, and with the matrices of its Conv1D, which are inputs × outputs, turned round.

    Files that mlx-lm has written begin all names with `model.`, and their matrices are turned already.
    """
    found = {}
    for name, value in weights.items():
        inner = name.removeprefix("transformer.").removeprefix("model.")
        if inner == "lm_head.weight" or inner.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the head is the embedding; the others are the causal mask
        is_matrix = inner.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        found[f"model.{inner}"] = value.T if is_matrix and not name.startswith("model.") else value
    return found
