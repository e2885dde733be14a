"""Every shipped recipe is what its header says, and trains end to end on a small model of its architecture."""

import functools
import itertools
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Phi3Config, PretrainedConfig, Qwen2Config

from config.model_families import FAMILIES, ModelFamily
from config.recipe_io import load_recipe
from config.structured_config import ModelSection
from utils.model_source import find_model

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
EMBEDDED = "embedded/smollm2-135m-instruct"
VOCABULARY = 49_152
LAYERS = 2
COMMAND = re.compile(r"^#\s+(python scripts/.+)$", re.MULTILINE)
PARAMETERS = re.compile(r"\((\d+(?:\.\d+)?)([BM])\)|-(\d+)M\b")
EVERY_RECIPE = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
# Recipe → the architecture that it is for, small enough for seconds.
ARCHITECTURES: dict[str, PretrainedConfig] = {
    "gpt2_text": GPT2Config(n_embd=64, n_layer=LAYERS, n_head=4, n_positions=1024, **SMALL),
    "llama_chat": LlamaConfig(**SHAPE, **SMALL),
    "phi_chat": Phi3Config(**SHAPE, **SMALL),
    "qwen_chat": Qwen2Config(**SHAPE, **SMALL),
}
FAMILY_OF_RECIPE = {
    "gpt2_text": "gpt2",
    "llama_chat": "llama",
    "phi_chat": "phi3",
    "qwen_chat": "qwen",
    "smollm2_sql": "llama",
}
# Learning rates of LoRA fine-tuning by parameters (design, section 7): up to how many billions, all families, exceptions.
LEARNING_RATES: list[tuple[float, set[float], dict[str, set[float]]]] = [
    (1.25, {4e-4}, {"qwen": {4e-4, 5e-4}}),
    (5.0, {3e-4}, {"llama": {3e-4, 3.5e-4}, "qwen": {3e-4, 4.5e-4}}),
    (15.0, {2e-4}, {"llama": {2e-4, 2.8e-4}, "gemma": {1.5e-4, 2e-4}, "mistral": {1.5e-4, 2e-4}}),
]


def read_header(path: Path) -> str:
    """The comment lines at the top of a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))])


def find_family(path: Path) -> ModelFamily:
    return next(family for family in FAMILIES if family.name == FAMILY_OF_RECIPE[path.stem])


@functools.lru_cache
def read_help(script: Path) -> str:
    """What `--help` of a script prints."""
    return subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True).stdout


def run_script(name: str, *arguments: object, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Runs one of our scripts offline."""
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_every_recipe_is_known_to_these_tests() -> None:
    assert {path.stem for path in RECIPES} == set(FAMILY_OF_RECIPE)


@EVERY_RECIPE
def test_the_header_shows_a_command_for_this_very_recipe_that_exists(path: Path) -> None:
    commands = [shlex.split(line) for line in COMMAND.findall(read_header(path))]
    assert any(f"recipes/{path.name}" in words for words in commands)
    for words in commands:
        script = ROOT / words[1]
        assert script.is_file()
        for option in [word for word in words if word.startswith("--")]:
            assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", read_help(script)), option
        assert words[words.index("--recipe") + 1] == f"recipes/{path.name}"
        overrides = [value for option, value in itertools.pairwise(words) if option == "--set"]
        load_recipe(path, overrides)


@EVERY_RECIPE
def test_the_header_states_the_hardware_and_what_was_run(path: Path) -> None:
    header = read_header(path)
    assert re.search(r"^# Needs: .*\d+ ?GB", header, re.MULTILINE)
    assert "@@" not in header, "a placeholder was left in"
    assert re.search(r"^# (Run end to end|Result|Measured|Expect\w*)\b.*", header, re.MULTILINE)


@EVERY_RECIPE
def test_the_recipe_loads_and_states_its_training_numbers(path: Path) -> None:
    loaded = load_recipe(path)
    for key in ("training.learning_rate", "training.batch_size", "lora.r", "lora.alpha", "seed", "training.epochs"):
        assert loaded.origins[key].startswith(str(path)), f"{key} is left to a default that may change"


@EVERY_RECIPE
def test_the_adapter_targets_are_modules_of_the_family(path: Path) -> None:
    lora = load_recipe(path).recipe.lora
    assert lora is not None
    if lora.target_modules != "all-linear":
        assert set(lora.target_modules) <= set(find_family(path).lora_targets)


