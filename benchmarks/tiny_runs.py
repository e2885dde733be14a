"""Real runs of a tiny model in forked processes, ended at chosen moments: torch is imported once, a run takes about a second.

Used by `benchmarks/soak.py` and by the tests.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.tiny_models import build_tiny_model
from scripts import train
from utils import cli

TIMINGS = ("tokens_per_second",)
DISK_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Moment:
    """When a process gets a signal: at its n-th change of the disk below `folder`, or at its n-th call of `function`."""

    number: int
    folder: str | None = None
    function: str | None = None
    signals: tuple[int, ...] = (signal.SIGKILL,)

    def arm(self) -> None:
        """Makes this process send itself the signals then; nothing else about it changes."""
        left = [self.number]

        def count() -> None:
            left[0] -= 1
            if left[0] == 0:
                for each in self.signals:
                    os.kill(os.getpid(), each)

        if self.folder is not None:
            watch_disk(self.folder, count)
        if self.function is not None:
            watch_calls(self.function, count)


def watch_disk(folder: str, count: Callable[[], None]) -> None:
    """Calls `count` before every file that is opened to be written, flush, rename and removal below a folder."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+")
        # A tree is removed name by name, relative to its folders, which are open.
        is_in_tree = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if is_in_tree or ((writes or event in DISK_CHANGES) and folder in str(arguments[0])):
            count()

    flush = os.fsync

    def fsync(fd: Any) -> None:  # the one change that is no audit event
        count()
        flush(fd)

    os.fsync = fsync
    sys.addaudithook(watch)


def watch_calls(function: str, count: Callable[[], None]) -> None:
    """Calls `count` before every call of a Python function of that name, in any thread."""

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_name == function:
            count()

    threading.setprofile(watch)
    sys.setprofile(watch)


def write_tiny_recipe(folder: Path, model: Path, changes: dict[str, Any] | None = None) -> Path:
    """A recipe of 8 steps over two epochs with its rows.

    Args:
        changes: of dotted keys; None leaves a section out, and `pairs` as `data.train` names the pairs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Say {n}", "completion": str(n) * (1 + n % 5)} for n in range(18)]
    pairs = [{"prompt": f"Say {n}", "chosen": str(n) * (1 + n % 5), "rejected": "no" * (1 + n % 3)} for n in range(18)]
    for name, content in (("rows", rows), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe: dict[str, Any] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": "rows", "eval_fraction": 0.2, "max_length": 64},
        "lora": {"r": 2, "alpha": 4},
        "training": {
            "method": "sft",
            "batch_size": 4,
            "micro_batch_size": 2,
            "learning_rate": 1e-2,
            "max_steps": 8,
            "eval_every": 2,
            "save_every": 1,
            "keep_checkpoints": 2,
            "small_data": "off",
        },
    }
    for key, value in (changes or {}).items():
        section, _, name = key.partition(".")
        if value is None:
            del recipe[section]
        elif name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    recipe["data"]["train"] = str(folder / f"{recipe['data']['train']}.jsonl")
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def warm_up(folder: Path) -> Path:
    """Imports what a run imports, and builds the tiny model, so that forked processes need not; no thread is left behind.

    Returns:
        The model's folder.
    """
    import matplotlib.pyplot as plt
    import torch

    import utils.preview
    import utils.session
    import utils.training_run
    from utils.backends import load_backend

    assert plt, (utils.preview, utils.session, utils.training_run)  # they are imported for the processes to come
    load_backend("torch")
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # threads of OpenMP do not survive a fork
    model = build_tiny_model(folder / "model")
    AutoModelForCausalLM.from_pretrained(model)
    return model


def fork(work: Callable[[], int | None], log: Path) -> int:
    """Runs work in a forked process as a script of its own; its output goes into a log.

    Returns:
        The number of the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(target, 1)
        os.dup2(target, 2)
        cli.run(lambda arguments: work())
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a process, or minus the number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def start_training(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """`python scripts/train.py …` in a forked process.

    Args:
        before: is called in it first.

    Returns:
        The number of the process.
    """

    def work() -> int:
        if before:
            before()
        return train.main(arguments)

    return fork(work, log)


def read_weights(run: Path) -> dict[str, npt.NDArray[Any]]:
    """What a finished run has published."""
    from safetensors.numpy import load_file

    (path,) = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    found: dict[str, npt.NDArray[Any]] = load_file(path)
    return found


def count_different_bytes(first: Path, second: Path) -> int:
    """Bytes of published weights that differ between two runs."""
    one, other = read_weights(first), read_weights(second)
    if one.keys() != other.keys():
        return sum(each.nbytes for each in one.values())
    return sum(int((one[name].view(np.uint8) != other[name].view(np.uint8)).sum()) for name in one)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without timings."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]
