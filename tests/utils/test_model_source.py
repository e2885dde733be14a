"""A model is found, or the error says what is wrong with it, before any framework is loaded."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from config.structured_config import ModelSection
from utils.exceptions import ModelLoadingError, RecipeError, TunebookError
from utils.model_headers import read_header_bytes
from utils.model_source import (
    MAX_CONFIG_BYTES,
    ModelSource,
    find_model,
    hash_file,
    iterate_tensor_shapes,
    list_linear_modules,
)

ROOT = Path(__file__).resolve().parents[2]
WHERE = "recipes/x.yaml:3"
NAME = "smollm2-135m-instruct"
LLAMA_MODULES = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as save_pretrained leaves it, with tiny weights."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file(
        {
            "model.embed_tokens.weight": np.zeros((8, 4), dtype=np.float32),
            "model.layers.0.self_attn.q_proj.weight": np.zeros((4, 4), dtype=np.float32),
            "model.layers.0.self_attn.q_proj.bias": np.zeros(4, dtype=np.float32),
            "model.layers.0.mlp.up_proj.weight": np.zeros((6, 4), dtype=np.float32),
            "model.layers.0.input_layernorm.weight": np.zeros(4, dtype=np.float32),
            "lm_head.weight": np.zeros((8, 4), dtype=np.float32),
        },
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    return path


def find(name: Path | str, *, with_weights: bool = True) -> ModelSource:
    return find_model(ModelSection(name=str(name)), WHERE, with_weights=with_weights)


def fail(name: Path | str, kind: type[TunebookError] = ModelLoadingError, *, with_weights: bool = True) -> str:
    with pytest.raises(kind) as caught:
        find(name, with_weights=with_weights)
    return caught.value.problems[0].code


def write_header(path: Path, header: bytes, length: int | None = None) -> None:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)


def test_a_local_folder_is_a_model(folder: Path) -> None:
    source = find(folder)
    assert source.folder == folder
    assert source.model_type == "llama"
    assert source.family is not None
    assert source.family.name == "llama"
    assert [path.name for path in source.list_weight_files()] == ["model.safetensors"]


def test_a_relative_folder_is_a_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    assert find("model").model_type == "llama"


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "../x", "~/no-such-folder-here", "a/b/c"])
def test_a_path_without_a_folder_is_a_recipe_error_and_never_a_download(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find(name)
    assert caught.value.problems[0].code == "no-model"
    assert caught.value.problems[0].where == WHERE


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert fail(folder) == "no-config"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe"])
def test_a_damaged_config_is_refused(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    assert fail(folder) == "no-config"


def test_a_model_without_safetensors_is_refused_only_where_weights_are_needed(folder: Path) -> None:
    # A pickle is no substitute: loading one runs its code.
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert fail(folder) == "no-weights"
    assert find(folder, with_weights=False).model_type == "llama"


def test_linear_modules_are_the_matrices_inside_the_numbered_layers(folder: Path) -> None:
    assert list_linear_modules(find(folder)) == ["q_proj", "up_proj"]


def test_linear_modules_of_the_embedded_model_come_from_its_file() -> None:
    source = find(f"embedded/{NAME}")
    assert list_linear_modules(source) == LLAMA_MODULES
    shapes = dict(iterate_tensor_shapes(source))
    assert shapes["model.layers.0.self_attn.k_proj.weight"] == (192, 576)
    assert "__metadata__" not in shapes


def test_linear_modules_come_from_the_family_table_where_no_weights_are_here(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert sorted(list_linear_modules(find(folder, with_weights=False))) == LLAMA_MODULES


def test_linear_modules_of_an_unknown_family_without_weights_are_none(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text('{"model_type": "unheard_of"}')
    assert list_linear_modules(find(folder, with_weights=False)) == []


@pytest.fixture
def parts(folder: Path) -> Path:
    """The folder with its weights in two files and an index."""
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    more = {"model.layers.1.mlp.down_proj.weight": np.zeros((4, 6), dtype=np.float32)}
    save_file(more, folder / "model-2.safetensors")
    write_index(folder, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    return folder


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_linear_modules_are_collected_over_all_weight_files(parts: Path) -> None:
    assert list_linear_modules(find(parts)) == ["down_proj", "q_proj", "up_proj"]


def test_weights_that_transformers_would_not_load_are_not_read(folder: Path) -> None:
    # Some models carry a second copy in another layout: its names became LoRA targets, its bytes part of the hash.
    first = find(folder).hash_weights()
    save_file({"layers.0.attention.wq.weight": np.zeros((4, 4), np.float32)}, folder / "consolidated.safetensors")
    source = find(folder)
    assert list_linear_modules(source) == ["q_proj", "up_proj"]
    assert source.hash_weights() == first


def test_a_missing_part_of_the_weights_is_named(parts: Path) -> None:
    (parts / "model-2.safetensors").unlink()
    with pytest.raises(
        ModelLoadingError, match=r"1 of 2 weight files are missing, such as model-2\.safetensors"
    ) as caught:
        find(parts)
    assert caught.value.problems[0].code == "incomplete"
    assert list_linear_modules(find(parts, with_weights=False)) == ["q_proj", "up_proj"]


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "model.bin", ".."])
def test_an_index_that_names_a_file_elsewhere_or_a_pickle_is_refused(parts: Path, name: str) -> None:
    write_index(parts, {"a": "model-1.safetensors", "b": name})
    assert fail(parts) == "unsafe-index"


@pytest.mark.parametrize("weight_map", [None, [], "x", {"a": 3}])
def test_a_damaged_index_is_refused(parts: Path, weight_map: Any) -> None:
    write_index(parts, weight_map)
    assert fail(parts) == "damaged"


def test_a_folder_with_an_adapter_only_says_so(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelLoadingError, match="is an adapter, not a whole model"):
        find(folder)


@pytest.mark.parametrize("value", ["x", 0, -1, 2.5, True, {}])
@pytest.mark.parametrize("key", ["vocab_size", "num_hidden_layers", "n_embd"])
def test_a_config_with_a_size_that_no_model_has_is_refused(folder: Path, key: str, value: object) -> None:
    # Words and fractions were a traceback of transformers, and -1 layers a model without layers that trained.
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", key: value}))
    assert fail(folder) == "bad-config"


@pytest.mark.parametrize("value", [64, None, [64, 32]])
def test_a_config_may_leave_a_size_open_or_give_one_for_each_layer(folder: Path, value: object) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "n_embd": value}))
    assert find_model(ModelSection(name=str(folder)), "r:1", with_weights=False).config["n_embd"] == value


def test_a_config_that_is_too_large_or_too_deep_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    assert fail(folder) == "no-config"
    with (folder / "config.json").open("wb") as file:
        file.truncate(MAX_CONFIG_BYTES + 1)
    with pytest.raises(ModelLoadingError, match="too large"):
        find(folder)


@pytest.mark.parametrize("length", [2**63, 200_000_000, 1000])
def test_a_header_that_claims_to_be_too_large_is_refused_before_it_is_read(folder: Path, length: int) -> None:
    write_header(folder / "model.safetensors", b"{}", length)
    with pytest.raises(ModelLoadingError, match="too large") as caught:
        read_header_bytes(folder / "model.safetensors")
    assert caught.value.problems[0].where == str(folder / "model.safetensors")


@pytest.mark.parametrize("content", [b"", b"1234567", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"])
def test_what_is_no_safetensors_file_is_refused(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelLoadingError) as caught:
        list_linear_modules(find(folder))
    assert caught.value.problems[0].code == "damaged"


# The last four are JSON, but no header: they raised AttributeError, KeyError or TypeError.
@pytest.mark.parametrize("header", [b"{", b"\xff\xff", b"[]", b'{"a": 3}', b'{"a": {}}', b'{"a": {"shape": 3}}'])
def test_a_damaged_header_is_refused(folder: Path, header: bytes) -> None:
    write_header(folder / "model.safetensors", header)
    with pytest.raises(ModelLoadingError) as caught:
        list_linear_modules(find(folder))
    assert caught.value.problems[0].code == "damaged"
    assert caught.value.problems[0].where == str(folder / "model.safetensors")


def test_the_hash_of_weights_tells_fine_tunes_apart(folder: Path) -> None:
    # Fine-tunes of one model share every name, shape and size.
    first = find(folder).hash_weights()
    assert find(folder).hash_weights() == first
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert find(folder).hash_weights() != first


def test_an_unknown_embedded_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError) as caught:
        find("embedded/smollm3")
    assert caught.value.problems[0].where == WHERE
    assert f"embedded/{NAME}" in (caught.value.problems[0].fix or "")


@pytest.fixture
def converted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which the embedded model lies already converted."""
    target = tmp_path / "cache" / "models" / NAME
    target.parent.mkdir(parents=True)
    folder.rename(target)
    entries: dict[str, Any] = {
        path.name: {"bytes": path.stat().st_size, "sha256": hash_file(path)} for path in target.iterdir()
    }
    (target / "checksums.json").write_text(json.dumps(entries))
    monkeypatch.setenv("TUNEBOOK_CACHE", str(tmp_path / "cache"))
    return target


