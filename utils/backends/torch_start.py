"""Imported before the torch back end, to start quickly.

peft imports bitsandbytes wherever it is installed, and bitsandbytes hands functions of its CPU kernels to torch.compile while
it is imported. That alone imports the whole compiler, a quarter of the time from a command to its first line of work, for
functions that only 4- and 8-bit runs call. Here they are compiled when they are called first.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch


def compile_when_called(function: Callable[..., Any] | None = None, **settings: Any) -> Callable[..., Any]:
    """Takes the arguments of torch.compile, and puts off its work until the function's first call."""
    if function is None:
        return partial(compile_when_called, **settings)
    compiled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function, **settings))
        return compiled[0](*arguments, **options)

    return call


if importlib.util.find_spec("bitsandbytes") is not None:
    original = torch.compile
    torch.compile = compile_when_called
    try:
        import bitsandbytes as bitsandbytes
    finally:
        torch.compile = original
