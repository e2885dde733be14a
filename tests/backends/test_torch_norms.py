"""RMS norms whose results are formed again: the same numbers as transformers' own, and less in memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from tests.backends.twins import IDS, SIZES, adapt, differentiate
from utils.backends.torch_norms import find_normed, form_norms_again, is_rms_norm

CONFIGS = {"llama": LlamaConfig(**SIZES), "phi3": Phi3Config(**SIZES), "qwen3": Qwen3Config(**SIZES, head_dim=8)}


def draw_norms(network: nn.Module) -> None:
    """Weights of one would hide a norm that forgets them."""
    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.weight.data.uniform_(0.5, 2.0)


def build(name: str, targets: str | list[str], *, fused: bool, dtype: torch.dtype) -> tuple[nn.Module, ...]:
    """The same small adapted network twice: with transformers' norms and with ours."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name]).to(dtype)
    draw_norms(plain)
    again = copy.deepcopy(plain)
    form_norms_again(again)
    assert again.model.norm.forward.__func__ is not type(again.model.norm).forward
    return adapt((plain, again), targets, fused=fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["v_proj", "up_proj", "qkv_proj", "gate_up_proj"]], ids=str)
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "peft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(
    name: str, fused: bool, targets: str | list[str], dtype: torch.dtype
) -> None:
    plain, again = build(name, targets, fused=fused, dtype=dtype)
    (expected, expected_gradients), (got, gradients) = differentiate(plain), differentiate(again)
    assert torch.equal(got, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name_, gradient in gradients.items():
        largest = expected_gradients[name_].abs().max()
        assert largest > 0, name_
        # In 16 bits the order of the roundings differs.
        assert (gradient - expected_gradients[name_]).abs().max() < largest * (1e-5 if dtype == torch.float32 else 0.1)


@pytest.mark.parametrize("width", [16, 33])
def test_the_gradient_is_that_of_the_formula(width: int) -> None:
    torch.manual_seed(0)
    module = LlamaRMSNorm(width, eps=0.5).double()  # large, so that a gradient that forgets it is found out
    module.weight.data.uniform_(-1, 2)
    module.weight.requires_grad_(False)
    plain = copy.deepcopy(module)
    form_norms_again(module)
    x, outer = torch.randn(3, 5, width, dtype=torch.double, requires_grad=True), torch.randn(3, 5, width).double()
    (expected,) = torch.autograd.grad(plain(x), x, outer)
    (got,) = torch.autograd.grad(module(x), x, outer)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def find_living(network: Any) -> list[bool]:
    """After a forward pass whose result is held: which results of norms inside of the layers are still in memory?"""
    references = []

    def watch(_: nn.Module, __: object, output: torch.Tensor) -> None:
        references.append(StorageWeakRef(output.untyped_storage()))

    for layer in network.base_model.model.model.layers:
        layer.input_layernorm.register_forward_hook(watch)
        layer.post_attention_layernorm.register_forward_hook(watch)
    logits = network(input_ids=IDS).logits
    assert logits.requires_grad
    return [not reference.expired() for reference in references]


def test_the_results_of_norms_are_not_kept() -> None:
    plain, again = build("llama", "all-linear", fused=True, dtype=torch.float32)
    assert find_living(plain) == [True] * 4
    assert find_living(again) == [False] * 4


def test_a_backward_pass_forms_each_result_once_and_forgets_it() -> None:
    _, network = build("llama", "all-linear", fused=True, dtype=torch.float32)
    memos = []

    def watch(_: nn.Module, __: object, output: torch.Tensor) -> None:
        normed = find_normed(output)
        assert normed is not None
        memos.append(normed.memo)

    for layer in network.base_model.model.model.layers:
        layer.input_layernorm.register_forward_hook(watch)
        layer.post_attention_layernorm.register_forward_hook(watch)
    differentiate(network)
    assert [memo.readers for memo in memos] == [3, 2, 3, 2]
    assert [(memo.left, memo.rows) for memo in memos] == [(0, None)] * 4


def test_a_result_that_is_changed_in_place_is_kept_as_it_is() -> None:
    gradients = []
    for network in build("llama", "all-linear", fused=True, dtype=torch.float32):
        for layer in network.base_model.model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda _, __, output: output.mul_(2))
        gradients.append(differentiate(network)[1])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_graph_can_be_gone_through_twice() -> None:
    _, network = build("llama", "all-linear", fused=True, dtype=torch.float32)
    loss = network(input_ids=IDS).logits.square().sum()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    first = torch.autograd.grad(loss, trained, retain_graph=True)
    second = torch.autograd.grad(loss, trained)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_norms_that_are_trained_get_their_gradient() -> None:
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    form_norms_again(network)
    network(input_ids=IDS).logits.square().sum().backward()
    assert all(tensor.grad.abs().max() > 0 for name, tensor in network.named_parameters() if "norm" in name)


class ScaledRMSNorm(LlamaRMSNorm):
    """A norm with the parts of the usual one that computes something else."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(hidden_states)


@pytest.mark.parametrize(
    "module", [Gemma2RMSNorm(16), ScaledRMSNorm(16), nn.RMSNorm(16), nn.LayerNorm(16)], ids=lambda m: type(m).__name__
)
def test_other_norms_keep_their_forward_pass(module: nn.Module) -> None:
    assert not is_rms_norm(module)
    before = type(module).forward
    form_norms_again(module)
    assert module.forward.__func__ is before


def test_gemma_is_left_alone() -> None:
    network = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES, head_dim=4))
    form_norms_again(network)
    assert not any("forward" in vars(module) for module in network.modules())
