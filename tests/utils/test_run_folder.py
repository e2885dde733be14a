"""A run never overwrites another, is found again, and holds everything but secrets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from config.recipe_io import LoadedRecipe, load_recipe
from utils.atomic_files import write_text_atomically
from utils.exceptions import AdapterError, RunError
from utils.model_source import ModelSource
from utils.run_folder import (
    OUTPUTS,
    RunFolder,
    check_run_target,
    collect_versions,
    create_run_folder,
    find_git_state,
    find_run,
    mark_latest,
)
from utils.run_record import RunRecord
from utils.stop_signals import SignalExit

RECIPE = """
model:
  name: embedded/smollm2-135m-instruct
data:
  train: rows.jsonl
training:
  method: sft
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, since outputs/ is relative to it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, text: str = RECIPE) -> LoadedRecipe:
    path = folder / "song.yaml"
    path.write_text(text, encoding="utf-8")
    return load_recipe(path)


def make_run(folder: Path, name: str) -> RunFolder:
    run = create_run_folder(write_recipe(folder), folder / name)
    run.write_facts({"status": "finished"})
    return run


def test_a_run_without_a_name_lies_under_outputs_recipe_and_time(folder: Path) -> None:
    run = create_run_folder(write_recipe(folder), None)
    assert run.path.parent == OUTPUTS / "song"
    assert run.recipe_file.is_file()


def test_two_runs_started_in_one_second_get_two_folders(folder: Path) -> None:
    # The folder's name has seconds only, so the second of two runs that a script starts at once was refused.
    loaded = write_recipe(folder)
    assert len({create_run_folder(loaded, None).path for _ in range(3)}) == 3


def test_the_named_folder_is_created_with_its_parents(folder: Path) -> None:
    assert create_run_folder(write_recipe(folder), folder / "a" / "b").path == folder / "a" / "b"


def test_a_folder_that_exists_is_refused_even_if_it_is_empty(folder: Path) -> None:
    (folder / "run").mkdir()
    for attempt in (
        lambda: create_run_folder(write_recipe(folder), folder / "run"),
        lambda: check_run_target(folder / "run"),
    ):
        with pytest.raises(RunError) as caught:
            attempt()
        assert caught.value.problems[0].code == "run-exists"
        assert caught.value.exit_code == 5
    assert list((folder / "run").iterdir()) == []
    check_run_target(None)
    check_run_target(folder / "new")


def test_a_folder_inside_a_file_is_refused(folder: Path) -> None:
    (folder / "file").write_text("x")
    with pytest.raises(RunError) as caught:
        create_run_folder(write_recipe(folder), folder / "file" / "run")
    assert caught.value.problems[0].code == "disk"


def test_the_resolved_recipe_can_be_read_again(folder: Path) -> None:
    loaded = write_recipe(folder)
    assert create_run_folder(loaded, folder / "run").load_recipe().recipe == loaded.recipe


def test_a_pinned_revision_survives_in_the_resolved_recipe(folder: Path) -> None:
    # 40 hex digits look like a token, so a pinned commit was written as [hidden], which YAML then reads as a list.
    revision = "0123456789abcdef0123456789abcdef01234567"
    text = RECIPE.replace("embedded/smollm2-135m-instruct", f"some/model\n  revision: {revision}")
    loaded = write_recipe(folder, text)
    assert loaded.recipe.model.revision == revision
    assert create_run_folder(loaded, folder / "run").load_recipe().recipe.model.revision == revision


def test_secrets_do_not_get_into_the_resolved_recipe(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "correct-horse-battery")
    text = RECIPE + "  # correct-horse-battery\n"
    text = text.replace("rows.jsonl", "correct-horse-battery.jsonl")
    run = create_run_folder(write_recipe(folder, text), folder / "run")
    assert "correct-horse" not in run.recipe_file.read_text()
    assert "[hidden]" in run.recipe_file.read_text()


def test_the_latest_run_is_found_without_a_name(folder: Path) -> None:
    first, second = make_run(folder, "a"), make_run(folder, "b")
    mark_latest(first)
    mark_latest(second)
    assert find_run(None).path == second.path.resolve()


def test_the_latest_run_is_found_from_its_relative_path(folder: Path) -> None:
    run = create_run_folder(write_recipe(folder), None)
    run.write_facts({"status": "running"})
    mark_latest(run)
    assert find_run(None).path == run.path.resolve()


def test_a_run_is_found_by_its_folder(folder: Path) -> None:
    mark_latest(make_run(folder, "a"))
    other = make_run(folder, "b")
    assert find_run(other.path).path == other.path


def test_without_any_run_the_error_says_how_to_train(folder: Path) -> None:
    with pytest.raises(RunError, match="no run yet") as caught:
        find_run(None)
    assert "train.py" in (caught.value.problems[0].fix or "")


def test_what_is_not_a_run_folder_is_refused(folder: Path) -> None:
    (folder / "empty").mkdir()
    create_run_folder(write_recipe(folder), folder / "unstarted")
    for name in ("missing", "empty", "unstarted", "song.yaml"):
        with pytest.raises(RunError) as caught:
            find_run(folder / name)
        assert caught.value.problems[0].code == "no-run"
        assert caught.value.problems[0].where == str(folder / name)


def test_a_latest_run_that_was_deleted_is_an_error_with_its_place(folder: Path) -> None:
    run = make_run(folder, "a")
    mark_latest(run)
    run.run_file.unlink()
    with pytest.raises(RunError, match="latest run is not there") as caught:
        find_run(None)
    problem = caught.value.problems[0]
    assert (problem.where, problem.code) == (str(run.path.resolve()), "no-run")
    assert "--run" in (problem.fix or "")


