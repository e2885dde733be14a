"""One seed makes every generator of a run repeat itself."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.seed_manager import SeedManager


def draw_python() -> list[float]:
    return [random.random() for _ in range(5)]


def draw_numpy() -> list[float]:
    return [float(value) for value in np.random.rand(5)]


def draw_torch() -> list[float]:
    return [float(value) for value in torch.rand(5)]


def draw_mlx() -> list[float]:
    core = pytest.importorskip("mlx.core")
    return [float(value) for value in core.random.uniform(shape=(5,)).tolist()]


@pytest.fixture(autouse=True)
def _restore_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


@pytest.mark.parametrize("draw", [draw_python, draw_numpy, draw_torch, draw_mlx])
def test_a_seed_repeats_a_sequence_and_another_does_not(draw: Callable[[], list[float]]) -> None:
    draw()  # imports mlx, which is seeded only once it is there
    sequences = []
    for seed in (42, 42, 43):
        SeedManager(seed).seed_everything()
        sequences.append(draw())
    assert sequences[0] == sequences[1]
    assert sequences[0] != sequences[2]


def test_what_was_seeded_is_named() -> None:
    pytest.importorskip("mlx.core")
    assert SeedManager(1).seed_everything() == ["python", "numpy", "torch", "mlx"]


def test_seeding_imports_no_framework() -> None:
    code = (
        "import sys\nfrom utils.seed_manager import SeedManager\n"
        "manager = SeedManager(1)\nmanager.make_deterministic()\nprint(manager.seed_everything())\n"
        "print([name for name in ('torch', 'mlx.core') if name in sys.modules])\n"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines() == ["['python', 'numpy']", "[]"]


def test_deterministic_mode_sets_torchs_switches(monkeypatch: pytest.MonkeyPatch) -> None:
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.benchmark,
    )
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    try:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.benchmark = True
        SeedManager(1).make_deterministic()
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = before[2]


def test_deterministic_mode_keeps_a_workspace_that_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        SeedManager(1).make_deterministic()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
