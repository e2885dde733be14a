"""An adapter leaves its run for mlx-lm and comes back, and every script reads it on both sides of the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from scripts import export, infer, merge, train
from utils.exceptions import AdapterError, RunError

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a run of a few steps on it with a template of its own, and the export of its adapter."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copytree(tiny_llama, folder / "base")
    rows = [{"prompt": f"Say {i}", "completion": f"SELECT {i}"} for i in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"name": "base", "dtype": "float32"},
        "data": {"train": "rows.jsonl", "eval_fraction": 0.25, "strategy": "standard", "template": "alpaca"},
        "lora": {"r": 4, "variant": "rslora"},
        "training": {"method": "sft", "batch_size": 4, "learning_rate": 5e-2, "max_steps": 3},
        "generation": {"max_new_tokens": 12},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNEBOOK_CACHE", str(folder / "cache"))
        assert train.main(["--recipe", "recipe.yaml", "--run", "run"]) == 0
        assert export.main(["--to", "mlx"]) == 0
    return folder


@pytest.fixture(autouse=True)
def _stay_there(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in that folder, with a cache of its own."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("TUNEBOOK_CACHE", str(work / "cache"))


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a model answers."""
    capsys.readouterr()
    assert infer.main([*arguments, "--prompt", "Say 3", "--set", "generation.max_new_tokens=12"]) == 0
    return capsys.readouterr().out


def test_the_run_and_both_forms_of_its_adapter_answer_alike_with_its_template(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ask(capsys, "--model", "base")
    answers = [ask(capsys, "--model", "base", "--adapter", name) for name in ("run", "run/adapter", "run/adapter_mlx")]
    assert answers == [ask(capsys, "--run", "run")] * 3
    assert answers[0] != plain
    assert (work / "run/adapter_mlx/chat_template.jinja").read_text() != (work / "base/chat_template.jinja").read_text()


def test_an_export_names_what_it_wrote_and_the_command_that_uses_it_and_comes_back_to_the_byte(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export.main(["--to", "mlx", "--run", "run", "--out", "there"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Adapter in the format of mlx-lm: there (LoRA on 14 modules, rank 4, scale 16)"
    # transformers 5 keeps the rotation in a section that mlx-lm's own tools do not read, and the template is another one.
    assert [line.partition(":")[0] for line in lines[1:3]] == ["Note", "Note"]
    assert '"rope_theta": 10000.0' in lines[1]
    assert "another chat template" in lines[2]
    assert lines[3] == "Next: mlx_lm.generate --model base --adapter-path there --prompt '…'"
    assert lines[4] == "      python scripts/infer.py --model base --adapter there"
    assert export.main(["--to", "peft", "--model", "base", "--adapter", "there"]) == 0
    assert "there_peft" in capsys.readouterr().out
    for name in (WEIGHTS, "chat_template.jinja"):
        assert (work / "there_peft" / name).read_bytes() == (work / "run/adapter" / name).read_bytes()
    assert json.loads((work / "there_peft/adapter_config.json").read_text())["base_model_name_or_path"] == "base"


def test_a_merge_of_either_form_is_the_merge_of_the_run(work: Path) -> None:
    assert merge.main(["--run", "run", "--out", "merged"]) == 0
    for name in ("run/adapter", "run/adapter_mlx"):
        out = f"merged_{Path(name).name}"
        assert merge.main(["--model", "base", "--adapter", name, "--out", out]) == 0
        for path in sorted((work / "merged").iterdir()):
            assert (work / out / path.name).read_bytes() == path.read_bytes(), path.name


def test_training_on_either_form_is_training_on_the_same_model(work: Path) -> None:
    losses = []
    for name in ("adapter", "adapter_mlx"):
        overrides = ["--set", f"model.adapter=run/{name}", "--set", "training.max_steps=1"]
        assert train.main(["--recipe", "recipe.yaml", "--run", f"on_{name}", *overrides]) == 0
        rows = [json.loads(line) for line in (work / f"on_{name}/metrics.jsonl").read_text().splitlines()]
        losses.append([(row.get("loss"), row.get("eval_loss")) for row in rows])
        with pytest.raises(AdapterError, match="had another adapter folded in"):
            export.main(["--to", "mlx", "--run", f"on_{name}"])
    assert losses[0] == losses[1]


def test_an_exported_adapter_is_refused_on_another_base_than_that_of_its_run(work: Path) -> None:
    shutil.copytree(work / "base", work / "other", dirs_exist_ok=True)
    weights = {name: tensor * 1.01 for name, tensor in load_file(work / "base/model.safetensors").items()}
    save_file(weights, work / "other/model.safetensors", metadata={"format": "pt"})
    for main in (infer.main, merge.main):
        out = ["--out", "new"] if main is merge.main else ["--prompt", "Say 3"]
        with pytest.raises(AdapterError, match="was trained on other weights than those of other"):
            main(["--model", "other", "--adapter", "run/adapter_mlx", *out])
    assert not (work / "new").exists()


def test_a_run_that_trained_all_weights_and_a_reward_models_adapter_do_not_travel(work: Path) -> None:
    shutil.copytree(work / "run", work / "whole")
    (work / "whole/adapter").rename(work / "whole/model")
    with pytest.raises(RunError, match="this run trained all weights"):
        export.main(["--to", "mlx", "--run", "whole"])
    config = json.loads((work / "run/adapter/adapter_config.json").read_text())
    shutil.copytree(work / "run/adapter", work / "reward")
    reward = {**config, "task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    (work / "reward/adapter_config.json").write_text(json.dumps(reward))
    head = {"base_model.model.score.weight": torch.zeros(1, 64)}
    save_file(load_file(work / "reward" / WEIGHTS) | head, work / "reward" / WEIGHTS)
    with pytest.raises(AdapterError, match="the adapter is of a reward model"):
        infer.main(["--model", "base", "--adapter", "reward", "--prompt", "Say 3"])
