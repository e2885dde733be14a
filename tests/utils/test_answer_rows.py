"""How many prompts are answered at once, by the memory that is there."""

from __future__ import annotations

import logging

import pytest

from utils.answer_rows import MEMORY_SHARE, limit_rows
from utils.logging import get_logger
from utils.machine import measure_device_memory

LLAMA = {"num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
GPT2 = {"n_layer": 4, "n_embd": 32, "n_head": 4}
TOKEN_BYTES = 2 * 4 * 32 * 2  # keys and values of four layers, 32 numbers of 2 bytes each, in both


@pytest.mark.parametrize("config", [LLAMA, GPT2, {**LLAMA, "num_key_value_heads": 1, "head_dim": 32}], ids=str)
def test_as_many_rows_as_half_of_the_free_memory_holds(
    config: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    _, free = measure_device_memory("cpu")
    assert free is not None
    tokens = int(free * MEMORY_SHARE / TOKEN_BYTES / 2.5)  # other programs may take or leave a fifth of it meanwhile
    assert limit_rows(config, 2, tokens, 2, "cpu") == 2
    assert limit_rows(config, 64, 100, 2, "cpu") == 64
    logger = get_logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    assert limit_rows(config, 64, tokens, 2, "cpu") == 2
    assert limit_rows(config, 64, 100 * tokens, 2, "cpu") == 1
    logger.removeHandler(caplog.handler)
    assert "rows answered at once: 2 instead of 64, because the cache of one may need" in caplog.text


def test_a_config_without_sizes_limits_nothing() -> None:
    assert limit_rows({"model_type": "of its own"}, 64, 2**40, 2, "cpu") == 64
