"""New models on torch: GPT-2's initialisation, one seed one model, and transformers' own loss on a window."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from config.structured_config import GenerationSection, Recipe, ScratchSection
from utils.backends import GenerationSettings, torch_backend
from utils.backends.torch_scratch import build_network
from utils.batching import pad_prompts_left, pad_rows
from utils.model_shape import read_shape
from utils.model_source import ModelSource
from utils.text_windows import make_examples

SIZES: dict[str, Any] = {"layers": 8, "heads": 4, "width": 128, "context": 32}
ARCHITECTURES = pytest.mark.parametrize("architecture", ["llama", "gpt2"])


def make_config(architecture: Any, **sizes: Any) -> dict[str, Any]:
    return ScratchSection(architecture=architecture, **{**SIZES, **sizes}).to_model_config(70, 0)


def make_recipe(architecture: str, **generation: Any) -> Recipe:
    values = {
        "model": {"name": "new", "init": "scratch"},
        "scratch": {"architecture": architecture, **SIZES},
        "data": {"train": "x.txt"},
        "training": {"method": "sft"},
        "generation": generation,
    }
    return Recipe(**values)


def load_new(architecture: str, seed: int = 0, **sizes: Any) -> Any:
    source = ModelSource("new", Path("none"), make_config(architecture, **sizes), seed=seed)
    return torch_backend.load_model(source, make_recipe(architecture))


@ARCHITECTURES
def test_matrices_start_normal_and_residual_projections_smaller(architecture: str) -> None:
    network = build_network(make_config(architecture), 0)
    small = 0.02 / math.sqrt(2 * 8)
    for name, parameter in network.named_parameters():
        if parameter.ndim < 2:
            assert set(parameter.unique().tolist()) == {0.0 if name.endswith("bias") else 1.0}, name
            continue
        is_residual = name.split(".")[-2] in ("c_proj", "o_proj", "down_proj")
        # The standard error of a standard deviation over n numbers is its value / sqrt(2 n).
        tolerance = 5 / math.sqrt(2 * parameter.numel())
        assert parameter.std().item() == pytest.approx(small if is_residual else 0.02, rel=tolerance), name
        assert abs(parameter.mean().item()) < 5 * 0.02 / math.sqrt(parameter.numel()), name


def test_the_scales_are_those_of_transformers_gpt2() -> None:
    torch.manual_seed(0)
    config = make_config("gpt2")
    del config["model_type"]
    reference = dict(GPT2LMHeadModel(GPT2Config(**config)).named_parameters())
    ours = dict(build_network(make_config("gpt2"), 0).named_parameters())
    assert ours.keys() == reference.keys()
    for name, parameter in ours.items():
        assert parameter.shape == reference[name].shape
        assert parameter.std().item() == pytest.approx(reference[name].std().item(), rel=0.08, abs=1e-9), name


@ARCHITECTURES
def test_one_seed_is_one_model_whatever_was_drawn_before(architecture: str) -> None:
    first = build_network(make_config(architecture), 1).state_dict()
    torch.manual_seed(99)
    torch.rand(7)
    state = torch.get_rng_state()
    second, other = build_network(make_config(architecture), 1), build_network(make_config(architecture), 2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], tensor) for name, tensor in second.state_dict().items())
    assert not torch.equal(other.get_input_embeddings().weight, second.get_input_embeddings().weight)


@ARCHITECTURES
def test_head_and_embedding_are_one_matrix_also_after_a_reload(architecture: str, tmp_path: Path) -> None:
    model = load_new(architecture)
    assert model.network.get_output_embeddings().weight is model.network.get_input_embeddings().weight
    torch_backend.save_weights(model, tmp_path)
    again = torch_backend.load_model(ModelSource("x", tmp_path, {}), make_recipe(architecture))
    assert again.network.get_output_embeddings().weight is again.network.get_input_embeddings().weight
    assert again.network.dtype == torch.float32
    assert torch.equal(again.network.get_input_embeddings().weight, model.network.get_input_embeddings().weight)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is True


@ARCHITECTURES
def test_the_table_of_shapes_counts_the_parameters(architecture: str) -> None:
    shape = read_shape(make_config(architecture))
    assert shape is not None
    assert shape.parameters == torch_backend.count_parameters(load_new(architecture))[1]


@ARCHITECTURES
def test_the_loss_of_a_window_is_that_of_transformers(architecture: str) -> None:
    model = load_new(architecture)
    tokens = np.random.default_rng(0).integers(2, 70, 100).astype(np.int32)
    windows = list(make_examples(tokens, 32, 24, held_out=True))
    got = torch_backend.evaluate(model, [pad_rows(windows, 0)])
    for window, (nats, count) in zip(windows, got, strict=True):
        ids = torch.from_numpy(window.input_ids)[None]
        labels = ids.masked_fill(~torch.from_numpy(window.loss_mask)[None], -100)
        expected = model.network(input_ids=ids, labels=labels).loss.item()
        assert count == window.supervised_tokens
        assert nats / count == pytest.approx(expected, abs=1e-5)
    # A new model knows nothing yet: its loss is the logarithm of the vocabulary's size.
    assert got[0][0] / got[0][1] == pytest.approx(math.log(70), abs=0.1)


@ARCHITECTURES
@pytest.mark.parametrize("length", [3, 20, 31, 90])
def test_an_answer_goes_on_beyond_the_context_and_a_stream_gives_the_same(architecture: str, length: int) -> None:
    model = load_new(architecture)
    prompt = np.random.default_rng(length).integers(2, 70, length)
    settings = GenerationSettings(GenerationSection(max_new_tokens=70), (0,), 0)
    (ids,) = torch_backend.generate(model, [prompt], settings, 1)
    assert list(torch_backend.stream(model, pad_prompts_left([prompt], 0), settings)) == ids
    assert len(ids) == 70


def test_up_to_the_context_the_sliding_window_changes_nothing() -> None:
    model = load_new("llama")
    prompt = np.arange(5, 15)
    short = GenerationSettings(GenerationSection(max_new_tokens=22), (), 0)
    long = GenerationSettings(GenerationSection(max_new_tokens=40), (), 0)
    (within,), (beyond,) = (torch_backend.generate(model, [prompt], settings, 1) for settings in (short, long))
    assert beyond[:22] == within


def test_a_prompt_that_goes_beyond_the_context_disturbs_no_other() -> None:
    model = load_new("gpt2")
    prompts = [np.arange(5, 15), np.arange(20, 50)]
    settings = GenerationSettings(GenerationSection(max_new_tokens=20), (0,), 0)
    together = torch_backend.generate(model, prompts, settings, 2)
    alone = [torch_backend.generate(model, [prompt], settings, 1)[0] for prompt in prompts]
    assert together == alone
