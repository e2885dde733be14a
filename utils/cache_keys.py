"""What a cached result depends on besides its input: the code that made it, and the libraries under that."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

UTILS = Path(__file__).parent
# Libraries whose kernels decide how a forward pass of a back end rounds.
FORWARD_LIBRARIES: dict[str, tuple[str, ...]] = {
    "torch": ("torch", "transformers", "peft"),
    "mlx": ("mlx", "mlx-lm", "transformers"),
}


def hash_code(paths: Sequence[str]) -> list[str]:
    """SHA-256 of our own modules, named as paths below utils/."""
    return [hashlib.sha256((UTILS / path).read_bytes()).hexdigest() for path in paths]


def hash_facts(facts: dict[str, Any]) -> str:
    """Name of a cache entry that depends on these facts and nothing else."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:40]


def hash_project() -> str:
    """SHA-256 over the code of a run, whatever part of it a run reaches."""
    digest = hashlib.sha256()
    for folder in ("config", "utils"):
        for path in sorted((UTILS.parent / folder).rglob("*.py")):
            digest.update(path.relative_to(UTILS.parent).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def describe_forward(backend: str, quantization: str) -> dict[str, list[str]]:
    """What a number that a back end computes depends on besides model and tokens: its modules, and the libraries under them.

    Args:
        backend: `torch` or `mlx`.
        quantization: as in the recipe; on torch, `none` leaves bitsandbytes out, which then need not be installed.
    """
    modules = sorted(path.relative_to(UTILS).as_posix() for path in UTILS.glob(f"backends/{backend}_*.py"))
    names = FORWARD_LIBRARIES[backend]
    if backend == "torch" and quantization != "none":
        names = (*names, "bitsandbytes")
    return {"code": hash_code(modules), "versions": [f"{name} {importlib.metadata.version(name)}" for name in names]}
