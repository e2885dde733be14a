"""What MLX allocates on small models of known sizes, beside the forecast; and that chunks of logits do not pile up."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.backends.mlx_sides import mlx_backend  # first: what must be so before MLX is imported

import mlx.core as mx  # isort: skip
from mlx_lm.models import llama  # isort: skip

from config.structured_config import Recipe
from utils.backends import mlx_losses
from utils.backends.mlx_model import MlxModel
from utils.batching import Batch, pad_rows
from utils.machine import Machine
from utils.mlx_memory import estimate_mlx_memory
from utils.model_shape import read_shape
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample
from utils.workload import ForwardPass, Rows, plan_workload, unroll_pass

pytestmark = pytest.mark.slow
METAL = Machine("metal", 2, 1, 2048, 64 << 30, None, quick_bfloat16=True, backend="mlx")
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1000,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Case:
    """A run of one step.

    Attributes:
        learned: tokens of each row.
    """

    rows: int = 4
    length: int = 64
    learned: int = 8
    dtype: str = "float32"
    lora: bool = True
    checkpointing: bool = False
    vocabulary: int = 1000


CASES = {
    "adapters": Case(),
    "adapters on bfloat16": Case(dtype="bfloat16"),
    "long rows": Case(rows=2, length=256),
    "many logits": Case(rows=2, learned=60, vocabulary=4000),
    "all weights": Case(lora=False),
    "checkpointing": Case(rows=2, length=128, checkpointing=True),
}


def make_recipe(case: Case) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x", "dtype": case.dtype},
            "data": {"train": "x.jsonl"},
            "lora": {"r": 8} if case.lora else None,
            "training": {"method": "sft", "gradient_checkpointing": case.checkpointing, "batch_size": case.rows},
        }
    )


def build(case: Case) -> MlxModel:
    config = {**LLAMA, "vocab_size": case.vocabulary, "rms_norm_eps": 1e-5}
    network = llama.Model(llama.ModelArgs(**config))
    network.set_dtype(getattr(mx, case.dtype))
    network.freeze()
    mx.eval(network.parameters())
    return MlxModel(network, ModelSource("x", None, config), "cpu", case.dtype, "none", ())  # type: ignore[arg-type]


def make_batch(case: Case) -> Batch:
    random = np.random.default_rng(0)
    mask = np.arange(case.length) >= case.length - case.learned
    rows = [EncodedExample(random.integers(3, 300, case.length), mask, "rows:1") for _ in range(case.rows)]
    return pad_rows(rows, 0)


@pytest.mark.parametrize("name", CASES)
def test_a_step_takes_about_what_was_predicted(name: str) -> None:
    case = CASES[name]
    recipe = make_recipe(case)
    gc.collect()
    before = mx.get_active_memory()
    step = mlx_backend.make_step(mlx_backend.attach_lora(build(case), recipe), recipe)
    step.step([make_batch(case)], 1e-3)
    mx.reset_peak_memory()
    step.step([make_batch(case)], 1e-3)
    measured = mx.get_peak_memory() - before
    shape = read_shape({**LLAMA, "vocab_size": case.vocabulary})
    assert shape is not None
    lengths = np.full(case.rows, case.length)
    rows, nothing = Rows(lengths, np.full(case.rows, case.learned)), Rows(lengths[:0], lengths[:0])
    workload = plan_workload(recipe, shape, METAL, rows, nothing)
    assert estimate_mlx_memory(recipe, shape, METAL, workload).total == pytest.approx(measured, rel=0.2)


def test_the_logits_of_many_chunks_are_never_there_together(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks that did not wait for each other were all laid out at once, in an evaluation too: 28 of 16 tokens each.
    case = Case(learned=30, vocabulary=4000)
    model, batch = mlx_backend.attach_lora(build(case), make_recipe(case)), make_batch(case)
    step = mlx_backend.make_step(model, make_recipe(case))
    peaks, losses = {}, {}
    for tokens in (120, 10):
        monkeypatch.setattr(mlx_losses, "CHUNK", tokens * case.vocabulary)
        for name, take in (
            ("training", lambda: step._accumulate([batch], 1)),
            ("scoring", lambda: score(model, batch)),
        ):
            gc.collect()
            resident = mx.get_active_memory()
            mx.reset_peak_memory()
            losses[name, tokens] = take()[0]
            peaks[name, tokens] = mx.get_peak_memory() - resident
    logits = 4 * 120 * case.vocabulary
    for name in ("training", "scoring"):
        assert losses[name, 10] == pytest.approx(losses[name, 120], rel=1e-5)
        assert peaks[name, 120] - peaks[name, 10] > logits


def score(model: MlxModel, batch: Batch) -> list[float]:
    return [sum(loss for loss, _ in mlx_backend.evaluate(model, [batch]))]


def test_a_pair_is_two_rows_that_both_hold_the_prompt() -> None:
    # Prompt 40, answers 12 and 8: two rows of about 50 tokens.
    assert unroll_pass(ForwardPass(1, 60, 20, masked=False)) == ForwardPass(2, 50, 20, masked=False)
