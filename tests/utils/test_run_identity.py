"""A run goes on with the recipe, rows and template that it began with; what differs is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from config.recipe_io import format_resolved, load_recipe
from utils.exceptions import RunError
from utils.run_identity import check_recipe_is_same, check_rows_are_same, identify_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_the_resolved_recipe_of_a_run_is_the_recipe_that_it_began_with(path: Path, tmp_path: Path) -> None:
    loaded = load_recipe(path)
    if loaded.recipe.training.micro_batch_size == "auto":
        loaded = loaded.with_automatic_value("training.micro_batch_size", 2, "because")
    facts = identify_recipe(loaded)
    resolved = tmp_path / "recipe.yaml"
    resolved.write_text(format_resolved(loaded), encoding="utf-8")
    assert identify_recipe(load_recipe(resolved))["recipe_hash"] == facts["recipe_hash"]
    check_recipe_is_same(facts, load_recipe(resolved), "fix")
    check_recipe_is_same(facts, load_recipe(path), "fix")  # what a rule has chosen, the recipe still leaves open


RECIPE = """
model:
  name: some/model
data:
  train: rows.jsonl
training:
  method: sft
  learning_rate: 4.0e-4
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("4.0e-4", "2.0e-4"), "mine.yaml:8: training.learning_rate: 0.0004 in the run, 0.0002 now"),
        (("rows.jsonl", "other.jsonl"), "data.train: rows.jsonl in the run, other.jsonl now"),
        (("  method: sft", "  method: sft\n  epochs: 9"), "training.epochs: 7.0 in the run, 9.0 now"),
        (("  method: sft", "  method: sft\n  max_steps: 9"), "training.max_steps: nothing in the run, 9 now"),
        (("training:", "lora:\n  r: 8\ntraining:"), "lora.r: nothing in the run, 8 now"),
    ],
)
def test_each_value_that_differs_is_shown_with_its_line(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    loaded = load_recipe(write(tmp_path, RECIPE)).with_automatic_value("training.epochs", 7.0, "few rows")
    facts = identify_recipe(loaded)
    check_recipe_is_same(facts, load_recipe(write(tmp_path, RECIPE)), "put it back")
    with pytest.raises(RunError) as caught:
        check_recipe_is_same(facts, load_recipe(write(tmp_path, RECIPE.replace(*change))), "put it back")
    assert said in str(caught.value)
    assert "Fix: put it back" in str(caught.value)


def test_a_secret_in_a_recipe_is_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "canary-7c1f5e")
    loaded = load_recipe(write(tmp_path, RECIPE.replace("rows.jsonl", "canary-7c1f5e.jsonl")))
    facts = identify_recipe(loaded)
    assert "canary" not in str(facts)
    check_recipe_is_same(facts, loaded, "fix")


def test_files_that_have_changed_come_or_gone_are_named() -> None:
    facts: dict[str, Any] = {"sources": {"train": [["a", "1"], ["b", "2"]], "eval": None}}
    places = {"train": "x.yaml:3", "eval": "x.yaml:4"}
    check_rows_are_same(facts, {"train": [("b", "2"), ("a", "1")], "eval": None}, places)
    with pytest.raises(RunError) as caught:
        check_rows_are_same(facts, {"train": [("a", "9"), ("c", "2")], "eval": [("d", "1")]}, places)
    assert [problem.message for problem in caught.value.problems] == [
        "a has changed since the run began",
        "b is gone since the run began",
        "c is new since the run began",
        "d is new since the run began",
    ]
