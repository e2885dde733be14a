"""What tests share: the real embedded model, and tiny real models built in code."""

from __future__ import annotations

import json
import os
import shutil
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

from config.structured_config import ModelSection
from utils.logging import set_up_logging
from utils.model_source import ModelSource, find_model

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded/smollm2-135m-instruct"


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
    """A two-layer random Llama with the embedded model's tokenizer: seconds instead of minutes, nothing else differs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(embedded.folder / name, folder / name)
    return folder
