"""Optimizers, schedules, LoRA+, noise and checkpointing against their formulas, their libraries and their papers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from config.structured_config import Recipe
from tests.backends.test_torch_backend import (
    PAD,
    UNEVEN,
    collect_gradients,
    load_trainable,
    make_examples,
    make_recipe,
    open_source,
)
from utils.backends import torch_backend
from utils.backends.torch_optimizer import build_optimizer, set_learning_rate
from utils.backends.torch_step import TorchTrainStep
from utils.batching import pad_rows
from utils.model_shape import ModelShape, measure_shape
from utils.model_source import ModelSource
from utils.optimizer_memory import count_optimizer_bytes
from utils.schedules import Scheduler, compute_learning_rate

pytestmark = pytest.mark.slow
RATE = 0.01


def make_layer(seed: int = 0) -> nn.Linear:
    """A matrix and a vector, large enough that 8 bits are used."""
    torch.manual_seed(seed)
    return nn.Linear(96, 64)


def take_steps(layer: nn.Linear, recipe: Recipe, count: int) -> tuple[torch.optim.Optimizer, list[torch.Tensor]]:
    """Steps along the same seeded gradients; returns the optimizer and the gradients of the matrix."""
    optimizer, gradients = build_optimizer(layer, recipe), []
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        for parameter in layer.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        gradients.append(layer.weight.grad.clone())
        set_learning_rate(optimizer, RATE)
        optimizer.step()
    return optimizer, gradients


def test_adamw_follows_its_formula_and_decays_matrices_only() -> None:
    # Decoupled weight decay, arXiv 1711.05101, algorithm 2; a first step is the sign of the gradient.
    before, layer = make_layer(), make_layer()
    take_steps(layer, make_recipe("x", weight_decay=0.1), 1)
    generator = torch.Generator().manual_seed(7)
    weight, bias = (torch.randn(p.shape, generator=generator) for p in before.parameters())
    torch.testing.assert_close(layer.weight, before.weight * (1 - RATE * 0.1) - RATE * weight.sign())
    torch.testing.assert_close(layer.bias, before.bias - RATE * bias.sign())
    assert isinstance(build_optimizer(layer, make_recipe("x")), torch.optim.AdamW)
    assert build_optimizer(layer, make_recipe("x")).defaults["fused"] is True


def test_adafactor_follows_its_paper_at_the_recipes_learning_rate() -> None:
    # arXiv 1804.04235, algorithm 4 with the rate in place of its relative step: factored V, update clipped at RMS 1.
    layer, expected = make_layer(), make_layer().weight.detach().double()
    _, gradients = take_steps(layer, make_recipe("x", optimizer="adafactor", weight_decay=0.1), 3)
    rows, columns = torch.zeros(64, dtype=torch.float64), torch.zeros(96, dtype=torch.float64)
    for step, gradient in enumerate(gradients, start=1):
        keep, square = 1 - step**-0.8, gradient.double() ** 2 + 1e-30
        rows = keep * rows + (1 - keep) * square.mean(1)
        columns = keep * columns + (1 - keep) * square.mean(0)
        update = gradient.double() / torch.sqrt(torch.outer(rows, columns) / rows.mean())
        update = update / max(1.0, float(update.pow(2).mean().sqrt()))
        expected = expected * (1 - RATE * 0.1) - RATE * update
    torch.testing.assert_close(layer.weight.detach(), expected.float(), rtol=1e-5, atol=1e-6)


def test_adafactor_moves_a_matrix_that_starts_at_zero_as_far_as_any_other() -> None:
    # torch.optim.Adafactor scales by the size of the tensor: LoRA's B would get a thousandth of the step.
    for build, low, high in (
        (lambda layer: build_optimizer(layer, make_recipe("x", optimizer="adafactor")), 0.5 * RATE, 1.5 * RATE),
        (lambda layer: torch.optim.Adafactor(layer.parameters(), lr=RATE), 0.0, 2e-3 * RATE),
    ):
        layer = make_layer()
        nn.init.zeros_(layer.weight)
        optimizer: torch.optim.Optimizer = build(layer)
        layer.weight.grad = torch.randn_like(layer.weight)
        layer.bias.grad = torch.zeros_like(layer.bias)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.step()
        assert low <= float(layer.weight.detach().pow(2).mean().sqrt()) <= high


def test_8_bit_adamw_takes_the_steps_of_adamw_with_moments_of_a_byte() -> None:
    # bitsandbytes has a slow CPU version of its kernel: enough to see what the GPU would do.
    exact, small = make_layer(), make_layer()
    take_steps(exact, make_recipe("x", weight_decay=0.1), 5)
    optimizer, _ = take_steps(small, make_recipe("x", weight_decay=0.1, optimizer="adamw_8bit"), 5)
    moved = exact.weight.detach() - make_layer().weight.detach()
    error = small.weight.detach() - exact.weight.detach()
    assert float(error.norm() / moved.norm()) < 0.1
    assert {optimizer.state[small.weight][name].dtype for name in ("state1", "state2")} == {torch.uint8}
    assert optimizer.state[small.bias]["state1"].dtype == torch.float32


def count_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all moments; single numbers and the tables that all 8-bit tensors share are left out."""
    return sum(
        value.nbytes
        for state in optimizer.state.values()
        for name, value in state.items()
        if isinstance(value, torch.Tensor) and name not in ("step", "RMS", "qmap1", "qmap2")
    )


