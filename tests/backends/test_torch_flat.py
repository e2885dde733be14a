"""The quick path against the plain one: flat batches, the chunked head, and LoRA as one operation, on every family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from config.structured_config import LoraSection, Recipe
from tests.backends.test_families import CONFIGS, OTHERS, open_source
from utils import machine
from utils.backends import torch_backend, torch_head
from utils.backends.torch_beginning import compute_beginning
from utils.backends.torch_head import Head, compute_losses, find_head
from utils.backends.torch_lora import FusedLinear
from utils.backends.torch_losses import compute_token_losses
from utils.backends.torch_model import TorchModel
from utils.batching import Batch, pad_rows, split_rows
from utils.piece_encoder import EncodedExample

pytestmark = pytest.mark.slow
# transformers computes their attention in plain operations, so their rows stay padded.
PADDED = {"gpt_neo", "gptj", "gemma2"}
HEADS = {"gemma2": "a soft cap", "gemma3_text": "a soft cap", "cohere": "a scale", "granite": "a scale"}


def load(name: str, folder: Path, lora: dict[str, Any] | None = None) -> tuple[TorchModel, Recipe]:
    """A small model of an architecture, trainable; B of each adapter is random, for at 0 half of the gradients are."""
    torch.manual_seed(0)
    config = {**CONFIGS, **OTHERS}[name]
    if name == "granite":
        config.logits_scaling = 3.0
    AutoModelForCausalLM.from_config(config).save_pretrained(str(folder))
    recipe = Recipe(
        model={"name": str(folder), "dtype": "float32"},
        data={"train": "unused"},
        lora={"r": 4, "alpha": 8} if lora is None else lora or None,
        training={"method": "sft"},
    )
    model = torch_backend.attach_lora(torch_backend.load_model(open_source(folder), recipe), recipe)
    for parameter_name, parameter in model.network.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return model, recipe


def make_batch() -> Batch:
    """Rows that begin alike, longer than the window of the architectures that have one."""
    random = np.random.default_rng(0)
    beginning = random.integers(3, 300, 12)
    rows = []
    for length, learned in ((24, 9), (7, 6), (15, 3)):
        ids = np.concatenate([beginning, random.integers(3, 300, length)])
        rows.append(EncodedExample(ids, np.arange(len(ids)) >= len(ids) - learned, "rows:1"))
    return pad_rows(rows, 0)


def differentiate(model: TorchModel, batch: Batch, weights: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Token losses, and gradients of a sum in which each of them counts differently."""
    model.network.train()
    losses = compute_token_losses(model, batch)
    named = {name: p for name, p in model.network.named_parameters() if p.requires_grad}
    return losses.detach(), dict(zip(named, torch.autograd.grad((losses * weights).sum(), named.values()), strict=True))


@pytest.mark.parametrize(
    ("name", "everything"),
    [
        *((name, False) for name in sorted([*CONFIGS, "cohere", "granite", "mixtral", "qwen3_moe"])),
        *((name, True) for name in ("llama", "gpt2", "gemma3_text")),
    ],
)
def test_losses_and_gradients_are_those_of_padded_rows(name: str, everything: bool, tmp_path: Path) -> None:
    model, _ = load(name, tmp_path, {} if everything else None)
    assert model.runs_flat == (name not in PADDED)
    batch = make_batch()
    weights = torch.rand(batch.supervised_tokens) - 0.3
    losses, gradients = differentiate(model, batch, weights)
    expected, plain = differentiate(replace(model, runs_flat=False), batch, weights)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    for parameter_name, gradient in plain.items():
        torch.testing.assert_close(gradients[parameter_name], gradient, rtol=1e-3, atol=2e-4)


def make_rows() -> list[Batch]:
    """So many rows, each in a pass of its own, that a pass more for their beginning pays off."""
    return split_rows([make_batch()]) * 4


# Tokens of each pass over `make_rows`: the beginning once, and what every row has behind it.
COMPUTED = sorted([12, *[24, 7, 15] * 4])


def count_computed(model: TorchModel) -> list[int]:
    """Gets the tokens of every forward pass from now on."""
    counts: list[int] = []
    embeddings: Any = model.base.get_input_embeddings()
    embeddings.register_forward_pre_hook(lambda _, inputs: counts.append(inputs[0].numel()))
    return counts


