"""The torch back end against its oracles: TRL's loss, transformers' logits, peft's merge, and itself cut differently."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from config.structured_config import GenerationSection, Recipe
from tests.conftest import TINY_VOCABULARY
from utils.backends import GenerationSettings, torch_backend
from utils.backends.torch_losses import compute_token_losses
from utils.backends.torch_model import TorchModel
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, make_micro_batches, pad_prompts_left, pad_rows
from utils.exceptions import AdapterError, MachineError, ModelLoadingError, RecipeError
from utils.model_source import ModelSource
from utils.tokenizer_utils import EncodedExample

pytestmark = pytest.mark.slow
PAD = 2


def make_recipe(folder: Path | str, lora: dict[str, Any] | None = None, **training: Any) -> Recipe:
    """A recipe for a model folder, in float32, so that comparisons can be exact."""
    return Recipe(
        model={"name": str(folder), "dtype": "float32"},
        data={"train": "unused"},
        lora={"r": 4, "alpha": 8} if lora is None else lora or None,
        training={"method": "sft", **training},
    )


def open_source(folder: Path) -> ModelSource:
    """The folder as a source."""
    return ModelSource(str(folder), folder, {})


def load_trainable(folder: Path, recipe: Recipe) -> TorchModel:
    """A model with fresh adapters whose B is random as well: at B = 0 half of the gradients would be zero."""
    torch.manual_seed(1)
    model = torch_backend.attach_lora(torch_backend.load_model(open_source(folder), recipe), recipe)
    for name, parameter in model.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def make_examples(lengths: list[tuple[int, int]], seed: int = 0) -> list[EncodedExample]:
    """Random examples of (length, learned tokens at the end)."""
    random = np.random.default_rng(seed)
    return [
        EncodedExample(
            random.integers(5, TINY_VOCABULARY, length), np.arange(length) >= length - learned, f"rows:{index}"
        )
        for index, (length, learned) in enumerate(lengths)
    ]


UNEVEN = [(40, 30), (12, 2), (25, 24), (7, 3), (33, 1), (18, 9), (50, 20), (9, 8)]


def collect_gradients(
    model: TorchModel, recipe: Recipe, micro_batches: list[Batch]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of one step, before clipping and update."""
    step = TorchTrainStep(model, recipe)
    supervised = sum(batch.supervised_tokens for batch in micro_batches)
    model.network.train()
    loss = step._accumulate(micro_batches, supervised)
    named = {name: p.grad.clone() for name, p in model.network.named_parameters() if p.grad is not None}
    step.optimizer.zero_grad()
    return loss, named


def test_our_loss_and_gradients_equal_those_of_trl_on_the_same_batch(tiny_llama: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    examples = make_examples([(40, 30), (12, 2), (25, 24), (7, 3)])
    loss, gradients = collect_gradients(model, recipe, [pad_rows(examples, PAD)])

    rows = [{"input_ids": e.input_ids.tolist(), "completion_mask": e.loss_mask.astype(int).tolist()} for e in examples]
    config = SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        max_length=None,
        use_cpu=True,
        report_to="none",
        loss_type="nll",
    )
    trainer = SFTTrainer(
        model=model.network,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    model.network.train()
    theirs = trainer.compute_loss(model.network, trainer._prepare_inputs(batch))
    theirs.backward()
    assert loss == pytest.approx(float(theirs.detach()), abs=1e-5)
    compared = 0
    for name, parameter in model.network.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-5, atol=1e-5)
            compared += 1
    assert compared == len(gradients) == 2 * 7 * 2


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_step_does_not_depend_on_how_it_is_cut(tiny_llama: Path, micro_batch_size: int, workers: int) -> None:
    # The field's oldest silent bug: a mean over micro-batch means weighs short answers too much.
    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    examples = make_examples(UNEVEN)
    whole = collect_gradients(replace(model, plan=replace(model.plan, workers=1)), recipe, [pad_rows(examples, PAD)])
    cut_model = replace(model, plan=replace(model.plan, workers=workers))
    cut = collect_gradients(cut_model, recipe, make_micro_batches(examples, micro_batch_size, PAD))
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(cut[1][name], gradient, rtol=1e-4, atol=1e-6)
        assert gradient.abs().max() > 0


