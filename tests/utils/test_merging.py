"""Merging refuses what does not predict like the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.tiny_models import save_llama, shorten_tokenizer
from config.recipe_io import load_recipe
from config.structured_config import ModelSection
from tests.conftest import TINY_VOCABULARY
from utils.backends import torch_backend
from utils.batching import pad_rows
from utils.exceptions import AdapterError
from utils.merge_sources import Trained
from utils.merging import Merge, measure_drift, merge_run
from utils.model_source import ModelSource, find_model
from utils.run_folder import RunFolder
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import EncodedExample, TokenizerUtils


def test_drift_is_zero_for_equal_logits_and_the_kl_divergence_otherwise() -> None:
    logits = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    same = measure_drift(logits, logits + 3.0)  # a constant moves no probability
    assert same.mean_divergence == pytest.approx(0.0, abs=1e-12)
    other = np.zeros_like(logits)
    p = torch.from_numpy(logits).softmax(-1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(p), torch.distributions.Categorical(logits=torch.from_numpy(other))
    )
    drift = measure_drift(logits, other)
    assert drift.mean_divergence == pytest.approx(float(expected.mean()), rel=1e-5)
    assert drift.largest_logit_difference == pytest.approx(float(np.abs(logits).max()))


def test_a_merge_that_loses_the_adapter_to_rounding_is_refused_and_leaves_nothing(
    embedded: ModelSource, tmp_path: Path
) -> None:
    # Stored in bfloat16, weights keep three digits: for a model with logits in the hundreds that is far from equal. It takes
    # many tokens for two of them to be about equally likely.
    base = tmp_path / "base"
    save_llama(base, 49_152, 64)
    shorten_tokenizer(embedded.folder, base, 49_152)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 2000  # the tied head of a random model is faint
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    recipe = tmp_path / "recipe.yaml"
    body = {"model": {"name": str(base), "dtype": "float32"}, "data": {"train": "x"}, "lora": {"r": 8}}
    recipe.write_text(json.dumps({**body, "training": {"method": "sft"}}), encoding="utf-8")
    loaded = load_recipe(recipe)
    source = find_model(ModelSection(name=str(base)), "test", with_weights=True)
    model = torch_backend.attach_lora(torch_backend.load_model(source, loaded.recipe), loaded.recipe)
    torch.manual_seed(0)
    for name, parameter in model.network.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=3.0)
    folder = RunFolder(tmp_path)
    torch_backend.save_weights(model, folder.adapter)
    tokenizer = TokenizerUtils(load_tokenizer(base))
    with pytest.raises(AdapterError, match="drifts"):
        merge_run(Trained(loaded.recipe, source, folder.adapter, True, tokenizer), tmp_path / "merged", compare=True)
    assert not list(tmp_path.glob("*merged*"))


def finish_run(base: Path, folder: Path, body: dict[str, Any]) -> Trained:
    """A run of a few steps on the tiny model, as train.py leaves it."""
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    body = {"data": {"train": "x"}, "training": {"method": "sft"}, **body}
    body["model"] = {"name": str(base), "dtype": "float32", **body.get("model", {})}
    recipe.write_text(json.dumps(body), encoding="utf-8")
    loaded = load_recipe(recipe)
    source = find_model(loaded.recipe.model, "test", with_weights=True)
    torch.manual_seed(0)
    model = torch_backend.attach_lora(torch_backend.load_model(source, loaded.recipe), loaded.recipe)
    random = np.random.default_rng(0)
    batch = pad_rows([EncodedExample(random.integers(5, TINY_VOCABULARY, 20), np.arange(20) > 2, "rows:1")], 2)
    step = torch_backend.make_step(model, loaded.recipe)
    for _ in range(4):
        step.step([batch], 2e-2)
    run = RunFolder(folder)
    tokenizer = TokenizerUtils(load_tokenizer(base))
    target = run.adapter if loaded.recipe.lora else run.model
    torch_backend.save_weights(model, target)
    tokenizer.save(target)
    return Trained(loaded.recipe, source, target, loaded.recipe.lora is not None, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_a_quantised_run_merges_into_either_base_and_the_distance_from_what_was_trained_is_told(
    tiny_llama: Path, tmp_path: Path, kind: str
) -> None:
    # The adapter has learned to make up for the rounding of its base, so on the full-precision base it is another model.
    run = finish_run(tiny_llama, tmp_path / "run", {"model": {"quantization": kind}, "lora": {"r": 4}})
    full = merge_run(run, tmp_path / "full", compare=True)
    dequantised = merge_run(run, tmp_path / "dequantised", "dequantized")
    for merge in (full, dequantised):
        assert merge.drift is not None
        assert merge.drift.mean_divergence < 1e-8  # integrity: the same numbers after writing and reading
        assert merge.trained_drift is not None
    assert full.trained_drift is not None
    assert dequantised.trained_drift is not None
    assert full.base == "into the full-precision base"
    if kind != "int8":  # on a CPU its evaluation rounds the activations too
        assert dequantised.trained_drift.mean_divergence < 1e-8
        assert full.trained_drift.mean_divergence > 100 * dequantised.trained_drift.mean_divergence
    assert dequantised.trained_drift.mean_divergence < full.trained_drift.mean_divergence


@pytest.mark.slow
def test_a_run_that_trained_all_weights_is_copied_in_the_number_format_of_its_base(
    tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    run = finish_run(base, tmp_path / "run", {})
    merge: Merge = merge_run(run, tmp_path / "merged", compare=True)
    assert merge.base.startswith("a copy")
    assert merge.drift is not None
    assert merge.check is not None
    assert merge.trained_drift is None
    copied = load_file(tmp_path / "merged" / "model.safetensors")
    trained = load_file(run.folder / "model.safetensors")
    assert copied.keys() == trained.keys()
    for name, tensor in trained.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(copied[name], tensor.to(torch.bfloat16))
