"""What is merged: the result of a run, or an adapter of any tool on a plain model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from config.recipe_io import LoadedRecipe
from config.structured_config import Recipe
from utils.exceptions import AdapterError
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


def open_trained_run(loaded: LoadedRecipe, folder: RunFolder) -> Trained:
    """The result of a run.

    Raises:
        RunError: its base is no longer what it was trained on.
    """
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
