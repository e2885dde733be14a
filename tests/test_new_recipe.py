"""A new recipe loads, validates, says why of every number, trains as it is, and is refused where it cannot be right."""

import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config.model_families import FAMILIES, find_learning_rate, guess_family, guess_parameters
from config.recipe_io import LoadedRecipe, load_recipe
from config.structured_config import FormatName
from utils.exceptions import DataError, ModelLoadingError, RecipeError
from utils.model_source import DEFAULT_MODEL as EMBEDDED
from utils.model_source import ModelSource
from utils.recipe_choices import Plan, choose_answer_length, choose_data, choose_length, choose_lora
from utils.recipe_facts import ModelFacts, RowFacts, find_held_out_file
from utils.recipe_writer import choose_path
from utils.row_checks import RowScan
from utils.rule_checks import Facts
from utils.rules import find_problems

ROOT = Path(__file__).resolve().parents[1]
NEW_RECIPE = importlib.import_module("scripts.new_recipe")
NUMBER = re.compile(r"^ *\w+: [-+.\d][^#\n]*$", re.MULTILINE)
LLAMA = next(family for family in FAMILIES if family.name == "llama")
# One row of each format; {0} makes it a row of its own.
ROWS: dict[FormatName, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Say {0}."}, {"role": "assistant", "content": "It is {0}."}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Say {0}."}, {"from": "gpt", "value": "It is {0}."}]},
    "alpaca": {"instruction": "Say it.", "input": "{0}", "output": "It is {0}."},
    "prompt_completion": {"prompt": "Number {0} is", "completion": " {0}"},
    "question_answer": {"question": "Which is number {0}?", "answer": "It is {0}."},
    "text": {"text": "Number {0} follows the one before it."},
    "preference": {"prompt": "Say {0}.", "chosen": "It is {0}.", "rejected": "No, not {0}."},
}


FAST_OR_PAIRS = ("messages", "text", "preference")


def write_rows(path: Path, row: dict[str, Any], count: int = 60) -> Path:
    """Rows that differ in their number."""
    lines = [json.dumps(row).replace("{0}", str(number)) for number in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_recipe(tmp_path: Path, data: Path | str, *more: str, model: str = EMBEDDED) -> LoadedRecipe:
    """Runs the script and reads what it wrote."""
    out = tmp_path / "new.yaml"
    assert NEW_RECIPE.main(["--model", model, "--data", str(data), "--out", str(out), *more]) == 0
    return load_recipe(out)


def make_plan(rows: int, *, longest: int = 100, positions: int | None = None, **more: Any) -> Plan:
    """A plan for rows that exist on paper only."""
    scan = RowScan(rows, 0, {"messages": rows}, frozenset(), ())
    facts = RowFacts("rows.jsonl", None, scan, longest, **more)
    return Plan(Path("x.yaml"), ModelFacts("x", 10**9, "its name", LLAMA, positions=positions), facts, "chat", "sft")


def collect(lines: list[Any]) -> dict[str, Any]:
    return {line.key: line.value for line in lines}


@pytest.mark.parametrize(
    "format_name",
    ["messages", "text", *(pytest.param(name, marks=pytest.mark.slow) for name in ROWS if name not in FAST_OR_PAIRS)],
)
def test_rows_of_each_format_give_a_recipe_that_is_valid_and_gives_a_reason_for_every_number(
    format_name: FormatName, tmp_path: Path, embedded: ModelSource, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = make_recipe(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS[format_name]))
    assert "The recipe is valid. Next: python scripts/train.py --recipe" in capsys.readouterr().out
    recipe, text = loaded.recipe, loaded.path.read_text(encoding="utf-8")
    assert NUMBER.findall(text) == []
    assert recipe.lora is not None
    assert recipe.lora.target_modules == LLAMA.lora_targets
    assert recipe.training.learning_rate == find_learning_rate(135e6, LLAMA, "sft", with_lora=True) == 4e-4
    assert recipe.data.strategy == ("standard" if format_name == "text" else "chat")
    assert recipe.data.overlong == "error"
    assert (recipe.training.epochs, recipe.training.batch_size) == (8, 4)  # 60 rows are few
    assert find_problems(Facts(recipe, LLAMA, parameters=135_000_000), loaded.find_origin) == []


def test_the_recipe_pins_what_would_otherwise_be_left_to_a_default(tmp_path: Path, embedded: ModelSource) -> None:
    loaded = make_recipe(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS["messages"]))
    pinned = {key for key, origin in loaded.origins.items() if origin.startswith(str(loaded.path))}
    assert pinned >= {
        *("seed", "model.name", "data.train", "data.eval_fraction", "data.strategy", "data.loss_on", "data.max_length"),
        *("lora.r", "lora.alpha", "lora.target_modules", "training.method", "training.epochs", "training.batch_size"),
        *("training.learning_rate", "training.lr_scheduler", "training.warmup_ratio", "generation.max_new_tokens"),
        *("generation.temperature", "evaluation.metrics"),
    }


