"""What tests share: the real embedded model, and tiny real models built in code."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

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


def wait_until(is_there: Callable[[], object], seconds: float = 120) -> None:
    """Waits for what another process does."""
    deadline = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class RunningScript:
    """A script that the server has started, and that is to be waited for before the next one."""

    def __init__(self, server: ScriptServer) -> None:
        self.server = server
        self.process_id = server.read_number()

    def read_output(self) -> str:
        """What it has written so far."""
        return self.server.streams["stdout"].read_text(encoding="utf-8")

    def send_signal(self, number: int) -> None:
        """Sends a signal to the script's own process."""
        os.kill(self.process_id, number)

    def wait(self) -> Finished:
        """Waits for its end."""
        code = self.server.read_number()
        return Finished(code, *(self.server.streams[name].read_text(encoding="utf-8") for name in ("stdout", "stderr")))


class ScriptServer:
    """Runs scripts one after the other, each in a process of its own that need not import the frameworks (script_server.py)."""

    def __init__(self, folder: Path) -> None:
        self.streams = {name: folder / name for name in ("stdin", "stdout", "stderr")}
        command = [sys.executable, str(ROOT / "tests" / "script_server.py")]
        self.process = subprocess.Popen(command, cwd=folder, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def read_number(self) -> int:
        """The server's next line."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def start(
        self,
        name: str,
        *arguments: object,
        cwd: Path,
        stdin: str = "",
        limits: dict[str, Any] | None = None,
        **environment: str | None,
    ) -> RunningScript:
        """Starts a script as a user would, from `cwd`: one of scripts/, or a module by its full name.

        Args:
            limits: as in script_server.py.
            environment: variables; None unsets one.
        """
        for stream, path in self.streams.items():
            path.write_text(stdin if stream == "stdin" else "", encoding="utf-8")
        request = {
            "name": name,
            "arguments": [str(each) for each in arguments],
            "cwd": str(cwd),
            "limits": limits or {},
        }
        request |= {"environment": environment, **{stream: str(path) for stream, path in self.streams.items()}}
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return RunningScript(self)

    def run(self, name: str, *arguments: object, **options: Any) -> Finished:
        """Starts a script and waits for its end."""
        return self.start(name, *arguments, **options).wait()


@pytest.fixture(scope="session", autouse=True)
def latest_run_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test makes a run of its own the one that scripts here take when none is named."""
    yield
    pointer = ROOT / "outputs" / "latest"
    if pointer.is_file():
        assert not pointer.read_text(encoding="utf-8").startswith(str(tmp_path_factory.getbasetemp()))


@pytest.fixture(scope="session")
def script_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptServer]:
    """One for all tests of this worker."""
    server = ScriptServer(tmp_path_factory.mktemp("script_server"))
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=60) == 0


RunScript = Callable[..., Finished]


@pytest.fixture(scope="session")
def run_script(script_server: ScriptServer) -> RunScript:
    """`run_script("train", "--recipe", path, cwd=folder)`, and environment variables as further keywords."""
    return script_server.run


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
