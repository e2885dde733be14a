"""Whole runs through the scripts' own code: all weights, added tokens, an adapter on an adapter, and a quantised base."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from scripts import baseline_inference, evaluate_run, infer, merge, train
from tests.conftest import ROOT, TINY_VOCABULARY
from utils.exceptions import RunError

pytestmark = pytest.mark.slow


def write_recipe(folder: Path, base: Path, name: str, **sections: Any) -> str:
    """A recipe for the tiny model with 24 short rows."""
    rows = folder / "rows.jsonl"
    turns = [
        [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"<say>SELECT {i}<done>"}]
        for i in range(24)
    ]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name": str(base), "dtype": "float32"},
        "data": {"train": str(rows), "eval_fraction": 0.25},
        "training": {"method": "sft", "batch_size": 4, "learning_rate": 1e-2, "max_steps": 6},
        "generation": {"max_new_tokens": 3},
        "evaluation": {"metrics": ["loss", "exact_match"], "samples": 1},
    }
    for key, values in sections.items():
        recipe[key] = {**recipe.get(key, {}), **values}
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return str(path)


def run_all(recipe: str, run: Path, *merging: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trains, evaluates, asks, merges, and asks the merged model.

    Returns:
        run.json and report.json.
    """
    assert train.main(["--recipe", recipe, "--run", str(run)]) == 0
    assert evaluate_run.main(["--run", str(run)]) == 0
    assert infer.main(["--run", str(run), "--prompt", "Say 3"]) == 0
    assert merge.main(["--run", str(run), *merging]) == 0
    assert (
        infer.main(["--model", str(run / "merged"), "--prompt", "Say 3", "--set", "generation.max_new_tokens=3"]) == 0
    )
    return json.loads((run / "run.json").read_text()), json.loads((run / "report.json").read_text())


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own: runs are marked as the latest in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_recipe_without_its_lora_section_trains_all_weights(
    tiny_llama: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    facts, report = run_all(write_recipe(work, tiny_llama, "full", model={"dtype": "auto"}), work / "run")
    output = capsys.readouterr()
    # Where bfloat16 is quick, the weights were rounded to it before training, and the trained ones again for the report.
    assert facts["dtype"] == "float32"
    assert "dtype: float32  # auto: all weights are trained" in (work / "run" / "recipe.yaml").read_text()
    assert "times above the usual 3e-05 for all weights" in output.err
    assert facts["trainable_parameters"] == facts["parameters"]
    assert report["metrics"]["loss"]["tuned"] == pytest.approx(facts["best_eval_loss"], abs=1e-4)
    assert report["metrics"]["loss"]["tuned"] < report["metrics"]["loss"]["base"]
    assert "a copy: all weights were trained" in output.out


def test_added_tokens_are_there_in_every_script_and_in_the_merged_model(tiny_llama: Path, work: Path) -> None:
    lora = {"r": 4, "variant": "pissa"}
    recipe = write_recipe(work, tiny_llama, "tokens", lora=lora, data={"added_tokens": ["<say>", "<done>"]})
    facts, report = run_all(recipe, work / "run")
    # The evaluation stands on the untouched base with the converted adapter: the same loss as in training.
    assert report["metrics"]["loss"]["tuned"] == pytest.approx(facts["best_eval_loss"], abs=1e-4)
    merged = work / "run" / "merged"
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == TINY_VOCABULARY + 2
    assert {"<say>", "<done>"} <= {
        token["content"] for token in json.loads((merged / "tokenizer.json").read_text())["added_tokens"]
    }
    with safe_open(merged / "model.safetensors", framework="pt") as file:
        assert file.get_slice("model.embed_tokens.weight").get_shape() == [TINY_VOCABULARY + 2, 64]


def test_a_run_on_a_finished_adapter_starts_where_that_one_ended(tiny_llama: Path, work: Path) -> None:
    first = write_recipe(work, tiny_llama, "first", lora={"r": 4})
    assert train.main(["--recipe", first, "--run", str(work / "one")]) == 0
    ended = json.loads((work / "one" / "run.json").read_text())
    second = write_recipe(work, tiny_llama, "second", lora={"r": 2}, model={"adapter": str(work / "one")})
    assert baseline_inference.main(["--recipe", second]) == 0
    facts, report = run_all(second, work / "two")
    assert ended["adapter_hash"] is None
    assert len(facts["adapter_hash"]) == 64
    assert report["metrics"]["loss"]["base"] == pytest.approx(ended["best_eval_loss"], abs=1e-4)
    assert report["metrics"]["loss"]["tuned"] == pytest.approx(facts["best_eval_loss"], abs=1e-4)


@pytest.mark.parametrize("base", ["full", "dequantized"])
def test_a_quantised_run_is_evaluated_as_it_was_trained_and_merges(
    tiny_llama: Path, work: Path, base: str, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(work, tiny_llama, "quantised", lora={"r": 4}, model={"quantization": "nf4"})
    facts, report = run_all(recipe, work / "run", "--base", base, "--compare")
    assert facts["quantization"] == "nf4"
    assert report["metrics"]["loss"]["tuned"] == pytest.approx(facts["best_eval_loss"], abs=1e-4)
    assert "Against what was trained, the nf4 base with the adapter" in capsys.readouterr().out


def test_a_merge_loads_no_framework_and_is_compared_where_one_is_needed(
    tiny_llama: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"added_tokens": ["<say>", "<done>"]}
    recipe = write_recipe(work, tiny_llama, "light", lora={"r": 4, "variant": "dora"}, data=rows)
    assert train.main(["--recipe", recipe, "--run", str(work / "run")]) == 0
    code = "import sys; from scripts import merge; merge.main(sys.argv[1:]); print(sorted({'torch', 'peft'} & {*sys.modules}))"
    command = [sys.executable, "-c", code, "--run", str(work / "run"), "--out", str(work / "merged")]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n[]\n")
    assert merge.main(["--run", str(work / "run"), "--out", str(work / "compared"), "--compare"]) == 0
    output = capsys.readouterr().out
    assert "equal base + adapter within rounding" in output
    assert "loaded and compared: largest logit difference" in output
    files = [(work / name / "model.safetensors").read_bytes() for name in ("merged", "compared")]
    assert files[0] == files[1]


def test_experts_that_transformers_puts_together_are_merged_in_memory_and_compared(
    tiny_llama: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = work / "mixture"
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "intermediate_size": 32}
    config = Qwen3MoeConfig(vocab_size=TINY_VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes, **experts)
    AutoModelForCausalLM.from_config(config).save_pretrained(str(base))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_llama / name, base / name)
    assert train.main(["--recipe", write_recipe(work, base, "mixture", lora={"r": 2}), "--run", str(work / "run")]) == 0
    assert merge.main(["--run", str(work / "run")]) == 0
    output = capsys.readouterr().out
    assert "loaded and compared: largest logit difference" in output
    assert "read back" not in output


def test_a_run_is_refused_with_another_base_or_with_other_rows_to_draw_from(tiny_llama: Path, work: Path) -> None:
    # Both were recorded and never compared: the adapter was judged on a model that it was not made for, and rows that it had
    # learned were held out.
    base, run = work / "base", work / "run"
    shutil.copytree(tiny_llama, base)
    assert train.main(["--recipe", write_recipe(work, base, "small", lora={"r": 4}), "--run", str(run)]) == 0
    rows = work / "rows.jsonl"
    written = rows.read_text()
    rows.write_text("".join(reversed(written.splitlines(keepends=True))))
    with pytest.raises(RunError, match=r"data\.train have changed"):
        evaluate_run.main(["--run", str(run)])
    assert infer.main(["--run", str(run), "--prompt", "Say 3"]) == 0
    rows.write_text(written)
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: tensor * 1.01 for name, tensor in weights.items()}, base / "model.safetensors", metadata={"format": "pt"}
    )
    for script, arguments in ((evaluate_run, []), (infer, ["--prompt", "Say 3"]), (merge, [])):
        with pytest.raises(RunError, match=r"model\.name no longer holds the weights"):
            script.main(["--run", str(run), *arguments])


def test_a_run_that_trained_all_weights_answers_without_its_base(tiny_llama: Path, work: Path) -> None:
    base, run = work / "base", work / "run"
    shutil.copytree(tiny_llama, base)
    assert train.main(["--recipe", write_recipe(work, base, "whole"), "--run", str(run)]) == 0
    shutil.rmtree(base)
    assert infer.main(["--run", str(run), "--prompt", "Say 3"]) == 0
