"""Small sets: what is filled in, what is never touched, and real runs on five and twelve rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config.recipe_io import LoadedRecipe, format_resolved, load_recipe
from scripts import evaluate_run, train, validate
from utils.exceptions import RecipeError
from utils.logging import get_logger
from utils.preflight import check_recipe, summarise_preflight
from utils.small_data import GENTLE, adapt_to_small_data


def load(folder: Path, *overrides: str, data: dict[str, Any] | None = None, **training: Any) -> LoadedRecipe:
    """A recipe that sets nothing but what is given."""
    values = {
        "model": {"name": "x"},
        "data": {"train": "rows.jsonl", **(data or {})},
        "lora": {},
        "training": {"method": "sft", **training},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return load_recipe(path, overrides)


def list_changes(before: LoadedRecipe, after: LoadedRecipe) -> dict[str, Any]:
    """Dotted key → new value."""
    old, new = before.recipe.model_dump(), after.recipe.model_dump()
    return {
        f"{section}.{key}": value
        for section, values in new.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if old[section][key] != value
    }


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (5, {"training.epochs": 10.0, "training.batch_size": 4, "data.eval_fraction": 0.2}),
        (40, {"training.epochs": 10.0, "training.batch_size": 4, "data.eval_fraction": 0.125}),
        (99, {"training.epochs": 10.0, "training.batch_size": 4}),
        (100, {"training.epochs": 8.0, "training.batch_size": 8}),
        (199, {"training.epochs": 8.0, "training.batch_size": 8}),
        (200, {}),
        (10_000, {}),
    ],
)
def test_a_recipe_that_sets_nothing_is_adapted_below_200_examples(
    tmp_path: Path, rows: int, expected: dict[str, Any]
) -> None:
    loaded = load(tmp_path)
    adapted = adapt_to_small_data(loaded, rows, rows)
    assert list_changes(loaded, adapted) == expected
    for key in expected:
        assert adapted.origins[key].startswith("auto: ")
        assert str(rows) in adapted.origins[key]
        assert f"# {adapted.origins[key]}" in format_resolved(adapted)


SET = {"epochs": 1.0, "batch_size": 32, "learning_rate": 1e-3, "warmup_ratio": 0.2, "neftune_alpha": 5.0}


@pytest.mark.parametrize("profile", ["auto", "gentle"])
def test_what_the_recipe_sets_is_never_touched(tmp_path: Path, profile: str) -> None:
    loaded = load(tmp_path, data={"eval_fraction": 0.1}, **SET, early_stopping_patience=1, small_data=profile)
    assert adapt_to_small_data(loaded, 20, 22) == loaded
    override = load(tmp_path, "training.epochs=2", small_data=profile)
    adapted = adapt_to_small_data(override, 20, 22)
    assert adapted.recipe.training.epochs == 2
    assert adapted.origins["training.epochs"] == "--set"


def test_off_changes_nothing(tmp_path: Path) -> None:
    loaded = load(tmp_path, small_data="off")
    assert adapt_to_small_data(loaded, 5, 5) is loaded


def test_only_what_is_too_low_is_raised_and_only_where_it_decides(tmp_path: Path) -> None:
    by_steps = load(tmp_path, max_steps=50)
    assert list_changes(by_steps, adapt_to_small_data(by_steps, 90, 90)) == {}
    own_rows = load(tmp_path, data={"eval": "held_out.jsonl"})
    assert "data.eval_fraction" not in list_changes(own_rows, adapt_to_small_data(own_rows, 20, 20))
    none = load(tmp_path, data={"eval_fraction": 0.0})
    assert "data.eval_fraction" not in list_changes(none, adapt_to_small_data(none, 20, 20))
    micro = load(tmp_path, micro_batch_size=6)
    assert adapt_to_small_data(micro, 20, 20).recipe.training.batch_size == 6


def test_gentle_is_the_named_profile(tmp_path: Path) -> None:
    loaded = load(tmp_path, small_data="gentle")
    changes = list_changes(loaded, adapt_to_small_data(loaded, 150, 160))
    assert changes == {**GENTLE, "training.batch_size": 8}
    assert GENTLE == {
        "training.learning_rate": 3.5e-5,
        "training.epochs": 8.0,
        "training.warmup_ratio": 0.05,
        "training.neftune_alpha": 0.05,
        "training.early_stopping_patience": 7,
    }


def test_gentle_on_a_large_set_says_that_it_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loaded = load(tmp_path, small_data="gentle")
    logger = get_logger()
    logger.addHandler(caplog.handler)
    try:
        assert adapt_to_small_data(loaded, 640, 700) is loaded
    finally:
        logger.removeHandler(caplog.handler)
    assert "below 200 training examples, here are 640" in caplog.text


def test_gentle_leaves_out_what_the_recipe_makes_impossible(tmp_path: Path) -> None:
    loaded = load(tmp_path, data={"eval_fraction": 0.0}, small_data="gentle", packing=True, max_steps=9)
    changes = list_changes(loaded, adapt_to_small_data(loaded, 150, 160))
    assert changes == {"training.learning_rate": 3.5e-5, "training.warmup_ratio": 0.05}


def test_gentle_leaves_noise_out_under_trl_which_refuses_it(tmp_path: Path) -> None:
    # The filled-in noise broke a rule of the schema: a traceback of pydantic out of validate.py.
    loaded = load(tmp_path, small_data="gentle", engine="trl")
    changes = list_changes(loaded, adapt_to_small_data(loaded, 150, 160))
    assert changes.keys() == {*GENTLE, "training.batch_size"} - {"training.neftune_alpha"}


def test_an_automatic_value_that_breaks_a_rule_is_an_error_with_a_place(tmp_path: Path) -> None:
    loaded = load(tmp_path, packing=True)
    with pytest.raises(RecipeError, match="which packing hides") as caught:
        loaded.with_automatic_value("training.neftune_alpha", 5.0, "a test")
    (problem,) = caught.value.problems
    assert str(problem.where).startswith(str(loaded.path))
    assert problem.fix


def write_files(folder: Path, model: Path, count: int, words: int = 3, **training: Any) -> Path:
    """Rows and a recipe that leaves to the rules what it can."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": f"It is {n}." * words}]}
        for n in range(count)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl")},
        "lora": {"r": 4},
        "training": {"method": "sft", **training},
        "generation": {"max_new_tokens": 4},
    }
    path = folder / "few.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("count", "held_out"), [(2, 1), (5, 1), (12, 2), (30, 5), (199, 20)])
