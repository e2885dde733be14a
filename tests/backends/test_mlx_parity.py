"""One recipe, two back ends: MLX computes the logits, gradients, losses and texts that torch computes.

Torch is the oracle, which other tests hold against transformers, PEFT and TRL. Tiny random models of every supported
architecture, in float32; torch gets steps in micro-batches, and MLX at once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, MistralConfig, Phi3Config, PretrainedConfig
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from config.structured_config import GenerationSection
from tests.backends.mlx_sides import (
    BACKENDS,
    Sides,
    assert_same_gradients,
    collect_mlx_gradients,
    collect_torch_gradients,
    make_recipe,
    mlx_backend,
    open_sides,
    open_source,
    save_tiny,
)
from tests.backends.test_families import CONFIGS, GEMMA, SHAPE, make_batch
from tests.backends.test_torch_preference import make_pairs
from utils.backends import GenerationSettings, torch_backend
from utils.backends.mlx_generation import make_sampler
from utils.batching import Batch, pack_row, pad_prompts_left, pad_rows, split_rows
from utils.mlx_names import MLX_MODEL_TYPES
from utils.piece_encoder import EncodedExample

pytestmark = pytest.mark.slow
FACTORS = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **FACTORS}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# Sliding windows that are longer than the rows, but in Gemma 3, where mlx-lm has them; and rotations that are scaled.
MODELS: dict[str, PretrainedConfig] = {
    **{name: config for name, config in CONFIGS.items() if name in MLX_MODEL_TYPES},
    "mistral": MistralConfig(**SHAPE, sliding_window=64),
    "gemma2": Gemma2Config(**GEMMA, sliding_window=64, attn_logit_softcapping=1.0, final_logit_softcapping=30.0),
    "gemma3_text": Gemma3TextConfig(
        **{**GEMMA, "num_hidden_layers": 3},
        sliding_window=8,
        layer_types=[*["sliding_attention"] * 2, "full_attention"],
    ),
    "llama with llama3 rotations": LlamaConfig(**SHAPE, rope_parameters=LLAMA3),
    "llama with linear rotations": LlamaConfig(
        **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "phi3 with longrope": Phi3Config(
        **SHAPE, max_position_embeddings=128, original_max_position_embeddings=64, rope_parameters=LONGROPE
    ),
}
PROMPTS = [np.arange(3, 3 + length) for length in (5, 9, 7)]


@pytest.fixture(scope="module", params=sorted(MODELS))
def sides(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sides:
    """Each architecture in turn."""
    folder = save_tiny(tmp_path_factory.mktemp("model"), MODELS[request.param])
    training = {"method": "sft", "learning_rate": 1e-3, "weight_decay": 0.1}
    return open_sides(folder, make_recipe(folder, training=training))


def make_settings(**section: Any) -> GenerationSettings:
    """Greedy answers of twelve tokens."""
    return GenerationSettings(GenerationSection(max_new_tokens=8, **section), (2,), 0)


def answer(sides: Sides, settings: GenerationSettings) -> list[list[list[int]]]:
    """Texts of torch, of MLX in batches of two, and of MLX streamed."""
    both = [
        backend.generate(model, PROMPTS, settings, 2)
        for backend, model in zip(BACKENDS, (sides.torch, sides.mlx), strict=True)
    ]
    return [*both, [list(mlx_backend.stream(sides.mlx, pad_prompts_left([ids], 0), settings)) for ids in PROMPTS]]


def test_logits_and_greedy_texts_are_those_of_torch(sides: Sides) -> None:
    batch = make_batch()
    ours, theirs = (
        backend.compute_logits(model, batch) for backend, model in zip(BACKENDS, (sides.torch, sides.mlx), strict=True)
    )
    np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4)
    torch_text, mlx_text, streamed = answer(sides, make_settings())
    assert torch_text == mlx_text == streamed
    assert len({tuple(text) for text in torch_text}) > 1
    assert torch_backend.count_parameters(sides.torch) == mlx_backend.count_parameters(sides.mlx)


def test_the_first_gradient_of_every_trained_tensor_is_that_of_torch(sides: Sides) -> None:
    ours, theirs = sides.make_steps()
    batch = make_batch()
    assert_same_gradients(collect_torch_gradients(ours, split_rows([batch])), collect_mlx_gradients(theirs, [batch]))


@pytest.mark.parametrize("sides", sorted(MLX_MODEL_TYPES), indirect=True)
def test_losses_of_twenty_steps_are_those_of_torch(sides: Sides) -> None:
    assert compare_steps(sides, [make_batch()], steps=20) > 0.1


def compare_steps(sides: Sides, batches: list[Batch], steps: int = 3, tolerance: float = 1e-4) -> float:
    """Takes the same steps on both sides, asserts the same losses and norms, and gives back how far the loss fell.

    Torch gets every fourth step row by row; all of them would take too long.
    """
    ours, theirs = sides.make_steps()
    losses = []
    for number in range(steps):
        one = ours.step(split_rows(batches) if number % 4 == 0 else batches, 1e-3)
        other = theirs.step(batches, 1e-3)
        assert other.loss == pytest.approx(one.loss, rel=tolerance), number
        assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=10 * tolerance, abs=1e-5), number
        assert (other.tokens, other.supervised_tokens) == (one.tokens, one.supervised_tokens)
        assert (other.pairs, other.answers) == (one.pairs, one.answers)
        assert other.numbers == pytest.approx(one.numbers, rel=10 * tolerance, abs=1e-4)
        losses.append(one.loss)
    assert theirs.list_silent_tensors() == ours.list_silent_tensors() == []
    return losses[0] - losses[-1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One architecture with rotations, groups of heads and plain matrices, and one with positions and turned ones."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, MODELS[name]) for name in ("gpt2", "llama")}


SFT: dict[str, Any] = {"method": "sft", "learning_rate": 1e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"lora": {"r": 4, "alpha": 8, "variant": "dora"}},
    "rslora": {"lora": {"r": 4, "alpha": 8, "variant": "rslora"}},
    "lora+": {"lora": {"r": 4, "alpha": 8, "plus_ratio": 8.0}},
    "all weights with decay": {"lora": None, "training": {**SFT, "weight_decay": 0.5}},
    "adafactor": {"training": {**SFT, "optimizer": "adafactor", "weight_decay": 0.1}},
    "all weights by adafactor": {"lora": None, "training": {**SFT, "optimizer": "adafactor"}},
    "without clipping": {"training": {**SFT, "max_grad_norm": None}},
    "checkpointed": {"training": {**SFT, "gradient_checkpointing": True}},
}


@pytest.mark.parametrize("name", sorted(VARIANTS))
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_every_way_of_training_gives_the_gradients_and_losses_of_torch(
    folders: dict[str, Path], model: str, name: str
) -> None:
    sides = open_sides(folders[model], make_recipe(folders[model], **VARIANTS[name]))
    ours, theirs = sides.make_steps()
    batch = make_batch()
    assert_same_gradients(collect_torch_gradients(ours, [batch]), collect_mlx_gradients(theirs, [batch]))
    assert compare_steps(sides, [batch]) > 0.005


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_packed_rows_give_the_losses_of_torch(folders: dict[str, Path], model: str) -> None:
    random = np.random.default_rng(0)
    examples = [
        EncodedExample(random.integers(3, 300, length), np.arange(length) >= 3, "rows:1") for length in (12, 7, 15)
    ]
    sides = open_sides(folders[model], make_recipe(folders[model], training={**SFT, "packing": True}))
    packed, padded = [pack_row(examples[:2]), pack_row(examples[2:])], pad_rows(examples, 0)
    ours, theirs = sides.make_steps()
    assert_same_gradients(collect_torch_gradients(ours, [padded]), collect_mlx_gradients(theirs, packed))
    assert compare_steps(sides, packed) > 0.005
    rows = mlx_backend.evaluate(sides.mlx, packed)
    assert [count for _, count in rows] == [batch.supervised_tokens for batch in packed]
    np.testing.assert_allclose(rows, torch_backend.evaluate(sides.torch, packed), rtol=1e-4)


DPO: dict[str, dict[str, Any]] = {
    "sigmoid": {"beta": 0.5, "label_smoothing": 0.2, "reference": "precomputed"},
    "ipo": {"beta": 0.5, "loss": "ipo", "reference": "adapter_off"},
    "hinge": {"beta": 0.05, "loss": "hinge", "reference": "model"},
}


@pytest.mark.parametrize("name", sorted(DPO))
@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_preference_pairs_give_the_losses_of_torch(folders: dict[str, Path], model: str, name: str) -> None:
    # Trained from their own start: the reference is the untouched model, and the adapters start at zero.
    sections: dict[str, Any] = {"training": {"method": "dpo", "learning_rate": 1e-3}, "dpo": DPO[name]}
    if DPO[name]["reference"] == "model":
        sections["lora"] = None
    sides = open_sides(folders[model], make_recipe(folders[model], **sections), moved=False)
    batch = pad_rows(make_pairs([(6, 5, 9), (3, 7, 2), (10, 1, 4)]), 0)
    scored = [
        backend.score_pairs(each, [batch]) for backend, each in zip(BACKENDS, (sides.torch, sides.mlx), strict=True)
    ]
    np.testing.assert_allclose(scored[1], scored[0], rtol=1e-4)
    if DPO[name]["reference"] == "precomputed":
        # As of another model: where policy and reference are equal, rounding decides which answer wins.
        batch = replace(batch, reference=scored[0] + np.array([[0.3, -0.2], [-1.0, 0.5], [0.1, 0.4]]))
    assert compare_steps(sides, [batch]) > 0.001


def test_a_base_in_bfloat16_trains_adapters_in_float32_along_the_losses_of_torch(folders: dict[str, Path]) -> None:
    folder = folders["llama"]
    sides = open_sides(folder, make_recipe(folder, model={"dtype": "bfloat16"}))
    assert compare_steps(sides, [make_batch()], tolerance=0.02) > 0.005
    trained = dict(tree_flatten(sides.mlx.network.trainable_parameters()))
    assert {value.dtype for value in trained.values()} == {mx.float32}
    assert sides.mlx.network.model.norm.weight.dtype == mx.bfloat16


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_a_repetition_penalty_gives_the_texts_of_torch_in_batches_too(folders: dict[str, Path], model: str) -> None:
    sides = open_sides(folders[model], make_recipe(folders[model]))
    torch_text, mlx_text, streamed = answer(sides, make_settings(repetition_penalty=1.8))
    assert torch_text == mlx_text == streamed
    assert torch_text != answer(sides, make_settings())[0]


def test_sampled_tokens_have_the_distribution_of_transformers() -> None:
    # mlx-lm's own order is top-p before the temperature: another distribution from the same settings.
    section = GenerationSection(temperature=1.7, top_k=6, top_p=0.8)
    logits = torch.tensor([[2.0, 1.5, 1.0, 0.5, 0.2, 0.0, -0.1, -3.0]])
    expected = logits
    for warper in (TemperatureLogitsWarper(1.7), TopKLogitsWarper(6), TopPLogitsWarper(0.8)):
        expected = warper(None, expected)
    mx.random.seed(0)
    rows = mx.broadcast_to(mx.array(logits.log_softmax(-1).numpy()), (4_000, 8))
    counts = np.bincount(np.array(make_sampler(section)(rows)), minlength=8) / 4_000
    np.testing.assert_allclose(counts, expected.softmax(-1)[0].numpy(), atol=0.03)


def test_a_model_of_mlx_keeps_its_numbers_when_torch_reads_what_was_trained(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # And the other way round: open_sides fills MLX's adapters from torch's file.
    for name, folder in folders.items():
        for variant in ("lora", "dora", "rslora"):
            recipe = make_recipe(folder, lora={"r": 4, "alpha": 8, "variant": variant})
            sides, batch = open_sides(folder, recipe), make_batch()
            mlx_backend.save_weights(sides.mlx, tmp_path / name / variant)
            base = torch_backend.load_model(open_source(folder), recipe)
            adapted = torch_backend.load_adapter(base, tmp_path / name / variant)
            expected = torch_backend.compute_logits(sides.torch, batch)
            np.testing.assert_allclose(torch_backend.compute_logits(adapted, batch), expected, atol=1e-4)
            merged = mlx_backend.merge_adapter(sides.mlx)
            np.testing.assert_allclose(mlx_backend.compute_logits(merged, batch), expected, atol=2e-4)