@EVERY_RECIPE
def test_the_learning_rate_is_that_of_the_table_or_measured(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rate = load_recipe(path).recipe.training.learning_rate
    if path.stem == "smollm2_sql":  # measured: its comment must say so
        assert re.search(r"learning_rate: .*#.*reached \d+", text)
        return
    found = PARAMETERS.search(read_header(path))
    assert found, "the header names no number of parameters"
    billions = float(found[1]) / (1000 if found[2] == "M" else 1)
    _, rates, exceptions = next(row for row in LEARNING_RATES if billions <= row[0])
    assert rate in exceptions.get(find_family(path).name, rates)


@EVERY_RECIPE
def test_the_data_that_the_recipe_names_is_shipped(path: Path) -> None:
    data = load_recipe(path).recipe.data
    for name in [data.train, data.eval]:
        assert name is None or (ROOT / str(name)).is_file()


def test_the_demo_recipe_passes_the_whole_preflight() -> None:
    done = run_script("validate.py", "--recipe", "recipes/smollm2_sql.yaml", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["ok"] is True
    assert answer["facts"]["architecture"] == "llama"
    assert answer["facts"]["strategy"] == "chat"
    assert answer["facts"]["held_out_rows"] > 0
    assert 0 < answer["facts"]["supervised_tokens_per_epoch"] < answer["facts"]["tokens_per_epoch"]


def build_small_model(name: str, folder: Path) -> None:
    """A random two-layer model of a recipe's architecture with the embedded model's tokenizer."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(ARCHITECTURES[name]).save_pretrained(str(folder))
    tokenizer = find_model(ModelSection(name=EMBEDDED), "test", with_weights=True).folder
    for path in (tokenizer / "tokenizer.json", tokenizer / "tokenizer_config.json"):
        shutil.copy2(path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    template = settings.pop("chat_template", None)
    if template is None:
        template = (tokenizer / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if name != "gpt2_text":  # GPT-2 has none
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_rows(name: str, path: Path) -> None:
    """Twelve rows in the shape that a recipe's header asks for."""
    question = "What is {0} and {0}?"
    rows = [
        {"text": f"{question.format(n)} It is {2 * n}."}
        if name == "gpt2_text"
        else {
            "messages": [
                {"role": "user", "content": question.format(n)},
                {"role": "assistant", "content": f"It is {2 * n}."},
            ]
        }
        for n in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_the_recipe_trains_end_to_end_on_a_small_model_of_its_architecture(tmp_path: Path, name: str) -> None:
    recipe_path, run = ROOT / "recipes" / f"{name}.yaml", tmp_path / "run"
    build_small_model(name, tmp_path / "model")
    write_rows(name, tmp_path / "rows.jsonl")
    overrides = [f"model.name={tmp_path / 'model'}", f"data.train={tmp_path / 'rows.jsonl'}", "training.epochs=2"]
    arguments = [word for override in overrides for word in ("--set", override)]
    done = run_script("train.py", "--recipe", recipe_path, *arguments, "--run", run, folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert f"python scripts/evaluate_run.py --run {run}" in done.stdout

    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, evaluations = [row for row in metrics if "loss" in row], [row for row in metrics if "eval_loss" in row]
    assert facts["status"] == "finished"
    assert facts["steps"] == 2  # eleven of twelve rows fit into one step of 16
    assert [row["step"] for row in steps] == [1, 2]
    assert [row["step"] for row in evaluations] == [1, 2]
    # A random model knows nothing: its loss starts at the logarithm of the vocabulary's size.
    assert steps[0]["loss"] == pytest.approx(math.log(VOCABULARY), abs=0.7)
    assert all(math.isfinite(row["loss"]) and 0 < row["grad_norm"] < math.inf for row in steps)
    assert all(math.isfinite(row["eval_loss"]) for row in evaluations)
    assert facts["tokens"] == sum(row["tokens"] for row in steps)
    assert facts["supervised_tokens"] == sum(row["supervised_tokens"] for row in steps)
    if name == "gpt2_text":  # every token of raw text is learned, but for a first one that nothing predicts
        assert facts["supervised_tokens"] >= facts["tokens"] - 22
    else:
        assert 0 < facts["supervised_tokens"] < facts["tokens"] / 2

    resolved, lora = load_recipe(run / "recipe.yaml").recipe, load_recipe(recipe_path).recipe.lora
    assert lora is not None
    assert resolved.lora == lora
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-1", "step-2"]
    check_adapter(run / "adapter", set(lora.target_modules), lora.r)


def check_adapter(folder: Path, targets: set[str], rank: int) -> None:
    """Exactly the recipe's targets carry an adapter in every layer, of the recipe's rank, and all of them have learned."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - no mapping
    halves = Counter()
    for key, tensor in tensors.items():
        parts = key.split(".")
        half = next(part for part in parts if part.startswith("lora_"))
        halves[parts[parts.index(half) - 1], half] += 1
        assert rank in tensor.shape
        assert torch.isfinite(tensor).all()
        assert tensor.abs().sum() > 0, f"{key} was never trained"
    per_layer = {target: 2 if target == "c_proj" else 1 for target in targets}  # GPT-2: attention and MLP have a c_proj
    assert halves == {
        (target, half): LAYERS * count for target, count in per_layer.items() for half in ("lora_A", "lora_B")
    }
