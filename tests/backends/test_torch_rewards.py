"""Reward models on torch, against transformers' own forward pass, peft's, and the loss of TRL's trainer."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from config.structured_config import Recipe
from utils.backends import torch_backend
from utils.backends.torch_losses import shares_prompts
from utils.backends.torch_model import TorchModel
from utils.backends.torch_rewards import compute_rewards, find_ends
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, pad_rows, unroll_pairs
from utils.methods.pairs import join_pair, split_pair
from utils.model_source import ModelSource
from utils.piece_encoder import EncodedExample

PAD, EOS, VOCABULARY = 3, 2, 300
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, eos_token_id=EOS),
    "phi": PhiConfig(**SHAPE),
    "phi3": Phi3Config(**SHAPE, pad_token_id=0),
    "qwen2": Qwen2Config(**SHAPE),
    "mistral with a window": MistralConfig(**SHAPE, sliding_window=8),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=8),
}
SHAPES = [(12, 5, 9), (3, 14, 2), (20, 1, 1), (8, 3, 11)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random language model of each architecture, with a tokenizer whose padding token is 3."""
    root = tmp_path_factory.mktemp("models")
    words = {"<unk>": 0, "<s>": 1, "</s>": EOS, "<pad>": PAD}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), eos_token="</s>", pad_token="<pad>"
    )
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


def make_recipe(folder: Path, *, with_lora: bool = True, quantization: str = "none", **reward: Any) -> Recipe:
    """A recipe for a reward model in float32, so that comparisons can be exact."""
    return Recipe(
        model={"name": str(folder), "dtype": "float32", "quantization": quantization},
        data={"train": "unused"},
        lora={"r": 4, "alpha": 8} if with_lora else None,
        training={"method": "reward", "learning_rate": 1e-2},
        reward=reward,
    )


def load(folder: Path, recipe: Recipe, *, moved: bool = True) -> TorchModel:
    """A model with fresh adapters; `moved` gives it opinions, as after some training."""
    model = torch_backend.load_model(ModelSource(str(folder), folder, {}), recipe)
    torch.manual_seed(1)
    model = torch_backend.attach_lora(model, recipe)
    for name, parameter in model.network.named_parameters():
        if moved and parameter.requires_grad and ("lora_B" in name or "score" in name):
            nn.init.normal_(parameter, std=0.1)
    return model


def make_pairs(*, ending: int | None = None) -> list[EncodedExample]:
    """Random pairs; `ending` is written behind each answer and not learned, as templates do."""
    random = np.random.default_rng(0)
    pairs = []
    for number, (prompt, *answers) in enumerate(SHAPES):
        asked = random.integers(5, VOCABULARY, prompt)
        sides = []
        for length in answers:
            ids = np.concatenate([asked, random.integers(5, VOCABULARY, length)])
            mask = np.arange(len(ids)) >= prompt
            if ending is not None:
                ids, mask = np.append(ids, ending), np.append(mask, False)
            sides.append(EncodedExample(ids, mask, f"rows:{number}"))
        pair = join_pair(sides[0], sides[1])
        assert pair is not None
        pairs.append(pair)
    return pairs


def stack_sides(pairs: list[EncodedExample]) -> Batch:
    """All chosen conversations and then all rejected ones as plain rows, which is TRL's order."""
    sides = [split_pair(pair) for pair in pairs]
    return pad_rows([side[which] for which in (0, 1) for side in sides], PAD)


def ask_transformers(network: Any, batch: Batch) -> torch.Tensor:
    """Rewards by the model's own forward pass, which finds the last token itself; shape (rows,)."""
    real = torch.arange(batch.input_ids.shape[1]) < torch.from_numpy(batch.lengths)[:, None]
    logits: torch.Tensor = network(input_ids=torch.from_numpy(batch.input_ids), attention_mask=real.long()).logits
    return logits[:, 0]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("ending", [None, 7, PAD])
def test_rewards_are_those_of_transformers_on_plain_rows(
    folders: dict[str, Path], name: str, ending: int | None
) -> None:
    model = load(folders[name], make_recipe(folders[name]))
    model.network.eval()
    pairs = make_pairs(ending=ending)
    rewards = compute_rewards(model, pad_rows(pairs, PAD))
    expected = ask_transformers(model.network, stack_sides(pairs)).view(2, -1).T
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-6)
    assert rewards.std() > 1e-3
    plain = [side for pair in pairs for side in split_pair(pair)]
    alone = np.concatenate([torch_backend.score_rows(model, [pad_rows([side], PAD)]) for side in plain])
    np.testing.assert_allclose(alone, rewards.detach().numpy().reshape(-1), rtol=1e-4, atol=1e-6)


def test_both_ways_to_compute_a_pair_are_tried_here(folders: dict[str, Path]) -> None:
    shared = {name for name in CONFIGS if shares_prompts(load(folders[name], make_recipe(folders[name])).network)}
    assert shared == {"llama", "gpt2", "phi", "phi3", "qwen2"}


def test_the_last_token_that_is_no_padding_is_found_in_each_branch() -> None:
    sides = [
        EncodedExample(np.array([9, 8, 5, *answer]), np.array([False, False, False, *[True] * len(answer)]), "")
        for answer in ([6, 7, PAD], [4])
    ]
    pair = join_pair(sides[0], sides[1])
    assert pair is not None
    batch = pad_rows([pair], PAD)
    assert batch.input_ids.tolist() == [[9, 8, 5, 6, 7, PAD, 5, 4]]
    assert find_ends(batch, PAD).tolist() == [[4, 7]]
    assert find_ends(unroll_pairs(batch), PAD).tolist() == [[4], [3]]


