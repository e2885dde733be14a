"""Whole runs on MLX through the real scripts: killed and resumed, evaluated, merged, quantised, and read by torch and mlx-lm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from benchmarks.tiny_models import SPECIAL, save_llama
from config.structured_config import Recipe
from tests.backends.mlx_sides import mx
from tests.conftest import ROOT, ScriptServer
from tests.test_resume import SAME, Runs, at_call, find_differences, on_disk
from utils.backends import choose_backend

import mlx_lm  # isort: skip - behind what must be so before MLX is imported

pytestmark = pytest.mark.slow
MLX: dict[str, Any] = {"backend": "mlx", "generation": {"max_new_tokens": 4}}
SHORT: dict[str, Any] = {"training.max_steps": 3, "training.eval_every": 3, "training.save_every": 3}


class MlxRuns(Runs):
    """The folder of all runs, with a model that is wide enough for MLX's quantisation."""

    def __init__(self, folder: Path, server: ScriptServer) -> None:
        super().__init__(folder, server)
        save_llama(self.model, len(SPECIAL) + 95, 64, max_position_embeddings=128, tie_word_embeddings=False)

    def follow(self, script: str, *arguments: object, code: int = 0) -> str:
        """Runs another script, and gives back what it said."""
        done = self.server.run(script, *arguments, cwd=self.folder)
        text = done.stdout + done.stderr
        assert done.returncode == code, text
        return text


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, script_server: ScriptServer) -> MlxRuns:
    """The folder of all runs."""
    return MlxRuns(tmp_path_factory.mktemp("runs"), script_server)


def train(runs: MlxRuns, name: str, changes: dict[str, Any], *arguments: object) -> Path:
    """A finished run of a recipe with changes."""
    recipe = runs.write(name, changes)
    run = recipe.parent / "run"
    done = runs.train("--recipe", recipe, "--run", run, *arguments)
    assert done.code == 0, done.text
    return run


def read_json(path: Path) -> dict[str, Any]:
    """A file of a run."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


CASES: dict[str, dict[str, Any]] = {
    "adapters with dropout and noise, stopping early": {
        "lora.dropout": 0.2,
        "training.neftune_alpha": 5.0,
        "training.gradient_checkpointing": True,
        "training.early_stopping_patience": 2,
        "training.early_stopping_threshold": 9.0,
    },
    "all weights, packed rows, adafactor": {
        "lora": None,
        "training.optimizer": "adafactor",
        "training.packing": True,
        "training.micro_batch_size": "auto",
        "training.max_steps": 4,
    },
    "preference pairs under dora": {
        "data.train": "pairs",
        "training.method": "dpo",
        "lora.variant": "dora",
        "training.max_steps": 4,
        "training.eval_every": 4,
    },
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_with_the_bytes_of_one_that_never_stopped(runs: MlxRuns, name: str) -> None:
    recipe = runs.write(name, {**MLX, **CASES[name]})
    whole, killed = recipe.parent / "whole", recipe.parent / "killed"
    assert runs.train("--recipe", recipe, "--run", whole).code == 0
    # In the accumulation of a step; of one run also in a save behind an evaluation.
    assert runs.train("--recipe", recipe, "--run", killed, moment=at_call("_accumulate", 3)).code == -9
    is_twice = "stopping early" in name
    if is_twice:
        assert runs.train("--resume", killed, moment=on_disk(30, killed)).code == -9
    done = runs.train("--resume", killed)
    assert done.code == 0, done.text
    assert find_differences(whole, killed) == SAME
    facts = read_json(killed / "run.json")
    assert (facts["resumes"], facts["backend"]) == (1 + is_twice, "mlx")
    if is_twice:
        assert facts["stop_reason"]
        assert facts["steps"] == 6
        best = killed / "checkpoints" / f"step-{facts['best_step']}" / "adapter_model.safetensors"
        assert best.read_bytes() == (killed / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def both(runs: MlxRuns) -> tuple[Path, Path]:
    """The same recipe on MLX and on torch: fewer rows than a batch, so that each step sees all of them."""
    sections = {"training.batch_size": 32, "training.max_steps": 4, "evaluation": {"metrics": ["loss", "exact_match"]}}
    return (
        train(runs, "mlx", {**MLX, **sections}),
        train(runs, "torch", {**MLX, **sections, "backend": "torch"}),
    )


def test_a_run_on_mlx_says_so_and_is_evaluated_asked_and_compared(runs: MlxRuns, both: tuple[Path, Path]) -> None:
    run, other = both
    facts = read_json(run / "run.json")
    assert (facts["status"], facts["backend"], facts["device"], facts["dtype"]) == ("finished", "mlx", "cpu", "float32")
    assert {"mlx", "mlx-lm"} <= facts["versions"].keys()
    assert facts["peak_memory_bytes"] > 0
    assert facts["tokens"] == read_json(other / "run.json")["tokens"]
    evaluated = runs.follow("evaluate_run", "--run", run)
    assert "Report: " in evaluated
    report = read_json(run / "report.json")
    assert report["metrics"]["loss"]["tuned"] == pytest.approx(facts["eval_loss"], rel=1e-4)
    compared = runs.follow("diff_runs", run, other)
    assert "backend" in compared


def test_adapters_of_either_back_end_answer_on_the_other(runs: MlxRuns, both: tuple[Path, Path]) -> None:
    for run, there in zip(both, ("torch", "mlx"), strict=True):
        answers = [
            runs.follow("infer", "--run", run, "--prompt", "Say 3", *options).splitlines()
            for options in ((), ("--set", f"backend={there}"))
        ]
        assert answers[0][0] == answers[1][0] != ""
        assert ["MLX" in "".join(lines[1:]) for lines in answers] == [there == "torch", there == "mlx"]


def compute_torch_logits(folder: Path, ids: list[int]) -> np.ndarray:
    """What transformers predicts from a folder."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
    return found


