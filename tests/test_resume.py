"""A run that is killed, stopped or out of disk space goes on, and ends with the bytes of one that never stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from benchmarks.tiny_models import build_tiny_model
from benchmarks.tiny_runs import count_different_bytes, read_metrics, write_tiny_recipe
from tests.conftest import ScriptServer

pytestmark = pytest.mark.slow


class Done(NamedTuple):
    """How a run ended, and what it said."""

    code: int
    text: str


class Runs:
    """Trains a tiny model in forked processes."""

    def __init__(self, folder: Path, server: ScriptServer) -> None:
        self.folder, self.server = folder, server
        self.model = build_tiny_model(folder / "model")

    def write(self, name: str, changes: dict[str, Any] | None = None) -> Path:
        """A recipe in a folder of its own."""
        return write_tiny_recipe(self.folder / name, self.model, changes)

    def train(self, *arguments: object, chooses_threads: bool = False, **limits: Any) -> Done:
        """Runs train.py; `moment` says when a signal ends it, `size` how large a file may become."""
        environment = {"TUNEBOOK_THREADS": None} if chooses_threads else {}
        done = self.server.run("train", *arguments, cwd=self.folder, limits=limits, **environment)
        text = done.stdout + done.stderr
        assert "Traceback" not in text, text
        return Done(done.returncode, text)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, script_server: ScriptServer) -> Runs:
    """The folder of all runs."""
    return Runs(tmp_path_factory.mktemp("runs"), script_server)


def on_disk(number: int, run: Path, *signals: int) -> dict[str, Any]:
    """The n-th time that a process changes the run folder."""
    return {"number": number, "folder": str(run), "signals": signals or (signal.SIGKILL,)}


def at_call(function: str, number: int, *signals: int) -> dict[str, Any]:
    """The n-th time that a process calls a function."""
    return {"number": number, "function": function, "signals": signals or (signal.SIGKILL,)}


def find_differences(first: Path, second: Path) -> tuple[int, bool, set[str]]:
    """Different bytes of the weights, whether the metrics differ, and the results that do."""
    one, other = (json.loads((run / "run.json").read_text(encoding="utf-8")) for run in (first, second))
    keys = ("status", "steps", "tokens", "supervised_tokens", "train_loss", "eval_loss", "best_step", "stop_reason")
    return (
        count_different_bytes(first, second),
        read_metrics(first) != read_metrics(second),
        {key for key in keys if one[key] != other[key]},
    )


SAME = (0, False, set())
# Everything that a step's rounding may hang on: number format, what is trained, pairs, packing, random numbers, optimizers.
EARLY = {"training.early_stopping_patience": 2, "training.early_stopping_threshold": 9.0}
PACKED = {"training.packing": True, "training.micro_batch_size": "auto"}
CASES = {
    "bfloat16 adapters on two workers, stopping early": {"model.dtype": "bfloat16", **EARLY},
    "all weights, packed rows, adafactor": {"lora": None, "training.optimizer": "adafactor", **PACKED},
    "preference pairs under pissa": {"data.train": "pairs", "training.method": "dpo", "lora.variant": "pissa"},
    "dropout and noise": {"lora.dropout": 0.2, "training.neftune_alpha": 5.0},
}


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_ends_with_the_bytes_of_one_that_never_stopped(runs: Runs, name: str) -> None:
    recipe = runs.write(name, CASES[name])
    whole, killed = recipe.parent / "whole", recipe.parent / "killed"
    options = {"one_core": name == "dropout and noise", "chooses_threads": "packed" in name}
    assert runs.train("--recipe", recipe, "--run", whole, **options).code == 0
    # In the accumulation of a step, with micro-batches before it; then in a save behind an evaluation.
    assert runs.train("--recipe", recipe, "--run", killed, moment=at_call("compute", 8), **options).code == -9
    assert runs.train("--resume", killed, moment=on_disk(40, killed), **options).code == -9
    done = runs.train("--resume", killed, **options)
    assert done.code == 0, done.text
    assert find_differences(whole, killed) == SAME
    facts = json.loads((killed / "run.json").read_text(encoding="utf-8"))
    assert facts["resumes"] == 2
    assert not [path for path in killed.rglob(".*") if path.name != ".lock"]


@pytest.fixture(scope="module")
def whole(runs: Runs) -> Path:
    """A run of the plain recipe that never stopped."""
    recipe = runs.write("plain")
    assert runs.train("--recipe", recipe, "--run", recipe.parent / "run").code == 0
    return recipe.parent / "run"


@pytest.mark.parametrize("function", ["_accumulate", "evaluate", "save_weights"])
def test_a_signal_saves_at_once_and_the_run_goes_on_as_if_it_had_never_stopped(
    runs: Runs, whole: Path, function: str
) -> None:
    run = runs.folder / f"signal_{function}"
    number = {"_accumulate": signal.SIGUSR1, "evaluate": signal.SIGTERM, "save_weights": signal.SIGINT}[function]
    done = runs.train(*("--recipe", whole.parent / "tiny.yaml", "--run", run), moment=at_call(function, 2, int(number)))
    assert done.code == 128 + number, done.text
    assert f"python scripts/train.py --resume {run}" in done.text
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert facts["status"] == "stopped"
    assert (run / "adapter" / "adapter_model.safetensors").is_file()
    assert (run / "checkpoints" / f"step-{facts['steps']}").is_dir()
    if function == "evaluate":
        assert "will be measured when the run goes on" in done.text
        assert [row for row in read_metrics(run) if row["step"] == facts["steps"] and "eval_loss" in row] == []
    assert runs.train("--resume", run).code == 0
    assert find_differences(whole, run) == SAME


def test_a_second_signal_stops_at_once_and_leaves_the_last_checkpoint(runs: Runs, whole: Path) -> None:
    run = runs.folder / "twice"
    moment = at_call("_accumulate", 4, signal.SIGINT, signal.SIGTERM)
    done = runs.train("--recipe", whole.parent / "tiny.yaml", "--run", run, moment=moment)
    assert done.code == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM." in done.text
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "stopped"
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8") == "step-3\n"


@pytest.fixture(scope="module")
def stopped(runs: Runs, whole: Path) -> Path:
    """A run that was killed after four steps."""
    run = runs.folder / "stopped"
    moment = at_call("_accumulate", 5)
    assert runs.train("--recipe", whole.parent / "tiny.yaml", "--run", run, moment=moment).code == -9
    return run


def test_a_run_that_is_killed_at_one_moment_after_the_other_of_its_saves_loses_nothing(
    runs: Runs, whole: Path, stopped: Path
) -> None:
    # Every moment of a save is tried in tests/utils/test_checkpoint.py; here a whole run goes through some of them.
    run = runs.folder / "chain"
    shutil.copytree(stopped, run)
    for moment in range(9, 60, 12):
        assert runs.train("--resume", run, moment=on_disk(moment, run)).code == -9, moment
    assert runs.train("--resume", run).code == 0
    assert find_differences(whole, run) == SAME


def test_what_a_run_began_with_must_not_change(runs: Runs, whole: Path, stopped: Path) -> None:
    recipe, folder = whole.parent / "tiny.yaml", whole.parent
    done = runs.train(
        "--resume", stopped, "--recipe", recipe, "--set", "training.learning_rate=0.002", "--set", "seed=1"
    )
    assert done.code == 5
    assert "training.learning_rate: 0.01 in the run, 0.002 now" in done.text
    assert "seed: 42 in the run, 1 now" in done.text

    own = stopped / "recipe.yaml"
    kept = own.read_text(encoding="utf-8")
    own.write_text(kept.replace("max_steps: 8", "max_steps: 80"), encoding="utf-8")
    done = runs.train("--resume", stopped)
    assert done.code == 5
    assert "training.max_steps: 8 in the run, 80 now" in done.text
    assert f"{own}:" in done.text
    own.write_text(kept, encoding="utf-8")

    rows = folder / "rows.jsonl"
    kept = rows.read_text(encoding="utf-8")
    rows.write_text(kept.replace("Say 3", "Sag 3"), encoding="utf-8")
    done = runs.train("--resume", stopped)
    assert done.code == 5
    assert f"{rows} has changed since the run began" in done.text
    rows.write_text(kept, encoding="utf-8")

    template = runs.model / "chat_template.jinja"
    kept = template.read_text(encoding="utf-8")
    template.write_text(kept.replace("<|{{ m.role }}|>", "<|{{ m.role }}|> "), encoding="utf-8")
    done = runs.train("--resume", stopped)
    template.write_text(kept, encoding="utf-8")
    assert done.code == 5
    assert "the template has changed since the run began" in done.text
    assert "\n+{% for m in messages %}<|{{ m.role }}|> " in done.text
    assert "Loading" not in done.text


def test_a_finished_run_and_one_that_is_no_run_are_refused(runs: Runs, whole: Path) -> None:
    done = runs.train("--resume", whole)
    assert (done.code, "this run is finished" in done.text) == (5, True)
    assert "scripts/evaluate_run.py" in done.text
    done = runs.train("--resume", runs.folder / "nowhere")
    assert (done.code, "this is not a run folder" in done.text) == (5, True)


def test_a_signal_while_a_checkpoint_is_loaded_leaves_the_run_as_it_was(runs: Runs, whole: Path, stopped: Path) -> None:
    # The exception of the signal was replaced, deep in a library, by one that said that the checkpoint does not fit: exit 5.
    run = runs.folder / "loading"
    shutil.copytree(stopped, run)
    done = runs.train("--resume", run, moment=at_call("load_optimizer", 1, signal.SIGTERM))
    assert done.code == 143, done.text
    assert (run / "checkpoints" / "latest").read_text(encoding="utf-8") == "step-4\n"
    assert runs.train("--resume", run).code == 0
    assert find_differences(whole, run) == SAME


def test_a_second_process_on_one_run_folder_is_refused(runs: Runs, stopped: Path) -> None:
    from utils.run_lock import hold_run

    with hold_run(stopped):
        done = runs.train("--resume", stopped)
    assert done.code == 5
    assert f"process {os.getpid()} is training in this run folder" in done.text


def test_a_broken_checkpoint_is_set_aside_and_the_one_before_it_is_used(runs: Runs, whole: Path, stopped: Path) -> None:
    run = runs.folder / "broken"
    shutil.copytree(stopped, run)
    path = run / "checkpoints" / "step-4" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-7] ^= 1  # one bit of a moment
    path.write_bytes(content)
    done = runs.train("--resume", run)
    assert done.code == 0, done.text
    assert "step-4 is broken: optimizer.safetensors is not what was written" in done.text
    assert "Going on after step 3 of 8" in done.text
    assert (run / "checkpoints" / "step-4.broken" / "optimizer.safetensors").read_bytes() == content
    assert find_differences(whole, run) == SAME


def test_without_a_whole_checkpoint_the_run_is_refused_however_often_it_is_asked(runs: Runs, stopped: Path) -> None:
    run = runs.folder / "hopeless"
    shutil.copytree(stopped, run)
    for path in (run / "checkpoints").glob("step-*"):
        (path / "state.json").unlink()
    for _ in range(2):
        done = runs.train("--resume", run)
        assert (done.code, "no checkpoint of this run is whole" in done.text) == (5, True)


def test_other_versions_and_code_are_said_and_the_run_goes_on(runs: Runs, stopped: Path) -> None:
    run = runs.folder / "elsewhere"
    shutil.copytree(stopped, run)
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    facts["versions"]["torch"], facts["code_hash"], facts["cores"] = "2.0.0", "other", 64
    (run / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    done = runs.train("--resume", run)
    assert done.code == 0, done.text
    assert "the project's code; cores 64 → " in done.text
    assert "torch 2.0.0 → " in done.text
    assert "perhaps not bit for bit" in done.text


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": None},
        {"sources": {"train": [["rows.jsonl", 3]], "eval": None}},
        {"sources": {"train": None}},
        {"template_hash": 7},
        {"resumes": "often"},
        {"threads": 0},
    ],
)
def test_a_run_json_that_is_damaged_is_refused(runs: Runs, stopped: Path, changes: dict[str, Any]) -> None:
    path = stopped / "run.json"
    kept = path.read_text(encoding="utf-8")
    path.write_text(json.dumps({**json.loads(kept), **changes}), encoding="utf-8")
    done = runs.train("--resume", stopped, chooses_threads=True)
    path.write_text(kept, encoding="utf-8")
    assert done.code in (2, 4, 5), done.text
    assert "error: " in done.text


def test_a_file_that_may_grow_no_further_ends_a_run_with_its_last_checkpoint_whole(runs: Runs, whole: Path) -> None:
    # The size limit of a quota: safetensors, tokenizers and Python each report it in their own way.
    run = runs.folder / "quota"
    done = runs.train("--recipe", whole.parent / "tiny.yaml", "--run", run, size=16_000)
    assert done.code == 5, done.text
    assert "File too large" in done.text
    assert f"--resume {run}" in done.text
    assert json.loads((run / "run.json").read_text(encoding="utf-8"))["status"] == "failed"
    assert list((run / "checkpoints").iterdir()) == []
    assert runs.train("--resume", run).code == 0
    assert find_differences(whole, run) == SAME


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of half a megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=500k,mode=777", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_ends_a_run_with_its_last_checkpoint_whole_and_it_goes_on_later(
    runs: Runs, whole: Path, small_disk: Path
) -> None:
    run, ballast = small_disk / "run", small_disk / "ballast"
    recipe = whole.parent / "tiny.yaml"
    assert runs.train("--recipe", recipe, "--run", run, moment=at_call("_accumulate", 4)).code == -9
    for left in (0, 20_000, 45_000):  # full before a byte, in the weights, in the optimizer or the tokenizer
        fill(ballast, left)
        done = runs.train("--resume", run)
        assert done.code == 5, done.text
        assert "No space left on device" in done.text
        ballast.unlink()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step-2", "step-3"]
    assert runs.train("--resume", run).code == 0
    assert find_differences(whole, run) == SAME


def fill(ballast: Path, left: int) -> None:
    """Fills a disk up to some bytes."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            file.truncate(max(0, file.tell() - left))


def test_a_folder_that_may_not_be_written_is_said_at_once(runs: Runs, stopped: Path, small_disk: Path) -> None:
    done = runs.train("--recipe", stopped.parent / "plain" / "tiny.yaml", "--run", "/proc/run")
    assert (done.code, "the run folder cannot be created" in done.text) == (5, True)
    run = small_disk / "run"
    shutil.copytree(stopped, run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = runs.train("--resume", run)
    assert (done.code, "cannot be written: Read-only file system" in done.text) == (5, True)
    done = runs.train("--resume", stopped, user=65534)  # the test's own folder is closed to others
    assert (done.code, "cannot be read: Permission denied" in done.text) == (5, True)
