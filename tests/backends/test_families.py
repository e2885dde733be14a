"""Every model family of the table on a small random model: right signal, right gradient, right merge.

Fused projections (Phi-3), transposed ones (GPT-2's Conv1D), tied heads, heads with a bias (GPT-J, Phi) and softcaps (Gemma 2)
each broke a fine-tuning tool before.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTJConfig,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from config.model_families import PACKING_MODELS, find_family
from config.structured_config import ModelSection, Recipe
from utils.backends import torch_backend
from utils.backends.torch_adapters import is_linear
from utils.backends.torch_model import TorchModel
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, pack_row, pad_rows
from utils.model_source import ModelSource, find_model, list_linear_modules
from utils.tokenizer_utils import EncodedExample

pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Weights as large as trained ones: with the usual 0.02 a softcap, an attention score or a norm would change nothing.
SMALL["initializer_range"] = 0.2
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SMALL,
}
GEMMA: dict[str, Any] = {**SHAPE, "head_dim": 8}
OLD: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **SMALL}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "gpt2": GPT2Config(**OLD, **NO_DROPOUT),
    "gpt_neo": GPTNeoConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=8,
        attention_dropout=0.0,
        embed_dropout=0.0,
        resid_dropout=0.0,
        **SMALL,
    ),
    "gptj": GPTJConfig(**OLD, rotary_dim=4, **NO_DROPOUT),
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=True),
    "gemma": GemmaConfig(**GEMMA),
    "gemma2": Gemma2Config(**GEMMA, sliding_window=8, attn_logit_softcapping=1.0, final_logit_softcapping=2.0),
    "gemma3_text": Gemma3TextConfig(
        **GEMMA,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],  # by default so small a model has no full one
        final_logit_softcapping=2.0,
    ),
    "phi": PhiConfig(**{**SHAPE, "num_key_value_heads": 4}, partial_rotary_factor=0.5),
    "phi3": Phi3Config(**SHAPE),
}


# Architectures outside the table that may be packed.
MIXTURE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
OTHERS: dict[str, PretrainedConfig] = {
    "gpt_bigcode": AutoConfig.for_model("gpt_bigcode", **OLD, **NO_DROPOUT),
    "mixtral": AutoConfig.for_model("mixtral", **SHAPE, num_local_experts=4),
    "qwen2_moe": AutoConfig.for_model("qwen2_moe", **SHAPE, **MIXTURE, shared_expert_intermediate_size=16),
    "qwen3_moe": AutoConfig.for_model("qwen3_moe", **SHAPE, **MIXTURE, head_dim=8),
    "cohere2": AutoConfig.for_model("cohere2", **SHAPE, sliding_window=8),
    **{
        name: AutoConfig.for_model(name, **SHAPE)
        for name in ("cohere", "glm4", "gpt_neox", "granite", "olmo", "olmo2", "smollm3", "stablelm", "starcoder2")
    },
}


@dataclass(frozen=True)
class Family:
    """A small model on disk, loaded with adapters on the family's pinned targets, and its logits without them."""

    name: str
    folder: Path
    recipe: Recipe
    targets: tuple[str, ...]
    model: TorchModel
    untouched: np.ndarray


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Each family in turn; A and B of every adapter are random, because at B = 0 half of the gradients are zero."""
    name = request.param
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(CONFIGS[name])
    for parameter_name, parameter in network.named_parameters():
        if parameter_name.endswith("bias"):  # they start at zero, and a lost one would not be seen
            nn.init.normal_(parameter, std=0.5)
    network.save_pretrained(str(folder))
    known = find_family(name)
    assert known is not None
    recipe = Recipe(
        model={"name": str(folder), "dtype": "float32"},
        data={"train": "unused"},
        lora={"r": 4, "alpha": 8, "target_modules": known.lora_targets},
        training={"method": "sft"},
    )
    base = torch_backend.load_model(open_source(folder), recipe)
    untouched = torch_backend.compute_logits(base, make_batch())
    model = torch_backend.attach_lora(base, recipe)
    for parameter_name, parameter in model.network.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
    return Family(name, folder, recipe, known.lora_targets, model, untouched)


def open_source(folder: Path) -> ModelSource:
    """The folder as a source."""
    return ModelSource(str(folder), folder, {})


def make_batch() -> Batch:
    """Three rows of different lengths, so that padding and the sliding windows take part."""
    random = np.random.default_rng(0)
    return pad_rows(
        [
            EncodedExample(random.integers(3, 300, length), np.arange(length) >= length - learned, "rows:1")
            for length, learned in ((24, 9), (7, 6), (15, 1))
        ],
        0,
    )


def make_inputs(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as transformers takes it."""
    assert batch.attention_mask is not None
    labels = np.where(batch.loss_mask, batch.input_ids, -100)
    arrays = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.astype(np.int64), "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_the_pinned_targets_are_all_linear_modules_of_the_layers(family: Family) -> None:
    source = find_model(ModelSection(name=str(family.folder)), "test", with_weights=True)
    assert source.model_type == family.name
    assert set(list_linear_modules(source)) == set(family.targets)
    plain = AutoModelForCausalLM.from_pretrained(family.folder)
    linear = {name for name, module in plain.named_modules() if is_linear(module)}
    assert {name.rsplit(".", 1)[-1] for name in linear if "lm_head" not in name} == set(family.targets)


