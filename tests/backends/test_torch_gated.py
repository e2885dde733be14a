"""Gated MLPs that keep less: the same results and gradients as transformers' own, and less in memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaMLP

from tests.backends.twins import SIZES, adapt, differentiate
from utils.backends.torch_gated import FORMS, is_gated, keep_less

CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "with a bias": LlamaConfig(**SIZES, mlp_bias=True),
    "an activation that returns its input": LlamaConfig(**SIZES, hidden_act="linear"),
    "gelu": LlamaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "phi3": Phi3Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, head_dim=8),
}


def build(name: str, *, adapted: str) -> tuple[nn.Module, ...]:
    """The same small network twice: as transformers has it, and with MLPs that keep less."""
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(CONFIGS[name])
    less = copy.deepcopy(plain)
    keep_less(less)
    assert less.model.layers[1].mlp.forward.__func__ is not type(less.model.layers[1].mlp).forward
    if adapted == "all weights":
        return plain, less
    return adapt((plain, less), "all-linear", fused=adapted == "fused")


@pytest.mark.parametrize("adapted", ["all weights", "peft", "fused"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_are_those_of_transformers(name: str, adapted: str) -> None:
    plain, less = build(name, adapted=adapted)
    (expected, expected_gradients), (got, gradients) = differentiate(plain), differentiate(less)
    assert torch.equal(got, expected)
    assert gradients.keys() == expected_gradients.keys()
    for name_, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name_], rtol=1e-5, atol=1e-6)
        assert gradient.abs().max() > 0, name_


def find_living(module: LlamaMLP, rows: torch.Tensor) -> list[bool]:
    """After a forward pass whose result is held: are the gate and the input of the last module still in memory?"""
    references = []

    def watch(_: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        watched = inputs[0] if output.shape[-1] == module.hidden_size else output
        references.append(StorageWeakRef(watched.untyped_storage()))

    handles = [module.gate_proj.register_forward_hook(watch), module.down_proj.register_forward_hook(watch)]
    result = module(rows)
    for handle in handles:
        handle.remove()
    assert result.requires_grad
    return [not reference.expired() for reference in references]


def test_the_product_of_both_projections_is_not_kept() -> None:
    module, rows = LlamaMLP(CONFIGS["llama"]), torch.randn(32, 16)
    assert find_living(module, rows) == [True, True]
    keep_less(nn.ModuleList([module]))
    assert find_living(module, rows) == [True, False]


class Scaled(LlamaMLP):
    """A module with the children of a gated MLP that computes something else, as Falcon-H1 has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


def test_a_module_that_computes_something_else_keeps_its_own_forward_pass() -> None:
    form = FORMS[frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})]
    module = Scaled(CONFIGS["llama"])
    assert not is_gated(module, form)
    keep_less(nn.ModuleList([module]))
    assert module.forward.__func__ is Scaled.forward


def test_an_activation_with_parameters_keeps_its_own_forward_pass() -> None:
    module = LlamaMLP(CONFIGS["llama"])
    module.act_fn = nn.PReLU()
    keep_less(nn.ModuleList([module]))
    assert module.forward.__func__ is LlamaMLP.forward
