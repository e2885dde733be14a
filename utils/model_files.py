"""What a model's files show of a run that would fail later, looked at without a framework."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from config.recipe_io import LoadedRecipe
from config.structured_config import ModelSection
from utils.exceptions import ModelLoadingError, RecipeError
from utils.model_shape import refuse_oversized
from utils.model_source import ModelSource, check_weight_files, is_on_hub

# `("llama", "LlamaConfig")` or `"gpt-sw3": "GPT2Config"`.
ENTRY = re.compile(r"""["']([\w.-]+)["'][,:] ["']\w+Config["']""")


def check_model_files(loaded: LoadedRecipe, source: ModelSource) -> None:
    """What a model's files show of a run that would fail later, or of a key that they make useless.

    Raises:
        RecipeError: a revision of what is not on a hub.
        ModelLoadingError: an unknown architecture, or weights that are missing where nothing will download them.
    """
    model = loaded.recipe.model
    check_architecture(source, model, loaded.find_origin("model.name"))
    if is_on_hub(model.name):
        return
    check_weight_files(source)
    refuse_oversized(source)
    if model.revision is not None:
        message = f"revision {model.revision!r} does nothing: {model.name} is not on a hub"
        raise RecipeError(message, where=loaded.find_origin("model.revision"), fix="remove it", code="no-revision")


def check_architecture(source: ModelSource, model: ModelSection, where: str) -> None:
    """The installed transformers knows the architecture, or the model brings code that the recipe trusts.

    Raises:
        ModelLoadingError: neither.
    """
    known = list_architectures()
    brings_code = model.trust_remote_code and "auto_map" in source.config
    if known and source.model_type not in known and not brings_code:
        message = f"transformers knows no architecture {source.model_type!r}, which config.json of {source.name} names"
        fix = "choose another model, or set model.trust_remote_code: true where the model brings its code and you trust it"
        raise ModelLoadingError(message, where=where, fix=fix, code="unknown-architecture")


def list_architectures() -> frozenset[str]:
    """Values of `model_type` in transformers' own table, read without importing it: that would load torch, in seconds.

    Empty where the package has no such table.
    """
    package = importlib.util.find_spec("transformers")
    folder = Path(package.origin).parent if package and package.origin else Path()
    names: set[str] = set()
    for name in ("auto_mappings.py", "configuration_auto.py"):
        path = folder / "models" / "auto" / name
        if not path.is_file():
            return frozenset()
        names.update(ENTRY.findall(path.read_text(encoding="utf-8")))
    return frozenset(names)
