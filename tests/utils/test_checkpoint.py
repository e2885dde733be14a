"""A checkpoint is whole or absent, whatever happens while it is written."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from utils.checkpoint import STATE, rotate_checkpoints, save_checkpoint, write_folder_atomically
from utils.exceptions import RunError

ROOT = Path(__file__).resolve().parents[2]


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


def test_a_checkpoint_holds_weights_and_state(tmp_path: Path) -> None:
    state = {"step": 20, "eval_loss": 0.5, "best_step": None}
    folder = save_checkpoint(tmp_path, 20, save_weights, state)
    assert folder == tmp_path / "checkpoints" / "step-20"
    assert load_file(folder / "model.safetensors")["a"].tolist() == [0, 1, 2, 3]
    assert json.loads((folder / STATE).read_text()) == state


def make_checkpoints(run: Path, *steps: int) -> None:
    for step in steps:
        save_checkpoint(run, step, save_weights, {"step": step})


def list_steps(run: Path) -> set[int]:
    return {int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir()}


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
