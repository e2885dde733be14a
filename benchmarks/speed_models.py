"""The models of the speed benchmark: the embedded one, and random ones of other sizes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from config.structured_config import ModelSection
from utils.model_source import DEFAULT_MODEL, ModelSource, find_model

SEED = 42
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Random models, as fast as trained ones: four narrow layers, for MLX without a GPU; and Qwen2.5-0.5B's sizes, for GPUs.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 49_152,
    },
    "qwen2": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
}


def find_base() -> ModelSource:
    """The embedded model, converted when it is asked for the first time."""
    return find_model(ModelSection(name=DEFAULT_MODEL), "benchmark", with_weights=True)


def build_model(architecture: str, folder: Path) -> ModelSource:
    """A random model of one of `ARCHITECTURES`, with the embedded model's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    base = find_base().folder
    torch.manual_seed(SEED)
    special = {name: getattr(AutoConfig.from_pretrained(base), name) for name in SPECIAL_TOKENS}
    config = AutoConfig.for_model(architecture, **ARCHITECTURES[architecture], **special, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(base / name, folder)
    return find_model(ModelSection(name=str(folder)), "benchmark", with_weights=True)
