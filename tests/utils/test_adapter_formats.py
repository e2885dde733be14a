"""An adapter predicts the same in PEFT and in mlx-lm, whichever of the two made it, for every architecture that is supported.

The bases are small random models of transformers. mlx-lm reads some of their settings from other places of config.json (rotation
base and share, positions) and GPT-2's weights without the name of the outermost module: `write_base` says both, so that the two
sides compute one model, and a difference is the adapter's.
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from mlx_lm.utils import load_model, save_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from config.structured_config import ModelSection
from utils.adapter_formats import CHAT_TEMPLATE, convert_to_mlx, convert_to_peft, is_mlx_adapter
from utils.adapter_source import find_adapter
from utils.exceptions import AdapterError
from utils.mlx_names import MLX_MODEL_TYPES
from utils.model_source import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelSource, find_model, get_cache_folder
from utils.plain_adapters import MLX_WEIGHTS

LAYERS = 3
IDS = [[3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 3]]
# Weights as large as trained ones: with the usual 0.02 a norm, a score or an adapter would change nothing.
SMALL = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    **SMALL,
}
# Every third layer sees all of the text: with mlx-lm's six, a model of three layers would have none.
GEMMA3 = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
OLD = {"n_embd": 16, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, **SMALL}
NARROW = {"head_dim": 4}  # no setting of these types: the width is shared among the heads
OWN_SHAPES = {"phi": NARROW, "phi3": NARROW, "qwen2": NARROW, "gemma3_text": GEMMA3}
EVERY_TYPE = pytest.mark.parametrize("model_type", sorted(MLX_MODEL_TYPES))
VARIANTS = [
    {"lora_alpha": 16},
    {"lora_alpha": 7, "use_rslora": True},
    {"lora_alpha": 12, "use_dora": True},
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Converted adapters are kept in a cache: not in the one of whoever runs the tests."""
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[ModelSource, nn.Module]]:
    """Every architecture in a folder that both sides read alike, and as transformers' model."""
    folder = tmp_path_factory.mktemp("bases")
    return {name: write_base(name, folder / name) for name in sorted(MLX_MODEL_TYPES)}


