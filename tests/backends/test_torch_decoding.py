"""Answers of many prompts at once are those that transformers' generate gives to each alone, for every architecture."""

from __future__ import annotations

import copy
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from config.structured_config import GenerationSection, Recipe
from tests.backends.test_families import CONFIGS, OTHERS, SHAPE
from utils.backends import GenerationSettings, torch_attention, torch_backend
from utils.backends.torch_decoding import SLOT_MODELS, Decoder, Row, count_shared, uses_slots
from utils.backends.torch_generation import cut_at_stop
from utils.backends.torch_head import find_head
from utils.backends.torch_model import TorchModel
from utils.backends.torch_sampling import choose_tokens, make_processors
from utils.batching import Ids
from utils.device_manager import MachinePlan
from utils.logging import get_logger

LENGTHS = (3, 9, 1, 14, 6, 20, 2, 11, 5)  # more than the 4 that are answered at once, in no order
STOP_IDS = tuple(range(2, 30))  # a tenth of the vocabulary, so that rows end at different steps


def make_model(config: PreTrainedConfig, seed: int = 0, *, frozen: bool = True) -> TorchModel:
    """A small random model in float32 on the CPU; one that is trained keeps its head to itself."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config)
    for name, parameter in network.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.5)
    plan = MachinePlan("cpu", "a cpu", torch.float32, 2**30, 1, ())
    return TorchModel(network.eval().requires_grad_(not frozen), plan, Accelerator(cpu=True), "base")


def make_prompts(prefix: int = 0) -> list[Ids]:
    """Prompts of different lengths that begin with the same tokens."""
    random = np.random.default_rng(0)
    common = random.integers(30, 300, prefix)
    return [np.concatenate([common, random.integers(30, 300, length)]) for length in LENGTHS]


def make_settings(**values: Any) -> GenerationSettings:
    """Settings with many stop tokens."""
    return GenerationSettings(GenerationSection(**{"max_new_tokens": 20, **values}), STOP_IDS, 0)


def answer_alone(model: TorchModel, prompts: Sequence[Ids], settings: GenerationSettings) -> list[list[int]]:
    """The oracle: transformers' generate, one prompt after the other."""
    network: Any = model.network
    config = settings.generation.to_generation_config(list(settings.stop_ids), settings.pad_id)
    answers = []
    for prompt in prompts:
        ids = torch.from_numpy(prompt)[None]
        new = network.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[
            0, len(prompt) :
        ].tolist()
        answers.append(cut_at_stop(new, settings.stop_ids))
    return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "prefix"), [*((name, 7) for name in sorted({**CONFIGS, **OTHERS})), ("llama", 0), ("gpt2", 0)]
)
def test_rows_that_come_and_go_are_answered_as_each_is_alone(name: str, prefix: int) -> None:
    model, prompts = make_model({**CONFIGS, **OTHERS}[name], frozen=prefix > 0), make_prompts(prefix)
    assert (find_head(model.network) is not None) == (prefix > 0)
    assert uses_slots(model.network) == (name in SLOT_MODELS)
    endless = GenerationSettings(GenerationSection(max_new_tokens=20), (), 0)
    answers = answer_alone(model, prompts, endless)
    # Stop tokens that occur, so that rows end at different steps and others take their places.
    stop_ids = (answers[0][2], answers[3][7], answers[6][4])
    expected = [cut_at_stop(answer, stop_ids) for answer in answers]
    assert len({len(answer) for answer in expected}) > 1
    assert torch_backend.generate(model, prompts, replace(endless, stop_ids=stop_ids), 4) == expected


def test_a_small_llama_answers_a_batch_as_it_answers_each_prompt_whatever_the_number_at_once() -> None:
    model, prompts, settings = make_model(CONFIGS["llama"]), make_prompts(), make_settings()
    expected = answer_alone(model, prompts, settings)
    for batch_size in (1, 2, 4, 100):
        counts: list[int] = []
        assert torch_backend.generate(model, prompts, settings, batch_size, counts.append) == expected
        assert sorted(counts) == sorted(map(len, expected))
    assert torch_backend.generate(model, [], settings, 4) == []


def test_a_prompt_that_is_asked_twice_gets_the_same_answer_twice() -> None:
    # All of both prompts but the last token is common: nothing is left to be read.
    model, settings = make_model(CONFIGS["llama"]), make_settings()
    prompts = make_prompts()[3:4] * 2
    assert torch_backend.generate(model, prompts, settings, 4) == answer_alone(model, prompts, settings)