def test_a_run_without_weights_is_refused_with_its_status(folder: Path) -> None:
    run = make_run(folder, "a")
    run.write_facts({"status": "failed"})
    with pytest.raises(RunError, match="failed"):
        run.check_complete()
    run.model.mkdir()
    run.check_complete()
    run.adapter.mkdir()
    with pytest.raises(AdapterError, match="no weights"):
        run.check_complete()


def test_a_file_is_replaced_in_one_step(folder: Path) -> None:
    path = folder / "run.json"
    write_text_atomically(path, "old")
    reader = path.open()
    write_text_atomically(path, "newer ü")
    assert reader.read() == "old"  # a reader that opened the old file still sees all of it
    reader.close()
    assert path.read_text(encoding="utf-8") == "newer ü"
    assert [entry.name for entry in folder.iterdir()] == ["run.json"]


def test_facts_that_cannot_be_written_leave_the_old_ones(folder: Path) -> None:
    run = make_run(folder, "a")
    for bad in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            run.write_facts({"train_loss": bad})
    assert run.read_facts() == {"status": "finished"}
    assert sorted(entry.name for entry in run.path.iterdir()) == ["recipe.yaml", "run.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "3", b"\xff"])
def test_a_damaged_run_json_is_a_run_error(folder: Path, content: str | bytes) -> None:
    run = make_run(folder, "a")
    run.run_file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RunError) as caught:
        run.read_facts()
    assert caught.value.problems[0].where == str(run.path)


def test_metrics_are_one_json_row_a_line(folder: Path) -> None:
    run = make_run(folder, "a")
    assert run.read_metrics() == []
    rows = [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 2.0}]
    for row in rows:
        run.append_metrics(row)
    assert [json.loads(line) for line in run.metrics_file.read_text().splitlines()] == rows
    assert run.read_metrics() == rows


def test_half_a_line_that_a_kill_left_is_no_row(folder: Path) -> None:
    run = make_run(folder, "a")
    run.append_metrics({"step": 1, "loss": 2.5})
    with run.metrics_file.open("a", encoding="utf-8") as file:
        file.write('{"step": 2, "lo')
    assert run.read_metrics() == [{"step": 1, "loss": 2.5}]


def test_versions_and_commit_are_recorded() -> None:
    assert {"python", "platform", "torch", "transformers", "peft"} <= set(collect_versions())
    state = find_git_state()
    if state is not None:
        assert len(state["commit"]) == 40
        assert isinstance(state["dirty"], bool)


@pytest.mark.parametrize(
    ("error", "status", "said", "has_trace"),
    [
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero", True),
        (RunError("the disk is full", fix="free some"), "failed", "the disk is full Fix: free some", False),
        (KeyboardInterrupt(), "stopped", "interrupted", False),
        (SignalExit(15), "stopped", "stopped by SIGTERM", False),
        (SystemExit(3), "failed", "ended with exit code 3", False),
    ],
)
def test_a_run_says_what_ended_it_and_so_does_its_log(
    folder: Path, error: BaseException, status: str, said: str, has_trace: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    # Anything but an error of ours left `running` for good, and a log without the error.
    run = create_run_folder(write_recipe(folder), folder / "run")
    with pytest.raises(type(error)), RunRecord(run, {"status": "running", "steps": None}):
        raise error
    assert run.read_facts() == {"status": status, "steps": None, "error": said, "skipped_steps": 0}
    log = run.log_file.read_text(encoding="utf-8")
    assert f"ERROR {said}" in log
    assert ("Traceback" in log) == has_trace
    assert capsys.readouterr().err == ""


def test_a_run_that_ends_by_itself_says_what_it_found(folder: Path) -> None:
    run = create_run_folder(write_recipe(folder), folder / "run")
    with RunRecord(run, {"status": "running", "steps": None}) as record:
        assert run.read_facts()["status"] == "running"
        record.results = {"status": "finished", "steps": 3}
    assert run.read_facts() == {"status": "finished", "steps": 3}


@pytest.mark.parametrize(
    ("facts", "train", "evaluation", "refused"),
    [
        ({"data_hash": "a", "eval_hash": None}, "a", None, None),
        ({"data_hash": "a", "eval_hash": None}, "b", None, "data.train"),  # held-out rows are drawn from it
        ({"data_hash": "a", "eval_hash": "e"}, "b", "e", None),  # held-out rows have a file of their own
        ({"data_hash": "a", "eval_hash": "e"}, "a", "f", "data.eval"),
        ({"data_hash": "of both, as older versions wrote it"}, "a", "e", None),
        ({}, "a", None, None),
    ],
)
def test_held_out_rows_must_be_those_of_the_run(
    folder: Path, facts: dict[str, str | None], train: str, evaluation: str | None, refused: str | None
) -> None:
    run = make_run(folder, "run")
    run.write_facts(facts)
    if refused is None:
        run.check_data({"train": train, "eval": evaluation})
        return
    with pytest.raises(RunError, match=refused) as caught:
        run.check_data({"train": train, "eval": evaluation})
    assert caught.value.problems[0].code == "data-changed"


def test_the_base_must_be_that_of_the_run_where_the_run_knows_it(folder: Path) -> None:
    run = make_run(folder, "run")
    source = ModelSource("m", folder, {"vocab_size": 8}, seed=1)
    run.check_base(source)
    run.write_facts({"model_hash": source.hash_weights(), "adapter_hash": None})
    run.check_base(source)
    with pytest.raises(RunError, match=r"model\.name no longer holds"):
        run.check_base(replace(source, seed=2))
    adapter = folder / "adapter"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (adapter / name).write_text("x")
    with pytest.raises(RunError, match=r"model\.adapter no longer holds"):
        run.check_base(replace(source, adapter=adapter))
