"""What tests share: the real embedded model, and tiny real models built in code."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from config.structured_config import ModelSection
from utils.logging import set_up_logging
from utils.model_source import ModelSource, find_model

EMBEDDED = "embedded/smollm2-135m-instruct"


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Silences libraries as every script does."""
    set_up_logging("WARNING")


@pytest.fixture(scope="session")
def embedded() -> ModelSource:
    """The embedded model, converted on first use."""
    return find_model(ModelSection(name=EMBEDDED), "test", with_weights=True)


@pytest.fixture(scope="session")
def tiny_llama(embedded: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with the embedded model's tokenizer: seconds instead of minutes, nothing else differs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.folder / name, folder / name)
    return folder
