"""A whole run on pairs through the real scripts, on a tiny model: train, held-out numbers, report, and what is kept on disk."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from scripts import baseline_inference, evaluate_run, infer, merge, preview_data, train, validate
from tests.conftest import ScriptServer, wait_until
from utils.exceptions import DataError, RecipeError, RunError

pytestmark = pytest.mark.slow
NUMBERS = ("margin", "accuracy", "chosen_reward", "rejected_reward")
METRICS = ["preference_accuracy", "preference_accuracy_per_token", "reward_accuracy", "loss"]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs land in a folder of their own, and so does the token cache; the tiny model needs no other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))


def write_recipe(folder: Path, model: Path, method: str, *, pairs: int = 20, **sections: Any) -> Path:
    """A recipe file whose rows prefer short answers."""
    rows = [
        {"prompt": f"What is {n} and {n}?", "chosen": f"{2 * n}.", "rejected": f"I think it is {2 * n + 1}, or so."}
        for n in range(pairs)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "pairs.jsonl"), "eval_fraction": 0.4},
        "lora": {"r": 4},
        "training": {"method": method, "batch_size": 4, "learning_rate": 5e-3, "max_steps": 6, "eval_every": 3},
        "evaluation": {"metrics": METRICS},
        **sections,
    }
    path = folder / f"{method}.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def read_metrics(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of the steps and of the evaluations."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row for row in rows if "loss" in row], [row for row in rows if "eval_loss" in row]


@pytest.mark.parametrize("method", ["dpo", "kto", "orpo"])
def test_a_run_on_pairs_learns_the_preference_and_reports_it(tmp_path: Path, tiny_llama: Path, method: str) -> None:
    run = tmp_path / "run"
    names = [name for name in METRICS if method != "orpo" or name != "reward_accuracy"]
    recipe = write_recipe(tmp_path, tiny_llama, method, evaluation={"metrics": names})
    assert train.main(["--recipe", str(recipe), "--run", str(run)]) == 0
    steps, evaluations = read_metrics(run)
    assert [row["step"] for row in evaluations] == [3, 6]
    for name in NUMBERS:
        assert all(math.isfinite(row[name]) for row in steps)
        assert all(math.isfinite(row[f"eval_{name}"]) for row in evaluations)
    assert evaluations[-1]["eval_margin"] > evaluations[0]["eval_margin"]
    if method == "dpo":
        assert steps[0]["loss"] == pytest.approx(math.log(2), abs=5e-7)
        assert evaluations[-1]["eval_accuracy"] > 0.9
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "finished"
    assert facts["train_loss"] == pytest.approx(sum(row["loss"] for row in steps) / len(steps), rel=1e-6)
    assert "the reference is another" not in (run / "log.txt").read_text(encoding="utf-8")

    assert evaluate_run.main(["--run", str(run)]) == 0
    metrics = json.loads((run / "report.json").read_text(encoding="utf-8"))["metrics"]
    assert list(metrics) == names
    if method == "orpo":
        assert metrics["preference_accuracy_per_token"]["tuned"] >= metrics["preference_accuracy_per_token"]["base"]
    else:
        assert metrics["reward_accuracy"]["base"] == 0.5
        assert metrics["reward_accuracy"]["tuned"] > 0.9
    assert metrics["preference_accuracy"]["rows"] == 8
    assert "preference accuracy" in (run / "report.md").read_text(encoding="utf-8")


def test_the_untouched_model_answers_prompts_of_pairs(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Metrics of pairs were taken for metrics of answers: KeyError 'database'.
    recipe = write_recipe(
        tmp_path, tiny_llama, "dpo", evaluation={"metrics": METRICS}, generation={"max_new_tokens": 2}
    )
    assert baseline_inference.main(["--recipe", str(recipe), "--show", "1"]) == 0
    assert "8 answers of the untouched" in capsys.readouterr().out


def test_a_second_run_finds_the_reference_on_disk_and_repeats_every_number(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, "dpo")
    written = []
    for name in ("first", "second"):
        assert train.main(["--recipe", str(recipe), "--run", str(tmp_path / name)]) == 0
        kept = sorted((tmp_path / "cache" / "tokens").glob("reference-*/reference.f64"))
        written.append({path: path.stat().st_mtime_ns for path in kept})
    assert len(written[0]) == 2  # training and held-out pairs
    assert written[1] == written[0]
    first, second = (read_metrics(tmp_path / name) for name in ("first", "second"))
    for one, other in zip(first[0] + first[1], second[0] + second[1], strict=True):
        assert {**one, "tokens_per_second": 0} == {**other, "tokens_per_second": 0}


def test_a_reward_model_learns_to_tell_answers_apart_and_scores_the_same_wherever_it_is_loaded(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, "reward", evaluation={"metrics": ["preference_accuracy"]})
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert train.main(["--recipe", str(recipe), "--run", str(run)]) == 0
    steps, evaluations = read_metrics(run)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=5e-7)
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] < math.log(2)
    assert evaluate_run.main(["--run", str(run)]) == 0
    metrics = json.loads((run / "report.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["preference_accuracy"]["base"] == 0.5  # a new head has no opinion
    assert metrics["preference_accuracy"]["tuned"] > 0.9

    assert merge.main(["--run", str(run), "--out", str(merged)]) == 0
    found = {}
    for name, options in (("run", ["--run", str(run)]), ("merged", ["--model", str(merged)])):
        out = tmp_path / f"{name}.jsonl"
        assert infer.main([*options, "--prompts", str(tmp_path / "pairs.jsonl"), "--out", str(out)]) == 0
        found[name] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert len(found["run"]) == 40
    assert [row["messages"] for row in found["run"]] == [row["messages"] for row in found["merged"]]
    rewards = [row["reward"] for row in found["run"]]
    assert [row["reward"] for row in found["merged"]] == pytest.approx(rewards, rel=1e-4)
    assert sum(chosen > rejected for chosen, rejected in zip(rewards[::2], rewards[1::2], strict=True)) > 18

    scored = ["--model", str(merged), "--prompts", str(tmp_path / "pairs.jsonl")]
    with pytest.raises(RecipeError, match="generation settings do nothing"):
        infer.main([*scored, "--set", "generation.temperature=0.5"])

    # What users have: transformers, its tokenizer and the saved template.
    tokenizer = AutoTokenizer.from_pretrained(merged)
    network = AutoModelForSequenceClassification.from_pretrained(merged, dtype="float32").eval()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in found["run"]]
    given = network(**tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)).logits[:, 0]
    assert given.tolist() == pytest.approx(rewards, rel=1e-4)


def test_a_reward_model_refuses_to_write(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, "reward", evaluation={"metrics": ["preference_accuracy"]})
    assert train.main(["--recipe", str(recipe), "--run", str(tmp_path / "run"), "--set", "training.max_steps=3"]) == 0
    with pytest.raises(RunError, match="scores answers, and writes none"):
        infer.main(["--run", str(tmp_path / "run"), "--prompt", "hi"])
    (tmp_path / "text.jsonl").write_text('{"text": "a"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="no answer to score"):
        infer.main(["--run", str(tmp_path / "run"), "--prompts", str(tmp_path / "text.jsonl")])
    with pytest.raises(RecipeError, match="writes no answers"):
        baseline_inference.main(["--recipe", str(recipe)])


def test_all_weights_can_be_trained_on_pairs(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, "dpo")
    values = json.loads(recipe.read_text(encoding="utf-8"))
    del values["lora"]
    values["training"]["learning_rate"] = 1e-3
    recipe.write_text(json.dumps(values), encoding="utf-8")
    run = tmp_path / "run"
    assert train.main(["--recipe", str(recipe), "--run", str(run)]) == 0
    steps, evaluations = read_metrics(run)
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=5e-7)
    assert evaluations[-1]["eval_loss"] < math.log(2)
    assert (run / "model" / "model.safetensors").is_file()


def test_rows_with_one_answer_are_refused_under_dpo_and_pairs_under_sft(tmp_path: Path, tiny_llama: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, "dpo")
    rows = tmp_path / "pairs.jsonl"
    pairs = rows.read_text(encoding="utf-8")
    rows.write_text(pairs + '{"prompt": "Hi", "completion": "Hello."}\n', encoding="utf-8")
    with pytest.raises(RecipeError, match="1 rows have one answer"):
        train.main(["--recipe", str(recipe)])
    rows.write_text(pairs, encoding="utf-8")
    plain = ["--set", "training.method=sft", "--set", "evaluation.metrics=[loss]"]
    with pytest.raises(RecipeError, match="method sft learns one answer"):
        train.main(["--recipe", str(recipe), *plain])


def test_kto_needs_an_answer_to_another_prompt_and_says_so_before_a_model_is_loaded(
    tmp_path: Path, tiny_llama: Path
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, "kto", pairs=2)
    with pytest.raises(DataError, match="training rows with two prompts"):
        validate.main(["--recipe", str(recipe)])


def write_labelled(folder: Path, model: Path, rows: list[dict[str, Any]] | None = None, **sections: Any) -> Path:
    """A recipe whose rows have one answer: short ones are good, long ones are not."""
    if rows is None:
        short = [{"prompt": f"What is {n} and {n}?", "completion": f"{2 * n}.", "label": True} for n in range(16)]
        rows = [
            {**row, "completion": f"I think it is {n}, or so.", "label": False} if n % 2 else row
            for n, row in enumerate(short)
        ]
        rows += [{"prompt": f"What is {n} plus 0?", "chosen": f"{n}.", "rejected": f"It may be {n}."} for n in range(4)]
    path = write_recipe(folder, model, "kto", evaluation={"metrics": ["label_accuracy", "loss"]}, **sections)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_run_on_labelled_rows_and_pairs_moves_answers_the_right_way_and_reports_it(
    tmp_path: Path, tiny_llama: Path
) -> None:
    run = tmp_path / "run"
    recipe = write_labelled(tmp_path, tiny_llama)
    assert train.main(["--recipe", str(recipe), "--run", str(run)]) == 0
    steps, evaluations = read_metrics(run)
    assert all(math.isfinite(value) for row in (*steps, *evaluations) for value in row.values())
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"] < 0.5
    assert {"eval_accuracy", "eval_loss"} <= set(evaluations[-1])
    log = (run / "log.txt").read_text(encoding="utf-8")
    assert "the reference is another" not in log
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["row_formats"] == {"labelled": 16, "preference": 4}

    assert evaluate_run.main(["--run", str(run)]) == 0
    metrics = json.loads((run / "report.json").read_text(encoding="utf-8"))["metrics"]
    assert metrics["label_accuracy"]["base"] == 0.5
    assert metrics["label_accuracy"]["tuned"] > 0.9
    assert metrics["label_accuracy"]["rows"] == 8
    assert 0 < metrics["loss"]["rows"] < 8  # the desirable answers alone
    assert metrics["loss"]["difference"] < 0
    assert "label accuracy" in (run / "report.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("rows", "changes", "word"),
    [
        ({"label": False}, ["training.method=sft", "evaluation.metrics=[loss]"], "learn bad answers like good ones"),
        ({"label": False}, ["training.method=dpo", "evaluation.metrics=[loss]"], "compares two answers of a row"),
        (
            {"label": True},
            ["evaluation.metrics=[preference_accuracy]"],
            "these metrics compare two: preference_accuracy",
        ),
        ({"label": False}, [], "no held-out row has label true"),
        ({}, [], "16 rows have one answer, the first in .*pairs.jsonl:1, and method kto needs a label"),
        ({"label": "yes"}, [], "label is 'yes', and it must say true or false"),
        ({"label": 1}, [], "label is 1, and it must say true or false"),
        ({"label": True, "completion": ""}, [], "completion is empty"),
        ({"label": False}, ["evaluation.metrics=[label_accuracy,exact_match]"], "this row's has label false"),
        ({"label": False}, ["data.format=prompt_completion"], "format prompt_completion has one answer"),
    ],
)
def test_labelled_rows_that_cannot_be_meant_are_refused_before_training(
    tmp_path: Path, tiny_llama: Path, rows: dict[str, Any], changes: list[str], word: str
) -> None:
    written = [{"prompt": f"What is {n}?", "completion": f"{n}.", **rows} for n in range(16)]
    recipe = write_labelled(tmp_path, tiny_llama, written)
    more = [word for change in changes for word in ("--set", change)]
    with pytest.raises((RecipeError, DataError), match=word):
        train.main(["--recipe", str(recipe), "--run", str(tmp_path / "run"), *more])
    assert not (tmp_path / "run").exists()


def test_held_out_rows_are_looked_at_too(tmp_path: Path, tiny_llama: Path) -> None:
    # Bad answers in data.eval would have been measured like good ones: only the formats of data.train were looked at.
    recipe = write_recipe(tmp_path, tiny_llama, "sft", evaluation={"metrics": ["loss"]})
    values = json.loads(recipe.read_text(encoding="utf-8"))
    values["data"] = {"train": str(tmp_path / "train.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    recipe.write_text(json.dumps(values), encoding="utf-8")
    for name, label in (("train", {}), ("eval", {"label": False})):
        rows = [{"prompt": f"{name} {n}?", "completion": f"{n}.", **label} for n in range(16)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(RecipeError, match="16 rows have one answer and a label"):
        train.main(["--recipe", str(recipe)])


def test_labels_that_are_all_the_same_or_out_of_balance_are_said(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for good, said in ((16, "nothing to tell good answers from"), (12, "set kto.desirable_weight:"), (8, None)):
        rows = [{"prompt": f"What is {n}?", "completion": f"{n}.", "label": n < good} for n in range(16)]
        recipe = write_labelled(tmp_path, tiny_llama, rows)
        values = json.loads(recipe.read_text(encoding="utf-8"))
        values["data"]["eval_fraction"] = 0.0
        values["training"].pop("eval_every")
        recipe.write_text(json.dumps(values), encoding="utf-8")
        assert validate.main(["--recipe", str(recipe)]) == 0
        shown = capsys.readouterr().err
        assert said is None or said in shown
        assert ("kto.desirable_weight" in shown, "nothing to tell" in shown) == (good == 12, good == 16)


def test_people_see_which_answers_are_good_ones(
    tmp_path: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_labelled(tmp_path, tiny_llama)
    changes = ["--set", "data.eval_fraction=0", "--set", "training.eval_every=epoch"]
    arguments = ["--recipe", str(recipe), *changes, "--rows", "20", "--picture", "p.png"]
    assert preview_data.main(arguments) == 0
    shown = capsys.readouterr().out
    assert [shown.count(f"\n{name}: ") for name in ("desirable", "undesirable", "chosen", "rejected")] == [8, 8, 4, 4]
    assert "a pair of" in shown
    assert "desirable answers  12\nundesirable answers 12\n" in shown
    assert preview_data.main([*arguments, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row.get("label") for row in rows] == [*([True, False] * 8), *([None] * 4)]


def test_sigterm_in_the_reference_pass_leaves_no_half_folder_and_a_run_that_says_stopped(
    tmp_path: Path, tiny_llama: Path, script_server: ScriptServer
) -> None:
    # The process died by the signal itself: run.json said `running` for good, and the cache kept a half-built entry.
    run, recipe = tmp_path / "run", write_recipe(tmp_path, tiny_llama, "dpo", pairs=1500)
    script = script_server.start(
        "train", "--recipe", recipe, "--run", run, cwd=tmp_path, TUNEBOOK_CACHE=str(tmp_path / "cache")
    )
    wait_until(lambda: list(tmp_path.glob("cache/tokens/.reference-*")))
    script.send_signal(signal.SIGTERM)
    done = script.wait()
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert (facts["status"], facts["error"]) == ("stopped", "stopped by SIGTERM")
    assert not list((tmp_path / "cache").rglob(".*tmp-*"))
    assert "Traceback" not in done.stderr
