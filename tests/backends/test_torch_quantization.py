"""Quantised bases: gradients against the dequantised base, the trap of an evaluation that ends training, and true merges."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from config.structured_config import Recipe
from tests.conftest import TINY_VOCABULARY
from utils.backends import torch_backend
from utils.backends.torch_model import TorchModel
from utils.backends.torch_quantization import find_repacked
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, pad_rows
from utils.exceptions import AdapterError, RecipeError, TrainingError
from utils.model_source import ModelSource
from utils.tokenizer_utils import EncodedExample

pytestmark = pytest.mark.slow


def make_recipe(folder: Path, quantization: str, **lora: Any) -> Recipe:
    """A recipe on a quantised base, computed in float32."""
    return Recipe(
        model={"name": str(folder), "dtype": "float32", "quantization": quantization},
        data={"train": "unused"},
        lora={"r": 4, "alpha": 8, **lora},
        training={"method": "sft"},
    )


def load_base(folder: Path, recipe: Recipe) -> TorchModel:
    """The quantised base."""
    return torch_backend.load_model(ModelSource(str(folder), folder, {}), recipe)


def attach(model: TorchModel, recipe: Recipe) -> TorchModel:
    """Adapters whose A and B are random, the same ones each time."""
    model = torch_backend.attach_lora(model, recipe)
    torch.manual_seed(1)
    for name, parameter in model.network.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def make_batch() -> Batch:
    """Two rows of different lengths."""
    random = np.random.default_rng(0)
    return pad_rows(
        [EncodedExample(random.integers(5, TINY_VOCABULARY, n), np.arange(n) >= n // 2, "rows:1") for n in (20, 13)], 2
    )


def collect_gradients(model: TorchModel, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Gradients of one step, before the update."""
    step, batch = TorchTrainStep(model, recipe), make_batch()
    model.network.train()
    step._accumulate([batch], batch.supervised_tokens)
    found = {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    return found


def compare(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest distance of two gradients, relative to their length."""
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours)


@pytest.mark.parametrize(("kind", "tolerance"), [("int8", 1e-4), ("nf4", 1e-4), ("fp4", 1e-4)])
def test_gradients_on_a_quantised_base_are_those_on_its_dequantised_weights(
    tiny_llama: Path, kind: str, tolerance: float
) -> None:
    # Only the weights are rounded: on a CPU, int8 rounds the activations in evaluation alone.
    recipe = make_recipe(tiny_llama, kind)
    quantised = collect_gradients(attach(load_base(tiny_llama, recipe), recipe), recipe)
    plain = torch_backend.dequantize(load_base(tiny_llama, recipe))
    assert plain.quantization == "none"
    assert {type(module) for module in plain.network.modules() if isinstance(module, nn.Linear)} == {nn.Linear}
    exact = collect_gradients(attach(plain, recipe), recipe)
    assert len(exact) == 2 * 7 * 2
    assert all(gradient.norm() > 0 for gradient in exact.values())
    assert compare(quantised, exact) < tolerance
    original = make_recipe(tiny_llama, "none")
    full = collect_gradients(attach(load_base(tiny_llama, original), original), original)
    assert compare(exact, full) > tolerance  # the quantisation has changed the weights at all


@pytest.mark.parametrize(
    ("kind", "variant"), [("int8", "lora"), ("int8", "rslora"), ("nf4", "lora"), ("nf4", "dora"), ("fp4", "lora")]
)
def test_a_quantised_base_trains_and_its_adapter_loads_again(
    tiny_llama: Path, tmp_path: Path, kind: str, variant: str
) -> None:
    recipe = make_recipe(tiny_llama, kind, variant=variant)
    model = attach(load_base(tiny_llama, recipe), recipe)
    step = torch_backend.make_step(model, recipe)
    losses = [step.step([make_batch()], 2e-2).loss for _ in range(12)]
    assert losses[-1] < losses[0] - 0.1
    expected = torch_backend.compute_logits(model, make_batch())
    torch_backend.save_weights(model, tmp_path)
    again = torch_backend.load_adapter(load_base(tiny_llama, recipe), tmp_path)
    np.testing.assert_allclose(torch_backend.compute_logits(again, make_batch()), expected, atol=1e-5)


def test_4_bit_scales_are_quantised_twice(tiny_llama: Path) -> None:
    network = load_base(tiny_llama, make_recipe(tiny_llama, "nf4")).network
    states = [module.weight.quant_state for module in network.modules() if type(module).__name__ == "Linear4bit"]
    assert len(states) == 14
    assert all(state.nested and state.quant_type == "nf4" for state in states)
    assert not any(type(module).__name__ == "Linear4bit" for module in [network.lm_head])


def repack(network: nn.Module) -> None:
    """What bitsandbytes does in the forward pass of an evaluation on a CPU with AVX512-BF16."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    for module in network.modules():
        if type(module).__name__ == "Linear4bit":
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )


def take_away_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packed kernel is C++ for AVX512-BF16; on other CPUs a differentiable one stands in, so its gradient is cut here."""
    import bitsandbytes.functional as functional

    if not functional.has_avx512bf16():
        kernel = functional.gemv_4bit
        monkeypatch.setattr(functional, "gemv_4bit", lambda x, *rest, **named: kernel(x.detach(), *rest, **named))


@pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered:UserWarning")
def test_gradients_vanish_in_silence_when_bitsandbytes_has_repacked_and_an_evaluation_then_refuses_the_run(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The packed kernel has no backward: what reaches the loss through a packed module learns nothing, and no error says so.
    recipe = make_recipe(tiny_llama, "nf4")
    model = torch_backend.attach_lora(load_base(tiny_llama, recipe), recipe)
    model = replace(model, plan=replace(model.plan, workers=1))
    before = collect_gradients(model, recipe)
    repack(model.network)
    take_away_the_backward(monkeypatch)
    assert len(find_repacked(model.network)) == 14
    after, batch = collect_gradients(model, recipe), make_batch()
    behind = [name for name in before if "lora_B" in name and "o_proj" not in name and "down_proj" not in name]
    assert len(behind) == 2 * 5
    for name in behind:
        assert before[name].norm() > 0
        assert name not in after or after[name].norm() < 1e-3 * before[name].norm(), name
    with pytest.raises(TrainingError, match=r"repacked 14 modules .*gradients vanish"):
        torch_backend.evaluate(model, [batch])


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_no_evaluation_repacks_even_where_the_cpu_could(
    tiny_llama: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU with AVX512-BF16 the library switches this on by itself; here it is switched on before the model is built.
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    recipe = make_recipe(tiny_llama, kind)
    model = attach(load_base(tiny_llama, recipe), recipe)
    before = collect_gradients(model, recipe)
    torch_backend.evaluate(model, [make_batch()])
    torch_backend.compute_logits(model, make_batch())
    assert find_repacked(model.network) == []
    after = collect_gradients(model, recipe)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


def test_the_library_does_repack_in_an_evaluation_unless_it_is_forbidden(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # If this fails, bitsandbytes has changed, and the guard should be looked at again.
    import bitsandbytes.nn.modules as modules

    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)
    monkeypatch.setattr(torch_backend, "prepare_quantised", lambda network: None)
    recipe = make_recipe(tiny_llama, "nf4")
    model = attach(load_base(tiny_llama, recipe), recipe)
    with pytest.raises(TrainingError, match="gradients vanish"):
        torch_backend.evaluate(model, [make_batch()])


def test_an_adapter_is_never_folded_into_quantised_weights(tiny_llama: Path) -> None:
    # peft would round the sum to 16 values again, with no more than a warning.
    recipe = make_recipe(tiny_llama, "nf4")
    with pytest.raises(AdapterError, match="cannot be folded into nf4"):
        torch_backend.merge_adapter(attach(load_base(tiny_llama, recipe), recipe))


def test_a_head_is_trained_whole_beside_a_quantised_base_and_a_quantised_module_is_refused(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama, "nf4", modules_to_save=["embed_tokens"])
    model = attach(load_base(tiny_llama, recipe), recipe)
    assert any("embed_tokens" in name for name in collect_gradients(model, recipe))
    recipe = make_recipe(tiny_llama, "nf4", modules_to_save=["o_proj"])
    with pytest.raises(RecipeError, match="'o_proj' is quantised"):
        torch_backend.attach_lora(load_base(tiny_llama, recipe), recipe)
