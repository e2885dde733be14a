"""A stranger's folder is data: it chooses no code, names no files elsewhere, and links to none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from config.structured_config import ModelSection
from utils.exceptions import ModelLoadingError, RunError
from utils.model_safety import check_links, check_run_links, strip_code_keys
from utils.model_source import find_model


def test_keys_that_choose_code_or_files_are_left_out_at_every_depth() -> None:
    config = {
        "model_type": "llama",
        "auto_map": {"AutoModel": "evil.Model"},
        "_attn_implementation_internal": "evil/kernel",
        "text_config": {
            "hidden_size": 8,
            "attn_implementation": "evil/kernel",
            "list": [{"transformers_weights": "x"}],
        },
        "_name_or_path": "org/base",
        "attn_implementation": None,
    }
    kept, dropped = strip_code_keys(config)
    assert kept == {"model_type": "llama", "text_config": {"hidden_size": 8, "list": [{}]}}
    assert dropped == ["auto_map", "_attn_implementation_internal", "attn_implementation", "transformers_weights"]
    assert "auto_map" in config, "the config that was given is changed"


def test_a_model_knows_what_was_left_out_and_a_trusted_one_keeps_it(tmp_path: Path) -> None:
    config = {"model_type": "llama", "vocab_size": 8, "auto_map": {"AutoModel": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    source = find_model(ModelSection(name=str(tmp_path)), "test", with_weights=False)
    assert (source.config, source.ignored) == ({"model_type": "llama", "vocab_size": 8}, ("auto_map",))
    trusted = ModelSection(name=str(tmp_path), trust_remote_code=True)
    assert find_model(trusted, "test", with_weights=False).config == config


def test_the_links_of_the_hubs_cache_lead_to_its_own_blobs_and_nowhere_else(tmp_path: Path) -> None:
    storage = tmp_path / "models--lab--tiny"
    snapshot = storage / "snapshots" / ("0" * 40)
    for folder in (snapshot, storage / "blobs"):
        folder.mkdir(parents=True)
    (storage / "blobs" / "1234").write_text("{}", encoding="utf-8")
    (snapshot / "config.json").symlink_to("../../blobs/1234")
    check_links(snapshot, ModelLoadingError)
    (snapshot / "tokenizer.json").symlink_to("../../../secret")
    with pytest.raises(ModelLoadingError, match=r"tokenizer\.json is a link to .*secret, outside of this folder"):
        check_links(snapshot, ModelLoadingError)


def test_a_folder_may_itself_be_a_link_and_hold_links_to_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "config.json").write_text("{}", encoding="utf-8")
    (tmp_path / "real" / "again.json").symlink_to("config.json")
    (tmp_path / "name").symlink_to("real")
    check_links(tmp_path / "name", ModelLoadingError)
    check_run_links(tmp_path / "name")


def test_a_run_whose_weights_are_a_link_out_of_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    (tmp_path / "run" / "adapter" / "adapter_model.safetensors").symlink_to("/etc/hostname")
    with pytest.raises(RunError, match="outside of this folder"):
        check_run_links(tmp_path / "run")
