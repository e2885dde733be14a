"""How many prompts are answered at once: as many as the recipe says, or fewer where their keys and values would not fit."""

from __future__ import annotations

from typing import Any

from utils.logging import get_logger
from utils.machine import measure_device_memory
from utils.memory import show_bytes
from utils.model_shape import read_key_width, read_number

MEMORY_SHARE = 0.5  # of the free memory, for keys and values


def limit_rows(config: dict[str, Any], batch_size: int, tokens: int, itemsize: int, device: str) -> int:
    """Rows at once: the batch size, or fewer where their keys and values would take more than a share of the free memory.

    Args:
        config: of the language model, as config.json has it.
        tokens: of the longest prompt with the longest answer.
        itemsize: bytes of a number in the cache.
    """
    layers = read_number(config, "num_hidden_layers", "num_layers", "n_layer")
    row_bytes = 2 * layers * read_key_width(config) * itemsize * tokens
    total, free = measure_device_memory(device)
    room = free or total
    if room is None or row_bytes == 0:  # a driver that does not say, a config in words of its own
        return batch_size
    most = max(1, int(room * MEMORY_SHARE) // row_bytes)
    if most < batch_size:
        message = "rows answered at once: %d instead of %d, because the cache of one may need %s"
        get_logger().info(message, most, batch_size, show_bytes(row_bytes))
    return min(batch_size, most)