def test_a_converted_model_is_taken_from_the_cache(converted: Path) -> None:
    assert find(f"embedded/{NAME}").folder == converted


def test_a_converted_file_of_another_size_is_refused_with_the_folder_to_delete(converted: Path) -> None:
    with (converted / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(ModelLoadingError, match=r"damaged: model\.safetensors") as caught:
        find(f"embedded/{NAME}")
    assert str(converted) in (caught.value.problems[0].fix or "")


def test_a_converted_file_that_is_missing_is_refused(converted: Path) -> None:
    (converted / "config.json").unlink()
    assert fail(f"embedded/{NAME}") == "damaged"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config.json": {}}', '{"config.json": 3}'])
def test_damaged_checksums_are_refused(converted: Path, content: str) -> None:
    # They were trusted to be what we once wrote, and a file cut short by a full disk raised a JSONDecodeError.
    (converted / "checksums.json").write_text(content)
    assert fail(f"embedded/{NAME}") == "damaged"


OFFLINE = """
import sys
from config.structured_config import ModelSection
from utils.exceptions import TunebookError
from utils.model_source import find_model
try:
    find_model(ModelSection(name=sys.argv[1]), "recipes/x.yaml:3", with_weights=sys.argv[2] == "True")
except TunebookError as error:
    print(error.exit_code, error.problems[0].code, error.problems[0].where, error.problems[0].fix)
print([name for name in ("torch", "transformers") if name in sys.modules])
"""


def run_offline(tmp_path: Path, *arguments: str) -> list[str]:
    # In a process of its own, because huggingface_hub reads its environment once, when it is imported.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", OFFLINE, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("with_weights", ["True", "False"])
def test_a_hub_model_that_is_not_here_offline_is_an_error_with_ways_out(tmp_path: Path, with_weights: str) -> None:
    error, loaded = run_offline(tmp_path, "some-lab/some-model", with_weights)
    assert error.startswith(f"4 offline {WHERE} ")
    assert f"embedded/{NAME}" in error
    assert loaded == "[]"


@pytest.mark.parametrize("name", ["some lab/model", "-bad-/x", "a/b--c"])
def test_an_id_that_the_hub_cannot_have_is_a_recipe_error(tmp_path: Path, name: str) -> None:
    assert run_offline(tmp_path, name, "True")[0].startswith(f"2 no-model {WHERE} ")
