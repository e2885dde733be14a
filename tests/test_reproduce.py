"""Runs that are replayed and compared, through the real scripts on a tiny model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts import diff_runs, reproduce, train
from tests.test_run import write_recipe
from utils.exceptions import RunError
from utils.replay import StepComparison, judge_replay, measure_distance
from utils.run_comparison import Difference, compare_runs, find_environment_differences
from utils.run_folder import RunFolder


@pytest.fixture(scope="module")
def work(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in `a`, and one at another rate in `b`; with dropout, which draws numbers."""
    folder = tmp_path_factory.mktemp("replayed")
    recipe = write_recipe(folder, tiny_llama, max_steps=4, eval_every=4)
    values = json.loads(recipe.read_text(encoding="utf-8"))
    recipe.write_text(json.dumps({**values, "lora": {"r": 4, "dropout": 0.1}}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("TUNEBOOK_THREADS", "1")
        for name, override in (("a", "seed=42"), ("b", "training.learning_rate=0.02")):
            assert train.main(["--recipe", str(recipe), "--set", override, "--run", name]) == 0
    return folder


@pytest.fixture
def run(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the first run that a test may change, in the folder that it was made in."""
    monkeypatch.chdir(work)
    return Path(shutil.copytree(work / "a", tmp_path / "run"))


def list_files(folder: Path) -> dict[str, bytes]:
    """Every file with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a JSON file."""
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


def edit_row(run: Path, index: int, **values: Any) -> None:
    """Changes a row of metrics.jsonl."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows[index].update(values)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def test_a_run_is_reproduced_bit_for_bit_and_nothing_of_it_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, latest = list_files(run), (run.parent / "outputs").exists()
    assert reproduce.main(["--run", str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "reproduced: 4 of 4 losses bit for bit"
    assert list_files(run) == before
    assert (run.parent / "outputs").exists() == latest


def test_another_loss_is_told_with_its_step_and_what_else_differs(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = RunFolder(run).read_metrics()[2]["loss"]
    edit_row(run, 2, loss=loss * 1.01)
    edit_json(run / "run.json", lambda facts: facts.update(device_name="another CPU"))
    with pytest.raises(
        RunError, match=r"not reproduced: step 3 differs, 2 of 3 losses .*device_name: another"
    ) as caught:
        reproduce.main(["--run", str(run), "--steps", "3"])
    assert caught.value.exit_code == 5
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in out[-4:-1]] == ["none", "none", "9.9e-03"]
    assert out[-1].startswith("differs: device_name: another CPU → ")


def test_rounding_is_forgiven_where_machine_or_versions_are_others() -> None:
    row = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "tokens": 9, "supervised_tokens": 4}
    steps = [StepComparison(1, row, row, 0.0), StepComparison(2, row, row, 3e-6)]
    changes = [Difference("versions.torch", "2.12.0", "2.13.0")]
    with pytest.raises(RunError, match=r"step 2 differs, 1 of 2 .*machine, versions and code are the same"):
        judge_replay(steps, [], "float32", "run")
    said = (
        "reproduced: 2 of 2 losses within 0.0001 (largest relative difference 3.0e-06 at step 2), 1 of them bit for bit"
    )
    assert judge_replay(steps, changes, "float32", "run") == said
    steps.append(StepComparison(3, row, row, 1e-3))
    with pytest.raises(RunError, match=r"step 3 differs.*versions.torch: 2.12.0 → 2.13.0"):
        judge_replay(steps, changes, "float32", "run")
    assert judge_replay(steps, changes, "bfloat16", "run").startswith("reproduced: 3 of 3 losses within 0.02")


def test_changed_rows_are_refused_before_a_model_is_loaded(run: Path) -> None:
    edit_json(run / "run.json", lambda facts: facts.update(data_hash="0" * 64, template_hash="1" * 64))
    with pytest.raises(RunError, match=r"trained on has changed since: data, template"):
        reproduce.main(["--run", str(run)])


def test_a_run_without_a_step_cannot_be_reproduced(run: Path) -> None:
    (run / "metrics.jsonl").unlink()
    with pytest.raises(RunError, match=r"does not have the first step"):
        reproduce.main(["--run", str(run)])


def test_other_tokens_are_never_rounding() -> None:
    row = {"step": 1, "loss": 2.0, "grad_norm": 1.0, "tokens": 9, "supervised_tokens": 4}
    assert measure_distance(row, dict(row)) == 0.0
    assert measure_distance(row, {**row, "loss": 2.5}) == pytest.approx(0.2)
    assert measure_distance({**row, "loss": None}, {**row, "loss": None}) == 0.0
    for other in ({**row, "tokens": 8}, {**row, "loss": None}):
        assert measure_distance(row, other) == float("inf")
    assert judge_replay([], [], "float32", "x") == "reproduced: 0 of 0 losses bit for bit"


def test_the_same_run_twice_is_said_to_be_the_same(work: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_json(run / "run.json", lambda facts: facts.update(seconds=99.5))
    assert diff_runs.main([str(work / "a"), str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "The runs are the same but for speed and memory."
    assert "losses: the same bit for bit in all 4 common steps" in lines
    assert lines[-3].endswith("→ 99.5")


def test_two_runs_show_what_differs_and_where_their_losses_part(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert diff_runs.main([str(work / "a"), str(work / "b"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["recipe"] == [{"name": "training.learning_rate", "first": 0.01, "second": 0.02}]
    assert (answer["same"], answer["inputs"], answer["losses"]["parted_at"]) == (False, [], 2)
    assert {"train_loss", "eval_loss"} <= {each["name"] for each in answer["results"]}


def test_failed_and_older_runs_are_compared_as_far_as_they_go(
    work: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "run.json").write_text('{"status": "failed", "versions": null}', encoding="utf-8")
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 5, "lo')  # a kill in the middle of a line
    report = {"metrics": {"loss": {"tuned": 1.0, "difference": -0.5, "low": -0.75, "high": -0.25}}}
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    assert diff_runs.main([str(run), str(work / "a")]) == 0
    text = capsys.readouterr().out
    for part in ("status  ", "failed → finished", "1 (difference -0.5, -0.75 to -0.25) → —", "all 4 common steps"):
        assert part in text


@pytest.mark.parametrize("line", ["nothing", "[]", '{"loss": 1.0}', '{"step": "one", "loss": 1.0}'])
def test_a_damaged_line_of_metrics_is_named(work: Path, run: Path, line: str) -> None:
    path = run / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "loss": 1.0}}\n{line}\n', encoding="utf-8")
    with pytest.raises(RunError) as caught:
        compare_runs(RunFolder(run), RunFolder(work / "a"))
    assert caught.value.problems[0].where == f"{path}:2"


def test_code_and_versions_are_part_of_the_environment() -> None:
    then = {"device": "cpu", "versions": {"torch": "1", "gone": "2"}, "git": {"commit": "a" * 40, "dirty": False}}
    now = {"device": "cpu", "versions": {"torch": "2", "new": "1"}, "git": {"commit": "a" * 40, "dirty": True}}
    assert find_environment_differences(then, now) == [
        Difference("versions.torch", "1", "2"),
        Difference("git", "a" * 12, "a" * 12 + " with changes"),
    ]
    assert find_environment_differences({}, now) == []
