"""The start of the torch back end: quick, and nothing changed by it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from utils.backends.torch_start import compile_when_called

ROOT = Path(__file__).resolve().parents[2]
CHECK = """
import sys, torch
original = torch.compile
from utils.backends import load_backend
load_backend("torch")
import bitsandbytes
assert torch.compile is original
assert "peft" in sys.modules
assert "torch._inductor.compile_fx" not in sys.modules, "the compiler was imported"
weights = torch.randn(64, 64)
packed, state = bitsandbytes.functional.quantize_4bit(weights, quant_type="nf4")
assert (bitsandbytes.functional.dequantize_4bit(packed, state) - weights).abs().max() < 1
"""


def test_the_compiler_is_not_imported_before_something_is_compiled() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_function_is_compiled_when_it_is_called_with_the_settings_that_it_was_given() -> None:
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(len(inputs))
        return graph

    @compile_when_called(backend=backend, dynamic=False)
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    assert seen == []
    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert double(torch.ones(3)).tolist() == [2, 2, 2]
    assert seen == [1]
    assert double.__name__ == "double"
