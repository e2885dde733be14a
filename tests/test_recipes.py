"""Every shipped recipe is what its header says, and runs end to end on a small random model of its architecture."""

import functools
import importlib
import importlib.util
import itertools
import json
import math
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from config.model_families import ModelFamily, find_family, guess_family, guess_parameters
from config.recipe_io import load_recipe
from config.structured_config import Recipe
from utils.model_source import EMBEDDED_MODELS, EMBEDDED_PREFIX, ModelSource

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
LAYERS, VOCABULARY = 2, 2000
TRAINING_ROWS, HELD_OUT_ROWS, BATCH_SIZE = 8, 2, 4
COMMAND = re.compile(r"^#\s+(python scripts/.+)$", re.MULTILINE)
PARAMETERS = re.compile(r"\((\d+(?:\.\d+)?)([BM])\)|-(\d+)M\b")
CONTROL = re.compile(r"<\|[\w\"]+\|>|<start_of_turn>|<end_of_turn>")
NUMBER = re.compile(r"^ *\w+: [-+.\d][^#\n]*$", re.MULTILINE)
EVERY_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
TRL = importlib.util.find_spec("trl")

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
# Family → its architecture, small enough for seconds.
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "gpt2": (GPT2Config, {"n_embd": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 1024}),
    "llama": (LlamaConfig, SHAPE),
    "mistral": (MistralConfig, SHAPE),
    "qwen": (Qwen2Config, SHAPE),
    # mlx-lm takes its wide mask from a layer that has one, so there must be one.
    "gemma": (Gemma3TextConfig, {**SHAPE, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": (Phi3Config, SHAPE),
}
# Family → its chat template, as trl ships it or as we do, and the tokens that begin and end a text.
TEMPLATES = {
    "llama": ("trl", "llama3_2", "<|begin_of_text|>", "<|eot_id|>"),
    "mistral": ("tunebook", "mistral", "<s>", "</s>"),
    "qwen": ("trl", "qwen2_5", None, "<|im_end|>"),
    "gemma": ("trl", "gemma3", "<bos>", "<eos>"),
    "phi3": ("trl", "phi3_5", "<s>", "<|endoftext|>"),
}
# Learning rates by parameters (design, section 7): up to how many billions, all families, exceptions.
LORA_RATES: list[tuple[float, set[float], dict[str, set[float]]]] = [
    (1.25, {4e-4}, {"qwen": {4e-4, 5e-4}}),
    (5.0, {3e-4}, {"llama": {3e-4, 3.5e-4}, "qwen": {3e-4, 4.5e-4}}),
    (15.0, {2e-4}, {"llama": {2e-4, 2.8e-4}, "gemma": {1.5e-4, 2e-4}, "mistral": {1.5e-4, 2e-4}}),
]
FULL_RATES = [(1.25, {3e-5}), (5.0, {2e-5}), (15.0, {1e-5})]
LORA_PAIR_RATES = [(1.25, {1e-5, 1.5e-5, 2e-5}), (5.0, {1e-5}), (15.0, {5e-6})]
FULL_PAIR_RATES = [(1.25, {1e-6}), (5.0, {7e-7}), (15.0, {5e-7})]


def read_header(path: Path) -> str:
    """The comment lines at the top of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def find_family_of(recipe: Recipe) -> ModelFamily | None:
    """The family of a recipe's model; None where the model is made from scratch."""
    name = recipe.model.name
    return find_family(EMBEDDED_MODELS.get(name.removeprefix(EMBEDDED_PREFIX))) or guess_family(name)


def is_from_scratch(recipe: Recipe) -> bool:
    """True for a recipe that names no model to start from: its own tests train it."""
    return recipe.model.model_dump().get("init", "pretrained") != "pretrained"


def run_main(script: str, *arguments: object) -> None:
    """Runs a script's `main` in this process, where torch is loaded already."""
    assert importlib.import_module(f"scripts.{script}").main([str(argument) for argument in arguments]) == 0


@functools.lru_cache
def read_help(script: Path) -> str:
    """Options that a script names in its parser."""
    return script.read_text(encoding="utf-8") + (ROOT / "utils" / "cli.py").read_text(encoding="utf-8")


@EVERY_RECIPE
def test_the_header_shows_a_command_for_this_very_recipe_that_exists(path: Path) -> None:
    commands = [shlex.split(line) for line in COMMAND.findall(read_header(path))]
    assert any(f"recipes/{path.name}" in words for words in commands)
    for words in commands:
        script = ROOT / words[1]
        assert script.is_file()
        for option in [word for word in words if word.startswith("--")]:
            assert f'"{option}"' in read_help(script), option
        if "--recipe" in words:
            assert words[words.index("--recipe") + 1] == f"recipes/{path.name}"
            overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
            load_recipe(path, overrides)


@EVERY_RECIPE
def test_the_header_states_the_hardware_and_what_was_run(path: Path) -> None:
    header = read_header(path)
    assert re.search(r"^# Needs: .*\d+ ?GB", header, re.MULTILINE)
    assert "@@" not in path.read_text(encoding="utf-8"), "a placeholder was left in"
    assert re.search(r"^# (Run end to end|Result|Measured|Expect\w*)\b.*", header, re.MULTILINE)


@EVERY_RECIPE
def test_the_recipe_loads_and_states_its_training_numbers(path: Path) -> None:
    loaded = load_recipe(path)
    keys = ["seed", "training.learning_rate", "training.batch_size"]
    keys += ["training.max_steps" if loaded.recipe.training.max_steps else "training.epochs"]
    keys += ["lora.r", "lora.alpha"] if loaded.recipe.lora else []
    for key in keys:
        assert loaded.origins[key].startswith(str(path)), f"{key} is left to a default that may change"


@EVERY_RECIPE
def test_every_number_says_why(path: Path) -> None:
    assert NUMBER.findall(path.read_text(encoding="utf-8")) == []


@EVERY_RECIPE
def test_the_adapter_targets_are_modules_of_the_family(path: Path) -> None:
    recipe = load_recipe(path).recipe
    if recipe.lora is None or recipe.lora.target_modules == "all-linear":
        return
    family = find_family_of(recipe)
    assert family is not None
    assert set(recipe.lora.target_modules) == set(family.lora_targets)


@EVERY_RECIPE
def test_the_learning_rate_is_that_of_the_table_or_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    recipe = load_recipe(path).recipe
    if is_from_scratch(recipe):
        return  # the table is for models that know something
    if re.search(r"learning_rate: .*#.*reached \d+", text):
        return
    found = PARAMETERS.search(read_header(path))
    assert found, "the header names no number of parameters"
    billions = float(found[1] or found[3]) / (1000 if found[2] != "B" else 1)
    family, pairs = find_family_of(recipe), recipe.training.method in ("dpo", "kto")
    assert family is not None
    if recipe.lora and not pairs:
        share = 0.25 if recipe.training.method == "reward" else 1
        _, rates, exceptions = next(row for row in LORA_RATES if billions <= row[0])
        rates = exceptions.get(family.name, rates)
    else:
        share = 1
        table = (LORA_PAIR_RATES if recipe.lora else FULL_PAIR_RATES) if pairs else FULL_RATES
        _, rates = next(row for row in table if billions <= row[0])
    assert recipe.training.learning_rate in [share * rate for rate in rates]


@EVERY_RECIPE
def test_the_size_in_the_header_is_that_of_the_models_name(path: Path) -> None:
    # The learning rate hangs on it. Qwen's «7B» has 7.6 billion, so a tenth is not a difference.
    named, found = guess_parameters(load_recipe(path).recipe.model.name), PARAMETERS.search(read_header(path))
    if named and found:
        assert float(found[1] or found[3]) * (1e6 if found[2] != "B" else 1e9) == pytest.approx(named, rel=0.1)


@EVERY_RECIPE
def test_the_data_that_the_recipe_names_is_shipped(path: Path) -> None:
    data = load_recipe(path).recipe.data
    for name in [data.train, data.eval]:
        assert name is None or (ROOT / str(name)).is_file()


def check_preflight(recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The facts of a recipe that passes validate.py as it is shipped."""
    monkeypatch.chdir(ROOT)
    run_main("validate", "--recipe", f"recipes/{recipe}.yaml", "--json")
    answer = json.loads(capsys.readouterr().out)
    assert answer["ok"] is True
    return dict(answer["facts"])


@pytest.mark.parametrize(
    "path", [p for p in RECIPES if EMBEDDED_PREFIX in p.read_text(encoding="utf-8")], ids=lambda p: p.stem
)
def test_a_recipe_of_the_embedded_model_passes_the_whole_preflight(
    path: Path, embedded: ModelSource, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = check_preflight(path.stem, capsys, monkeypatch)
    assert facts["architecture"] == "llama"
    assert facts["strategy"] == "chat"
    assert facts["held_out_rows"] > 0
    assert 0 < facts["supervised_tokens_per_epoch"] < facts["tokens_per_epoch"]
    assert facts["longest_example"] <= load_recipe(path).recipe.data.max_length


@functools.lru_cache
def train_tokenizer() -> str:
    """A byte-level BPE tokenizer of shipped rows, as JSON: as real as a large one, and loaded in milliseconds."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    rows = [ROOT / "data" / name for name in ("text_to_sql/train.jsonl", "notes/chat_train.jsonl")]
    tokenizer.train([str(path) for path in rows], trainer)
    return str(tokenizer.to_str())


def build_tokenizer(recipe: Recipe, family: ModelFamily, embedded: Path) -> PreTrainedTokenizerFast:
    """A small tokenizer with the control tokens and the chat template of a family."""
    template, bos, eos = None, None, "<|endoftext|>"
    if recipe.model.name.startswith(EMBEDDED_PREFIX):
        template, bos, eos = (
            (embedded / "chat_template.jinja").read_text(encoding="utf-8"),
            "<|im_start|>",
            "<|im_end|>",
        )
    elif family.name in TEMPLATES:
        origin, name, bos, eos = TEMPLATES[family.name]
        assert TRL is not None
        folders = {"trl": Path(str(TRL.origin)).parent / "chat_templates", "tunebook": ROOT / "utils" / "templates"}
        template = (folders[origin] / f"{name}.jinja").read_text(encoding="utf-8")
    control = sorted({*CONTROL.findall(template or ""), eos, *([bos] if bos else [])})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(train_tokenizer()),
        bos_token=bos,
        eos_token=eos,
        extra_special_tokens=control,
    )
    # A base model of the family has no template.
    tokenizer.chat_template = None if recipe.data.strategy == "standard" else template
    return tokenizer


def build_small_model(recipe: Recipe, family: ModelFamily, embedded: Path, folder: Path) -> int:
    """A random two-layer model of a family with its tokenizer; returns the size of the vocabulary."""
    tokenizer = build_tokenizer(recipe, family, embedded)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config, sizes = ARCHITECTURES[family.name]
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **sizes, **special)).save_pretrained(folder)
    return len(tokenizer)


