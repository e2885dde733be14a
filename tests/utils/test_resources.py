"""Gradient checkpointing on auto: decided by the predicted peak and by what is free, with the reason as origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config.recipe_io import LoadedRecipe, format_resolved, load_recipe
from config.structured_config import Recipe
from utils.machine import Machine
from utils.memory import MemoryEstimate, estimate_memory
from utils.model_shape import read_shape
from utils.model_source import ModelSource
from utils.preflight import check_recipe, list_automatic_values
from utils.resources import decide_checkpointing
from utils.workload import assume_workload

KEY = "training.gradient_checkpointing"
LLAMA_1B = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
CUDA = Machine("cuda", 8, 1, 16_384, 80 << 30, 80 << 30, quick_bfloat16=True)


def load(folder: Path, **training: Any) -> LoadedRecipe:
    values = {
        "model": {"name": "x"},
        "data": {"train": "rows.jsonl"},
        "lora": {},
        "training": {"method": "sft", **training},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_recipe(path)


def predict(recipe: Recipe) -> MemoryEstimate:
    shape = read_shape(LLAMA_1B)
    assert shape is not None
    return estimate_memory(recipe, shape, CUDA, assume_workload(recipe, shape, CUDA))


def test_checkpointing_is_on_only_where_the_run_would_not_fit_without_it(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    needed = predict(load(tmp_path, gradient_checkpointing=False).recipe).total
    enough, scarce = (decide_checkpointing(loaded, free, predict) for free in (needed, needed - 1))
    assert enough.recipe.training.gradient_checkpointing is False
    assert scarce.recipe.training.gradient_checkpointing is True
    assert predict(scarce.recipe).total < needed
    for decided in (enough, scarce):
        assert f"{needed / 1e9:.1f} GB needed without it" in decided.origins[KEY]
        assert f"# {decided.origins[KEY]}" in format_resolved(decided)
    assert "with it" in scarce.origins[KEY].split(";")[1]


def test_checkpointing_stays_off_where_it_saves_nothing_or_nothing_is_known(tmp_path: Path) -> None:
    loaded = load(tmp_path)
    same = predict(loaded.recipe)
    for free, how, words in (
        (1, lambda recipe: same, "needed without it"),  # as where loading the weights is the peak
        (None, predict, "free memory is unknown"),
        (1, None, "architecture needs is unknown"),
    ):
        decided = decide_checkpointing(loaded, free, how)
        assert decided.recipe.training.gradient_checkpointing is False
        assert words in decided.origins[KEY]


@pytest.mark.parametrize("value", [True, False])
def test_what_the_recipe_says_about_checkpointing_is_kept(tmp_path: Path, value: bool) -> None:
    loaded = load(tmp_path, gradient_checkpointing=value)
    assert decide_checkpointing(loaded, 1 if not value else 1 << 50, predict) is loaded


def test_the_pre_flight_decides_and_shows_it(embedded: ModelSource, tmp_path: Path) -> None:
    loaded = load_recipe(
        Path(__file__).resolve().parents[2] / "recipes" / "smollm2_sql.yaml", [f"model.name={embedded.folder}"]
    )
    preflight = check_recipe(loaded)
    assert preflight.loaded.recipe.training.gradient_checkpointing in (True, False)
    assert "needed without it" in list_automatic_values(preflight.loaded)[KEY]