@pytest.mark.parametrize("coefficient", [0.0, 0.05])
def test_loss_and_gradients_equal_those_of_trl(folders: dict[str, Path], coefficient: float) -> None:
    from trl import RewardTrainer

    recipe = make_recipe(folders["llama"], center_coefficient=coefficient)
    model = load(folders["llama"], recipe)
    pairs = make_pairs(ending=7)
    step = TorchTrainStep(model, recipe)
    loss = step._accumulate([pad_rows(pairs[:1], PAD), pad_rows(pairs[1:], PAD)], len(pairs))
    named = [(name, p) for name, p in model.network.named_parameters() if p.requires_grad]
    ours = [p.grad.clone() for _, p in named if p.grad is not None]
    assert len(ours) == len(named)

    model.network.zero_grad()
    rows = stack_sides(pairs)
    real = torch.arange(rows.input_ids.shape[1]) < torch.from_numpy(rows.lengths)[:, None]
    gather = SimpleNamespace(gather=lambda value: value, gather_for_metrics=lambda value: value)
    trainer: Any = SimpleNamespace(
        model=model.network,
        accelerator=gather,
        args=SimpleNamespace(center_rewards_coefficient=coefficient or None),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": torch.from_numpy(rows.input_ids), "attention_mask": real.long()}
    expected = RewardTrainer.compute_loss(trainer, model.network, inputs)
    expected.backward()
    assert loss == pytest.approx(float(expected), rel=1e-5)
    for (name, parameter), gradient in zip(named, ours, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("with_lora", [True, False])
def test_a_new_head_starts_at_ln_2_and_every_weight_then_learns(folders: dict[str, Path], with_lora: bool) -> None:
    # What shifts both rewards alike, such as GPT-2's last bias, is learned by way of the centre only.
    recipe = make_recipe(folders["gpt2"], with_lora=with_lora, center_coefficient=0.01)
    model = load(folders["gpt2"], recipe, moved=False)
    batch = pad_rows(make_pairs(), PAD)
    before = {name: p.detach().clone() for name, p in model.network.named_parameters() if p.requires_grad}
    assert any("score" in name for name in before)
    step = torch_backend.make_step(model, recipe)
    results = [step.step([batch], 1e-2) for _ in range(8)]
    assert results[0].loss == pytest.approx(math.log(2), abs=1e-7)
    assert results[-1].loss < 0.5
    assert results[-1].numbers["margin"] > results[0].numbers["margin"] == 0.0
    after = dict(model.network.named_parameters())
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_swapping_the_answers_flips_the_margin(folders: dict[str, Path]) -> None:
    recipe = make_recipe(folders["qwen2"])
    model = load(folders["qwen2"], recipe)
    model.network.eval()
    swapped = []
    for pair in make_pairs():
        chosen, rejected = split_pair(pair)
        other = join_pair(rejected, chosen)
        assert other is not None
        swapped.append(other)
    rewards = compute_rewards(model, pad_rows(make_pairs(), PAD))
    flipped = compute_rewards(model, pad_rows(swapped, PAD))
    torch.testing.assert_close(flipped, rewards.flip(1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_keeps_its_head_and_reads_back_the_same(
    folders: dict[str, Path], tmp_path: Path, quantization: str
) -> None:
    recipe = make_recipe(folders["llama"], quantization=quantization)
    model = load(folders["llama"], recipe)
    batch = pad_rows(make_pairs(), PAD)
    expected = torch_backend.score_pairs(model, [batch])
    torch_backend.save_weights(model, tmp_path / "adapter")
    fresh = torch_backend.load_model(ModelSource("", folders["llama"], {}), recipe)
    assert not torch_backend.score_pairs(fresh, [batch]).any()
    loaded = torch_backend.load_adapter(fresh, tmp_path / "adapter")
    np.testing.assert_allclose(torch_backend.score_pairs(loaded, [batch]), expected, rtol=1e-5, atol=1e-7)


def test_a_merged_model_scores_the_same_in_transformers_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    recipe = make_recipe(folders["llama"])
    model = load(folders["llama"], recipe)
    pairs = make_pairs(ending=PAD)
    expected = torch_backend.score_pairs(model, [pad_rows(pairs, PAD)])
    torch_backend.save_merged(torch_backend.merge_adapter(model), tmp_path / "merged", "float32")
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    with torch.inference_mode():
        got = ask_transformers(network, stack_sides(pairs)).view(2, -1).T.numpy()
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_an_adapter_of_a_language_model_can_be_what_a_reward_model_starts_from(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["llama"]
    sft = Recipe(
        model={"name": str(folder), "dtype": "float32"},
        data={"train": "unused"},
        lora={"r": 4},
        training={"method": "sft"},
    )
    tuned = torch_backend.attach_lora(torch_backend.load_model(ModelSource("", folder, {}), sft), sft)
    for name, parameter in tuned.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    torch_backend.save_weights(tuned, tmp_path / "adapter")
    plain = torch_backend.merge_adapter(tuned).network.model
    started = torch_backend.load_model(
        ModelSource("", folder, {}, adapter=tmp_path / "adapter"), make_recipe(folder)
    ).network
    for (name, ours), (_, theirs) in zip(started.model.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=name)