def write_rows(recipe: Recipe, name: str, folder: Path) -> list[str]:
    """The first rows that the recipe names, or raw text for a recipe of raw text; returns the overrides that name them."""

    def copy(source: str, count: int, target: str) -> str:
        lines = (ROOT / source).read_text(encoding="utf-8").splitlines()[:count]
        if name.endswith("_text"):
            lines = [json.dumps({"text": json.loads(line)["messages"][0]["content"]}) for line in lines]
        (folder / target).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(folder / target)

    if recipe.data.eval is None:
        rows = copy(str(recipe.data.train), TRAINING_ROWS + HELD_OUT_ROWS, "rows.jsonl")
        return [f"data.train={rows}", f"data.eval_fraction={HELD_OUT_ROWS / (TRAINING_ROWS + HELD_OUT_ROWS)}"]
    train = copy(str(recipe.data.train), TRAINING_ROWS, "train.jsonl")
    return [f"data.train={train}", f"data.eval={copy(str(recipe.data.eval), HELD_OUT_ROWS, 'eval.jsonl')}"]


def choose_marks(path: Path) -> list[pytest.MarkDecorator]:
    """One family stays in the light suite."""
    return [] if path.stem == "llama_chat" else [pytest.mark.slow]


@pytest.mark.parametrize("path", [pytest.param(path, marks=choose_marks(path), id=path.stem) for path in RECIPES])
def test_the_recipe_runs_end_to_end_on_a_small_model_of_its_architecture(
    path: Path,
    embedded: ModelSource,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = load_recipe(path).recipe
    family = find_family_of(recipe)
    if is_from_scratch(recipe):
        pytest.skip("there is no model to start from; tests of its own train it")
    assert family is not None, "add the family to config/model_families.py"
    monkeypatch.chdir(tmp_path)
    vocabulary = build_small_model(recipe, family, embedded.folder, tmp_path / "model")
    run = tmp_path / "run"
    overrides = [f"model.name={tmp_path / 'model'}", *write_rows(recipe, path.stem, tmp_path), "training.epochs=1"]
    overrides += [f"training.batch_size={BATCH_SIZE}", "evaluation.samples=1"]
    question, length = ["--prompt", "Who are you?"], ["--set", "generation.max_new_tokens=2"]
    if recipe.reward:
        question, length = ["--prompts", tmp_path / "eval.jsonl"], []
    else:
        overrides += ["generation.max_new_tokens=4"]
    arguments = ["--recipe", path, *(word for override in overrides for word in ("--set", override))]
    run_main("validate", *arguments)
    run_main("train", *arguments, "--run", run)
    assert f"python scripts/evaluate_run.py --run {run}" in capsys.readouterr().out
    check_run(run, recipe, vocabulary, path.stem)
    if recipe.lora:
        targets = family.lora_targets if recipe.lora.target_modules == "all-linear" else recipe.lora.target_modules
        check_adapter(run / "adapter", set(targets), recipe.lora.r)

    run_main("evaluate_run", "--run", run)
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert set(report["metrics"]) == set(recipe.evaluation.metrics)
    run_main("infer", "--run", run, *question)
    finished = run / "model"
    if recipe.lora:
        finished = tmp_path / "merged"
        run_main("merge", "--run", run, "--out", finished)
    assert list(finished.glob("*.safetensors"))
    run_main("infer", "--model", finished, *question, *length)


def check_run(run: Path, recipe: Recipe, vocabulary: int, name: str) -> None:
    """What a run of two steps must have written."""
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, evaluations = [row for row in metrics if "loss" in row], [row for row in metrics if "eval_loss" in row]
    assert facts["status"] == "finished"
    assert facts["steps"] == TRAINING_ROWS // BATCH_SIZE
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["step"] for row in evaluations] == [2]
    # A random model knows nothing: its loss starts at the logarithm of the vocabulary's size, a preference's at ln 2.
    if recipe.training.method == "sft":
        assert steps[0]["loss"] == pytest.approx(math.log(vocabulary), abs=0.7)
        assert facts["supervised_tokens"] == sum(row["supervised_tokens"] for row in steps)
        if name.endswith("_text"):  # every token of raw text is learned, but for a first one that nothing predicts
            assert facts["supervised_tokens"] >= facts["tokens"] - 2 * TRAINING_ROWS
        else:
            assert 0 < facts["supervised_tokens"] < facts["tokens"] / 2
    elif recipe.training.method in ("dpo", "reward"):
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in steps)
    assert all(math.isfinite(row["eval_loss"]) for row in evaluations)
    assert facts["tokens"] == sum(row["tokens"] for row in steps)
    assert load_recipe(run / "recipe.yaml").recipe.lora == recipe.lora
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-2"]


def check_adapter(folder: Path, targets: set[str], rank: int) -> None:
    """Exactly the recipe's targets carry an adapter in every layer, of the recipe's rank, and all of them have learned."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    halves = Counter()
    for key, tensor in tensors.items():
        assert torch.isfinite(tensor).all()
        assert tensor.abs().sum() > 0, f"{key} was never trained"
        parts = key.split(".")
        if parts[-2] == "score":
            continue  # the head of a reward model is trained whole
        half = next(part for part in parts if part.startswith("lora_"))
        halves[parts[parts.index(half) - 1], half] += 1
        assert rank in tensor.shape
    per_layer = {target: 2 if target == "c_proj" else 1 for target in targets}  # GPT-2: attention and MLP have a c_proj
    assert halves == {
        (target, half): LAYERS * count for target, count in per_layer.items() for half in ("lora_A", "lora_B")
    }