def write_base(model_type: str, folder: Path, **settings: Any) -> tuple[ModelSource, nn.Module]:
    """A random model; names and settings that mlx-lm looks for elsewhere stand in both places."""
    torch.manual_seed(0)
    values = OLD if model_type == "gpt2" else {**SHAPE, **OWN_SHAPES.get(model_type, {})}
    config = AutoConfig.for_model(model_type, **{**values, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if model_type == "gemma":  # mlx-lm computes the exact GELU, transformers the approximation with tanh
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.GELU()
    model.save_pretrained(folder)
    path, weights = folder / "config.json", folder / "model.safetensors"
    written = json.loads(path.read_text(encoding="utf-8"))
    rope = written.get("rope_parameters") or {}
    moved = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    path.write_text(json.dumps({**written, **moved, "n_ctx": 64, "sliding_window_pattern": 3}), encoding="utf-8")
    if model_type == "gpt2":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
        save_file(tensors, weights, metadata={"format": "pt"})
    return find_model(ModelSection(name=str(folder)), "test", with_weights=True), model


def make_peft_adapter(model: nn.Module, folder: Path, **settings: Any) -> np.ndarray:
    """A PEFT adapter with random numbers in all of its parts; returns its logits."""
    settings = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    is_gpt2 = model.config.model_type == "gpt2"
    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(fan_in_fan_out=is_gpt2, **settings)).eval()
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return compute(adapted)


def compute(model: nn.Module) -> np.ndarray:
    """Logits of transformers."""
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def compute_in_mlx(source: ModelSource, adapter: Path | None = None) -> np.ndarray:
    """Logits of mlx-lm, the adapter read by its own loader."""
    model, _ = load_model(source.folder)
    if adapter:
        load_adapters(model, str(adapter))
    model.eval()
    return np.array(model(mx.array(IDS)))


def compute_in_peft(model: nn.Module, folder: Path) -> np.ndarray:
    """Logits of transformers with an adapter that PEFT reads."""
    return compute(PeftModel.from_pretrained(copy.deepcopy(model), folder).eval())


def make_mlx_adapter(
    source: ModelSource, folder: Path, *, kind: str = "lora", layers: int = -1, **settings: Any
) -> np.ndarray:
    """An adapter that mlx-lm itself has made and saved as its trainer does, with random numbers; returns its logits."""
    parameters = {"rank": 4, "scale": 3.3, "dropout": 0.1, **settings}
    model, _ = load_model(source.folder)
    model.freeze()
    mx.random.seed(0)
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    trained = tree_map(lambda one: one + 0.1 * mx.random.normal(one.shape), model.trainable_parameters())
    model.update(trained)
    model.eval()
    folder.mkdir()
    arguments = {
        "fine_tune_type": kind,
        "num_layers": layers,
        "lora_parameters": parameters,
        "model": "any",
        "iters": 10,
    }
    save_config(arguments, folder / ADAPTER_CONFIG)
    mx.save_safetensors(str(folder / MLX_WEIGHTS), dict(tree_flatten(model.trainable_parameters())))
    return np.array(model(mx.array(IDS)))


def convert(source: ModelSource, adapter: Path, target: Path) -> Path:
    """Converts an adapter into the other format."""
    target.mkdir()
    (convert_to_peft if is_mlx_adapter(adapter) else convert_to_mlx)(adapter, source, target, "test")
    return target


@EVERY_TYPE
def test_an_adapter_of_peft_predicts_the_same_in_mlx_lm_and_comes_back_to_the_byte(
    bases: dict[str, tuple[ModelSource, nn.Module]], model_type: str, tmp_path: Path
) -> None:
    source, model = bases[model_type]
    base = compute(model)
    np.testing.assert_allclose(compute_in_mlx(source), base, atol=1e-4)
    for number, variant in enumerate(VARIANTS):
        expected = make_peft_adapter(model, tmp_path / f"{number}", **variant)
        assert np.abs(expected - base).max() > 0.05  # an adapter that does nothing would prove nothing
        there = convert(source, tmp_path / f"{number}", tmp_path / f"{number}_mlx")
        np.testing.assert_allclose(compute_in_mlx(source, there), expected, atol=1e-4)
        back = convert(source, there, tmp_path / f"{number}_peft")
        weights = [(folder / ADAPTER_WEIGHTS).read_bytes() for folder in (tmp_path / f"{number}", back)]
        assert weights[0] == weights[1]


@EVERY_TYPE
def test_an_adapter_of_mlx_lm_predicts_the_same_in_peft_and_comes_back_to_the_byte(
    bases: dict[str, tuple[ModelSource, nn.Module]], model_type: str, tmp_path: Path
) -> None:
    source, model = bases[model_type]
    base = compute(model)
    # mlx-lm adapts the last 16 layers by default: here the last two of three.
    for kind, layers in (("lora", 2), ("dora", -1)):
        expected = make_mlx_adapter(source, tmp_path / kind, kind=kind, layers=layers)
        assert np.abs(expected - base).max() > 0.05
        found = find_adapter(str(tmp_path / kind), source, "test")
        np.testing.assert_allclose(compute_in_peft(model, found), expected, atol=1e-4)
        back = convert(source, found, tmp_path / f"{kind}_mlx")
        pair = [mx.load(str(folder / MLX_WEIGHTS)) for folder in (tmp_path / kind, back)]
        assert {*pair[0]} == {*pair[1]}
        assert all(np.array_equal(pair[0][name], pair[1][name]) for name in pair[0])
        np.testing.assert_allclose(compute_in_mlx(source, back), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "count", "keys"),
    [
        (
            {"layers_to_transform": [1, 2], "target_modules": ["q_proj", "up_proj"]},
            2,
            ["mlp.up_proj", "self_attn.q_proj"],
        ),
        ({"layers_to_transform": [0], "target_modules": ["q_proj"]}, 3, ["model.layers.0.self_attn.q_proj"]),
        (
            {"target_modules": ["q_proj", "lm_head"]},
            3,
            ["lm_head", *(f"model.layers.{n}.self_attn.q_proj" for n in range(3))],
        ),
        (
            {"target_modules": ["o_proj"], "exclude_modules": ["model.layers.1.self_attn.o_proj"]},
            3,
            ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"],
        ),
    ],
    ids=["last layers", "first layer", "head", "a hole"],
)
def test_adapters_on_some_modules_stand_on_the_same_ones_on_the_other_side(
    bases: dict[str, tuple[ModelSource, nn.Module]],
    tmp_path: Path,
    settings: dict[str, Any],
    count: int,
    keys: list[str],
) -> None:
    source, model = bases["llama"]
    expected = make_peft_adapter(model, tmp_path / "peft", **settings)
    there = convert(source, tmp_path / "peft", tmp_path / "mlx")
    config = json.loads((there / ADAPTER_CONFIG).read_text())
    assert (config["num_layers"], config["lora_parameters"]["keys"]) == (count, keys)
    np.testing.assert_allclose(compute_in_mlx(source, there), expected, atol=1e-4)
    back = find_adapter(str(there), source, "test")
    np.testing.assert_allclose(compute_in_peft(model, back), expected, atol=1e-4)