def test_a_back_end_that_is_asked_for_stands_in_the_recipe_and_in_its_name(tmp_path: Path, tiny_llama: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["messages"])
    loaded = make_recipe(tmp_path, rows, "--backend", "mlx", "--size", "1M", model=str(tiny_llama))
    assert loaded.recipe.backend == "mlx"
    assert loaded.origins["backend"].startswith(str(loaded.path))
    assert choose_path("gpt2", "chats.jsonl", "mlx") == Path("recipes/gpt2_chats_mlx.yaml")


def test_the_limit_is_the_longest_rows_own_length(tmp_path: Path, embedded: ModelSource) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["messages"])
    long = {"messages": [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Yes."}]}
    rows.write_text(rows.read_text(encoding="utf-8") + json.dumps(long) + "\n", encoding="utf-8")
    loaded = make_recipe(tmp_path, rows)
    assert 300 < loaded.recipe.data.max_length <= 448
    counted = re.search(
        r"max_length: (\d+) +# the longest row has (\d+) tokens", loaded.path.read_text(encoding="utf-8")
    )
    assert counted
    assert 0 <= int(counted[1]) - int(counted[2]) < 64


def test_rows_with_a_database_are_judged_by_running_their_answers(tmp_path: Path, embedded: ModelSource) -> None:
    recipe = make_recipe(tmp_path, ROOT / "data" / "text_to_sql" / "train.jsonl").recipe
    assert recipe.data.eval == str(ROOT / "data" / "text_to_sql" / "eval.jsonl")
    assert recipe.evaluation.metrics[:2] == ("execution_accuracy", "exact_match")
    assert recipe.generation.temperature == 0


def test_a_profile_decides_how_answers_are_sampled(tmp_path: Path, embedded: ModelSource) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["alpaca"])
    found = {}
    for profile in ("chat", "instruction"):
        (tmp_path / profile).mkdir()
        found[profile] = make_recipe(tmp_path / profile, rows, "--profile", profile).recipe
    assert found["chat"].generation.temperature > 0
    assert found["instruction"].generation.temperature == 0
    assert found["chat"].evaluation.metrics == ("loss", "perplexity")
    assert found["instruction"].evaluation.metrics == ("exact_match", "loss")


def test_pairs_are_for_a_method_that_learns_from_them(tmp_path: Path, embedded: ModelSource) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["preference"])
    with pytest.raises(DataError, match="method sft learns one answer") as refused:
        make_recipe(tmp_path, rows, "--method", "sft")
    assert "keep the chosen answers alone" in str(refused.value)
    assert not (tmp_path / "new.yaml").exists()
    loaded = make_recipe(tmp_path, rows)
    recipe = loaded.recipe
    assert recipe.training.method == "dpo"
    assert recipe.training.learning_rate == find_learning_rate(135e6, LLAMA, "dpo", with_lora=True) == 1.5e-5
    assert NUMBER.findall(loaded.path.read_text(encoding="utf-8")) == []
    assert "preference_accuracy" in recipe.evaluation.metrics


@pytest.mark.parametrize("method", ["kto", "orpo", "reward"])
def test_every_method_for_pairs_gets_a_recipe_that_is_valid(tmp_path: Path, embedded: ModelSource, method: str) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["preference"])
    recipe = make_recipe(tmp_path, rows, "--method", method).recipe
    assert recipe.training.method == method
    assert all("accuracy" in name or name == "loss" for name in recipe.evaluation.metrics)
    assert recipe.model_fields_set >= {method}


def test_labelled_rows_are_for_kto(tmp_path: Path, embedded: ModelSource) -> None:
    labelled = {"prompt": "Say {0}.", "completion": "It is {0}.", "label": True}
    rows = write_rows(tmp_path / "rows.jsonl", labelled)
    for method in ("sft", "dpo", "orpo"):
        with pytest.raises(DataError, match=f"method {method} reads no label") as refused:
            make_recipe(tmp_path, rows, "--method", method)
        assert "--method kto" in str(refused.value)
    loaded = make_recipe(tmp_path, rows)
    assert loaded.recipe.training.method == "kto"
    assert loaded.recipe.evaluation.metrics == ("label_accuracy", "loss")
    mixed = write_rows(tmp_path / "mixed.jsonl", labelled)
    with Path(mixed).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "Say it.", "completion": "It."}) + "\n")
    loaded.path.unlink()
    with pytest.raises(DataError, match="some rows have a label, others have one answer"):
        make_recipe(tmp_path, mixed)


