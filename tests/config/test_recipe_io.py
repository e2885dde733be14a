"""Recipes are read with every problem at its line, overridden with `--set`, and written back so that they reload."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from config.foreign_names import FOREIGN_NAMES
from config.recipe_io import LoadedRecipe, format_resolved, iterate_keys, iterate_schema_keys, load_recipe
from config.structured_config import Recipe
from utils.exceptions import Problem, RecipeError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
MINIMAL = "model:\n  name: some/model\ndata:\n  train: rows.jsonl\ntraining:\n  method: sft\n"


def write_recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def load_text(folder: Path, text: str, overrides: Sequence[str] = ()) -> LoadedRecipe:
    return load_recipe(write_recipe(folder, text), overrides)


def find_problems(folder: Path, text: str, overrides: Sequence[str] = ()) -> tuple[Problem, ...]:
    with pytest.raises(RecipeError) as caught:
        load_text(folder, text, overrides)
    return caught.value.problems


def find_problem(folder: Path, text: str, overrides: Sequence[str] = ()) -> Problem:
    problems = find_problems(folder, text, overrides)
    assert len(problems) == 1, [str(problem) for problem in problems]
    return problems[0]


def test_the_smallest_recipe_loads_with_the_documented_defaults(tmp_path: Path) -> None:
    recipe = load_text(tmp_path, MINIMAL).recipe
    assert recipe.seed == 42
    assert recipe.lora is None
    assert (recipe.training.epochs, recipe.training.batch_size, recipe.training.learning_rate) == (3.0, 16, 4e-4)
    assert (recipe.data.max_length, recipe.data.overlong, recipe.data.loss_on) == (1024, "error", "assistant")


def test_a_misspelt_key_is_answered_with_the_right_one_and_its_line(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL + "  epoch: 3\n")
    assert problem.code == "unknown-key"
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:7"
    assert "training.epoch" in problem.message
    assert problem.fix == "did you mean epochs?"


@pytest.mark.parametrize(
    ("text", "wanted"), [("trainning: {}\n", "training"), ("generaton: {}\n", "generation"), ("lorra: {}\n", "lora")]
)
def test_a_misspelt_section_is_answered_with_the_right_one(tmp_path: Path, text: str, wanted: str) -> None:
    assert find_problem(tmp_path, MINIMAL + text).fix == f"did you mean {wanted}?"


def test_a_key_in_the_wrong_section_is_sent_to_the_right_one(tmp_path: Path) -> None:
    assert find_problem(tmp_path, MINIMAL + "  max_length: 10\n").fix == "here it is data.max_length"
    assert find_problem(tmp_path, MINIMAL + "epochs: 3\n").fix == "here it is training.epochs"


def test_a_key_like_no_other_gets_the_list_of_keys(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL + "lora:\n  zzqqxx: 3\n")
    assert problem.fix is not None
    assert "alpha" in problem.fix
    assert "target_modules" in problem.fix


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("training:\n  method: sft\n  per_device_train_batch_size: 4\n", "training.micro_batch_size"),
        ("training:\n  method: sft\n  num_train_epochs: 4\n", "training.epochs"),
        ("training:\n  method: sft\n  iters: 100\n", "training.max_steps"),
        ("training:\n  method: sft\nlora:\n  lora_alpha: 32\n", "lora.alpha"),
        ("training:\n  method: sft\ncutoff_len: 512\n", "data.max_length"),
        ("training:\n  method: sft\nload_in_4bit: true\n", "model.quantization: nf4"),
    ],
)
def test_names_of_other_tools_are_answered_with_ours(tmp_path: Path, line: str, wanted: str) -> None:
    problem = find_problem(tmp_path, MINIMAL.replace("training:\n  method: sft\n", line))
    assert problem.code == "unknown-key"
    assert problem.fix is not None
    assert f"here it is {wanted}" in problem.fix


@pytest.mark.parametrize("name", sorted(FOREIGN_NAMES))
def test_every_foreign_name_is_recognised_wherever_it_stands(tmp_path: Path, name: str) -> None:
    for text in (f"{MINIMAL}{name}: 1\n", f"{MINIMAL}  {name}: 1\n", f"{MINIMAL}lora:\n  {name}: 1\n"):
        problem = find_problem(tmp_path, text)
        assert problem.fix == FOREIGN_NAMES[name]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ('training.batch_size="3"', ["a whole number", "'3'"]),
        ("training.batch_size=3.5", ["a whole number", "3.5"]),
        ("training.batch_size=3.0", ["a whole number", "3.0"]),
        ("training.batch_size=true", ["a whole number", "true"]),
        ("training.batch_size=null", ["a whole number", "null"]),
        ("lora.r=8.5", ["a whole number", "8.5"]),
        ('training.learning_rate="4e-4"', ["a number", "'4e-4'"]),
        ("training.learning_rate=true", ["a number", "true"]),
        ("training.packing=on", ["true or false", "'on'"]),
        ("training.packing=1", ["true or false", "1"]),
        ("model.name=3", ["text", "3"]),
        ('model.name=""', ["not empty"]),
        ("data.train=[]", ["at least one"]),
        ("data.train=[a.jsonl, 3]", ["text"]),
        ("training.micro_batch_size=big", ["auto", "a whole number", "'big'"]),
        ("training.eval_every=0", ["at least 1"]),
        ("lora.dropout=1", ["below 1", "1"]),
        ("lora.dropout=-0.1", ["at least 0", "-0.1"]),
        ("lora.r=0", ["at least 1", "0"]),
        ("lora.r=5000", ["at most 1024"]),
        ("training.learning_rate=0", ["above 0"]),
        ("training.learning_rate=.nan", ["finite"]),
        ("training.epochs=.inf", ["finite"]),
        ("training.epochs=1e400", ["finite"]),
        ("data.eval_fraction=1", ["below 1"]),
        ("seed=-1", ["at least 0"]),
        ("model=some/model", ["section", "'some/model'"]),
        ("lora=true", ["section", "true"]),
        ("data.columns=[a]", ["data.columns", "section"]),
    ],
)
def test_a_wrong_value_is_explained_with_what_was_wanted_and_what_was_got(
    tmp_path: Path, override: str, words: list[str]
) -> None:
    key = override.partition("=")[0]
    problem = find_problem(tmp_path, MINIMAL, [override])
    assert problem.message.startswith(key)
    assert problem.where == f"--set {key}"
    for word in words:
        assert word in problem.message
    assert "Input should" not in str(problem), "pydantic's own words"


def test_a_misspelt_choice_is_answered_with_the_nearest_one(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL, ["model.dtype=bflot16"])
    assert "one of auto, bfloat16, float16 or float32" in problem.message
    assert problem.fix == "did you mean bfloat16?"


def test_an_unknown_method_names_those_that_exist(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL.replace("sft", "ppo"))
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:6"
    assert all(name in problem.message for name in ("sft", "dpo", "kto", "orpo"))


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        (MINIMAL.replace("model:\n  name: some/model\n", ""), "model", 1),
        (MINIMAL.replace("  name: some/model\n", "  dtype: auto\n"), "model.name", 1),
        (MINIMAL.replace("  method: sft\n", "  epochs: 1\n"), "training.method", 5),
    ],
)
def test_a_missing_key_is_named_with_the_section_it_belongs_to(tmp_path: Path, text: str, key: str, line: int) -> None:
    problem = find_problem(tmp_path, text)
    assert problem.code == "missing-key"
    assert problem.message.startswith(f"{key} is required")
    assert problem.where == f"{tmp_path / 'recipe.yaml'}:{line}"


def test_all_problems_are_reported_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = (
        "sed: 1\nmodel:\n  nam: a\ndata:\n  train: x.jsonl\n  max_length: 1\nlora:\n  r: 8.5\n  lora_alpha: 1\n"
        "training:\n  method: sft\n  epochs: many\n"
    )
    problems = find_problems(tmp_path, text)
    lines = [int(str(problem.where).rsplit(":", 1)[1]) for problem in problems]
    assert lines == sorted(lines)
    assert set(lines) == {1, 2, 3, 6, 8, 9, 12}
    assert len(problems) == 7
    with pytest.raises(RecipeError) as caught:
        load_text(tmp_path, text)
    assert len(str(caught.value).splitlines()) == 7


def test_one_key_with_a_union_of_shapes_is_one_problem(tmp_path: Path) -> None:
    # pydantic reports each branch of `auto | int` by itself, which made two errors out of one.
    find_problem(tmp_path, MINIMAL + "  micro_batch_size: '3'\n")
    find_problem(tmp_path, MINIMAL + "lora:\n  target_modules: [1, 2, 3]\n")


def test_an_override_wins_and_says_so(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, MINIMAL + "  epochs: 2\n", ["training.epochs=5", "training.learning_rate=2e-4"])
    assert loaded.recipe.training.epochs == 5
    assert loaded.recipe.training.learning_rate == 2e-4
    assert loaded.origins["training.epochs"] == "--set"
    assert loaded.origins["training.method"] == f"{tmp_path / 'recipe.yaml'}:6"


def test_the_last_of_two_overrides_of_a_key_wins(tmp_path: Path) -> None:
    assert load_text(tmp_path, MINIMAL, ["seed=1", "seed=2"]).recipe.seed == 2


def test_an_override_can_open_a_section_that_the_recipe_lacks(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, MINIMAL + "lora:\n", ["lora.r=4", "tracking.tensorboard=true"])
    assert loaded.recipe.lora is not None
    assert loaded.recipe.lora.r == 4
    assert loaded.recipe.tracking.tensorboard is True


def test_override_values_are_read_as_yaml(tmp_path: Path) -> None:
    overrides = ["lora.target_modules=[q_proj, v_proj]", "data.eval=null", "data.columns={q: prompt}", "data.system=on"]
    recipe = load_text(tmp_path, MINIMAL, overrides).recipe
    assert recipe.lora is not None
    assert recipe.lora.target_modules == ("q_proj", "v_proj")
    assert recipe.data.eval is None
    assert recipe.data.columns == {"q": "prompt"}
    assert recipe.data.system == "on"


@pytest.mark.parametrize("text", ["Use # for comments", "first\nsecond: 2"])
def test_an_override_never_loses_a_part_of_its_value_in_silence(tmp_path: Path, text: str) -> None:
    # Read as YAML, «Use # for comments» is «Use», and what follows a line break is a key of its own: either the whole text
    # arrives, or the override is refused.
    try:
        system = load_text(tmp_path, MINIMAL, [f"data.system={text}"]).recipe.data.system
    except RecipeError:
        return
    assert system == text


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training..epochs=3", ".epochs=1", "training.=1"])
def test_an_override_that_is_no_assignment_is_refused(tmp_path: Path, override: str) -> None:
    problem = find_problem(tmp_path, MINIMAL, [override])
    assert "section.key=value" in problem.message
    assert override in problem.message


@pytest.mark.parametrize("override", ["training.epoch=1", "trainng.epochs=1", "lora.drpout=0", "sed=1"])
def test_an_unknown_key_in_an_override_names_the_override_and_not_a_line(tmp_path: Path, override: str) -> None:
    # `--set trainng.epochs=1` was reported at line 1 of a recipe that holds no such word.
    problem = find_problem(tmp_path, MINIMAL, [override])
    assert str(problem.where).startswith("--set")
    assert str(problem.where).removeprefix("--set ") in override
    assert "did you mean" in str(problem.fix)


def test_an_override_below_a_value_is_refused_with_its_key(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL + "seed: 3\n", ["seed.x=1"])
    assert problem.where == "--set seed.x"
    assert "seed" in problem.message


def test_an_override_that_is_broken_yaml_names_its_key(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL, ["lora.target_modules=[a"])
    assert str(problem.where).startswith("--set lora.target_modules")


def test_an_override_that_breaks_a_rule_names_its_key(tmp_path: Path) -> None:
    problem = find_problem(tmp_path, MINIMAL + "  epochs: 3\n", ["training.max_steps=5"])
    assert problem.code == "rule"
    assert problem.where == "--set training.max_steps"


def test_every_value_has_an_origin(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, MINIMAL + "lora:\n  r: 4\n", ["seed=7"])
    path = tmp_path / "recipe.yaml"
    assert set(iterate_keys(loaded.recipe)) <= set(loaded.origins)
    assert loaded.origins["lora.r"] == f"{path}:8"
    assert loaded.origins["model.name"] == f"{path}:2"
    assert loaded.origins["seed"] == "--set"
    assert loaded.origins["lora.alpha"] == "default"
    assert loaded.origins["generation.temperature"] == "default"


def test_a_user_is_pointed_to_the_nearest_place_to_change(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, MINIMAL)
    path = tmp_path / "recipe.yaml"
    assert loaded.find_origin("model.name") == f"{path}:2"
    assert loaded.find_origin("data.strategy") == f"{path}:3"
    assert loaded.find_origin("lora.target_modules") == str(path)
    changed = loaded.with_automatic_value("training.micro_batch_size", 4, "fits")
    assert changed.find_origin("training.micro_batch_size") == f"{path}:5"


def test_a_place_that_is_an_override_says_which_one(tmp_path: Path) -> None:
    # «--set: there is no model 'x'» did not say which of several --set was meant.
    loaded = load_text(tmp_path, MINIMAL, ["model.name=other/model", "data.train=other.jsonl"])
    assert loaded.find_origin("model.name") == "--set model.name"


def test_an_automatic_value_carries_its_reason_and_leaves_the_rest(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, MINIMAL + "  max_steps: 3\nlora:\n  target_modules: [a, b]\n", ["data.columns={a: b}"])
    changed = loaded.with_automatic_value("training.micro_batch_size", 4, "512 tokens fit")
    assert changed.recipe.training.micro_batch_size == 4
    assert changed.origins["training.micro_batch_size"] == "auto: 512 tokens fit"
    assert loaded.recipe.training.micro_batch_size == "auto"
    before, after = loaded.recipe.model_dump(), changed.recipe.model_dump()
    before["training"]["micro_batch_size"] = 4
    assert after == before
    assert "micro_batch_size: 4  # auto: 512 tokens fit" in format_resolved(changed)


def test_an_automatic_value_can_reach_a_section_that_the_recipe_does_not_name(tmp_path: Path) -> None:
    changed = load_text(tmp_path, MINIMAL).with_automatic_value("generation.max_new_tokens", 9, "because")
    assert changed.recipe.generation.max_new_tokens == 9


def reload(folder: Path, loaded: LoadedRecipe) -> LoadedRecipe:
    path = folder / "resolved.yaml"
    path.write_text(format_resolved(loaded), encoding="utf-8")
    return load_recipe(path)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_resolved_snapshot_of_a_shipped_recipe_reloads_to_the_same_recipe(tmp_path: Path, path: Path) -> None:
    loaded = load_recipe(path)
    again = reload(tmp_path, loaded)
    assert again.recipe.model_dump() == loaded.recipe.model_dump()
    assert reload(tmp_path, again).recipe.model_dump() == loaded.recipe.model_dump()


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.max_steps=7", "training.eval_every=2"],
        ["data.eval=other.jsonl"],
        ["data.train=[a.jsonl, b.jsonl]", "data.columns={question: prompt, on: off}"],
        ["lora.r=4", "lora.target_modules=[q_proj, v_proj]", "lora.variant=rslora"],
        ["training.early_stopping_patience=3", "training.early_stopping_threshold=0.01"],
        ["generation.temperature=0.7", "generation.top_p=0.9", "generation.top_k=40"],
        ["training.learning_rate=1e-7", "training.epochs=0.3333333333333333"],
        ["training.max_grad_norm=null", "training.neftune_alpha=5"],
    ],
)
def test_any_resolved_snapshot_reloads_to_the_same_recipe(tmp_path: Path, overrides: list[str]) -> None:
    loaded = load_text(tmp_path, MINIMAL, overrides)
    assert reload(tmp_path, loaded).recipe.model_dump() == loaded.recipe.model_dump()


@pytest.mark.parametrize(
    "system",
    [
        "",
        " leading and trailing ",
        "a # b",
        "colon: here",
        "two\nlines",
        "tab\there",
        "ümlaut 漢字 🎈",
        "{braces} [brackets], commas",
        "'single' and \"double\"",
        "yes",
        "null",
        "3",
        "1e5",
        "2e-4",
        "\\n",
        "line\u2028separator",
        "word " * 4000,
    ],
    ids=lambda text: repr(text[:20]),
)
def test_any_text_survives_the_snapshot(tmp_path: Path, system: str) -> None:
    # PyYAML writes the text "1e5" without quotes, because YAML 1.1 sees no number in it; our reader does.
    quoted = json.dumps(system, ensure_ascii=False).replace("\u2028", "\\u2028")
    loaded = load_text(tmp_path, MINIMAL.replace("data:\n", f"data:\n  system: {quoted}\n"))
    assert loaded.recipe.data.system == system
    assert reload(tmp_path, loaded).recipe.data.system == system


def test_the_snapshot_names_the_origin_of_every_value_on_its_line(tmp_path: Path) -> None:
    loaded = load_text(tmp_path, MINIMAL, ["seed=7"])
    lines = format_resolved(loaded).splitlines()
    assert "seed: 7  # --set" in lines
    assert f"  name: some/model  # {tmp_path / 'recipe.yaml'}:2" in lines
    assert "  dtype: auto  # default" in lines
    assert lines[0].startswith("# Resolved from ")
    values = [line for line in lines[1:] if not line.endswith(":") and not line.startswith("#")]
    assert all("  # " in line for line in values)


def test_the_name_of_a_recipe_is_its_file_name(tmp_path: Path) -> None:
    assert load_text(tmp_path, MINIMAL).name == "recipe"


def test_the_schema_keys_are_those_of_the_design() -> None:
    keys = set(iterate_schema_keys(Recipe))
    assert {"seed", "model.name", "data.train", "lora.r", "training.method", "generation.temperature"} <= keys
    assert {"lora", "model", "evaluation.metrics", "tracking.wandb"} <= keys