@pytest.mark.parametrize("layers", [-1, 1], ids=["all layers", "the last layer"])
def test_an_adapter_of_mlx_lm_with_keys_comes_over_without_the_keys_that_name_nothing(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path, layers: int
) -> None:
    # Keys of another architecture adapt nothing in mlx-lm; a head stands outside of the layers that num_layers counts.
    source, model = bases["llama"]
    keys = ["self_attn.v_proj", "attn.c_attn", "lm_head", "model.layers.0.mlp.up_proj"]
    expected = make_mlx_adapter(source, tmp_path / "mlx", layers=layers, keys=keys)
    found = find_adapter(str(tmp_path / "mlx"), source, "test")
    np.testing.assert_allclose(compute_in_peft(model, found), expected, atol=1e-4)
    targets = json.loads((found / ADAPTER_CONFIG).read_text())["target_modules"]
    adapted = range(3) if layers < 0 else (2,)
    assert targets == [
        "lm_head",
        "model.layers.0.mlp.up_proj",
        *(f"model.layers.{n}.self_attn.v_proj" for n in adapted),
    ]


def test_patterns_that_give_all_modules_one_rank_and_scale_are_no_reason_to_refuse(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path
) -> None:
    source, model = bases["gpt2"]
    patterns = {"r": 2, "rank_pattern": {"c_attn": 2}, "alpha_pattern": {"c_attn": 6}, "target_modules": ["c_attn"]}
    expected = make_peft_adapter(model, tmp_path / "peft", lora_alpha=99, **patterns)
    there = convert(source, tmp_path / "peft", tmp_path / "mlx")
    np.testing.assert_allclose(compute_in_mlx(source, there), expected, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_keep_their_format_and_bits(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path, dtype: torch.dtype
) -> None:
    source, model = bases["llama"]
    make_peft_adapter(model, tmp_path / "peft")
    weights = tmp_path / "peft" / ADAPTER_WEIGHTS
    save_file({name: one.to(dtype) for name, one in load_file(weights).items()}, weights, metadata={"format": "pt"})
    there = convert(source, tmp_path / "peft", tmp_path / "mlx")
    found = mx.load(str(there / MLX_WEIGHTS))
    assert {one.dtype for one in found.values()} == {mx.bfloat16 if dtype is torch.bfloat16 else mx.float16}
    assert (convert(source, there, tmp_path / "back") / ADAPTER_WEIGHTS).read_bytes() == weights.read_bytes()


def test_the_cached_copy_is_made_once_and_anew_when_the_adapter_or_its_template_changes(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path
) -> None:
    source, _ = bases["qwen3"]
    make_mlx_adapter(source, tmp_path / "mlx")
    first = find_adapter(str(tmp_path / "mlx"), source, "test")
    written = (first / ADAPTER_WEIGHTS).stat().st_mtime_ns
    assert find_adapter(str(tmp_path / "mlx"), source, "test") == first
    assert (first / ADAPTER_WEIGHTS).stat().st_mtime_ns == written
    (tmp_path / "mlx" / CHAT_TEMPLATE).write_text("{{ messages }}")
    second = find_adapter(str(tmp_path / "mlx"), source, "test")
    assert second != first
    assert (second / CHAT_TEMPLATE).read_text() == "{{ messages }}"


def change_adapter(
    folder: Path, config: dict[str, Any], rename: dict[str, str], shapes: dict[str, tuple[int, ...]]
) -> None:
    """Changes an adapter's configuration, and names and shapes of its tensors, in either format."""
    path = folder / ADAPTER_CONFIG
    old = json.loads(path.read_text())
    inner = {"lora_parameters": {**old.get("lora_parameters", {}), **config.pop("lora_parameters", {})}}
    path.write_text(json.dumps({**old, **(inner if is_mlx_adapter(folder) else {}), **config}))
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    for name, new in rename.items():
        tensor = tensors.pop(name)
        if new:
            tensors[new] = tensor
    tensors |= {name: torch.ones(shape) for name, shape in shapes.items()}
    save_file(tensors, weights)


Q = "base_model.model.model.layers.1.self_attn.q_proj"
PEFT_FAULTS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, tuple[int, ...]], str]] = {
    "modules_to_save": ({"modules_to_save": ["norm"]}, {}, {}, r"sets modules_to_save: \['norm'\]"),
    "tokens": ({"trainable_token_indices": {"embed_tokens": [3]}}, {}, {}, "sets trainable_token_indices"),
    "bare parameters": ({"target_parameters": ["mlp.experts.down_proj"]}, {}, {}, "sets target_parameters"),
    "bias": ({"bias": "all"}, {}, {}, "sets bias: 'all'"),
    "bias of B": ({"lora_bias": True}, {}, {}, "sets lora_bias: True"),
    "unknown": ({"use_qalora": True}, {}, {}, "sets use_qalora: True"),
    "ranks": ({"rank_pattern": {"1.self_attn.q_proj": 2}}, {}, {}, "layers.0.self_attn.q_proj has rank 4 and scale 2"),
    "alphas": ({"alpha_pattern": {"2.self_attn.q_proj": 2}}, {}, {}, "layers.2.self_attn.q_proj has 4 and 0.5"),
    "embedding": ({}, {}, {"base_model.model.model.embed_tokens.lora_embedding_A": (4, 40)}, "no factor of a linear module"),
    "embedding as matrix": ({}, {f"{Q}.lora_A.weight": "base_model.model.model.embed_tokens.lora_A.weight",
                                 f"{Q}.lora_B.weight": "base_model.model.model.embed_tokens.lora_B.weight"}, {}, "is an embedding"),
    "another layer": ({}, {f"{Q}.lora_A.weight": Q.replace("1", "7") + ".lora_A.weight",
                           f"{Q}.lora_B.weight": Q.replace("1", "7") + ".lora_B.weight"}, {}, "has no layer for"),
    "no B": ({}, {f"{Q}.lora_B.weight": ""}, {}, "layers.1.self_attn.q_proj lacks its factor B"),
    "no magnitude": ({"use_dora": True}, {}, {}, "lacks its magnitude"),
    "magnitude without DoRA": ({}, {}, {f"{Q}.lora_magnitude_vector": (32,)}, "no place for .*magnitude"),
    "wrong rank": ({}, {}, {f"{Q}.lora_A.weight": (3, 16), f"{Q}.lora_B.weight": (32, 3)}, "and the rank is 4"),
    "other ranks in A and B": ({}, {}, {f"{Q}.lora_B.weight": (32, 3)}, "and the rank is 4"),
    "a vector": ({}, {}, {f"{Q}.lora_B.weight": (32,)}, "and the rank is 4"),
    "experts": ({}, {}, {f"{Q}.lora_B.weight": (2, 32, 4)}, "experts of a mixture"),
    "no name": ({}, {}, {"weight": (4, 16)}, "weight is no factor"),
}  # fmt: skip


