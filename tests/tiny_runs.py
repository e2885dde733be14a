"""Real runs of a tiny model in forked processes: torch is imported once, and a run takes a fraction of a second."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

TIMINGS = ("tokens_per_second",)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tiny_model(folder: Path) -> Path:
    """A Llama of 6,000 parameters with a tokenizer of single characters."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    characters = [chr(code) for code in range(32, 127)]
    special = ["<unk>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.WordLevel({text: number for number, text in enumerate(special + characters)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names, additional_special_tokens=special[3:])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def write_tiny_recipe(folder: Path, model: Path, changes: dict[str, Any] | None = None) -> Path:
    """A recipe of 8 steps over two epochs, with its rows; `changes` are dotted keys."""
    rows = [{"prompt": f"Say {n}", "completion": str(n) * (1 + n % 5)} for n in range(18)]
    pairs = [{"prompt": f"Say {n}", "chosen": str(n) * (1 + n % 5), "rejected": "no" * (1 + n % 3)} for n in range(18)]
    for name, content in (("rows", rows), ("pairs", pairs)):
        text = "".join(json.dumps(row) + "\n" for row in content)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    recipe: dict[str, dict[str, Any]] = {
        "model": {"name": str(model), "dtype": "float32"},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.2, "max_length": 64},
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
            recipe.pop(section)
        elif not name:
            recipe[section] = value
        else:
            recipe.setdefault(section, {})[name] = value
    path = folder / "tiny.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")
    return path


def fork(work: Callable[[], int | None], log: Path) -> int:
    """Runs work in a forked process, as a script: its output goes into a log, its end is its exit code.

    Returns:
        The exit code; of a process that a signal has killed, minus its number.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        from utils import cli

        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w") for number in (1, 2))
        sys.__stderr__ = sys.stderr
        code = 1
        try:
            cli.run(lambda arguments: work())
        except SystemExit as error:
            code = int(error.code or 0)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def train_in_fork(arguments: list[str], log: Path, before: Callable[[], None] | None = None) -> int:
    """`python scripts/train.py …` in a forked process; `before` is called in it first."""
    from scripts import train

    def work() -> int:
        if before:
            before()
        return train.main(arguments)

    return fork(work, log)


def read_weights(run: Path) -> dict[str, np.typing.NDArray[Any]]:
    """What a finished run has published."""
    from safetensors.numpy import load_file

    files = [*run.glob("adapter/*.safetensors"), *run.glob("model/*.safetensors")]
    assert len(files) == 1, files
    return load_file(files[0])


def count_different_bytes(first: Path, second: Path) -> int:
    """Bytes of published weights that differ between two runs."""
    one, other = read_weights(first), read_weights(second)
    assert one.keys() == other.keys()
    return sum(int((one[name].view(np.uint8) != other[name].view(np.uint8)).sum()) for name in one)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without timings."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def kill_at(moment: int, folder: Path) -> Callable[[], None]:
    """Makes a process kill itself at its n-th change of the disk below a folder: opening to write, fsync, rename, removal."""
    names = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        opens = event == "open" and isinstance(arguments[1], str) and any(letter in arguments[1] for letter in "wax+")
        if (opens or event in names) and str(folder) in str(arguments[0]):
            count()

    def begin() -> None:
        flush = os.fsync

        def fsync(descriptor: int) -> None:
            count()
            flush(descriptor)

        os.fsync = fsync
        sys.addaudithook(watch)

    return begin
