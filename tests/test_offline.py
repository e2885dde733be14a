"""No script touches the network: every attempt of the interpreter to reach a host is recorded and refused."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
# Python reports these events from C, so it sees all clients: httpx, requests, urllib, asyncio, raw sockets.
SHIM = """
import os, sys, traceback

EVENTS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto")

def refuse(event, arguments):
    if event in EVENTS and not (event == "socket.connect" and isinstance(arguments[1], (str, bytes))):  # a pipe by name
        with open(os.environ["NETWORK_LOG"], "a") as file:
            file.write(f"{event} {arguments[-1] if event == 'socket.connect' else arguments}\\n")
            traceback.print_stack(file=file)
        raise OSError("this test has no network")

sys.addaudithook(refuse)
"""

# Importing the frameworks takes seconds, with the shim in front of them too: scripts can share a process, one after the other.
DRIVER = """
import json, runpy, sys
for command in json.loads(sys.argv[1]):
    sys.argv, code = command, 0
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as error:
        code = error.code or 0
    for stream in (sys.stdout, sys.stderr):
        print(f"<<exit {code}>>", file=stream, flush=True)
"""


@pytest.fixture
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose sitecustomize.py every Python process imports first."""
    folder = tmp_path_factory.mktemp("shim")
    (folder / "sitecustomize.py").write_text(SHIM, encoding="utf-8")
    return folder


def run_together(
    commands: Sequence[Sequence[object]], cwd: Path, environment: dict[str, str]
) -> list[tuple[int, str, str]]:
    """Runs scripts in one new process; exit code, stdout and stderr of each."""
    full = [[str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)] for name, *arguments in commands]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(full)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out, err = (re.split(r"<<exit (\d+)>>\n", stream) for stream in (done.stdout, done.stderr))
    return [(int(out[2 * number + 1]), out[2 * number], err[2 * number]) for number in range(len(full))]


def make_environment(shim: Path, **environment: str) -> dict[str, str]:
    """Variables that put the shim in front, and take back every offline switch but those given."""
    switches = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "0")
    return {
        **switches,
        "WANDB_MODE": "online",
        "PYTHONPATH": str(shim),
        "NETWORK_LOG": str(shim / "log.txt"),
        **environment,
    }


def run(shim: Path, cwd: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python process without a network, with no offline switch but those given."""
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env={**os.environ, **make_environment(shim, **environment)},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def take_log(shim: Path) -> str:
    """What was tried since the last look."""
    path = shim / "log.txt"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    path.unlink(missing_ok=True)
    return text


def write_recipe(folder: Path, model: str) -> Path:
    """Two steps on eight rows, everything measured."""
    rows = [
        {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": f"{i}"}]}
        for i in range(12)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": {"name": model, "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.5},
        "lora": {"r": 2},
        "training": {"method": "sft", "batch_size": 2, "max_steps": 2},
        "generation": {"max_new_tokens": 2},
        "evaluation": {"metrics": ["exact_match", "loss"], "samples": 1},
    }
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def put_into_hub_cache(model: Path, home: Path, *names: str) -> None:
    """The cache as a download of lab/tiny leaves it; without names, all files."""
    storage = home / "hub" / "models--lab--tiny"
    snapshot = storage / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    files = sorted(path for path in model.iterdir() if path.is_file())
    for path in files:
        if not names or path.name in names:
            shutil.copy(path, snapshot / path.name)
    listing = {path.name: {"size": path.stat().st_size, "blob_id": "0" * 40} for path in files}
    tree = json.dumps({"format_version": 1, "files": listing})
    for name, content in (("refs/main", COMMIT), (f"trees/{COMMIT}.json", tree)):
        (storage / name).parent.mkdir(exist_ok=True)
        (storage / name).write_text(content, encoding="utf-8")


def test_the_shim_refuses_and_records_what_it_is_there_for(shim: Path, tmp_path: Path) -> None:
    attempt = (
        "import socket\ntry:\n  socket.create_connection(('127.0.0.1', 9))\nexcept OSError as error:\n  print(error)"
    )
    done = run(shim, tmp_path, "-c", attempt)
    assert done.stdout == "this test has no network\n", done.stderr
    assert "'127.0.0.1', 9" in take_log(shim)
    hub = "from huggingface_hub import HfApi\ntry:\n  HfApi().model_info('a/b')\nexcept Exception as error:\n  print(error)"
    run(shim, tmp_path, "-c", hub)
    assert "socket.getaddrinfo ('huggingface.co'" in take_log(shim)


def test_an_uncached_model_is_an_error_within_two_seconds_that_says_how_to_get_it(shim: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "lab/absent")
    home = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run(shim, tmp_path, ROOT / "scripts" / "validate.py", "--recipe", recipe, **home)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (
        after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    )  # of the processor: others may keep it busy
    assert done.returncode == 4, done.stderr
    assert "lab/absent is not complete in the cache, and HF_HUB_OFFLINE is set" in done.stderr
    assert "hf download lab/absent" in done.stderr
    assert "embedded/" in done.stderr
    assert take_log(shim) == ""
    assert seconds < 2


def test_a_model_of_which_only_the_config_is_cached_is_not_taken_for_whole(
    shim: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    put_into_hub_cache(tiny_llama, tmp_path, "config.json", "tokenizer.json", "tokenizer_config.json")
    recipe = write_recipe(tmp_path, "lab/tiny")
    home = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = run(shim, tmp_path, ROOT / "scripts" / "train.py", "--recipe", recipe, **home)
    assert done.returncode == 4
    assert "is not complete in the cache" in done.stderr
    assert take_log(shim) == ""


@pytest.mark.slow
def test_no_script_tries_to_reach_a_host_when_the_model_is_here(shim: Path, tiny_llama: Path, tmp_path: Path) -> None:
    # peft#1452 and others: saving a checkpoint asked the hub about the base model, and offline runs crashed hours in.
    # No switch is set: with one the hub's library refuses by itself, and so every script has to know that it needs nothing.
    home = tmp_path / "home"
    put_into_hub_cache(tiny_llama, home)
    run_folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    recipe, of_folder = write_recipe(tmp_path, "lab/tiny"), write_recipe(other, str(tiny_llama))
    commands = (
        ("validate", "--recipe", recipe),
        ("train", "--recipe", recipe, "--run", run_folder),
        ("infer", "--run", run_folder, "--prompt", "Say 3"),
        ("merge", "--run", run_folder),
        ("evaluate_run", "--run", run_folder),
        ("reproduce", "--run", run_folder),
        ("validate", "--recipe", of_folder),
        ("train", "--recipe", of_folder, "--run", other / "run"),
        # TRL sends a message to the hub when a trainer is made, unless it is told not to.
        ("train", "--recipe", recipe, "--set", "training.engine=trl", "--run", tmp_path / "trl"),
    )
    done = run_together(commands, tmp_path, make_environment(shim, HF_HOME=str(home)))
    for (name, *_), (code, _, errors) in zip(commands, done, strict=True):
        assert code == 0, f"{name}: {errors}"
    assert take_log(shim) == ""


def test_the_embedded_model_needs_no_network_and_no_switch(shim: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, "embedded/smollm2-135m-instruct")
    home = str(tmp_path / "home")
    done = run(shim, tmp_path, ROOT / "scripts" / "validate.py", "--recipe", recipe, HF_HOME=home)
    assert done.returncode == 0, done.stderr
    assert take_log(shim) == ""