@pytest.mark.parametrize("fault", PEFT_FAULTS)
def test_what_mlx_lm_cannot_hold_is_refused_by_name(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path, fault: str
) -> None:
    source, model = bases["llama"]
    make_peft_adapter(model, tmp_path / "peft", target_modules=["q_proj"], lora_alpha=8)
    config, rename, shapes, words = PEFT_FAULTS[fault]
    change_adapter(tmp_path / "peft", config, rename, shapes)
    with pytest.raises(AdapterError, match=words) as caught:
        convert(source, tmp_path / "peft", tmp_path / "mlx")
    assert caught.value.problems[0].where == "test"
    assert not list((tmp_path / "mlx").iterdir())


M = "model.layers.1.self_attn.q_proj"
MLX_FAULTS: dict[str, tuple[dict[str, Any], dict[str, str], dict[str, tuple[int, ...]], str]] = {
    "all weights": ({"fine_tune_type": "full"}, {}, {}, "says fine_tune_type: 'full', which is no adapter"),
    "no parameters": ({"lora_parameters": {"rank": None}}, {}, {}, "lora_parameters with a rank above 0"),
    "no rank": ({"lora_parameters": {"rank": True}}, {}, {}, "lora_parameters with a rank above 0"),
    "no scale": ({"lora_parameters": {"scale": None, "alpha": 16}}, {}, {}, "says None where the scale should stand"),
    "scale of text": ({"lora_parameters": {"scale": "2"}}, {}, {}, "says '2' where the scale"),
    "endless scale": ({"lora_parameters": {"scale": float("inf")}}, {}, {}, "says inf where the scale"),
    "giant scale": ({"lora_parameters": {"scale": 10**400}}, {}, {}, "where the scale"),
    "dropout": ({"lora_parameters": {"dropout": 1.0}}, {}, {}, "says the dropout 1.0"),
    "no number of layers": ({"num_layers": None}, {}, {}, "says no num_layers"),
    "keys of text": ({"lora_parameters": {"keys": "q_proj"}}, {}, {}, "keys that are no list of names"),
    # mlx-lm compares whole names: with `q_proj` alone its trainer adapts nothing.
    "keys of PEFT's": ({"lora_parameters": {"keys": ["q_proj"]}}, {}, {}, "no place for model.layers.*q_proj: keys and num"),
    "fewer layers": ({"num_layers": 1}, {}, {}, "no place for model.layers.[01].self_attn.q_proj"),
    "a lost layer": ({}, {f"{M}.lora_a": "", f"{M}.lora_b": ""}, {}, f"it has no {M}.lora_a, and other layers have"),
    "a layer beyond": ({}, {f"{M}.lora_a": "model.layers.9.self_attn.q_proj.lora_a",
                            f"{M}.lora_b": "model.layers.9.self_attn.q_proj.lora_b"}, {}, "no place for model.layers.9"),
    "zeros before the number": ({}, {f"{M}.lora_a": "model.layers.01.self_attn.q_proj.lora_a",
                                     f"{M}.lora_b": "model.layers.01.self_attn.q_proj.lora_b"}, {}, "it has no|no place"),
    "a number of a million digits": ({}, {f"{M}.lora_a": f"model.layers.{'9' * 5000}.q.lora_a",
                                          f"{M}.lora_b": f"model.layers.{'9' * 5000}.q.lora_b"}, {}, "no place for"),
    "no lora_b": ({}, {f"{M}.lora_b": ""}, {}, "layers.1.self_attn.q_proj lacks its factor B"),
    "magnitude without DoRA": ({}, {}, {f"{M}.m": (32,)}, "no place for .*q_proj.m"),
    "no magnitude": ({"fine_tune_type": "dora"}, {}, {}, "lacks its magnitude"),
    "not transposed": ({}, {}, {f"{M}.lora_a": (4, 16), f"{M}.lora_b": (32, 4)}, "and the rank is 4"),
    "experts": ({}, {}, {f"{M}.lora_a": (2, 4, 16), f"{M}.lora_b": (2, 32, 4)}, "experts of a mixture"),
    "whole weights": ({}, {}, {"model.norm.weight": (16,)}, "model.norm.weight is no part of an adapter"),
    "embedding": ({"lora_parameters": {"keys": ["self_attn.q_proj", "model.embed_tokens"]}}, {},
                  {"model.embed_tokens.lora_a": (40, 4), "model.embed_tokens.lora_b": (4, 16)}, "is an embedding"),
}  # fmt: skip