def test_answers_that_outgrow_the_first_cache_stay_the_same() -> None:
    model, prompts = make_model(LlamaConfig(**SHAPE, max_position_embeddings=512)), make_prompts(3)[:4]
    settings = GenerationSettings(GenerationSection(max_new_tokens=160), (2,), 0)
    assert torch_backend.generate(model, prompts, settings, 3) == answer_alone(model, prompts, settings)


@pytest.mark.parametrize(("name", "kept_apart"), [("llama", True), ("gemma2", False), ("stablelm", False)])
def test_what_all_prompts_begin_with_is_in_no_slot(name: str, kept_apart: bool) -> None:
    # Gemma 2 has no fused attention; StableLM hands nothing down to it. Their rows read the same columns as if they were their own.
    model = make_model(copy.deepcopy({**CONFIGS, **OTHERS}[name]))
    prompts = [prompt.tolist() for prompt in make_prompts(30)]
    settings = GenerationSettings(GenerationSection(max_new_tokens=5), (), 0)
    with torch.inference_mode(), torch_attention.use(model.network) as is_used:
        decoder = Decoder(model, settings, 4, prompts)
        decoder.read_shared(apart=is_used)
        decoder.answer(deque(Row(index, list(prompt)) for index, prompt in enumerate(prompts)), lambda row: None)
    assert bool(decoder.seen) == kept_apart
    for layer in decoder.cache.layers:
        assert layer.keys.shape[0] == layer.values.shape[0] == 4
        assert layer.keys.shape[2] == layer.values.shape[2] == max(LENGTHS) + 5
        assert layer.shared[0].shape[2] == layer.shared[1].shape[2] == 30


def test_answering_leaves_the_network_the_attention_that_it_had() -> None:
    model = make_model(copy.deepcopy(CONFIGS["llama"]))
    network: Any = model.network
    torch_backend.generate(model, make_prompts(7), make_settings(), 4)
    assert network.config._attn_implementation == "sdpa"

    def fail(*_: object) -> None:
        raise RuntimeError

    network.base_model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError):
        torch_backend.generate(model, make_prompts(7), make_settings(), 4)
    assert network.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("window", [None, 4])
def test_one_token_sees_what_its_row_shares_and_what_is_its_own(
    dtype: torch.dtype, rounding: float, window: int | None
) -> None:
    torch.manual_seed(0)
    rows, heads, key_heads, shared, own, width = 3, 6, 2, 5, 8, 16
    query = torch.randn(rows, heads, 1, width)
    first, second = torch.randn(2, 1, key_heads, shared, width), torch.randn(2, rows, key_heads, own, width)
    last = torch.tensor([[5], [9], [12]])  # the second row's window begins in its own columns, the first one's before
    columns = torch.arange(shared + own)
    mask = columns <= last
    if window is not None:
        mask &= columns > last - window
    keys, values = torch.cat([first.expand(-1, rows, -1, -1, -1), second], dim=3)
    expected = functional.scaled_dot_product_attention(
        query, keys, values, mask[:, None, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    query, first, second = query.to(dtype), first.to(dtype), second.to(dtype)
    got = torch_attention.attend_apart(
        query, *second, tuple(first), mask[:, None, None], 0.3, is_hidden=window is not None
    )
    torch.testing.assert_close(got.float(), expected, rtol=rounding, atol=rounding)


def test_a_repetition_penalty_sees_the_row_alone_and_no_padding() -> None:
    model, prompts = make_model(CONFIGS["llama"]), make_prompts()
    settings = make_settings(repetition_penalty=3.0)
    expected = answer_alone(model, prompts, settings)
    assert expected != answer_alone(model, prompts, make_settings())
    assert torch_backend.generate(model, prompts, settings, 4) == expected


def test_a_sampled_answer_depends_on_the_seed_and_on_no_other_prompt() -> None:
    model, prompts = make_model(CONFIGS["llama"]), make_prompts(4)
    settings = make_settings(temperature=1.3, top_p=0.9)
    others = [*prompts[:5], *make_prompts()[5:]]
    answers = []
    for asked, batch_size, seed in ((prompts, 4, 0), (prompts, 9, 0), (others, 2, 0), (prompts, 4, 1)):
        torch.manual_seed(seed)
        answers.append(torch_backend.generate(model, asked, settings, batch_size))
    assert answers[0] == answers[1]
    assert answers[0][:5] == answers[2][:5]
    assert answers[0] != answers[3]


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.4},
        {"temperature": 1.0},
        {"temperature": 2.0, "top_k": 5},
        {"repetition_penalty": 0.5},
    ],
)
def test_the_processors_are_those_of_transformers_generate(values: dict[str, Any]) -> None:
    network: Any = make_model(CONFIGS["llama"]).network
    section = GenerationSection(**values)
    config, kwargs = network._prepare_generation_config(section.to_generation_config([2], 0))
    theirs = network._get_logits_processor(config, input_ids_seq_length=4)
    logits, ids = torch.randn(3, 300) * 3, torch.randint(300, (3, 4))
    assert not kwargs
    torch.testing.assert_close(make_processors(section)(ids, logits.clone()), theirs(ids, logits.clone()))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2, 0.0])
    logits = probabilities.log().expand(20_000, 5)
    generators = [np.random.default_rng([7, row]) for row in range(20_000)]
    drawn = choose_tokens(logits, [[0]] * 20_000, generators, make_processors(GenerationSection(temperature=1.0)))
    shares = np.bincount(drawn, minlength=5) / 20_000
    np.testing.assert_allclose(shares, probabilities.numpy(), atol=0.012)
    assert shares[1] == shares[4] == 0


