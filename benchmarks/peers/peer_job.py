"""What every peer's script needs: its job, its rows, and the file in which it writes down what it did. Standard library only.

A job is a JSON file: `model` (folder), `rows` (JSONL, in the order in which they must be trained on), `method` (sft or dpo),
`batch_size`, `steps`, `learning_rate`, `r`, `alpha` (null: all weights are trained), `quantization`, `seed`, `setting`.
Rows of sft are {"input_ids", "labels"}, with -100 at tokens that are not learned; pairs are {"prompt", "chosen", "rejected"},
texts that need nothing but the end-of-sequence token.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def read_job() -> dict[str, Any]:
    """The job that the first argument names."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def read_rows(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of a job, in their order."""
    return [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]


def sort_windows(rows: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """Sorts the rows of each optimizer step by length, longest first: micro-batches then hold rows of like length."""
    windows = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    return [row for window in windows for row in sorted(window, key=measure_row, reverse=True)]


def measure_row(row: dict[str, Any]) -> int:
    """Tokens of a row, or characters of a pair."""
    return len(row["input_ids"]) if "input_ids" in row else sum(map(len, row.values()))


def keep_freed_pages() -> None:
    """Tells glibc to keep big buffers instead of returning them, as Tunebook does: fewer page faults."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
        libc.mallopt(-8, 1)  # M_ARENA_MAX


def find_gpu() -> Any:
    """`torch.cuda` where the script has imported torch and there is an NVIDIA GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def computes_bfloat16_natively() -> bool:
    """Whether the GPU, or else this CPU, multiplies bfloat16 itself."""
    if gpu := find_gpu():
        return bool(gpu.is_bf16_supported(including_emulation=False))
    path = Path("/proc/cpuinfo")
    flags = path.read_text(encoding="utf-8") if path.exists() else ""
    return "avx512_bf16" in flags or "amx_bf16" in flags


class Recorder:
    """Counts what a step sees and when it ends, and writes the result that the second argument names."""

    def __init__(self) -> None:
        self.waiting = [0, 0]
        self.tokens: list[int] = []
        self.supervised_tokens: list[int] = []
        self.losses: list[float] = []
        self.gradient_norms: list[float | None] = []
        self.ends: list[float] = []

    def count(self, tokens: int, supervised_tokens: int) -> None:
        """Adds a micro-batch of the current step: real tokens, and those that are learned."""
        self.waiting[0] += tokens
        self.waiting[1] += supervised_tokens

    def end_step(self) -> None:
        """Stops the clock of a step."""
        self.ends.append(time.time())
        for numbers, value in zip((self.tokens, self.supervised_tokens), self.waiting, strict=True):
            numbers.append(value)
        self.waiting = [0, 0]

    def report(self, loss: float, gradient_norm: float | None) -> None:
        """Loss (mean over the step's learned tokens or pairs) and norm before clipping; None where a peer keeps none."""
        self.losses.append(loss)
        self.gradient_norms.append(gradient_norm if gradient_norm is None or math.isfinite(gradient_norm) else None)

    def write(self, trainable_parameters: int, dtype: str, packages: Sequence[str]) -> None:
        """Writes the result.

        Args:
            dtype: what the matrices are multiplied in, in words.
            packages: installed packages whose versions matter.
        """
        result = {
            "tokens": self.tokens,
            "supervised_tokens": self.supervised_tokens,
            "losses": self.losses,
            "gradient_norms": self.gradient_norms,
            "step_ends": self.ends,
            "trainable_parameters": trainable_parameters,
            "dtype": dtype,
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "device_bytes": gpu.max_memory_allocated() if (gpu := find_gpu()) else None,
        }
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
