"""Tokens that a recipe adds: one id each, the same everywhere, part of the cache's key, and never one that exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from config.recipe_io import load_recipe
from utils.added_tokens import add_tokens, find_added_ids
from utils.examples import Example
from utils.exceptions import DataError, RecipeError
from utils.model_source import ModelSource
from utils.prepared_data import make_key
from utils.run_tokenizer import open_tokenizer
from utils.tokenizer_files import load_tokenizer
from utils.tokenizer_utils import TokenizerUtils


def open_with(folder: Path, target: Path, **data: Any) -> TokenizerUtils:
    """The tokenizer of a recipe."""
    rows = target / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    path = target / "recipe.yaml"
    body = {"model": {"name": str(folder)}, "data": {"train": str(rows), **data}, "training": {"method": "sft"}}
    path.write_text(json.dumps(body), encoding="utf-8")
    return open_tokenizer(load_recipe(path), ModelSource(str(folder), folder, {}), {"prompt_completion"})


def test_an_added_token_is_one_id_that_answers_may_use_and_decoding_shows(
    embedded: ModelSource, tmp_path: Path
) -> None:
    tokenizer = open_with(embedded.folder, tmp_path, added_tokens=["<call>", "<done>"])
    size = len(load_tokenizer(embedded.folder))
    turns = ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "<call>x<done>"})
    example = Example("messages", turns, None, "rows:1", {})
    ids = tokenizer.encode_example(example).input_ids.tolist()
    assert ids.count(size) == ids.count(size + 1) == 1
    assert tokenizer.decode([size, size + 1]) == "<call><done>"
    plain = open_with(embedded.folder, tmp_path)
    assert len(plain.encode_example(example).input_ids) > len(ids)


def test_a_token_that_the_template_writes_becomes_a_control_token(embedded: ModelSource, tmp_path: Path) -> None:
    # So a base model learns the turns of a template that its tokenizer does not know.
    tokens = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    with pytest.raises(RecipeError, match="template phi needs"):
        open_with(embedded.folder, tmp_path, template="phi")
    tokenizer = open_with(embedded.folder, tmp_path, template="phi", added_tokens=tokens)
    size = len(load_tokenizer(embedded.folder))
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "hi"}]).tolist()
    assert {size + 1, size + 2, size + 3} <= {*prompt}
    assert size + 3 in tokenizer.find_stop_ids()
    with pytest.raises(DataError, match="control token"):
        tokenizer.encode_prompt([{"role": "user", "content": "<|user|>"}])


def test_a_token_that_exists_is_refused_with_its_line(embedded: ModelSource, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe\.yaml:1.*'<\|im_end\|>' already"):
        open_with(embedded.folder, tmp_path, added_tokens=["<new>", "<|im_end|>"])


def test_added_tokens_are_part_of_the_token_caches_key(embedded: ModelSource, tmp_path: Path) -> None:
    keys = set()
    for tokens in ([], ["<call>"], ["<call>", "<done>"]):
        tokenizer = open_with(embedded.folder, tmp_path, added_tokens=tokens)
        keys.add(
            (tokenizer.hash, make_key(load_recipe(tmp_path / "recipe.yaml"), tokenizer, {"train": [], "eval": None}))
        )
    assert len({hashed for hashed, _ in keys}) == len({key for _, key in keys}) == 3


def test_saved_tokens_are_found_again_and_not_added_twice(embedded: ModelSource, tmp_path: Path) -> None:
    tokenizer = open_with(embedded.folder, tmp_path, added_tokens=["<call>", "<done>"])
    tokenizer.save(tmp_path / "saved")
    saved = load_tokenizer(tmp_path / "saved")
    assert find_added_ids(saved, ["<call>", "<done>"]) == ()
    fresh = load_tokenizer(embedded.folder)
    size = len(fresh)
    assert find_added_ids(fresh, ["<call>", "<done>"]) == (size, size + 1)
    assert saved.convert_tokens_to_ids(["<call>", "<done>"]) == [size, size + 1]
    with pytest.raises(RecipeError, match="already"):
        add_tokens(saved, ["<call>"], "test")
