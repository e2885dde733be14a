"""The largest forward passes of a run, compared with the batches that training itself makes."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from config.structured_config import Recipe
from utils.batching import iterate_windows, make_micro_batches
from utils.machine import Machine
from utils.model_shape import ModelShape, read_shape
from utils.tokenizer_utils import EncodedExample
from utils.workload import (
    ForwardPass,
    Rows,
    Workload,
    assume_workload,
    choose_micro_batch_size,
    count_training_workers,
    find_token_budget,
    plan_workload,
)

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 1000,
}
MACHINE = Machine("cpu", 2, 2, 512, 8 << 30, 4 << 30, quick_bfloat16=False)


def make_recipe(**training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"name": "x"},
            "data": {"train": "x.jsonl", "max_length": 128},
            "lora": {},
            "training": {"method": "sft", "batch_size": 4, **training},
            "evaluation": {"batch_size": 8},
        }
    )


def find_shape(config: dict[str, Any] = LLAMA) -> ModelShape:
    shape = read_shape(config)
    assert shape is not None
    return shape


def make_examples(count: int) -> list[EncodedExample]:
    """Examples of different lengths, of which the last third is learned."""
    generator = np.random.default_rng(7)
    examples = []
    for length in generator.integers(9, 120, count):
        mask = np.arange(length) >= length - length // 3
        examples.append(EncodedExample(np.ones(length, dtype=np.int64), mask, "x:1"))
    return examples


def measure(examples: list[EncodedExample]) -> Rows:
    return Rows(
        np.array([len(example.input_ids) for example in examples], dtype=np.int64),
        np.array([example.supervised_tokens for example in examples], dtype=np.int64),
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_worst_step_is_one_that_training_takes(size: int) -> None:
    recipe, train, held_out = make_recipe(micro_batch_size=size, epochs=2), make_examples(50), make_examples(37)
    workload = plan_workload(recipe, find_shape(), MACHINE, measure(train), measure(held_out))

    steps = []
    for epoch in range(2):
        for window in iterate_windows(50, 4, recipe.seed, epoch):
            batches = make_micro_batches([train[index] for index in window], size, 0, evenly=True)
            passes = [ForwardPass(1, batch.tokens, batch.supervised_tokens, masked=False) for batch in batches]
            steps.append(tuple(sorted(passes, key=lambda item: item.tokens, reverse=True)))
    assert workload.training in [step[:2] for step in steps]
    assert (
        sum(item.tokens for item in workload.training)
        >= max(sum(item.tokens for item in step[:2]) for step in steps) * 0.95
    )
    assert workload.micro_batches == -(-4 // size)
    assert not workload.repeated
    scored = make_micro_batches(held_out, recipe.evaluation.batch_size, 0)[:2]
    assert [(item.tokens, item.supervised) for item in workload.evaluation] == [
        (batch.tokens, batch.supervised_tokens) for batch in scored
    ]


def test_padding_counts_where_random_numbers_are_drawn() -> None:
    recipe, train = make_recipe(micro_batch_size=2, neftune_alpha=5.0), make_examples(4)
    workload = plan_workload(recipe, find_shape(), MACHINE, measure(train), measure([]))
    batches = make_micro_batches(train, 2, 0)
    assert workload.training == (ForwardPass(*batches[0].input_ids.shape, batches[0].supervised_tokens, masked=True),)
    assert workload.micro_batches == len(batches)


def test_a_long_row_that_appears_once_is_found() -> None:
    lengths = np.full(1000, 10, dtype=np.int64)
    lengths[777] = 128
    nothing = np.zeros(0, dtype=np.int64)
    workload = plan_workload(make_recipe(), find_shape(), MACHINE, Rows(lengths, lengths - 1), Rows(nothing, nothing))
    assert workload.training[0].length == 128 + 10
    assert workload.evaluation == ()


def test_packed_rows_are_as_long_as_allowed() -> None:
    lengths = np.full(100, 50, dtype=np.int64)
    train = Rows(lengths, lengths // 2)
    workload = plan_workload(make_recipe(packing=True), find_shape(), MACHINE, train, train)
    assert workload.training == (ForwardPass(1, 128, 50, masked=True),) * 2
    assert not workload.repeated


def test_equal_rows_repeat_the_longest_pass() -> None:
    lengths = np.full(100, 50, dtype=np.int64)
    workload = plan_workload(
        make_recipe(micro_batch_size=1), find_shape(), MACHINE, Rows(lengths, lengths), Rows(lengths, lengths)
    )
    assert workload.repeated


def test_without_rows_the_most_that_the_recipe_allows_is_assumed() -> None:
    workload = assume_workload(make_recipe(), find_shape(), MACHINE)
    assert workload.training == (ForwardPass(1, 256, 254, masked=False),) * 2
    assert workload.evaluation == (ForwardPass(1, 8 * 128, 8 * 127, masked=False),) * 2


@pytest.mark.parametrize(
    ("batch_size", "longest", "workers", "budget", "size"),
    [(4, 99, 2, 512, 2), (16, 99, 2, 512, 5), (16, 1024, 2, 512, 1), (1, 10, 8, 512, 1), (16, 512, 1, 16_384, 16)],
)
def test_the_automatic_size_gives_every_worker_a_share_within_the_budget(
    batch_size: int, longest: int, workers: int, budget: int, size: int
) -> None:
    assert choose_micro_batch_size(batch_size, longest, workers, budget) == size


@pytest.mark.parametrize(
    ("row", "shared", "size"), [(600, 500, 2), (600, 300, 1), (225, 28, 1), (100, 60, 4), (100, 0, 2), (501, 500, 4)]
)
def test_what_all_rows_begin_with_takes_no_room_in_a_pass(row: int, shared: int, size: int) -> None:
    assert choose_micro_batch_size(8, row, 2, 256, shared) == size


def test_the_passes_that_are_foreseen_hold_a_common_beginning_once() -> None:
    lengths, nothing = np.full(16, 120, dtype=np.int64), Rows(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    def plan(shared: int, **training: Any) -> Workload:
        recipe = make_recipe(**{"batch_size": 8, "micro_batch_size": 4, **training})
        return plan_workload(recipe, find_shape(), MACHINE, Rows(lengths, lengths - 100, shared), nothing)

    def measure_passes(workload: Workload) -> tuple[list[int], int]:
        return [item.length for item in workload.training], workload.beginning

    assert measure_passes(plan(0)) == ([480, 480], 0)
    assert measure_passes(plan(110)) == ([4 * 10] * 2, 110)
    assert measure_passes(plan(20)) == ([480 - 3 * 20] * 2, 0)  # two passes: one more would cost more than it saves
    assert measure_passes(plan(20, micro_batch_size=1)) == ([100] * 2, 20)
    assert measure_passes(plan(110, packing=True, micro_batch_size="auto")) == ([128] * 2, 0)
    assert measure_passes(plan(110, neftune_alpha=5.0)) == ([120], 0)


def test_held_out_rows_that_begin_alike_are_scored_many_at_once() -> None:
    lengths = np.full(16, 120, dtype=np.int64)
    plan = partial(
        plan_workload, make_recipe(), find_shape(), replace(MACHINE, token_budget=256), Rows(lengths, lengths - 100)
    )
    assert [item.length for item in plan(Rows(lengths, lengths - 100)).evaluation] == [8 * 120] * 2
    assert [item.length for item in plan(Rows(lengths, lengths - 100, 90)).evaluation] == [90 + 8 * 30] * 2


def test_passes_are_longer_where_each_writes_a_gradient_as_large_as_the_model() -> None:
    adapted, whole = make_recipe(), make_recipe().model_copy(update={"lora": None})
    assert find_token_budget(adapted, "cpu", 256) == 256
    assert find_token_budget(whole, "cpu", 256) == 512
    assert find_token_budget(whole, "cuda", 16_384) == 16_384


def test_one_worker_trains_where_random_numbers_are_drawn() -> None:
    gpt2 = find_shape({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100})
    still = find_shape(
        {
            "model_type": "gpt2",
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": 100,
            "attn_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
        }
    )
    assert count_training_workers(make_recipe(), find_shape(), MACHINE) == 2
    assert count_training_workers(make_recipe(), gpt2, MACHINE) == 1
    assert count_training_workers(make_recipe(), still, MACHINE) == 2
    assert count_training_workers(make_recipe(), find_shape({**LLAMA, "attention_dropout": 0.1}), MACHINE) == 1
    assert count_training_workers(make_recipe(neftune_alpha=5.0), find_shape(), MACHINE) == 1
    noisy = make_recipe().model_copy(update={"lora": make_recipe().lora.model_copy(update={"dropout": 0.1})})  # type: ignore[union-attr]
    assert count_training_workers(noisy, find_shape(), MACHINE) == 1
