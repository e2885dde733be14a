"""What tests share: the real embedded model, and tiny real models built in code."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from config.structured_config import ModelSection
from utils.logging import set_up_logging
from utils.model_source import ModelSource, find_model

ROOT = Path(__file__).resolve().parent.parent
EMBEDDED = "embedded/smollm2-135m-instruct"


# Importing the frameworks takes seconds. Scripts that come one after the other can share a process, and are still themselves.
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


class Finished(NamedTuple):
    """What one script of several left."""

    returncode: int
    stdout: str
    stderr: str


RunTogether = Callable[..., list[Finished]]


@pytest.fixture(scope="session")
def run_together() -> RunTogether:
    """Runs scripts one after the other in one new process: `run_together([("train", "--recipe", path), …], cwd)`."""

    def run(
        commands: Sequence[Sequence[object]], cwd: Path, environment: dict[str, str] | None = None
    ) -> list[Finished]:
        full = [[str(ROOT / "scripts" / f"{name}.py"), *map(str, arguments)] for name, *arguments in commands]
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, json.dumps(full)],
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        parts = [re.split(r"<<exit (\d+)>>\n", stream) for stream in (done.stdout, done.stderr)]
        return [
            Finished(int(parts[0][2 * number + 1]), parts[0][2 * number], parts[1][2 * number])
            for number in range(len(full))
        ]

    return run


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
