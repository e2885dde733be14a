"""A whole run through the real scripts, on a tiny model: train, signals, evaluate, infer, merge, trackers, secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import evaluate_run, infer, merge, train
from tests.conftest import Finished, RunScript, ScriptServer, wait_until
from utils.exceptions import RecipeError, RunError

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
STEP_KEYS = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "tokens_per_second"}
RUN_KEYS = {
    *("status", "device", "dtype", "steps", "tokens", "supervised_tokens", "tokens_per_second", "peak_memory_bytes"),
    *("time_to_first_step_s", "train_loss", "eval_loss", "best_step", "versions", "data_hash", "template_hash"),
}


def write_rows(path: Path, count: int = 24) -> Path:
    """Rows with a question and an answer that a database can check."""
    database = "CREATE TABLE t (a INTEGER); INSERT INTO t VALUES (1), (2);"
    rows = [
        {
            "messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"SELECT {i}"}],
            "database": database,
            "level": i % 2,
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_recipe(folder: Path, model: Path, **training: Any) -> Path:
    """A recipe file for the tiny model."""
    recipe = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(write_rows(folder / "rows.jsonl")), "eval_fraction": 0.25},
        "lora": {"r": 4},
        "training": {
            "method": "sft",
            "batch_size": 4,
            "learning_rate": 1e-2,
            "max_steps": 6,
            "eval_every": 2,
            **training,
        },
        "generation": {"max_new_tokens": 4},
        "evaluation": {"metrics": ["execution_accuracy", "exact_match", "loss", "perplexity"], "samples": 2},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_script: RunScript) -> Path:
    """A working folder with one finished run in it, tracked by wandb (offline) and tensorboard, with secrets around."""
    work = tmp_path_factory.mktemp("work")
    recipe = write_recipe(work, tiny_llama)
    (work / ".env").write_text("HF_TOKEN=hf_canaryfromdotenvfile0001\n", encoding="utf-8")
    done = run_script(
        *("train", "--recipe", recipe, "--set", "tracking.wandb=true", "--set", "tracking.tensorboard=true"),
        cwd=work,
        WANDB_MODE="offline",
        WANDB_API_KEY="c0ffee" * 6 + "beef",
        MY_SECRET_TOKEN="canary-in-the-environment-42",
    )
    assert done.returncode == 0, done.stderr
    assert "⟦SELECT" in done.stdout
    assert "Next: python scripts/evaluate_run.py" in done.stdout
    return work


@pytest.fixture(scope="module")
def followed_up(finished: Path, run_script: RunScript) -> tuple[Finished, Finished]:
    """That run evaluated, and its recipe trained once more into `again`."""
    evaluated = run_script("evaluate_run", "--run", find_run(finished), cwd=finished)
    again = ("--recipe", finished / "tiny.yaml", "--run", finished / "again")
    return evaluated, run_script("train", *again, cwd=finished)


def find_run(work: Path) -> Path:
    """The run that the latest pointer names."""
    return Path((work / "outputs" / "latest").read_text(encoding="utf-8").strip())


def test_a_run_folder_holds_everything_that_the_contract_names(finished: Path) -> None:
    run = find_run(finished)
    for name in (
        "recipe.yaml",
        "run.json",
        "metrics.jsonl",
        "log.txt",
        "loss.png",
        "adapter/adapter_model.safetensors",
    ):
        assert (run / name).stat().st_size > 0, name
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts.keys() >= RUN_KEYS
    assert facts["status"] == "finished"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    assert all(row.keys() == STEP_KEYS for row in steps)
    assert [row["step"] for row in rows if "eval_loss" in row] == [2, 4, 6]
    assert facts["tokens"] == sum(row["tokens"] for row in steps)
    mean = sum(row["loss"] * row["supervised_tokens"] for row in steps) / facts["supervised_tokens"]
    assert facts["train_loss"] == pytest.approx(mean)
    assert "micro_batch_size" in (run / "recipe.yaml").read_text(encoding="utf-8")
    assert "# auto: " in (run / "recipe.yaml").read_text(encoding="utf-8")


def test_the_adapter_is_the_best_checkpoint(finished: Path) -> None:
    run = find_run(finished)
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    best = run / "checkpoints" / f"step-{facts['best_step']}" / "adapter_model.safetensors"
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == best.read_bytes()
    assert not list(run.rglob("*.tmp-*"))


def test_no_secret_reaches_the_run_folder_or_a_tracker(finished: Path) -> None:
    canaries = [b"hf_canaryfromdotenvfile0001", b"c0ffee" * 6 + b"beef", b"canary-in-the-environment-42"]
    files = [path for path in find_run(finished).rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert any("tfevents" in path.name for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [canary for canary in canaries if canary in content], path
        if path.suffix == ".wandb":
            assert os.uname().release.encode() not in content
            assert str(ROOT / "scripts").encode() not in content
            assert b"learning_rate" in content


def test_the_same_recipe_gives_the_same_losses(finished: Path, followed_up: tuple[Finished, Finished]) -> None:
    again, done = finished / "again", followed_up[1]
    assert done.returncode == 0, done.stderr

    def read_losses(run: Path) -> list[float]:
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [row["loss"] for row in map(json.loads, lines) if "loss" in row]

    first = next(path for path in (finished / "outputs" / "tiny").iterdir() if path.is_dir())
    assert read_losses(first) == read_losses(again)
    weights = "adapter/adapter_model.safetensors"
    assert (first / weights).read_bytes() == (again / weights).read_bytes()


def test_evaluation_writes_a_report_with_intervals_and_a_verdict(
    finished: Path, followed_up: tuple[Finished, Finished]
) -> None:
    done = followed_up[0]
    assert done.returncode == 0, done.stderr
    run = next(path for path in (finished / "outputs" / "tiny").iterdir() if path.is_dir())
    report = json.loads((run / "report.json").read_text(encoding="utf-8"))
    assert report["verdict"].split(":")[0] in ("Better", "Worse", "No measurable change")
    assert set(report["metrics"]) == {"execution_accuracy", "exact_match", "loss", "perplexity"}
    for numbers in report["metrics"].values():
        assert numbers["difference"] == pytest.approx(numbers["tuned"] - numbers["base"])
        assert numbers["low"] <= numbers["difference"] <= numbers["high"]
    assert report["metrics"]["perplexity"]["tuned"] == pytest.approx(np.exp(report["metrics"]["loss"]["tuned"]))
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert report["metrics"]["loss"]["tuned"] == pytest.approx(facts["best_eval_loss"], rel=1e-4)
    assert len(report["samples"]) == 2
    assert (run / "report.md").read_text(encoding="utf-8").startswith("# Report: tiny")
    assert (run / "before_after.png").read_bytes().startswith(b"\x89PNG")
    assert report["verdict"].split(":")[0] in done.stdout


def test_a_merged_model_answers_like_its_adapter_and_loads_in_transformers(
    finished: Path, run_script: RunScript
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = finished / "merged"
    prompts = finished / "prompts.jsonl"
    prompts.write_text('{"prompt": "Say 3"}\n{"messages": [{"role": "user", "content": "Say 4"}]}\n', encoding="utf-8")
    of_run, of_merged = finished / "of_run.jsonl", finished / "of_merged.jsonl"
    options = ("--set", "generation.max_new_tokens=4", "--prompts", prompts)
    commands = [
        ("merge", "--out", target),
        ("merge", "--out", target),
        ("infer", "--run", find_run(finished), "--prompts", prompts, "--out", of_run),
        ("infer", "--model", target, *options, "--out", of_merged),
        ("infer", "--prompt", "Say 3"),
    ]
    done, again, *asked, single = (run_script(*command, cwd=finished) for command in commands)
    assert done.returncode == 0, done.stderr
    assert "changed tensors equal base + adapter within rounding" in done.stdout
    assert "KL divergence" not in done.stdout  # which takes --compare: no framework was loaded
    assert again.returncode == 5
    tokenizer = AutoTokenizer.from_pretrained(target)
    assert "im_start" in tokenizer.chat_template
    assert AutoModelForCausalLM.from_pretrained(target).config.model_type == "llama"
    assert json.loads((target / "generation_config.json").read_text(encoding="utf-8"))["eos_token_id"] == [2]
    answers = []
    for done, out in zip(asked, (of_run, of_merged), strict=True):
        assert done.returncode == 0, done.stderr
        answers.append([json.loads(line)["answer"] for line in out.read_text(encoding="utf-8").splitlines()])
    assert answers[0] == answers[1]
    assert single.returncode == 0, single.stderr
    assert single.stdout.strip() == answers[0][0].strip()
    assert "warn" not in single.stderr.lower()


def test_a_conversation_remembers_and_ends(finished: Path, run_script: RunScript) -> None:
    done = run_script("infer", cwd=finished, stdin="Say 1\n/reset\n<|im_end|>\n/exit\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    assert "control token <|im_end|>" in done.stderr


def test_ctrl_c_ends_an_answer_and_the_script(tiny_llama: Path, tmp_path: Path, script_server: ScriptServer) -> None:
    # The thread that computed the answer outlived the interpreter, which then aborted: exit -6.
    arguments = ("--model", tiny_llama, "--prompt", "Hi", "--set", "generation.max_new_tokens=1900")
    script = script_server.start("infer", *arguments, cwd=tmp_path, limits={"to_the_end": True})
    wait_until(lambda: script.read_output())
    script.send_signal(signal.SIGINT)
    done = script.wait()
    assert done.returncode == 130, done.stderr
    assert "Interrupted." in done.stderr
    assert "Traceback" not in done.stderr


def test_a_signal_finishes_the_step_saves_and_says_so(
    tiny_llama: Path, tmp_path: Path, script_server: ScriptServer
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, max_steps=20_000, eval_every=10_000)
    run = tmp_path / "run"
    script = script_server.start("train", "--recipe", recipe, "--run", run, cwd=tmp_path)
    wait_until((run / "metrics.jsonl").exists)
    script.send_signal(signal.SIGINT)
    done = script.wait()
    assert done.returncode == 130, done.stderr
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "stopped"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "checkpoints" / f"step-{facts['steps']}").is_dir()
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def unusual(
    tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, run_script: RunScript
) -> tuple[Path, Finished, Finished]:
    """A run that gains nothing in `early`, and one of a broken model in `nan`."""
    from safetensors.torch import load_file, save_file

    work = tmp_path_factory.mktemp("unusual")
    folders = [work / name for name in ("early", "nan", "broken")]
    for folder in folders[:2]:
        folder.mkdir()
    shutil.copytree(tiny_llama, folders[2])
    weights = load_file(folders[2] / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folders[2] / "model.safetensors", metadata={"format": "pt"})
    # A threshold that no evaluation can beat: the first counts as best, the next two as without gain.
    patience = {"early_stopping_patience": 2, "early_stopping_threshold": 50.0}
    early = write_recipe(folders[0], tiny_llama, max_steps=40, eval_every=1, **patience)
    commands = [
        ("train", "--recipe", recipe, "--run", folder / "run")
        for recipe, folder in ((early, folders[0]), (write_recipe(folders[1], folders[2], eval_every=4), folders[1]))
    ]
    stopped, failed = (run_script(*command, cwd=work) for command in commands)
    return work, stopped, failed


def test_early_stopping_ends_a_run_that_no_longer_gains(unusual: tuple[Path, Finished, Finished]) -> None:
    work, done, _ = unusual
    assert done.returncode == 0, done.stderr
    run = work / "early" / "run"
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (facts["steps"], facts["best_step"]) == (3, 1)
    assert "no better held-out loss" in facts["stop_reason"]
    best = run / "checkpoints" / "step-1" / "adapter_model.safetensors"
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == best.read_bytes()


def test_a_run_whose_numbers_are_not_finite_stops_and_says_failed(unusual: tuple[Path, Finished, Finished]) -> None:
    work, _, done = unusual
    run = work / "nan" / "run"
    assert done.returncode == 5, done.stderr
    assert "Step 1 is not taken (loss nan" in done.stderr
    assert "error: step 3: 3 step(s) in a row had a loss or gradient that is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["skipped_steps"]) == ("failed", 3)
    assert not (run / "adapter").exists()


TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def test_a_run_keeps_its_own_template_whatever_becomes_of_the_file(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    template = tmp_path / "mine.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    recipe = write_recipe(tmp_path, tiny_llama)
    options = ["--set", f"data.template={template}", "--set", "training.max_steps=2"]
    assert train.main(["--recipe", str(recipe), "--run", "run", *options]) == 0
    assert "<user> Say" in capsys.readouterr().out
    saved = tmp_path / "run" / "adapter" / "chat_template.jinja"
    assert saved.read_text(encoding="utf-8") == TEMPLATE

    template.unlink()
    merged = tmp_path / "merged"
    assert merge.main(["--run", "run", "--out", str(merged)]) == 0
    assert evaluate_run.main(["--run", "run"]) == 0
    assert (merged / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE

    saved.write_text(TEMPLATE.replace("<", "["), encoding="utf-8")
    with pytest.raises(RunError, match="not the one that the run was trained with"):
        infer.main(["--run", "run", "--prompt", "Hi"])


def test_a_run_records_what_was_predicted_and_what_was_measured(finished: Path) -> None:
    facts = json.loads((find_run(finished) / "run.json").read_text(encoding="utf-8"))

    assert facts["predicted_memory"]["total"] > 0
    error = facts["predicted_memory"]["total"] / facts["peak_memory_bytes"] - 1
    assert facts["memory_error"] == pytest.approx(error)
    assert "Peak memory" in (find_run(finished) / "log.txt").read_text(encoding="utf-8")


def test_a_packed_run_leaves_a_recipe_that_can_be_read_again(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A packed row is a micro-batch by itself, so none is chosen: a number in the resolved recipe would be refused.
    recipe = write_recipe(tmp_path, tiny_llama, packing=True, max_steps=2)
    assert train.main(["--recipe", str(recipe), "--run", "run"]) == 0
    assert evaluate_run.main(["--run", "run"]) == 0
    assert "micro_batch_size: auto" in (tmp_path / "run" / "recipe.yaml").read_text(encoding="utf-8")


def test_a_target_that_is_found_missing_after_loading_names_its_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # peft needs whole dotted ends; the pre-flight compares last names. The key was named without file and line.
    recipe = write_recipe(tmp_path, tiny_llama)
    with pytest.raises(RecipeError, match=r"--set lora\.target_modules: no module is called 'wrong\.q_proj'"):
        train.main(["--recipe", str(recipe), "--run", "run", "--set", "lora.target_modules=[wrong.q_proj]"])


def test_rows_under_a_long_system_prompt_share_passes_and_learn_the_same(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, tiny_llama, batch_size=16, max_steps=2)
    system = "data.system=Answer with one query. " + "Keep the names. " * 10
    runs = []
    for name, size in (("shared", "auto"), ("alone", 1)):
        overrides = [word for one in (system, f"training.micro_batch_size={size}") for word in ("--set", one)]
        assert train.main(["--recipe", str(recipe), "--run", name, *overrides]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        runs.append([[row["loss"], row["grad_norm"]] for row in map(json.loads, lines) if "loss" in row])
    text = (tmp_path / "shared" / "recipe.yaml").read_text(encoding="utf-8")
    found = re.search(
        r"micro_batch_size: (\d+)  # auto: (\d+) worker.*, mean example (\d+), (\d+) at the beginning of all", text
    )
    assert found
    size, workers, row, shared = map(int, found.groups())
    assert 30 < shared < row
    assert size == min(-(-16 // workers), 256 // (row - shared))
    assert runs[0] == [pytest.approx(row, rel=1e-4) for row in runs[1]]