def test_a_method_for_pairs_refuses_rows_with_one_answer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="learns from a chosen and a rejected answer"):
        make_recipe(tmp_path, write_rows(tmp_path / "rows.jsonl", ROWS["messages"]), "--method", "dpo")


def test_a_model_that_is_not_here_is_known_by_its_name_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["messages"], 300)
    loaded = make_recipe(tmp_path, rows, model="Qwen/Qwen2.5-7B-Instruct")
    recipe, shown = loaded.recipe, capsys.readouterr()
    assert recipe.training.learning_rate == 2e-4
    assert recipe.data.strategy == "chat"
    assert "Not checked: " in shown.err
    assert "Next: python scripts/validate.py" in shown.out
    text = loaded.path.read_text(encoding="utf-8")
    assert "estimated from its bytes" in text
    assert "were not here" in text
    assert NUMBER.findall(text) == []


def test_a_model_of_unknown_size_is_asked_for_it(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["messages"])
    with pytest.raises(RecipeError, match=r"does not tell how large .* Fix: add --size"):
        make_recipe(tmp_path, rows, model="nobody/mystery-instruct")
    recipe = make_recipe(tmp_path, rows, "--size", "8B", model="nobody/mystery-instruct").recipe
    assert recipe.lora is not None
    assert recipe.lora.target_modules == "all-linear"
    assert recipe.training.learning_rate == 2e-4


