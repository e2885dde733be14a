"""Merging refuses what does not predict like the adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from config.recipe_io import load_recipe
from config.structured_config import ModelSection
from utils.backends import torch_backend
from utils.exceptions import AdapterError
from utils.merging import measure_drift, merge_run
from utils.model_source import find_model
from utils.run_folder import RunFolder
from utils.tokenizer_utils import TokenizerUtils, load_tokenizer


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
    tiny_llama: Path, tmp_path: Path
) -> None:
    # Stored in bfloat16, weights keep three digits: for a model with logits in the hundreds that is far from equal.
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (base / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    weights = load_file(base / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 2000  # the tied head of a random model is faint
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
        merge_run(torch_backend, loaded, source, folder, tokenizer, tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))