def test_every_small_file_gets_steps_and_held_out_rows(
    tiny_llama: Path, tmp_path: Path, count: int, held_out: int
) -> None:
    preflight = check_recipe(load_recipe(write_files(tmp_path, tiny_llama, count)))
    assert len(preflight.data.evaluation) == preflight.scan.evaluation_rows == held_out
    assert len(preflight.data.train) == count - held_out
    assert preflight.plan.steps_per_epoch >= 1
    assert preflight.plan.total_steps >= 10
    facts = summarise_preflight(preflight)
    assert facts["steps"] == preflight.plan.total_steps
    assert "training examples are few" in facts["automatic_values"]["training.epochs"]


@pytest.mark.slow
def test_a_single_row_trains_and_says_that_nothing_is_held_out(tiny_llama: Path, tmp_path: Path) -> None:
    preflight = check_recipe(load_recipe(write_files(tmp_path, tiny_llama, 1, early_stopping_patience=2)))
    assert preflight.plan.total_steps == 10
    assert len(preflight.data.evaluation) == 0
    (problem,) = [problem for problem in preflight.warnings if problem.code == "no-eval"]
    assert "early stopping cannot act" in problem.message


@pytest.mark.slow
@pytest.mark.parametrize(("count", "batches"), [(5, 1), (12, 3)])
def test_five_and_twelve_rows_train_and_can_be_evaluated(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, batches: int
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_files(tmp_path, tiny_llama, count, early_stopping_patience=50)
    assert train.main(["--recipe", str(recipe), "--run", "run"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 10 * batches + 1))
    assert [row["step"] for row in rows if "eval_loss" in row] == [batches * epoch for epoch in range(1, 11)]
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["steps"]) == ("finished", 10 * batches)
    resolved = tmp_path / "run" / "recipe.yaml"
    text = resolved.read_text(encoding="utf-8")
    assert "epochs: 10.0  # auto: " in text
    assert "batch_size: 4  # auto: " in text
    assert "gradient_checkpointing: false  # auto: " in text
    if count == 12:
        # What a finished run was trained with must not keep another machine from measuring it.
        text = text.replace("optimizer: adamw ", "optimizer: adamw_8bit ")
        text = text.replace("keep_checkpoints: 2 ", "keep_checkpoints: 1000000000 ").replace(
            "epochs: 10.0", "epochs: 999.0"
        )
        resolved.write_text(text.replace("save_every: epoch", "save_every: 1"), encoding="utf-8")
        assert {"adamw_8bit", "1000000000"} <= set(resolved.read_text(encoding="utf-8").split())
        assert evaluate_run.main(["--run", "run"]) == 0


@pytest.mark.slow
def test_8_bit_moments_on_a_cpu_are_refused_before_rows_are_read(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = write_files(tmp_path, tiny_llama, 5, optimizer="adamw_8bit")
    (tmp_path / "rows.jsonl").write_text("this is no row", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"few\.yaml:1.*adamw_8bit needs an NVIDIA GPU"):
        validate.main(["--recipe", str(recipe)])