@pytest.mark.parametrize("fault", MLX_FAULTS)
def test_what_is_no_plain_adapter_of_mlx_lm_is_refused_by_name_and_leaves_nothing(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path, fault: str
) -> None:
    source, _ = bases["llama"]
    make_mlx_adapter(source, tmp_path / "mlx", layers=3, keys=["self_attn.q_proj"])
    config, rename, shapes, words = MLX_FAULTS[fault]
    change_adapter(tmp_path / "mlx", config, rename, shapes)
    cached = {*get_cache_folder().rglob("*")}
    with pytest.raises(AdapterError, match=words) as caught:
        find_adapter(str(tmp_path / "mlx"), source, "recipe.yaml:3")
    assert caught.value.problems[0].where == "recipe.yaml:3"
    assert {*get_cache_folder().rglob("*")} <= cached | {get_cache_folder(), get_cache_folder() / "adapters"}


@pytest.mark.parametrize("model_type", ["gpt2", "gemma", "gemma2", "qwen3"])
def test_an_adapter_on_a_head_that_is_the_embedding_is_refused(
    tmp_path: Path, model_type: str, bases: dict[str, tuple[ModelSource, nn.Module]]
) -> None:
    source, model = bases[model_type]
    if model_type == "qwen3":  # the only one of them whose head is a matrix of its own unless the config says otherwise
        source = replace(
            source, config={key: one for key, one in source.config.items() if key != "tie_word_embeddings"}
        )
    make_peft_adapter(model, tmp_path / "peft", target_modules=["lm_head"])
    with pytest.raises(AdapterError, match="lm_head shares the embedding's matrix"):
        convert(source, tmp_path / "peft", tmp_path / "mlx")


def test_an_architecture_without_a_tested_counterpart_is_refused_with_those_that_have_one(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path
) -> None:
    source, model = bases["llama"]
    make_peft_adapter(model, tmp_path / "peft")
    other = replace(source, config={**source.config, "model_type": "olmo2"})
    with pytest.raises(AdapterError, match="is of the type 'olmo2'") as caught:
        convert(other, tmp_path / "peft", tmp_path / "mlx")
    assert "gemma, gemma2, gemma3_text, gpt2, llama" in str(caught.value.problems[0].fix)


def test_a_shape_that_only_the_base_shows_to_be_wrong_is_refused(
    bases: dict[str, tuple[ModelSource, nn.Module]], tmp_path: Path
) -> None:
    source, _ = bases["llama"]
    make_mlx_adapter(source, tmp_path / "mlx", keys=["self_attn.q_proj"])
    wide = {f"model.layers.{n}.self_attn.q_proj.lora_a": (20, 4) for n in range(LAYERS)}
    change_adapter(tmp_path / "mlx", {}, {}, wide)
    with pytest.raises(AdapterError, match=r"adapts 32 × 20, and .* is 32 × 16"):
        find_adapter(str(tmp_path / "mlx"), source, "test")
