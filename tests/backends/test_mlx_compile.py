"""The compiled step of MLX: the same numbers as the plain one, and not trusted where they differ."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.backends.mlx_sides import make_recipe, open_source, save_tiny
from tests.backends.test_families import CONFIGS, make_batch
from utils.backends import load_backend
from utils.batching import split_rows

backend = load_backend("mlx")

import mlx.core as mx  # noqa: E402 - behind what must be so before MLX is imported
from mlx import nn  # noqa: E402

from utils.backends.mlx_compile import Compiled  # noqa: E402
from utils.backends.mlx_step import MlxTrainStep  # noqa: E402


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    return save_tiny(tmp_path_factory.mktemp("llama"), CONFIGS["llama"])


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"lora": None},
        {"lora": {"r": 4, "dropout": 0.2}},
    ],
    ids=["lora", "full", "dropout"],
)
def test_compiled_steps_take_the_same_way(llama: Path, sections: dict[str, Any]) -> None:
    """Also where random numbers are drawn: the graph takes the generator's state and gives it back."""
    recipe, batches = make_recipe(llama, **sections), split_rows([make_batch()])
    losses = []
    for compiles in (False, True):
        mx.random.seed(1)
        model = backend.attach_lora(backend.load_model(open_source(llama), recipe), recipe)
        step = MlxTrainStep(model, recipe, compiles=compiles)
        if compiles and "dropout" in str(sections):
            step.multiple = 1  # padding draws numbers of its own
        losses.append([step.step(batches, 1e-3).loss for _ in range(4)])
        if compiles:
            assert isinstance(step.differentiate, Compiled)
            assert step.differentiate.is_trusted
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_a_graph_that_computes_something_else_is_left() -> None:
    """What changes behind a graph's back is frozen into it: here how often the function was called before."""
    network, calls = nn.Linear(3, 1), itertools.count(1)

    def compute(x: mx.array) -> tuple[mx.array, mx.array]:
        return (network(x) * next(calls)).sum(), x

    compiled = Compiled(network, nn.value_and_grad(network, compute))
    first, second = (float(compiled(mx.ones((1, 3)))[0][0]) for _ in range(2))
    assert compiled.compiled is None
    assert second == pytest.approx(first / 2 * 3, rel=1e-5)