def test_the_number_of_workers_changes_no_bit(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    micro_batches = make_micro_batches(make_examples(UNEVEN), 1, PAD)
    torch.set_num_threads(1)
    results = [
        collect_gradients(replace(model, plan=replace(model.plan, workers=workers)), recipe, micro_batches)
        for workers in (1, 2, 2)
    ]
    for loss, gradients in results[1:]:
        assert loss == results[0][0]
        assert all(torch.equal(gradients[name], gradient) for name, gradient in results[0][1].items())


def test_packing_gives_the_loss_and_gradients_of_padding(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    examples = make_examples(UNEVEN)
    padded = collect_gradients(model, recipe, [pad_rows(examples, PAD)])
    packed = collect_gradients(model, recipe, make_micro_batches(examples, 8, PAD, pack_length=120))
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    for name, gradient in padded[1].items():
        torch.testing.assert_close(packed[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_changing_one_document_of_a_pack_moves_no_loss_of_the_next(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    first, second, other = make_examples([(30, 10), (20, 19), (30, 10)], seed=3)
    losses = []
    for neighbour in (first, other):
        (batch,) = make_micro_batches([neighbour, second], 8, PAD, pack_length=64)
        with torch.no_grad():
            losses.append(compute_token_losses(model, batch)[-second.supervised_tokens :])
    assert torch.equal(losses[0], losses[1])


def test_token_losses_equal_those_of_full_logits(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    batch = pad_rows(make_examples(UNEVEN), PAD)
    with torch.no_grad():
        ours = compute_token_losses(model, batch)
        ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
        logits = model.network(input_ids=ids, attention_mask=mask).logits[:, :-1]
        log_probabilities = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    theirs = -log_probabilities[torch.from_numpy(batch.loss_mask)[:, 1:]]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_evaluation_returns_rows_in_order_and_sums_that_weigh_tokens(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama)
    model = load_trainable(tiny_llama, recipe)
    examples = make_examples(UNEVEN)
    together = torch_backend.evaluate(model, [pad_rows(examples[:3], PAD), pad_rows(examples[3:], PAD)])
    alone = [torch_backend.evaluate(model, [pad_rows([example], PAD)])[0] for example in examples]
    assert [tokens for _, tokens in together] == [example.supervised_tokens for example in examples]
    np.testing.assert_allclose([nats for nats, _ in together], [nats for nats, _ in alone], rtol=1e-5)


def test_every_trainable_tensor_moves_and_the_base_does_not(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama, learning_rate=1e-2)
    model = torch_backend.attach_lora(torch_backend.load_model(open_source(tiny_llama), recipe), recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.network.named_parameters()}
    step = torch_backend.make_step(model, recipe)
    for _ in range(2):  # lora_A has no gradient in the first step, because lora_B starts at 0
        result = step.step(make_micro_batches(make_examples(UNEVEN), 2, PAD), 1e-2)
    assert result.gradient_norm > 0
    for name, parameter in model.network.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_training_lowers_the_loss_on_what_it_sees(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama)
    model = torch_backend.attach_lora(torch_backend.load_model(open_source(tiny_llama), recipe), recipe)
    step = torch_backend.make_step(model, recipe)
    micro_batches = make_micro_batches(make_examples([(20, 19)]), 1, PAD)
    losses = [step.step(micro_batches, 2e-2).loss for _ in range(40)]
    assert losses[-1] < losses[0] - 0.5


def test_neftune_noise_is_scaled_by_real_lengths_and_absent_in_evaluation(tiny_llama: Path) -> None:
    recipe = make_recipe(tiny_llama, neftune_alpha=5.0)
    model = load_trainable(tiny_llama, recipe)
    step = TorchTrainStep(model, recipe)
    assert step.noise is not None
    assert step.workers == 1
    embeddings = model.network.get_input_embeddings()
    ids = torch.randint(5, 1000, (2, 30))
    step.noise.lengths = torch.tensor([30, 10])
    model.network.eval()
    clean = embeddings(ids)
    model.network.train()
    noise = embeddings(ids) - clean
    for row, length in enumerate((30, 10)):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.9 * bound < noise[row].abs().max() <= bound
    model.network.eval()
    assert torch.equal(embeddings(ids), clean)


def test_gradient_checkpointing_changes_no_gradient(tiny_llama: Path) -> None:
    examples = make_examples(UNEVEN)
    results = []
    for checkpointing in (False, True):
        recipe = make_recipe(tiny_llama, gradient_checkpointing=checkpointing)
        results.append(collect_gradients(load_trainable(tiny_llama, recipe), recipe, [pad_rows(examples, PAD)]))
    assert results[0][0] == results[1][0]
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient)


def test_full_fine_tuning_trains_every_weight_in_float32(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe(tiny_llama, lora={})
    assert recipe.lora is None
    model = torch_backend.attach_lora(torch_backend.load_model(open_source(tiny_llama), recipe), recipe)
    trainable, total = torch_backend.count_parameters(model)
    assert trainable == total
    torch_backend.make_step(model, recipe).step([pad_rows(make_examples(UNEVEN), PAD)], 1e-3)
    torch_backend.save_weights(model, tmp_path)
    reloaded = torch_backend.load_model(open_source(tmp_path), recipe)
    batch = pad_rows(make_examples([(9, 8)]), PAD)
    np.testing.assert_array_equal(
        torch_backend.compute_logits(model, batch), torch_backend.compute_logits(reloaded, batch)
    )


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_saved_adapters_reload_and_merge_to_the_same_logits(tiny_llama: Path, tmp_path: Path, variant: str) -> None:
    recipe = make_recipe(tiny_llama, lora={"r": 4, "alpha": 8, "variant": variant})
    model = load_trainable(tiny_llama, recipe)
    torch_backend.save_weights(model, tmp_path)
    batch = pad_rows(make_examples([(20, 5), (11, 3)]), PAD)
    expected = torch_backend.compute_logits(model, batch)
    base = torch_backend.load_model(open_source(tiny_llama), recipe)
    assert np.abs(torch_backend.compute_logits(base, batch) - expected).max() > 1e-3
    adapted = torch_backend.load_adapter(base, tmp_path)
    np.testing.assert_array_equal(torch_backend.compute_logits(adapted, batch), expected)
    merged = torch_backend.merge_adapter(adapted)
    np.testing.assert_allclose(torch_backend.compute_logits(merged, batch), expected, atol=1e-5)


def test_an_adapter_of_another_shape_is_refused(tiny_llama: Path, embedded: ModelSource, tmp_path: Path) -> None:
    torch_backend.save_weights(load_trainable(tiny_llama, make_recipe(tiny_llama)), tmp_path)
    base = torch_backend.load_model(embedded, make_recipe(embedded.folder))
    with pytest.raises(AdapterError, match="does not fit"):
        torch_backend.load_adapter(base, tmp_path)
    with pytest.raises(AdapterError, match="no adapter"):
        torch_backend.load_adapter(base, tmp_path / "nowhere")


def test_a_target_that_matches_nothing_is_refused_even_beside_one_that_matches(tiny_llama: Path) -> None:
    # peft accepts a list of which one name matches and silently trains only that one.
    recipe = make_recipe(tiny_llama, lora={"target_modules": ["q_proj", "query"]})
    with pytest.raises(RecipeError, match=r"query.*modules here.*q_proj"):
        load_trainable(tiny_llama, recipe)


def test_float16_on_a_cpu_and_several_processes_are_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEBOOK_DEVICE", "cpu")
    half = Recipe(model={"name": "x", "dtype": "float16"}, data={"train": "x"}, lora={}, training={"method": "sft"})
    with pytest.raises(MachineError, match="float16"):
        torch_backend.load_model(open_source(tiny_llama), half)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MachineError, match="one process"):
        torch_backend.load_model(open_source(tiny_llama), make_recipe(tiny_llama))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("num_attention_heads", 3, "not a multiple"),
        ("attention_dropout", "x", "attention_dropout"),
        ("num_key_value_heads", 0, "cannot be loaded"),
        ("hidden_act", "nope", "nope"),
    ],
)
def test_a_config_that_transformers_refuses_is_an_error_with_a_fix(
    tiny_llama: Path, tmp_path: Path, key: str, value: object, words: str
) -> None:
    # Its own checks raise an error that is no ValueError: a traceback.
    shutil.copytree(tiny_llama, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(ModelLoadingError, match=rf"{words}.*use another copy"):
        torch_backend.load_model(open_source(path.parent), make_recipe(path.parent))


def test_batched_greedy_answers_equal_those_given_one_by_one(embedded: ModelSource) -> None:
    recipe = make_recipe(embedded.folder)
    model = torch_backend.load_model(embedded, recipe)
    settings = GenerationSettings(GenerationSection(max_new_tokens=7), (2,), PAD)
    from utils.tokenizer_files import load_tokenizer
    from utils.tokenizer_utils import TokenizerUtils

    tokenizer = TokenizerUtils(load_tokenizer(embedded.folder))
    texts = ["Hi", "What is the capital of France?", "Name three colours and say which one is the sky's."]
    prompts = [tokenizer.encode_prompt([{"role": "user", "content": text}]) for text in texts]
    untouched = model.network.generation_config.to_dict()
    together = torch_backend.generate(model, prompts, settings, 2)
    alone = [torch_backend.generate(model, [prompt], settings, 1)[0] for prompt in prompts]
    streamed = [list(torch_backend.stream(model, pad_prompts_left([prompt], PAD), settings)) for prompt in prompts]
    assert together == alone == streamed
    assert "Paris" in tokenizer.decode(together[1])
    assert model.network.generation_config.to_dict() == untouched


def test_an_answer_that_nobody_reads_on_is_not_computed_on(tiny_llama: Path) -> None:
    # After Ctrl-C in a conversation the thread of the old answer ran on beside the next one.
    model = torch_backend.load_model(open_source(tiny_llama), make_recipe(tiny_llama))
    settings = GenerationSettings(GenerationSection(max_new_tokens=1500), (), PAD)
    for length in (3, 1900):  # with and beyond the context
        before = threading.active_count()
        tokens = torch_backend.stream(model, pad_prompts_left([np.arange(5, 5 + length)], PAD), settings)
        next(tokens)
        assert threading.active_count() == before + 1
        del tokens
        assert threading.active_count() == before


def test_sampling_follows_the_seed_and_greedy_settings_raise_no_warning(
    tiny_llama: Path, recwarn: pytest.WarningsRecorder
) -> None:
    model = torch_backend.load_model(open_source(tiny_llama), make_recipe(tiny_llama))
    prompt = np.array([5, 6, 7])
    answers = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        section = GenerationSection(max_new_tokens=8, temperature=1.0, top_p=0.9)
        answers.append(torch_backend.generate(model, [prompt], GenerationSettings(section, (2,), PAD), 1))
    assert answers[0] == answers[1] != answers[2]
    torch_backend.generate(model, [prompt], GenerationSettings(GenerationSection(max_new_tokens=2), (2,), PAD), 1)
    assert not [str(warning.message) for warning in recwarn if "generation" in str(warning.message).lower()]


def test_gradients_of_a_4_bit_base_survive_an_evaluation(tiny_llama: Path) -> None:
    # bitsandbytes repacks weights in place during an evaluation on AVX512-BF16 CPUs, and gradients then vanish silently.
    recipe = Recipe(
        model={"name": str(tiny_llama), "quantization": "nf4"},
        data={"train": "unused"},
        lora={"r": 4},
        training={"method": "sft"},
    )
    model = load_trainable(tiny_llama, recipe)
    from bitsandbytes.nn import Linear4bit

    quantised = [module for module in model.network.modules() if isinstance(module, Linear4bit)]
    assert len(quantised) == 14
    assert not any(module.support_avx512bf16_for_cpu for module in quantised)
    batch = pad_rows(make_examples(UNEVEN), PAD)
    before = collect_gradients(model, recipe, [batch])
    torch_backend.evaluate(model, [batch])
    after = collect_gradients(model, recipe, [batch])
    for name, gradient in before[1].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(after[1][name], gradient)


def test_an_adapter_names_the_hub_id_of_its_base_and_not_a_cache_folder(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = make_recipe("org/model")
    model = torch_backend.load_model(ModelSource("org/model", tiny_llama, {}), recipe)
    torch_backend.save_weights(torch_backend.attach_lora(model, recipe), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "org/model"


def test_weights_that_lack_a_tensor_are_refused_and_not_drawn_at_random(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    recipe = make_recipe(tmp_path / "model")
    with pytest.raises(
        ModelLoadingError, match=r"such as model\.layers\.1\.mlp\.down_proj\.weight: they would be random"
    ):
        torch_backend.load_model(open_source(tmp_path / "model"), recipe)