def test_what_does_not_exist_is_refused_and_nothing_is_written(tmp_path: Path, embedded: ModelSource) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["messages"])
    with pytest.raises(DataError, match="no such data file"):
        make_recipe(tmp_path, tmp_path / "nowhere.jsonl")
    with pytest.raises(RecipeError, match="there is no model"):
        make_recipe(tmp_path, rows, model=str(tmp_path / "nothing"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelLoadingError, match=r"there is no .*config\.json"):
        make_recipe(tmp_path, rows, model=str(tmp_path / "empty"))
    assert not (tmp_path / "new.yaml").exists()


def test_a_recipe_is_never_overwritten(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["messages"])
    (tmp_path / "new.yaml").write_text("mine\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="exists already") as refused:
        make_recipe(tmp_path, rows)
    assert "--out" in str(refused.value)
    assert (tmp_path / "new.yaml").read_text(encoding="utf-8") == "mine\n"


def test_the_first_command_of_help_works_and_names_the_recipe_after_model_and_folder(
    tmp_path: Path, embedded: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ROOT / "data" / "text_to_sql", tmp_path / "data" / "text_to_sql")
    monkeypatch.chdir(tmp_path)
    command = next(line for line in str(NEW_RECIPE.__doc__).splitlines() if "python scripts/new_recipe.py" in line)
    assert NEW_RECIPE.main(shlex.split(command)[2:]) == 0
    recipe = load_recipe("recipes/smollm2_135m_instruct_text_to_sql.yaml").recipe
    assert recipe.data.eval == "data/text_to_sql/eval.jsonl"


def test_a_file_that_says_nothing_is_named_by_its_folder() -> None:
    assert choose_path("Qwen/Qwen2.5-0.5B", "data/sql/train.jsonl.gz") == Path("recipes/qwen2_5_0_5b_sql.yaml")
    assert choose_path("/models/mine/", "chats.jsonl") == Path("recipes/mine_chats.yaml")
    assert choose_path("gpt2", "data/chats/*.jsonl") == Path("recipes/gpt2_chats.yaml")
    assert choose_path("gpt2", "org/set") == Path("recipes/gpt2_set.yaml")


def test_held_out_rows_are_found_beside_the_training_rows(tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows_eval.jsonl", "train.csv", "validation.csv", "chat_train.jsonl", "alone.jsonl"):
        (tmp_path / name).touch()
    found = {name: find_held_out_file(str(tmp_path / name)) for name in ("rows.jsonl", "train.csv", "alone.jsonl")}
    assert found == {
        "rows.jsonl": str(tmp_path / "rows_eval.jsonl"),
        "train.csv": str(tmp_path / "validation.csv"),
        "alone.jsonl": None,
    }
    assert find_held_out_file(str(tmp_path / "chat_train.jsonl")) is None
    assert find_held_out_file("org/dataset") is None


@pytest.mark.parametrize(
    ("rows", "expected"), [(5, (8, 4)), (199, (8, 4)), (500, (3, 8)), (5_000, (3, 16)), (90_000, (1, 16))]
)
def test_fewer_rows_are_seen_more_often_in_smaller_steps(rows: int, expected: tuple[int, int]) -> None:
    assert choose_length(rows, learns_pairs=False)[:2] == expected


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 25, 60, 400, 20_000])
def test_held_out_rows_are_enough_for_a_verdict_and_leave_most_rows_to_train_on(rows: int) -> None:
    plan = make_plan(rows)
    held_out = round(rows * plan.held_out_share)
    assert held_out <= max(1, rows / 5 + 1)
    assert held_out >= 5 or rows < 25
    assert held_out <= 502
    assert plan.training_rows >= 1


def test_no_more_positions_are_asked_for_than_the_model_has() -> None:
    plan = make_plan(100, longest=1500, positions=1024, longest_answer=300, longest_prompt=900)
    data = collect(choose_data(plan))
    assert (data["max_length"], data["overlong"]) == (1024, "truncate")
    assert choose_answer_length(plan).value == 124
    assert "overlong" not in collect(choose_data(make_plan(100, longest=1000, positions=1024)))


def test_many_rows_get_a_larger_rank_at_the_same_scale() -> None:
    few, many = (collect(choose_lora(make_plan(rows))) for rows in (5_000, 100_000))
    assert (few["r"], few["alpha"]) == (16, 32)
    assert (many["r"], many["alpha"]) == (32, 64)


@pytest.mark.parametrize(
    ("name", "family", "parameters"),
    [
        ("meta-llama/Llama-3.2-1B-Instruct", "llama", 1e9),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "llama", 135e6),
        ("Qwen/Qwen2.5-0.5B", "qwen", 0.5e9),
        ("Qwen/Qwen3-4B", "qwen", 4e9),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral", 7e9),
        ("google/gemma-3-1b-it", "gemma", 1e9),
        ("google/gemma-3-270m-it", "gemma", 270e6),
        ("microsoft/Phi-3.5-mini-instruct", "phi3", 3.8e9),
        ("microsoft/phi-2", "phi", 2.8e9),
        ("openai-community/gpt2-large", "gpt2", 774e6),
        ("EleutherAI/gpt-j-6b", "gptj", 6e9),
        # Other modules under the same names: nothing is guessed.
        ("Qwen/Qwen3-30B-A3B", None, 30e9),
        ("Qwen/Qwen2-VL-7B-Instruct", None, 7e9),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", None, None),
        ("meta-llama/Llama-3.2-11B-Vision-Instruct", None, 11e9),
        ("google/gemma-3-4b-it", None, 4e9),
        ("microsoft/Phi-3.5-MoE-instruct", None, None),
        ("nobody/mystery", None, None),
    ],
)
def test_family_and_size_are_read_from_a_name(name: str, family: str | None, parameters: float | None) -> None:
    guessed = guess_family(name)
    assert (guessed.name if guessed else None) == family
    assert guess_parameters(name) == parameters


@pytest.mark.slow
def test_a_new_recipe_trains_as_it_is(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", ROWS["question_answer"], 12)
    loaded = make_recipe(tmp_path, rows, model=str(tiny_llama))
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module("scripts.train").main(["--recipe", str(loaded.path), "--run", "run"]) == 0
    facts = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished"
    assert facts["steps"] == 24  # ten rows in steps of four, eight times


@pytest.mark.slow
def test_make_quick_writes_a_recipe_once_and_trains_it(tmp_path: Path, tiny_llama: Path) -> None:
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    write_rows(tmp_path / "rows.jsonl", ROWS["question_answer"], 12)
    command = ["make", "-f", str(ROOT / "Makefile"), "-o", "setup", "quick", f"PY={sys.executable}"]
    command += [f"MODEL={tiny_llama}", "DATA=rows.jsonl"]
    done, again = (
        subprocess.run([*command, f"ARGS=--set {override}"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
        for override in ("training.epochs=1", "training.epochs=none")  # the second is refused before anything heavy
    )
    assert done.returncode == 0, done.stderr
    assert "The recipe is valid" in done.stdout
    (recipe,) = (tmp_path / "outputs" / "recipes").glob("*_rows.yaml")
    assert len(list((tmp_path / "outputs" / recipe.stem).glob("*/adapter/adapter_model.safetensors"))) == 1
    assert "The recipe is valid" not in again.stdout  # it is there already
    assert "training.epochs" in again.stderr