def assert_read_alike(folder: Path) -> None:
    """transformers and mlx-lm predict the same from a folder."""
    ids = [6, 30, 40, 50, 8, 60]
    model = mlx_lm.load(str(folder))[0]
    model.set_dtype(mx.float32)
    got = np.array(model(mx.array([ids]))[0])
    np.testing.assert_allclose(got, compute_torch_logits(folder, ids), atol=1e-4)


def test_a_merged_run_is_read_alike_by_transformers_and_by_mlx_lm(
    runs: MlxRuns, both: tuple[Path, Path], tmp_path: Path
) -> None:
    said = runs.follow("merge", "--run", both[0], "--out", tmp_path / "merged", "--compare")
    assert "compared: largest logit difference 0.0000" in said
    assert_read_alike(tmp_path / "merged")


def test_a_merged_gpt2_has_the_names_that_mlx_lm_reads(runs: MlxRuns, tmp_path: Path) -> None:
    """transformers begins them with `transformer.`, which mlx-lm's own loader does not know."""
    sizes = {"vocab_size": len(SPECIAL) + 95, "n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(model)
    for path in runs.model.glob("*token*"):
        shutil.copy(path, model / path.name)
    shutil.copy(runs.model / "chat_template.jinja", model / "chat_template.jinja")
    run = train(runs, "gpt2", {**MLX, **SHORT, "model.name": str(model), "lora.target_modules": "all-linear"})
    said = runs.follow("merge", "--run", run, "--out", tmp_path / "merged")
    assert "mlx-lm's tools read GPT-2 only under the names of its first files" in said
    assert_read_alike(tmp_path / "merged")


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_run_on_a_quantised_base_is_evaluated_and_merged_either_way(runs: MlxRuns, bits: str, tmp_path: Path) -> None:
    run = train(runs, bits, {**MLX, **SHORT, "model.quantization": bits})
    assert read_json(run / "run.json")["quantization"] == bits
    if bits == "int4":
        runs.follow("evaluate_run", "--run", run)
        tuned = read_json(run / "report.json")["metrics"]["loss"]["tuned"]
        assert tuned == pytest.approx(read_json(run / "run.json")["eval_loss"], rel=1e-4)
        full = runs.follow("merge", "--run", run, "--out", tmp_path / "full")
        assert "into the full-precision base" in full
    said = runs.follow("merge", "--run", run, "--out", tmp_path / "plain", "--base", "dequantized")
    assert f"into what {bits} made of the base" in said
    assert "compared: largest logit difference 0.0000" in said
    assert "100.0 %" in said
    assert_read_alike(tmp_path / "plain")


def test_a_model_that_mlx_lm_has_quantised_is_trained_asked_and_merged(runs: MlxRuns, tmp_path: Path) -> None:
    packed = runs.folder / "packed"
    mlx_lm.convert(str(runs.model), mlx_path=str(packed), quantize=True, q_bits=8, q_group_size=32, dtype="float32")
    config = read_json(packed / "config.json")
    del config["quantization_config"]  # as in older folders of `mlx-community`, which say it once
    (packed / "config.json").write_text(json.dumps(config), encoding="utf-8")
    changes = {**MLX, **SHORT, "model.name": str(packed), "training.neftune_alpha": 5.0}
    run = train(runs, "packed_run", changes)
    assert read_json(run / "run.json")["quantization"] == "int8"
    said = runs.follow("merge", "--run", run, "--out", tmp_path / "plain")
    assert "compared: largest logit difference 0.0000" in said
    assert_read_alike(tmp_path / "plain")
    refused = runs.train("--recipe", run.parent / "tiny.yaml", "--set", "backend=torch")
    assert refused.code == 4, refused.text
    assert "quantised in MLX's format, which torch does not read" in refused.text


def test_without_mlx_its_recipes_say_how_to_install_it_and_auto_takes_torch(runs: MlxRuns) -> None:
    recipe = runs.write("absent", MLX)
    code = (
        "import runpy, sys\nsys.modules['mlx_lm'] = None  # what Python itself writes for a module that is not there\n"
        f"sys.argv = ['validate.py', '--recipe', {str(recipe)!r}]\n"
        f"runpy.run_path({str(ROOT / 'scripts' / 'validate.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4, done.stderr
    assert f"{recipe}:1: backend mlx needs the packages mlx and mlx-lm, which are not installed" in done.stderr
    assert "pip install mlx-lm==" in done.stderr
    assert "set backend: torch" in done.stderr
    values = {"model": {"name": "x"}, "data": {"train": "x"}, "lora": {}, "training": {"method": "sft"}}
    assert choose_backend(Recipe(**values)) == "torch"  # on Linux, installed or not