def test_loss_and_gradients_are_those_of_the_plain_forward_pass(family: Family) -> None:
    batch, network = make_batch(), family.model.network
    step = TorchTrainStep(family.model, family.recipe)
    network.train()
    loss = step._accumulate([batch], batch.supervised_tokens)
    ours = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    theirs = network(**make_inputs(batch), use_cache=False).loss
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-5)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    assert ours.keys() == trained.keys()
    # GPT-2 has a c_proj in the attention and one in the MLP.
    adapted = 2 * sum(2 if target == "c_proj" and family.name == "gpt2" else 1 for target in family.targets)
    assert len(ours) == 2 * adapted
    for name, parameter in trained.items():
        assert parameter.grad is not None
        assert ours[name].abs().max() > 1e-6, name
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5)
    network.zero_grad()


def test_the_loaded_model_computes_what_the_plain_attention_computes(family: Family) -> None:
    # Fused attention kernels know no softcap: Gemma 2 would be another model without an error.
    reference = AutoModelForCausalLM.from_pretrained(family.folder, attn_implementation="eager").eval()
    batch = make_batch()
    inputs = make_inputs(batch)
    with torch.no_grad():
        expected = reference(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    real = inputs["attention_mask"].bool()
    np.testing.assert_allclose(family.untouched, expected[real].numpy(), atol=1e-4)
    cap = reference.config.to_dict().get("final_logit_softcapping")
    assert cap is None or expected.abs().max() <= cap


@pytest.mark.parametrize("name", sorted(PACKING_MODELS))
def test_the_second_example_of_a_packed_row_is_what_it_is_alone(name: str) -> None:
    # OPT, Falcon, Bloom and others ignore positions that restart: there the second example sees the first.
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config({**CONFIGS, **OTHERS}[name]).eval()
    random = np.random.default_rng(0)
    first, other, second = (
        EncodedExample(random.integers(3, 300, n), np.arange(n) > 0, "rows:1") for n in (12, 12, 14)
    )
    seen = []
    for group in ([first, second], [other, second], [second]):
        batch = pack_row(group)
        ids, positions = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.position_ids)
        with torch.no_grad():
            seen.append(network(input_ids=ids, position_ids=positions, use_cache=False).logits[0, -14:])
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-5)  # experts round otherwise in other company
    torch.testing.assert_close(seen[0], seen[2], rtol=1e-4, atol=1e-5)


def test_saved_adapters_reload_and_the_merged_model_reloads_with_the_same_logits(
    family: Family, tmp_path: Path
) -> None:
    batch = make_batch()
    expected = torch_backend.compute_logits(family.model, batch)
    torch_backend.save_weights(family.model, tmp_path / "adapter")
    base = torch_backend.load_model(open_source(family.folder), family.recipe)
    assert np.abs(family.untouched - expected).max() > 1e-3
    adapted = torch_backend.load_adapter(base, tmp_path / "adapter")
    np.testing.assert_array_equal(torch_backend.compute_logits(adapted, batch), expected)
    merged = torch_backend.merge_adapter(adapted)
    np.testing.assert_allclose(torch_backend.compute_logits(merged, batch), expected, atol=1e-5)
    torch_backend.save_merged(merged, tmp_path / "merged", "float32")
    reloaded = torch_backend.load_model(open_source(tmp_path / "merged"), family.recipe)
    np.testing.assert_allclose(torch_backend.compute_logits(reloaded, batch), expected, atol=1e-5)
    assert reloaded.network.config.tie_word_embeddings == CONFIGS[family.name].tie_word_embeddings
