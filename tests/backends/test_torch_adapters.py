"""Adapters against peft as the oracle: every variant, whole modules, added tokens, tied heads, and adapters on adapters."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from config.structured_config import ModelSection, Recipe
from utils.adapter_source import find_adapter
from utils.backends import torch_backend
from utils.backends.torch_adapters import find_ends
from utils.backends.torch_model import TorchModel
from utils.backends.torch_step import TorchTrainStep
from utils.batching import Batch, pad_rows
from utils.exceptions import AdapterError, RecipeError
from utils.model_source import ModelSource, find_model
from utils.tokenizer_utils import EncodedExample

pytestmark = pytest.mark.slow
VOCABULARY = 300
TOKENS = ["<call>", "<answer>", "<done>"]
NEW_IDS = (VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)
SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    **SMALL,
}
NO_DROPOUT = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "tied": LlamaConfig(**LLAMA, tie_word_embeddings=True),
    "untied": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SMALL, **NO_DROPOUT),
    "biased_head": PhiConfig(**{**LLAMA, "num_key_value_heads": 4}, tie_word_embeddings=False),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Small random models with a tokenizer of 300 words."""
    found = {}
    words = Tokenizer(WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w2")
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        found[name] = tmp_path_factory.mktemp(name)
        AutoModelForCausalLM.from_config(config).save_pretrained(str(found[name]))
        tokenizer.save_pretrained(str(found[name]))
    return found


def make_recipe(folder: Path, lora: dict[str, Any] | None, dtype: str = "float32", **data: Any) -> Recipe:
    """A recipe for a model folder."""
    return Recipe(
        model={"name": str(folder), "dtype": dtype},
        data={"train": "unused", **data},
        lora=lora,
        training={"method": "sft"},
    )


def open_source(folder: Path, adapter: Path | None = None) -> ModelSource:
    """The folder as a source."""
    return ModelSource(str(folder), folder, {}, adapter)


def make_batch(*more: int) -> Batch:
    """Two rows; `more` are ids that must occur."""
    random = np.random.default_rng(0)
    before, behind = random.integers(5, VOCABULARY, 4), random.integers(5, VOCABULARY, 4)
    rows = [random.integers(5, VOCABULARY, 12), np.concatenate([before, np.array(more, dtype=np.int64), behind])]
    return pad_rows([EncodedExample(ids, np.arange(len(ids)) > 2, "rows:1") for ids in rows], 2)


def load_fresh(folder: Path, recipe: Recipe) -> TorchModel:
    """Base with fresh adapters."""
    torch.manual_seed(1)
    return torch_backend.attach_lora(torch_backend.load_model(open_source(folder), recipe), recipe)


def train(model: TorchModel, recipe: Recipe, batch: Batch, steps: int = 3) -> None:
    """A few steps at a rate that moves everything."""
    step = torch_backend.make_step(model, recipe)
    for _ in range(steps):
        step.step([batch], 2e-2)


def merge_with_peft(folder: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Weights as peft alone merges them."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return dict(PeftModel.from_pretrained(base, str(adapter)).merge_and_unload().state_dict())


def check_round_trip(model: TorchModel, recipe: Recipe, folder: Path, target: Path, batch: Batch) -> TorchModel:
    """Saved, loaded on the untouched base, merged, saved and loaded again: the same logits each time.

    Returns:
        The merged model, read from disk.
    """
    expected = torch_backend.compute_logits(model, batch)
    torch_backend.save_weights(model, target / "adapter")
    base = torch_backend.load_model(open_source(folder), recipe)
    assert np.abs(torch_backend.compute_logits(base, batch) - expected).max() > 1e-2
    adapted = torch_backend.load_adapter(base, target / "adapter")
    np.testing.assert_allclose(torch_backend.compute_logits(adapted, batch), expected, atol=1e-5)
    merged = torch_backend.merge_adapter(adapted)
    np.testing.assert_allclose(torch_backend.compute_logits(merged, batch), expected, atol=1e-5)
    torch_backend.save_merged(merged, target / "merged", "float32")
    plain = make_recipe(target / "merged", None)
    reloaded = torch_backend.load_model(open_source(target / "merged"), plain)
    np.testing.assert_allclose(torch_backend.compute_logits(reloaded, batch), expected, atol=1e-5)
    return reloaded


@pytest.mark.parametrize("architecture", ["tied", "untied", "gpt2"])
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "pissa"])
def test_every_variant_survives_saving_loading_and_merging_and_merges_as_peft_does(
    folders: dict[str, Path], tmp_path: Path, variant: str, architecture: str
) -> None:
    folder, batch = folders[architecture], make_batch()
    recipe = make_recipe(folder, {"r": 4, "alpha": 8, "variant": variant})
    model = load_fresh(folder, recipe)
    train(model, recipe, batch)
    reloaded = check_round_trip(model, recipe, folder, tmp_path, batch)
    theirs = merge_with_peft(folder, tmp_path / "adapter")
    ours = reloaded.network.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("targets", ["all-linear", ("c_attn",)])