def test_an_adapter_folded_into_the_weights_answers_as_it_does_beside_them() -> None:
    model, prompts, settings = make_model(CONFIGS["llama"]), make_prompts(), make_settings()
    recipe = Recipe(model={"name": "x"}, data={"train": "unused"}, lora={"r": 4}, training={"method": "sft"})
    untouched = torch_backend.generate(model, prompts, settings, 4)
    adapted = torch_backend.attach_lora(replace(model, base_name="x"), recipe)
    for name, parameter in adapted.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    beside = torch_backend.generate(adapted, prompts, settings, 4)
    assert beside == answer_alone(adapted, prompts, settings) != untouched
    assert torch_backend.generate(torch_backend.merge_adapter(adapted), prompts, settings, 4) == beside


def test_a_sampled_answer_depends_on_what_the_model_does_to_its_logits() -> None:
    scaled = make_model(copy.deepcopy(OTHERS["granite"]))
    plain = make_model(copy.deepcopy(OTHERS["granite"]))
    scaled.network.config.logits_scaling, plain.network.config.logits_scaling = 0.02, 1.0
    answers = []
    for model, divisor in ((scaled, 1.0), (plain, 0.02), (plain, 50.0)):  # the last one undoes the second
        with torch.no_grad():
            model.network.get_output_embeddings().weight.div_(divisor)
        torch.manual_seed(0)
        answers.append(torch_backend.generate(model, make_prompts(), make_settings(temperature=1.0), 4))
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_positions_that_stretch_with_the_longest_row_are_left_to_transformers(kind: str) -> None:
    # Phi-3 with a long context chooses its rotation by the longest row of the batch: neighbours would change an answer.
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4} if kind == "longrope" else {"factor": 2.0}
    rope = {"rope_type": kind, "rope_theta": 10_000.0, "original_max_position_embeddings": 16, **factors}
    config = LlamaConfig(**SHAPE, max_position_embeddings=64, rope_parameters=rope)
    assert not uses_slots(make_model(config).network)
    assert uses_slots(make_model(CONFIGS["llama"]).network)


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])  # with slots and without
def test_fewer_rows_are_answered_at_once_where_their_cache_might_not_fit(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = copy.deepcopy({**CONFIGS, **OTHERS}[name])
    model = make_model(config)
    config.max_position_embeddings = 2**40
    seen: list[int] = []

    def watch(_: nn.Module, arguments: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        seen.append(len(arguments[0] if arguments else named["input_ids"]))

    model.network.base_model.register_forward_pre_hook(watch, with_kwargs=True)
    generation = GenerationSection().model_copy(update={"max_new_tokens": 2**36})  # more than the machine can hold
    everything = tuple(range(config.vocab_size))  # answers that may be long, and end at once
    logger = get_logger()
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, logger.name)
    answers = torch_backend.generate(model, make_prompts(), GenerationSettings(generation, everything, 0), 4)
    logger.removeHandler(caplog.handler)
    assert answers == [[]] * len(LENGTHS)
    assert "rows answered at once: 1 instead of 4" in caplog.text
    assert set(seen) == {1}


def test_the_common_beginning_ends_where_any_prompt_differs_or_ends() -> None:
    assert count_shared([[1, 2, 3, 4], [1, 2, 9], [1, 2, 3]]) == 2
    assert count_shared([[1, 2, 3], [1, 2, 3, 4]]) == 2  # a row's last token is its first step
    assert count_shared([[1, 2, 3], [1, 2, 3]]) == 2
    assert count_shared([[1, 2, 3]]) == 0
    assert count_shared([[1], [2]]) == 0
    assert count_shared([[], [2]]) == 0
