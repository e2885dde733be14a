"""What tests share: the real embedded model, and tiny real models built in code."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Tests run side by side: with several threads each, tiny models mostly wait for each other, at three times the processor time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TUNEBOOK_THREADS", "1")  # which also spares each model the measurement that would choose them

from benchmarks.tiny_models import save_llama, shorten_tokenizer
from config.structured_config import ModelSection
from utils.logging import set_up_logging
from utils.model_source import ModelSource, find_model

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded/smollm2-135m-instruct"
TINY_VOCABULARY = 2048


class Finished(NamedTuple):
    """What a script left."""

    returncode: int
    stdout: str
    stderr: str


RunScript = Callable[..., Finished]


class ScriptServer:
    """Runs scripts one after the other, each in a process of its own that need not import the frameworks (script_server.py)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        command = [sys.executable, str(ROOT / "tests" / "script_server.py")]
        self.process = subprocess.Popen(command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, name: str, *arguments: object, cwd: Path, stdin: str = "", **environment: str) -> Finished:
        """Runs `scripts/<name>.py` as a user would, from `cwd`."""
        paths = {stream: self.folder / stream for stream in ("stdin", "stdout", "stderr")}
        for stream, path in paths.items():
            path.write_text(stdin if stream == "stdin" else "", encoding="utf-8")
        request = {"name": name, "arguments": [str(each) for each in arguments], "cwd": str(cwd)}
        request |= {"environment": environment, **{stream: str(path) for stream, path in paths.items()}}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Finished(code, *(paths[stream].read_text(encoding="utf-8") for stream in ("stdout", "stderr")))


@pytest.fixture(scope="session")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunScript]:
    """`run_script("train", "--recipe", path, cwd=folder)`, and environment variables as further keywords."""
    server = ScriptServer(tmp_path_factory.mktemp("script_server"))
    yield server.run
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=60) == 0


def pytest_collection_finish() -> None:
    """Leaves what was imported out of all garbage collections: of the frameworks' objects each would cost half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Silences libraries as every script does."""
    set_up_logging("WARNING")


@pytest.fixture(scope="session")
def embedded() -> ModelSource:
    """The embedded model, converted on first use."""
    return find_model(ModelSection(name=EMBEDDED), "test", with_weights=True)


@pytest.fixture(scope="session")
def tiny_llama(embedded: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer random Llama with the embedded model's template and its first tokens: seconds instead of minutes."""
    folder = tmp_path_factory.mktemp("tiny_llama")
    shorten_tokenizer(embedded.folder, folder, TINY_VOCABULARY)
    save_llama(folder, TINY_VOCABULARY, 64)
    return folder