def test_gpt2s_transposed_matrices_get_adapters_without_a_warning(
    folders: dict[str, Path], recwarn: pytest.WarningsRecorder, targets: str | tuple[str, ...]
) -> None:
    # peft warned about fan_in_fan_out on every run with GPT-2.
    recipe = make_recipe(folders["gpt2"], {"r": 4, "target_modules": targets})
    assert load_fresh(folders["gpt2"], recipe).network.peft_config["default"].fan_in_fan_out
    tied = make_recipe(folders["tied"], {"r": 4})
    assert not load_fresh(folders["tied"], tied).network.peft_config["default"].fan_in_fan_out
    assert [str(one.message) for one in recwarn if "fan_in_fan_out" in str(one.message)] == []


def test_pissa_starts_at_the_base_with_its_largest_singular_values_in_the_adapter(folders: dict[str, Path]) -> None:
    folder, batch = folders["untied"], make_batch()
    recipe = make_recipe(folder, {"r": 4, "alpha": 4, "variant": "pissa", "target_modules": ["q_proj"]})
    base = torch_backend.load_model(open_source(folder), recipe)
    untouched = torch_backend.compute_logits(base, batch)
    weight = base.network.model.layers[0].self_attn.q_proj.weight.clone()
    model = torch_backend.attach_lora(base, recipe)
    np.testing.assert_allclose(torch_backend.compute_logits(model, batch), untouched, atol=1e-5)
    layer = model.network.base_model.model.model.layers[0].self_attn.q_proj
    product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    largest = torch.linalg.svdvals(weight)[:4]
    torch.testing.assert_close(torch.linalg.svdvals(product)[:4], largest, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(layer.base_layer.weight + product, weight, rtol=1e-5, atol=1e-6)


def test_pissa_is_saved_as_peft_converts_it(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, batch = folders["untied"], make_batch()
    recipe = make_recipe(folder, {"r": 4, "alpha": 8, "variant": "pissa", "target_modules": ["q_proj", "down_proj"]})
    model = load_fresh(folder, recipe)
    start = tmp_path / "start"
    model.network.peft_config["default"].init_lora_weights = True  # peft's recipe for saving the start
    model.network.save_pretrained(str(start))
    model.network.peft_config["default"].init_lora_weights = "pissa_niter_16"
    train(model, recipe, batch)
    torch_backend.save_weights(model, tmp_path / "ours")
    model.network.save_pretrained(str(tmp_path / "theirs"), path_initial_model_for_weight_conversion=str(start))
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
    configs = [json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs")]
    for key in ("r", "lora_alpha", "init_lora_weights", "use_rslora", "inference_mode"):
        assert configs[0][key] == configs[1][key], key
    assert configs[0]["r"] == 8


@pytest.mark.parametrize("names", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["norm"]])
@pytest.mark.parametrize("architecture", ["tied", "untied"])
def test_whole_modules_are_trained_saved_and_merged_and_tied_ones_stay_one(
    folders: dict[str, Path], tmp_path: Path, architecture: str, names: list[str]
) -> None:
    # A trained head that is tied to an untrained embedding was lost at the merge by more than one tool.
    folder, batch = folders[architecture], make_batch()
    recipe = make_recipe(folder, {"r": 4, "modules_to_save": names})
    model = load_fresh(folder, recipe)
    train(model, recipe, batch)
    reloaded = check_round_trip(model, recipe, folder, tmp_path, batch).network
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    is_tied = architecture == "tied"
    assert reloaded.config.tie_word_embeddings == is_tied
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == is_tied
    moved = {
        "lm_head": not torch.equal(reloaded.lm_head.weight, before.lm_head.weight),
        "embed_tokens": not torch.equal(reloaded.model.embed_tokens.weight, before.model.embed_tokens.weight),
        "norm": not torch.equal(reloaded.model.norm.weight, before.model.norm.weight),
    }
    ends = {"lm_head", "embed_tokens"}
    asked = {*names} | (ends if is_tied and ends & {*names} else set())
    assert {name for name, has_moved in moved.items() if has_moved} == asked
    # `norm` is also the end of `input_layernorm`, which nobody asked for.
    assert torch.equal(reloaded.model.layers[0].input_layernorm.weight, before.model.layers[0].input_layernorm.weight)


def test_gpt2s_tied_head_stays_tied_though_its_embedding_is_called_wte(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, batch = folders["gpt2"], make_batch()
    recipe = make_recipe(folder, {"r": 4, "modules_to_save": ["wte"]})
    model = load_fresh(folder, recipe)
    train(model, recipe, batch)
    reloaded = check_round_trip(model, recipe, folder, tmp_path, batch).network
    assert reloaded.lm_head.weight is reloaded.transformer.wte.weight


def test_whole_modules_are_float32_masters_on_a_16_bit_base(folders: dict[str, Path]) -> None:
    # In bfloat16 an update of 1e-4 on a weight of 1 is lost.
    recipe = make_recipe(
        folders["untied"], {"r": 4, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}, dtype="bfloat16"
    )
    model = load_fresh(folders["untied"], recipe)
    trained = [parameter for parameter in model.network.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    train(model, recipe, make_batch(), steps=1)
    assert {parameter.dtype for parameter in model.network.parameters() if not parameter.requires_grad} == {
        torch.bfloat16
    }


def test_a_module_that_does_not_exist_is_refused(folders: dict[str, Path]) -> None:
    recipe = make_recipe(folders["tied"], {"r": 4, "modules_to_save": ["wte"]})
    with pytest.raises(RecipeError, match=r"wte.*modules here.*embed_tokens"):
        load_fresh(folders["tied"], recipe)


@pytest.mark.parametrize("architecture", ["tied", "untied", "gpt2"])
def test_only_the_rows_of_added_tokens_are_trained_and_they_survive_loading_and_merging(
    folders: dict[str, Path], tmp_path: Path, architecture: str
) -> None:
    folder, batch = folders[architecture], make_batch(*NEW_IDS)
    recipe = make_recipe(folder, {"r": 4}, added_tokens=TOKENS)
    model = load_fresh(folder, recipe)
    assert model.added_ids == NEW_IDS
    train(model, recipe, batch)
    reloaded = check_round_trip(model, recipe, folder, tmp_path, batch).network
    before = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    is_tied = architecture != "untied"
    assert reloaded.config.vocab_size == VOCABULARY + 3
    assert (reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight) == is_tied
    for get in ("get_input_embeddings", "get_output_embeddings"):
        old, new = getattr(before, get)().weight, getattr(reloaded, get)().weight
        assert torch.equal(new[:VOCABULARY], old)
        start = old.mean(dim=0)
        assert all((row - start).abs().max() > 1e-3 for row in new[VOCABULARY:])
    rows = 3 * 32 * (1 if is_tied else 2)
    adapters = sum(p.numel() for name, p in model.network.named_parameters() if "lora_" in name)
    assert torch_backend.count_parameters(model)[0] == adapters + rows


def test_added_tokens_beside_embedding_and_head_that_are_trained_whole(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, batch = folders["biased_head"], make_batch(*NEW_IDS)
    with pytest.raises(RecipeError, match=r"bias.*modules_to_save: \[embed_tokens, lm_head\]"):
        load_fresh(folder, make_recipe(folder, {"r": 4}, added_tokens=TOKENS))
    lora = {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]}
    recipe = make_recipe(folder, lora, added_tokens=TOKENS)
    model = load_fresh(folder, recipe)
    train(model, recipe, batch)
    reloaded = check_round_trip(model, recipe, folder, tmp_path, batch).network
    assert reloaded.lm_head.bias.shape == (VOCABULARY + 3,)


def test_added_tokens_start_the_same_in_every_script_and_cost_nothing_after_full_fine_tuning(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, batch = folders["tied"], make_batch(*NEW_IDS)
    recipe = make_recipe(folder, None, added_tokens=TOKENS)
    logits = [
        torch_backend.compute_logits(torch_backend.load_model(open_source(folder), recipe), batch) for _ in range(2)
    ]
    np.testing.assert_array_equal(*logits)
    model = load_fresh(folder, recipe)
    train(model, recipe, batch)
    expected = torch_backend.compute_logits(model, batch)
    torch_backend.save_weights(model, tmp_path)
    from utils.added_tokens import add_tokens
    from utils.tokenizer_files import load_tokenizer

    tokenizer = load_tokenizer(folder)
    add_tokens(tokenizer, TOKENS, "test")
    tokenizer.save_pretrained(str(tmp_path))
    reloaded = torch_backend.load_model(open_source(tmp_path), recipe)  # the tokens are known: no row is made again
    assert reloaded.added_ids == ()
    np.testing.assert_array_equal(torch_backend.compute_logits(reloaded, batch), expected)


def test_rows_that_the_embedding_has_to_spare_are_used_before_it_grows(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # Qwen's matrices have more rows than its tokenizer has tokens.
    folder = tmp_path / "padded"
    shutil.copytree(folders["tied"], folder)
    network = AutoModelForCausalLM.from_pretrained(folder)
    network.resize_token_embeddings(VOCABULARY + 64)
    network.save_pretrained(str(folder))
    recipe = make_recipe(folder, {"r": 4}, added_tokens=TOKENS)
    model = load_fresh(folder, recipe)
    assert model.added_ids == NEW_IDS
    assert model.network.config.vocab_size == VOCABULARY + 64
    train(model, recipe, make_batch(*NEW_IDS))
    check_round_trip(model, recipe, folder, tmp_path, make_batch(*NEW_IDS))


def train_first(folder: Path, target: Path) -> np.ndarray:
    """A first run's adapter; returns its logits."""
    recipe = make_recipe(folder, {"r": 4})
    model = load_fresh(folder, recipe)
    train(model, recipe, make_batch())
    torch_backend.save_weights(model, target)
    return torch_backend.compute_logits(model, make_batch())


def test_a_finished_adapter_becomes_the_frozen_base_of_a_second_one(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, batch = folders["tied"], make_batch()
    first = train_first(folder, tmp_path / "first")
    recipe = make_recipe(folder, {"r": 2, "alpha": 4})
    source = open_source(folder, tmp_path / "first")
    model = torch_backend.attach_lora(torch_backend.load_model(source, recipe), recipe)
    # B is 0 in the second adapter: with it, or with it switched off, the model is the first run's.
    np.testing.assert_allclose(torch_backend.compute_logits(model, batch), first, atol=1e-5)
    step = TorchTrainStep(model, recipe)
    step.step([batch], 1e-1)
    step.step([batch], 1e-1)
    second = torch_backend.compute_logits(model, batch)
    assert np.abs(second - first).max() > 1e-2
    with model.network.disable_adapter():
        np.testing.assert_allclose(torch_backend.compute_logits(model, batch), first, atol=1e-5)
    torch_backend.save_weights(model, tmp_path / "second")
    again = torch_backend.load_adapter(torch_backend.load_model(source, recipe), tmp_path / "second")
    np.testing.assert_allclose(torch_backend.compute_logits(again, batch), second, atol=1e-5)
    merged = torch_backend.merge_adapter(again)
    torch_backend.save_merged(merged, tmp_path / "merged", "float32")
    plain = torch_backend.load_model(open_source(tmp_path / "merged"), make_recipe(tmp_path / "merged", None))
    np.testing.assert_allclose(torch_backend.compute_logits(plain, batch), second, atol=1e-5)


def test_an_adapter_is_found_by_its_folder_or_its_run_and_hashed(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["tied"]
    train_first(folder, tmp_path / "run" / "adapter")
    sources = [
        find_model(ModelSection(name=str(folder), adapter=str(path)), "test", with_weights=True)
        for path in (tmp_path / "run", tmp_path / "run" / "adapter")
    ]
    assert sources[0].adapter == sources[1].adapter == tmp_path / "run" / "adapter"
    assert sources[0].hash_adapter() == sources[1].hash_adapter()
    plain = find_model(ModelSection(name=str(folder)), "test", with_weights=True)
    assert plain.hash_adapter() is None
    assert plain.hash_weights() == sources[0].hash_weights()


def test_an_adapter_that_cannot_be_folded_in_is_refused_before_weights_are_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders["tied"]
    source = open_source(folder)
    train_first(folder, tmp_path / "good")
    assert find_adapter(str(tmp_path / "good"), source, "r.yaml:3") == tmp_path / "good"
    with pytest.raises(RecipeError, match=r"r\.yaml:3: there is no adapter"):
        find_adapter(str(tmp_path / "nowhere"), source, "r.yaml:3")
    with pytest.raises(AdapterError, match=r"does not fit.*no place for .*model\.layers\.0"):
        find_adapter(str(tmp_path / "good"), open_source(folders["gpt2"]), "r.yaml:3")

    def change(name: str, **values: Any) -> str:
        shutil.copytree(tmp_path / "good", tmp_path / name)
        path = tmp_path / name / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
        return str(tmp_path / name)

    for name, values, message in (
        ("kind", {"peft_type": "IA3"}, "only LoRA"),
        ("tokens", {"trainable_token_indices": [5]}, "tokens of its own"),
        ("start", {"init_lora_weights": "pissa"}, "changes the base"),
    ):
        with pytest.raises(AdapterError, match=message):
            find_adapter(change(name, **values), source, "r.yaml:3")
    pickled = Path(change("pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        find_adapter(str(pickled), source, "r.yaml:3")
    damaged = Path(change("damaged"))
    (damaged / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(AdapterError, match="damaged"):
        find_adapter(str(damaged), source, "r.yaml:3")


def test_a_tensor_that_finds_no_place_or_a_place_without_a_tensor_is_an_error(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    # peft warns about the one and is silent about the other: a part of the training would be gone.
    from safetensors.torch import save_file

    train_first(folders["tied"], tmp_path / "good")
    tensors = load_file(tmp_path / "good" / "adapter_model.safetensors")
    name = next(iter(tensors))
    for label, changed in (
        ("missing", {key: value for key, value in tensors.items() if key != name}),
        ("extra", {**tensors, name.replace("layers.0", "layers.9"): tensors[name].clone()}),
    ):
        shutil.copytree(tmp_path / "good", tmp_path / label)
        save_file(changed, tmp_path / label / "adapter_model.safetensors", metadata={"format": "pt"})
        base = torch_backend.load_model(open_source(folders["tied"]), make_recipe(folders["tied"], {"r": 4}))
        with pytest.raises(AdapterError, match="does not fit"):
            torch_backend.load_adapter(base, tmp_path / label)


def test_an_adapter_of_peft_itself_can_be_folded_in(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, batch = folders["untied"], make_batch()
    network = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(task_type="CAUSAL_LM", r=3, use_rslora=True, target_modules=["q_proj", "up_proj"]),
    ).eval()
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    network.save_pretrained(str(tmp_path))
    ids = torch.from_numpy(batch.input_ids[:1])
    with torch.no_grad():
        expected = network(input_ids=ids).logits[0].numpy()
    source = find_model(ModelSection(name=str(folder), adapter=str(tmp_path)), "test", with_weights=True)
    model = torch_backend.load_model(source, make_recipe(folder, None))
    row = pad_rows([EncodedExample(batch.input_ids[0], batch.loss_mask[0], "rows:1")], 2)
    np.testing.assert_allclose(torch_backend.compute_logits(model, row), expected, atol=1e-4)


def test_the_ends_of_a_model_are_found_by_what_they_are(folders: dict[str, Path]) -> None:
    network = AutoModelForCausalLM.from_pretrained(folders["gpt2"])
    assert find_ends(network) == ("transformer.wte", "lm_head", True)
    network = AutoModelForCausalLM.from_pretrained(folders["untied"])
    assert find_ends(network) == ("model.embed_tokens", "lm_head", False)


MOE: dict[str, Any] = {**LLAMA, "max_position_embeddings": 64}
MIXTURES: dict[str, PretrainedConfig] = {
    "mixtral": MixtralConfig(**MOE, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**MOE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
}


def save_mixture(name: str, folder: Path) -> Path:
    """A small random mixture of experts."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MIXTURES[name]).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("name", MIXTURES)
def test_adapters_on_experts_train_in_one_worker_and_survive_saving_and_merging(tmp_path: Path, name: str) -> None:
    # Two workers took the experts' tensors from each other: the first step or evaluation crashed.
    folder = save_mixture(name, tmp_path / "base")
    recipe = make_recipe(folder, {"r": 2})
    base = torch_backend.load_model(open_source(folder), recipe)
    model = torch_backend.attach_lora(replace(base, plan=replace(base.plan, workers=4)), recipe)
    assert torch_backend.describe_machine(model).workers == 1
    batch = make_batch()
    step = TorchTrainStep(model, recipe)
    losses = [step.step([batch] * 4, 2e-2).loss for _ in range(4)]
    assert losses[-1] < losses[0]
    torch_backend.evaluate(model, [batch] * 4)
    check_round_trip(model, recipe, folder, tmp_path, batch)


@pytest.mark.parametrize("section", [{"dropout": 0.1}, {"variant": "dora"}])
def test_what_adapters_on_experts_cannot_have_is_refused(tmp_path: Path, section: dict[str, Any]) -> None:
    recipe = make_recipe(save_mixture("mixtral", tmp_path), {"r": 2, **section})
    model = torch_backend.load_model(open_source(tmp_path), recipe)
    with pytest.raises(RecipeError, match=r"does not work with .*leave the experts out"):
        torch_backend.attach_lora(model, recipe)