def find_shape(folder: Path) -> ModelShape:
    """The shape as the prediction sees it."""
    from transformers import AutoConfig

    shape = measure_shape(ModelSource(str(folder), folder, AutoConfig.from_pretrained(folder).to_dict()))
    assert shape is not None
    return shape


@pytest.mark.parametrize("lora", [{"r": 64, "alpha": 128}, {}], ids=["adapters", "all weights"])
@pytest.mark.parametrize("name", ["adamw", "adafactor", "adamw_8bit"])
def test_the_state_is_as_large_as_predicted(tiny_llama: Path, name: str, lora: dict[str, Any]) -> None:
    recipe = make_recipe(tiny_llama, lora=lora, optimizer=name)
    model = load_trainable(tiny_llama, recipe)
    step = TorchTrainStep(model, recipe)
    step.step([pad_rows(make_examples(UNEVEN), PAD)], 1e-3)
    predicted = count_optimizer_bytes(recipe, find_shape(tiny_llama))
    assert count_state_bytes(step.optimizer) == pytest.approx(predicted, rel=0.002)
    adamw = count_optimizer_bytes(make_recipe(tiny_llama, lora=lora), find_shape(tiny_llama))
    assert predicted == adamw if name == "adamw" else predicted < adamw
    if name == "adafactor":
        assert predicted < 0.2 * adamw


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "adamw_8bit"])
def test_every_optimizer_learns(tiny_llama: Path, optimizer: str) -> None:
    recipe = make_recipe(tiny_llama, optimizer=optimizer)
    model = torch_backend.attach_lora(torch_backend.load_model(open_source(tiny_llama), recipe), recipe)
    step = torch_backend.make_step(model, recipe)
    batch = pad_rows(make_examples([(20, 19)]), PAD)
    losses = [step.step([batch], 5e-3).loss for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5


def test_lora_plus_groups_are_those_of_peft(tiny_llama: Path) -> None:
    from peft.optimizers import create_loraplus_optimizer

    recipe = make_recipe(tiny_llama, lora={"r": 4, "plus_ratio": 16.0}, weight_decay=0.05, learning_rate=RATE)
    network = load_trainable(tiny_llama, recipe).network
    ours = build_optimizer(network, recipe)
    set_learning_rate(ours, RATE)
    theirs = create_loraplus_optimizer(
        network, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16.0, loraplus_weight_decay=0.05
    )
    names = {parameter: name for name, parameter in network.named_parameters()}

    def describe(optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
        return {
            names[parameter]: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
        }

    assert describe(ours) == describe(theirs)
    assert {rate for rate, _ in describe(ours).values()} == {RATE, 16 * RATE}


def test_lora_plus_moves_b_further_and_a_no_further(tiny_llama: Path) -> None:
    moved: dict[float | None, dict[str, float]] = {}
    for ratio in (None, 8.0):
        recipe = make_recipe(tiny_llama, lora={"r": 4, "plus_ratio": ratio})
        model = load_trainable(tiny_llama, recipe)
        before = {n: p.detach().clone() for n, p in model.network.named_parameters() if p.requires_grad}
        TorchTrainStep(model, recipe).step([pad_rows(make_examples(UNEVEN), PAD)], 1e-4)
        after = dict(model.network.named_parameters())
        moved[ratio] = {name: float((after[name].detach() - old).norm()) for name, old in before.items()}
    for name, distance in moved[None].items():
        assert moved[8.0][name] == pytest.approx(distance * (8 if "lora_B" in name else 1), rel=1e-3), name


@pytest.mark.parametrize("scheduler", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (10, 0), (10, 3), (97, 5), (200, 6)])
def test_schedules_equal_those_of_transformers(scheduler: Scheduler, total: int, warmup: int) -> None:
    # transformers counts from 0 and gives step 0 no rate at all: its step k is ours where its warmup is one step longer.
    from transformers import optimization

    from utils.schedules import count_decay_steps

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = (warmup + 1, total + 1)
    theirs = {
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, *steps),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, *steps),
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup + 1),
        "wsd": lambda: optimization.get_wsd_schedule(
            optimizer, warmup + 1, count_decay_steps(total, warmup), total + 1, decay_type="linear"
        ),
    }[scheduler]()
    expected = [theirs.lr_lambdas[0](step) for step in range(1, total + 1)]
    ours = [
        compute_learning_rate(step, total, peak=1.0, scheduler=scheduler, warmup_steps=warmup)
        for step in range(1, total + 1)
    ]
    assert ours == pytest.approx(expected)


