"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from utils.atomic_files import remove_unfinished, write_folder_atomically
from utils.checkpoint import (
    LATEST,
    MANIFEST,
    OPTIMIZER,
    STATE,
    find_checkpoint,
    find_damage,
    list_checkpoints,
    rotate_checkpoints,
    save_checkpoint,
    write_manifest,
)
from utils.exceptions import RunError
from utils.logging import get_logger
from utils.training_state import TrainingState

ROOT = Path(__file__).resolve().parents[2]
MADE_WITH = {"recipe_hash": "a"}


def save_weights(folder: Path) -> None:
    save_file({"a": np.arange(4, dtype=np.float32)}, folder / "model.safetensors")


def write_text(text: str) -> Callable[[Path], None]:
    """A writer that fills a folder with one file and a nested one."""

    def write(folder: Path) -> None:
        (folder / "nested").mkdir()
        (folder / "file.txt").write_text(text)
        (folder / "nested" / "file.txt").write_text(text)

    return write


def read(folder: Path) -> list[str]:
    return [(folder / "file.txt").read_text(), (folder / "nested" / "file.txt").read_text()]


def test_a_folder_is_filled_and_nothing_else_is_left(tmp_path: Path) -> None:
    write_folder_atomically(tmp_path / "deep" / "adapter", write_text("new"))
    assert read(tmp_path / "deep" / "adapter") == ["new", "new"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["adapter"]


def test_a_folder_that_exists_is_refused_and_untouched(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    write_folder_atomically(folder, write_text("old"))
    with pytest.raises(RunError, match="exists already"):
        write_folder_atomically(folder, write_text("new"))
    assert read(folder) == ["old", "old"]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_folder_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"

    def look_while_writing(temporary: Path) -> None:
        write_text("new")(temporary)
        assert not folder.exists()
        assert temporary.parent == folder.parent  # the same file system, or the rename would copy

    write_folder_atomically(folder, look_while_writing)
    assert folder.is_dir()


# safetensors reports a full disk as SafetensorError, which is no OSError: its half-written folder stayed behind.
@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("x"), KeyboardInterrupt()])
def test_a_writer_that_fails_leaves_nothing_behind(tmp_path: Path, failure: BaseException) -> None:
    def fail(temporary: Path) -> None:
        write_text("half")(temporary)
        raise failure

    with pytest.raises((RunError, RuntimeError, KeyboardInterrupt)):
        write_folder_atomically(tmp_path / "adapter", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_run_error_with_the_folder(tmp_path: Path) -> None:
    def fail(temporary: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match="No space left on device") as caught:
        write_folder_atomically(tmp_path / "adapter", fail)
    assert caught.value.problems[0].where == str(tmp_path / "adapter")
    assert caught.value.exit_code == 5


def test_weights_that_safetensors_cannot_write_are_a_run_error(tmp_path: Path) -> None:
    # It raises SafetensorError, which is no OSError, so users got a traceback and exit code 1 for a full disk.
    def fail(temporary: Path) -> None:
        save_weights(temporary / "no-such-folder")

    with pytest.raises(RunError):
        write_folder_atomically(tmp_path / "adapter", fail)


def test_a_parent_that_is_a_file_is_a_run_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError) as caught:
        write_folder_atomically(tmp_path / "file" / "adapter", write_text("new"))
    assert caught.value.problems[0].code == "disk"
    assert (tmp_path / "file").read_text() == "x"


KILLED = """
import os, sys
from pathlib import Path
from utils.atomic_files import write_folder_atomically

def write(folder):
    (folder / "nested").mkdir()
    (folder / "file.txt").write_text("new")
    (folder / "nested" / "file.txt").write_text("new")

folder, last = Path(sys.argv[1]), int(sys.argv[2])
seen = 0
def kill(event, arguments):
    global seen
    if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "open", "shutil.rmtree"):
        seen += 1
        if seen == last:
            os._exit(9)
sys.addaudithook(kill)
write_folder_atomically(folder, write)
"""


def test_a_kill_at_any_moment_leaves_the_whole_folder_or_none(tmp_path: Path) -> None:
    found = []
    for moment in range(1, 60):
        folder = tmp_path / str(moment) / "adapter"
        arguments = [sys.executable, "-c", KILLED, str(folder), str(moment)]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode in (0, 9), done.stderr
        found.append(read(folder) if folder.exists() else [])
        if done.returncode == 0:
            break
    assert found[0] == []
    assert found[-1] == ["new", "new"]
    assert len(found) > 5
    assert [state for state in found if state not in ([], ["new", "new"])] == []


def save_files(folder: Path) -> None:
    save_weights(folder)
    save_file({"exp_avg:a": np.arange(4, dtype=np.float32)}, folder / OPTIMIZER)


def describe(step: int, best_step: int | None = None) -> dict[str, Any]:
    """A state.json of a run that is known by one hash."""
    return {"training": TrainingState(step=step, best_step=best_step).to_json(), "made_with": MADE_WITH}


def save(run: Path, step: int, best_step: int | None = None) -> Path:
    return save_checkpoint(run, step, save_files, describe(step, best_step))


def test_a_checkpoint_holds_its_files_their_hashes_and_a_pointer_to_it(tmp_path: Path) -> None:
    folder = save(tmp_path, 20, 20)
    assert folder == tmp_path / "checkpoints" / "step-20"
    assert load_file(folder / "model.safetensors")["a"].tolist() == [0, 1, 2, 3]
    assert json.loads((folder / STATE).read_text()) == describe(20, 20)
    assert {*json.loads((folder / MANIFEST).read_text())["files"]} == {"model.safetensors", OPTIMIZER, STATE}
    assert (folder.parent / LATEST).read_text() == "step-20\n"
    assert find_damage(folder) is None
    found = find_checkpoint(tmp_path, MADE_WITH)
    assert found is not None
    assert (found.folder, found.step, found.best) == (folder, 20, folder)


