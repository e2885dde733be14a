"""What is merged: the result of a run, or an adapter of any tool on a plain model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from config.structured_config import Recipe
from utils.exceptions import AdapterError, RunError
from utils.model_source import ModelSource, find_model
from utils.run_folder import RunFolder
from utils.run_tokenizer import open_run_tokenizer
from utils.session import open_plain
from utils.tokenizer_utils import TokenizerUtils


@dataclass(frozen=True)
class Trained:
    """What was trained, and all that it takes to load it.

    Attributes:
        source: the base model.
        folder: holds the adapter, or all weights if these were trained.
        tokenizer: with the template and the added tokens of the training.
    """

    recipe: Recipe
    source: ModelSource
    folder: Path
    is_adapter: bool
    tokenizer: TokenizerUtils


def open_trained_run(folder: RunFolder, base: str, *, trusts_code: bool) -> Trained:
    """The result of a run.

    Args:
        base: `full` or `dequantized`, what it is going to be merged with.
        trusts_code: the user's own word that code of the model may run.

    Raises:
        RunError: no result, a base that is no longer what it was trained on, or none that was quantised.
        AdapterError: there is no base, or the adapter must not be read.
    """
    loaded = folder.load_recipe(trusts_code=trusts_code)
    folder.check_complete()
    if base == "dequantized" and loaded.recipe.model.quantization == "none":
        message = "--base dequantized is for runs on a quantised base, and this one has none"
        raise RunError(message, where=str(folder.path), fix="leave --base out", code="not-quantised")
    if loaded.recipe.scratch:
        message = "this run trained a new model: there is no base to merge with"
        raise AdapterError(message, where=str(folder.path), fix=f"use {folder.model}", code="no-adapter")
    source = find_model(loaded.recipe.model, loaded.find_origin("model.name"), with_weights=True)
    folder.check_base(source)
    tokenizer = open_run_tokenizer(loaded, source, folder)
    is_adapter = folder.adapter.is_dir()
    return Trained(loaded.recipe, source, folder.adapter if is_adapter else folder.model, is_adapter, tokenizer)


def open_plain_adapter(name: str, adapter: str) -> Trained:
    """An adapter on the model that it was trained on.

    Args:
        name: of the base: folder, hub id or embedded/<name>.
        adapter: its folder, in the format of PEFT or of mlx-lm.

    Raises:
        RecipeError: no such model or folder.
        AdapterError: it does not fit.
    """
    recipe, source, tokenizer = open_plain(name, None, adapter)
    if source.adapter is None:
        raise AdapterError("there is no adapter", where=adapter, code="no-adapter")
    return Trained(recipe, replace(source, adapter=None), source.adapter, True, tokenizer)