def test_noise_changes_training_and_no_pass_without_gradients(tiny_llama: Path) -> None:
    # A reference pass of DPO in train mode would otherwise be measured on noisy embeddings.
    batch = pad_rows(make_examples(UNEVEN), PAD)
    plain, noisy = make_recipe(tiny_llama), make_recipe(tiny_llama, neftune_alpha=15.0)
    # Noise keeps its padding, and without it sums are rounded otherwise.
    clean_model = replace(load_trainable(tiny_llama, plain), runs_flat=False)
    model = load_trainable(tiny_llama, noisy)
    step = TorchTrainStep(model, noisy)
    assert step.noise is not None
    step.noise.lengths = torch.from_numpy(batch.lengths)
    assert torch_backend.evaluate(model, [batch]) == torch_backend.evaluate(clean_model, [batch])

    embeddings, ids = model.network.get_input_embeddings(), torch.from_numpy(batch.input_ids)
    model.network.train()
    with torch.no_grad():
        reference = embeddings(ids)
    with torch.inference_mode():
        assert torch.equal(embeddings(ids), reference)
    assert not torch.equal(embeddings(ids), reference)
    losses = {collect_gradients(model, noisy, [batch])[0] for _ in range(2)}
    assert len(losses | {collect_gradients(clean_model, plain, [batch])[0]}) == 3


@pytest.mark.parametrize(("value", "on"), [(True, True), (False, False), ("auto", False)])
def test_checkpointing_is_on_only_after_a_decision(tiny_llama: Path, value: bool | str, on: bool) -> None:
    recipe = make_recipe(tiny_llama, gradient_checkpointing=value)
    model = load_trainable(tiny_llama, recipe)
    TorchTrainStep(model, recipe)
    assert model.network.is_gradient_checkpointing is on


@pytest.mark.parametrize("lora", [None, {}], ids=["adapters", "all weights"])
def test_checkpointing_gives_the_gradients_of_keeping_everything(tiny_llama: Path, lora: dict[str, Any] | None) -> None:
    batches = [pad_rows(make_examples(UNEVEN)[:4], PAD), pad_rows(make_examples(UNEVEN)[4:], PAD)]
    results = []
    for value in (False, True):
        recipe = make_recipe(tiny_llama, lora=lora, gradient_checkpointing=value)
        results.append(collect_gradients(load_trainable(tiny_llama, recipe), recipe, batches))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)
