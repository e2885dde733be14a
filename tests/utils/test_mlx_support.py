"""What is known of a model's config before MLX is imported: what mlx-lm would compute otherwise, and what it has to be told."""

from __future__ import annotations

from typing import Any

import pytest

from utils.mlx_support import find_config_trouble, list_mlx_keys, translate_config

GEMMA: dict[str, Any] = {"model_type": "gemma3_text", "num_hidden_layers": 6}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.1], "long_factor": [4.0, 9.0]}
WINDOW, FULL = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    ("changes", "is_fine"),
    [
        ({}, True),
        ({"layer_types": [WINDOW] * 5 + [FULL]}, True),
        ({"layer_types": [WINDOW, WINDOW, FULL] * 2}, True),
        ({"num_hidden_layers": 2}, False),
        ({"layer_types": [WINDOW] * 6}, False),
        ({"layer_types": [WINDOW, FULL, WINDOW, WINDOW, WINDOW, FULL]}, False),
    ],
)
def test_gemma_3_needs_the_layers_that_mlx_lm_builds(changes: dict[str, Any], is_fine: bool) -> None:
    """mlx-lm counts in steps of one length, and ends in an IndexError where the model has fewer layers."""
    assert (find_config_trouble({**GEMMA, **changes}) is None) == is_fine


def test_a_merged_config_keeps_both_factors_of_long_rotations() -> None:
    """In memory mlx-lm gets the short ones alone; a file must serve rows of any length, in transformers too."""
    config = {"model_type": "phi3", "rope_parameters": LONG, "tie_word_embeddings": False}
    assert translate_config(config)["rope_scaling"]["long_factor"] == LONG["short_factor"]
    written = list_mlx_keys(config)["rope_scaling"]
    assert (written["short_factor"], written["long_factor"], written["type"]) == ([1.0, 1.1], [4.0, 9.0], "longrope")