def take_step(model: TorchModel, recipe: Recipe, batches: Sequence[Batch]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients that a step adds up over its micro-batches."""
    step = torch_backend.make_step(model, recipe)
    model.network.train()
    loss = step._accumulate(batches, sum(batch.supervised_tokens for batch in batches))
    gradients = {name: p.grad for name, p in model.network.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    return loss, gradients


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        *((name, None) for name in sorted({*CONFIGS, "cohere", "granite", "mixtral", "qwen3_moe"} - PADDED)),
        *((name, {}) for name in ("llama", "gpt2", "gemma3_text")),
        ("llama", {"r": 4, "alpha": 8, "target_modules": ["q_proj"]}),  # keys of the first layer have no gradient
        ("llama", {"r": 4, "alpha": 8, "target_modules": ["1.mlp.down_proj"]}),  # nor any other
    ],
)
def test_a_step_that_computes_the_beginning_of_its_rows_once_gives_the_gradient_of_padded_rows(
    name: str, lora: dict[str, Any] | None, tmp_path: Path
) -> None:
    model, recipe = load(name, tmp_path, lora)
    batches = make_rows()
    computed = count_computed(model)
    loss, gradients = take_step(model, recipe, batches)
    assert sorted(computed) == COMPUTED
    expected, plain = take_step(replace(model, runs_flat=False), recipe, batches)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert plain.keys() == gradients.keys()
    for parameter_name, gradient in plain.items():
        torch.testing.assert_close(gradients[parameter_name], gradient, rtol=1e-3, atol=2e-4)


def test_rows_of_a_step_that_begin_otherwise_share_nothing(tmp_path: Path) -> None:
    model, _ = load("llama", tmp_path)
    batches = make_rows()
    assert compute_beginning(model, batches) is not None
    assert compute_beginning(model, batches[:8]) is None  # 7 x 12 tokens: a pass of its own would cost more
    assert compute_beginning(replace(model, runs_flat=False), batches) is None
    assert compute_beginning(model, batches[:1]) is None
    other = batches[0].input_ids.copy()
    other[0, 2] += 1
    assert compute_beginning(model, [*batches, replace(batches[0], input_ids=other)]) is None


def test_checkpointing_forms_the_beginning_again_with_the_same_gradient(tmp_path: Path) -> None:
    model, recipe = load("llama", tmp_path)
    loss, gradients = take_step(model, recipe, make_rows())
    training = recipe.training.model_copy(update={"gradient_checkpointing": True})
    computed = count_computed(model)
    again, formed = take_step(model, recipe.model_copy(update={"training": training}), make_rows())
    assert model.base.is_gradient_checkpointing
    assert sorted(computed) == COMPUTED
    assert again == loss
    for name, gradient in gradients.items():
        torch.testing.assert_close(formed[name], gradient, rtol=1e-5, atol=1e-6)


def test_held_out_rows_lose_the_same_behind_a_beginning_that_is_computed_once(tmp_path: Path) -> None:
    model, _ = load("llama", tmp_path)
    batches = make_rows()
    plain = torch_backend.evaluate(replace(model, runs_flat=False), batches)
    computed = count_computed(model)
    for (ours, count), (theirs, expected) in zip(torch_backend.evaluate(model, batches), plain, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
        assert count == expected
    assert sorted(computed) == COMPUTED


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_neighbour_in_the_same_pass_moves_no_loss(name: str, tmp_path: Path) -> None:
    model, _ = load(name, tmp_path)
    batch = make_batch()
    losses = compute_token_losses(model, batch)
    changed = batch.input_ids.copy()
    changed[0, 12:] = 7
    others = compute_token_losses(model, replace(batch, input_ids=changed))
    assert torch.equal(losses[9:], others[9:])
    assert not torch.allclose(losses[:9], others[:9])


@pytest.mark.parametrize("rows", [1, 4, 10**9], ids=["a row at a time", "4 rows", "all at once"])
@pytest.mark.parametrize("name", ["llama", "gptj", *HEADS])
def test_the_chunked_head_gives_the_models_own_losses(
    name: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(machine.LOGIT_BUDGETS, "cpu", 1)
    monkeypatch.setattr(machine, "FEWEST_LOGIT_ROWS", rows)
    model, _ = load(name, tmp_path)
    whole: Any = model.network.get_base_model()
    head = find_head(whole)
    assert head is not None
    assert (head.scale != 1.0 or head.softcap is not None) == (name in HEADS)
    ids = torch.randint(3, 300, (1, 23))
    hidden = whole.base_model(input_ids=ids).last_hidden_state[0].detach().requires_grad_()
    logits = whole(input_ids=ids).logits[0]
    targets = torch.randint(0, 300, (23,))
    losses = compute_losses(hidden, targets, head)
    torch.testing.assert_close(
        losses, functional.cross_entropy(logits, targets, reduction="none"), rtol=1e-4, atol=1e-5
    )
    weights = torch.rand(23) - 0.3
    (ours,) = torch.autograd.grad((losses * weights).sum(), hidden)
    plain = functional.cross_entropy(head.compute(hidden).float(), targets, reduction="none")
    (theirs,) = torch.autograd.grad((plain * weights).sum(), hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bias", [None, torch.arange(2 * torch_head.BLOCK + 300) / 1000], ids=["no bias", "a bias"])
def test_a_head_in_blocks_gives_the_logits_of_the_whole(bias: torch.Tensor | None) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(5, 8), torch.randn(2 * torch_head.BLOCK + 300, 8)
    expected = functional.linear(hidden, weight, bias)
    torch.testing.assert_close(torch_head.project(hidden, weight, bias), expected)
    leaf = hidden.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch_head.project(leaf, weight, bias).sum(), leaf)
    torch.testing.assert_close(gradient, weight.sum(0).expand(5, -1), rtol=1e-4, atol=1e-3)


def test_a_loss_far_below_the_likeliest_token_stays_exact() -> None:
    # Taken from the probability, which is 0 here, it would be infinite.
    head = Head(torch.tensor([[400.0], [0.0]]))
    hidden = torch.ones(1, 1, requires_grad=True)
    losses = compute_losses(hidden, torch.tensor([1]), head)
    assert losses.tolist() == [400.0]
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[400.0]]


@pytest.mark.parametrize("lora", [{}, {"r": 4, "alpha": 8, "modules_to_save": ["lm_head"]}], ids=["trained", "saved"])
def test_a_head_that_is_trained_is_left_to_autograd(lora: dict[str, Any], tmp_path: Path) -> None:
    model, _ = load("llama", tmp_path, lora)
    network: Any = model.network
    assert find_head(network.get_base_model() if lora else network) is None
    _, gradients = differentiate(model, make_batch(), torch.ones(18))
    assert any("lm_head" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "dropout"])
@pytest.mark.parametrize("biased", [False, True])
def test_lora_as_one_operation_equals_pefts(variant: str, biased: bool, dtype: torch.dtype) -> None:
    changes = {"dropout": 0.5} if variant == "dropout" else {"variant": variant}
    config = LoraSection.model_validate({"r": 4, "alpha": 8, "target_modules": ["0"], **changes}).to_peft_config()
    config.task_type = None
    networks: list[nn.Module] = []
    for fused in (False, True):
        torch.manual_seed(0)
        config._custom_modules = {nn.Linear: FusedLinear} if fused else None
        network = get_peft_model(nn.Sequential(nn.Linear(24, 40, bias=biased)).to(dtype), config)
        nn.init.normal_(next(p for name, p in network.named_parameters() if "lora_B" in name))
        networks.append(network)
    plain, ours = networks
    assert any(type(module) is FusedLinear for module in ours.modules())
    results = []
    for network in (plain, ours):
        torch.manual_seed(1)
        x = torch.randn(2, 5, 24).to(dtype).requires_grad_()
        output = network(x)
        output.float().square().sum().backward()
        named = {name: p.grad for name, p in network.named_parameters() if p.requires_grad}
        results.append((output, x.grad, *named.values()))
    tolerance = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for mine, theirs in zip(results[1], results[0], strict=True):
        assert mine is not None
        assert theirs is not None
        assert mine.dtype == theirs.dtype
        largest = float(theirs.abs().max())
        torch.testing.assert_close(mine / largest, theirs / largest, **tolerance)


def test_an_adapter_that_is_switched_off_changes_nothing(tmp_path: Path) -> None:
    model, _ = load("llama", tmp_path)
    network: Any = model.network
    batch = make_batch()
    with torch.no_grad(), network.disable_adapter():
        off = compute_token_losses(model, batch)
    merged = network.merge_and_unload()
    with torch.no_grad():
        on = compute_token_losses(replace(model, network=merged), batch)
    assert not torch.allclose(off, on)


@pytest.mark.parametrize("changes", [{"training": {"neftune_alpha": 5.0}}, {"lora": {"dropout": 0.1}}], ids=str)
def test_runs_that_draw_random_numbers_keep_their_padding(changes: dict[str, Any], tmp_path: Path) -> None:
    _, recipe = load("llama", tmp_path)
    values = recipe.model_dump(mode="python", exclude_none=True)
    values["training"] = {"method": "sft", **changes.get("training", {})}
    values["lora"] = {"r": 4, **changes.get("lora", {})}
    changed = Recipe.model_validate({key: values[key] for key in ("model", "data", "lora", "training")})
    assert not torch_backend.load_model(open_source(tmp_path), changed).runs_flat
