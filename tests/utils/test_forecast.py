"""Predicted time and disk, on run folders written by hand."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from config.recipe_io import load_recipe
from config.structured_config import Recipe
from utils.exceptions import MachineError
from utils.forecast import DiskForecast, check_disk, estimate_disk, measure_checkpoints, predict_seconds
from utils.machine import Machine
from utils.model_shape import ModelShape, read_shape

RECIPE = """\
model:
  name: some/model
data:
  train: x.jsonl
lora:
  r: 16
training:
  method: sft
"""
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
    "dtype": "bfloat16",
}


MACHINE = Machine("cpu", 2, 2, 256, None, None, False)


def write_run(outputs: Path, name: str, age: int, recipe: str = RECIPE, **facts: Any) -> Path:
    """A run folder with recipe and facts, written `age` seconds ago."""
    folder = outputs / "recipe" / name
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    values = {"status": "finished", "device": "cpu", "tokens_per_second": 100.0, **facts}
    (folder / "run.json").write_text(json.dumps(values), encoding="utf-8")
    os.utime(folder / "run.json", (1e9 - age, 1e9 - age))
    return folder


def read_recipe(tmp_path: Path, text: str = RECIPE) -> Recipe:
    (tmp_path / "asked.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "asked.yaml").recipe


def test_the_newest_run_of_the_same_work_gives_the_time(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    write_run(outputs, "old", 50, tokens_per_second=1.0)
    good = write_run(outputs, "good", 40, RECIPE.replace("r: 16", "r: 8"), tokens_per_second=200.0)
    write_run(outputs, "other model", 9, RECIPE.replace("some/model", "other/model"))
    write_run(outputs, "all weights", 8, RECIPE.replace("lora:\n  r: 16\n", ""))
    write_run(outputs, "other device", 7, device="cuda")
    write_run(outputs, "other back end", 7, backend="mlx")
    write_run(outputs, "stopped", 6, status="stopped")
    write_run(outputs, "no speed", 5, tokens_per_second=None)
    write_run(outputs, "older recipe", 4, RECIPE + "unknown: 1\n")
    (write_run(outputs, "broken", 3) / "run.json").write_text("{", encoding="utf-8")
    found = predict_seconds(read_recipe(tmp_path), 5000, MACHINE, outputs)
    assert found is not None
    assert (found.seconds, found.run) == (25.0, good)


def test_without_a_comparable_run_nothing_is_predicted(tmp_path: Path) -> None:
    assert predict_seconds(read_recipe(tmp_path), 5000, MACHINE, tmp_path / "absent") is None
    write_run(tmp_path / "outputs", "other", 1, device="mps")
    assert predict_seconds(read_recipe(tmp_path), 5000, MACHINE, tmp_path / "outputs") is None


def find_shape() -> ModelShape:
    shape = read_shape(LLAMA)
    assert shape is not None
    return shape


def test_adapters_are_counted_in_checkpoints_and_the_model_in_the_merge(tmp_path: Path) -> None:
    recipe, shape = read_recipe(tmp_path), find_shape()
    disk = estimate_disk(recipe, shape, LLAMA)
    adapters = 2 * 16 * sum(linear.inputs + linear.outputs for linear in shape.linears)
    result = 4 * adapters + 4_000_000  # and the tokenizer
    assert disk.checkpoint == result + 8 * adapters  # AdamW's two moments
    assert disk.checkpoints == 4 * disk.checkpoint + result  # two newest, best, one in writing, the result
    assert disk.merge == 2 * shape.parameters
    whole = estimate_disk(read_recipe(tmp_path, RECIPE.replace("lora:\n  r: 16\n", "")), shape, LLAMA)
    assert whole.checkpoint == 12 * shape.parameters + 4_000_000
    assert whole.merge == 0


def test_a_disk_that_cannot_hold_the_checkpoints_is_an_error(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(MachineError, match="are free in") as caught:
        check_disk(DiskForecast(0, 2 * free, 0), "recipe.yaml:9", tmp_path / "not" / "yet")
    assert caught.value.problems[0].code == "disk"
    assert caught.value.problems[0].where == "recipe.yaml:9"


def test_checkpoints_that_a_run_has_already_need_no_room_again(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    assert measure_checkpoints(recipe) == 0
    for name, size in (("step-1", 300), ("step-2", 500)):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "model.safetensors").write_bytes(bytes(size))
    assert measure_checkpoints(recipe) == 800
    free = shutil.disk_usage(tmp_path).free
    assert check_disk(DiskForecast(0, 2 * free, 0), "recipe.yaml:9", tmp_path, present=2 * free) == []


def test_a_disk_that_cannot_hold_the_merge_is_a_warning(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    (problem,) = check_disk(DiskForecast(0, free // 4, 2 * free), "recipe.yaml:9", tmp_path)
    assert (problem.severity, problem.code) == ("warning", "disk")
    assert check_disk(DiskForecast(0, free // 4, free // 4), "recipe.yaml:9", tmp_path) == []