SAVING = """
import os, signal, sys
from pathlib import Path
from utils.checkpoint import rotate_checkpoints
from tests.utils.test_checkpoint import save
from benchmarks.tiny_runs import Moment

run = Path(sys.argv[1])
for moment in range(1, 200):
    child = os.fork()
    if not child:
        folder = run / str(moment)
        save(folder, 1), save(folder, 2)
        Moment(moment, folder=str(folder)).arm()
        save(folder, 3)
        rotate_checkpoints(folder, 1, None)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
print(moment)
"""


def test_a_kill_at_any_moment_of_a_save_leaves_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", SAVING, str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    moments = int(done.stdout)
    found = []
    for moment in range(1, moments + 1):
        run = tmp_path / str(moment)
        for folder in (run, run / "checkpoints"):
            remove_unfinished(folder)
        checkpoint = find_checkpoint(run, MADE_WITH)
        assert checkpoint is not None
        found.append((checkpoint.step, len(list_checkpoints(run))))
        assert {path.name for path in (run / "checkpoints").iterdir()} <= {LATEST, "step-1", "step-2", "step-3"}
    assert moments > 20
    assert found == sorted(found, key=lambda each: (each[0], -each[1]))
    assert {*found} == {(2, 2), (3, 3), (3, 2), (3, 1)}


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing or damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {"model.safetensors": 3}}'), "is missing or damaged"),
        (lambda folder: (folder / MANIFEST).write_text('{"files": {}}'), "does not name state.json"),
        (lambda folder: (folder / OPTIMIZER).unlink(), "optimizer.safetensors is missing"),
        (lambda folder: os.truncate(folder / "model.safetensors", 50), "model.safetensors has 50 bytes instead of"),
        (lambda folder: flip_bit(folder / "model.safetensors"), "model.safetensors is not what was written"),
        (lambda folder: flip_bit(folder / STATE), "state.json is not what was written"),
        (lambda folder: replace_by_link(folder / "model.safetensors"), "model.safetensors is missing"),
        (lambda folder: rewrite(folder, {"step": 2}), "it does not describe a training run"),
        (lambda folder: rewrite(folder, {"training": {"step": 3}, "made_with": MADE_WITH}), "is that of step 3"),
        (lambda folder: rewrite(folder, {"training": {"step": "2"}, "made_with": MADE_WITH}), "state.json is damaged"),
        (lambda folder: rewrite(folder, {**describe(2), "made_with": {"recipe_hash": "b"}}), "belongs to another run"),
    ],
)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_found(
    tmp_path: Path, damage: Callable[[Path], object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    damage(save(tmp_path, 2))
    with capture_log(caplog):
        found = find_checkpoint(tmp_path, MADE_WITH)
    assert found is not None
    assert found.step == 1
    assert said in caplog.text
    assert list_steps(tmp_path) == {1}
    assert (tmp_path / "checkpoints" / "step-2.broken").is_dir()


@contextmanager
def capture_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Our logger hands nothing on to the root, where pytest listens."""
    logger = get_logger()
    logger.addHandler(caplog.handler)
    yield
    logger.removeHandler(caplog.handler)


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace_by_link(path: Path) -> None:
    """A file that lies elsewhere may change behind the manifest's back."""
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def rewrite(folder: Path, state: dict[str, Any]) -> None:
    """Another state.json with a manifest that fits it."""
    (folder / STATE).write_text(json.dumps(state))
    (folder / MANIFEST).unlink()
    write_manifest(folder)


def test_a_checkpoint_whose_best_weights_are_broken_is_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 1, 1)
    flip_bit(save(tmp_path, 2, 2) / "model.safetensors")
    save(tmp_path, 3, 2)
    found = find_checkpoint(tmp_path, MADE_WITH)
    assert found is not None
    assert (found.step, found.training.best_step) == (1, 1)
    assert list_steps(tmp_path) == {1}  # later ones would be the newest for the rotation


def test_the_best_is_looked_for_anew_where_its_weights_are_lost_for_good(tmp_path: Path) -> None:
    flip_bit(save(tmp_path, 2, 2) / "model.safetensors")
    save(tmp_path, 3, 2)
    found = find_checkpoint(tmp_path, MADE_WITH)
    assert found is not None
    assert (found.step, found.training.best_step, found.training.best_loss) == (3, None, math.inf)


def test_a_run_without_a_checkpoint_begins_anew_and_one_that_lost_them_is_refused(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, MADE_WITH) is None
    flip_bit(save(tmp_path, 1) / STATE)
    for _ in range(2):
        with pytest.raises(RunError, match="no checkpoint of this run is whole"):
            find_checkpoint(tmp_path, MADE_WITH)


def make_checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        save(run, step)


def list_steps(run: Path) -> set[int]:
    return {int(folder.name.removeprefix("step-")) for folder in list_checkpoints(run)}


def test_rotation_keeps_the_newest_by_number_and_not_by_name(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 8, 9, 10, 100)
    rotate_checkpoints(tmp_path, 2, None)
    assert list_steps(tmp_path) == {10, 100}


def test_rotation_keeps_the_best(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 1, 10, 20, 30)
    rotate_checkpoints(tmp_path, 1, 10)
    assert list_steps(tmp_path) == {10, 30}


def test_rotation_of_few_checkpoints_removes_none(tmp_path: Path) -> None:
    make_checkpoints(tmp_path, 1, 2)
    rotate_checkpoints(tmp_path, 3, None)
    rotate_checkpoints(tmp_path, 2, 2)
    assert list_steps(tmp_path) == {1, 2}
