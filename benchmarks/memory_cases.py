"""The runs whose memory `benchmarks/memory.py` measures, and the sizes of their models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EMBEDDED_VOCABULARY = 49_152
TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
# The sizes of the real models, as their config.json on the hub states them.
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2_text": {
        "model_type": "gpt2",
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
    },
    "qwen_chat": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "llama_chat": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    "phi_chat": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": False,
    },
    # Without Apple's GPU MLX is slow, so these are small.
    "qwen_chat_mlx": {
        "model_type": "qwen2",
        "vocab_size": EMBEDDED_VOCABULARY,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
    "llama_dpo_mlx": {
        "model_type": "llama",
        "vocab_size": EMBEDDED_VOCABULARY,
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    },
}
LAYERS_KEY = {"gpt2": "n_layer"}
STORED = {"gpt2_text": "float32"}  # the format of the files on the hub; the others are bfloat16


@dataclass(frozen=True)
class Case:
    """One run: a recipe, and what is changed in it."""

    name: str
    recipe: str
    overrides: tuple[str, ...] = ()
    all_weights: bool = False
    long_rows: bool = False


CASES = (
    Case("smollm2_sql", "smollm2_sql"),
    Case("smollm2_sql, all weights", "smollm2_sql", all_weights=True),
    Case("smollm2_sql, checkpointing", "smollm2_sql", ("training.gradient_checkpointing=true",)),
    Case("smollm2_sql, packing", "smollm2_sql", ("training.packing=true", "training.batch_size=16")),
    Case("smollm2_sql, nf4", "smollm2_sql", ("model.quantization=nf4",)),
    Case("smollm2_sql, long rows", "smollm2_sql", ("data.max_length=1024",), long_rows=True),
    Case("gpt2_text", "gpt2_text"),
    Case("qwen_chat", "qwen_chat"),
    Case("llama_chat", "llama_chat"),
    Case("phi_chat", "phi_chat"),
    Case("smollm2_sql_mlx", "smollm2_sql_mlx", ("evaluation.max_examples=16", "evaluation.metrics=[loss]")),
    Case("qwen_chat_mlx, 8 narrow layers", "qwen_chat_mlx"),
    Case("llama_dpo_mlx, 6 narrow layers", "llama_dpo_mlx", ("training.batch_size=8",)),
)
