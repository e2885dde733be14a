"""Where a model's files are: an embedded model, a local folder, or a hub id. No framework is loaded here."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.model_families import ModelFamily, find_family
from config.structured_config import ModelSection
from utils.exceptions import ModelLoadingError, RecipeError

EMBEDDED_PREFIX = "embedded/"
EMBEDDED_MODELS = {"smollm2-135m-instruct": "llama"}  # name → model_type, known before the first conversion
DEFAULT_MODEL = EMBEDDED_PREFIX + next(iter(EMBEDDED_MODELS))
SMALL_FILES = ["*.json", "*.jinja", "tokenizer.model"]
# Never *.bin or *.pt: those are pickles, and loading one runs its code.
ALL_FILES = [*SMALL_FILES, "*.safetensors"]
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine's disk.

    Attributes:
        name: as the recipe says it.
        folder: holds config.json, the tokenizer and, once fetched, safetensors.
        config: the parsed config.json.
    """

    name: str
    folder: Path
    config: dict[str, Any]

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config.get("model_type", ""))

    @property
    def family(self) -> ModelFamily | None:
        """Its row in the family table, if it has one."""
        return find_family(self.model_type)

    @property
    def public_name(self) -> str:
        """What an adapter names as its base: a hub id, which means the same everywhere, or else the folder."""
        is_local = self.name.startswith(EMBEDDED_PREFIX) or Path(self.name).expanduser().is_dir()
        return str(self.folder) if is_local else self.name

    def list_weight_files(self) -> list[Path]:
        """The safetensors files."""
        return sorted(self.folder.glob("*.safetensors"))

    def hash_weights(self) -> str:
        """SHA-256 over the names, sizes and headers of the weight files: fast, and different for a different model."""
        digest = hashlib.sha256()
        for path in self.list_weight_files():
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + read_header_bytes(path))
            with path.open("rb") as file:  # a sample of the numbers themselves: fine-tunes share names and sizes
                for part in range(16):
                    file.seek(path.stat().st_size * part // 16)
                    digest.update(file.read(4096))
        return digest.hexdigest()


def get_cache_folder() -> Path:
    """Folder for converted models: TUNEBOOK_CACHE, or ~/.cache/tunebook."""
    return Path(os.environ.get("TUNEBOOK_CACHE") or Path.home() / ".cache" / "tunebook").expanduser()


def find_model(model: ModelSection, where: str, *, with_weights: bool) -> ModelSource:
    """Finds the model's folder, downloading from the hub what is missing.

    Args:
        model: the recipe's section.
        where: `file:line` of model.name, for errors.
        with_weights: False fetches only the config and the tokenizer, which is all that a pre-flight needs.

    Raises:
        RecipeError: no such embedded model or folder.
        ModelLoadingError: not in the cache while offline, not reachable, or without safetensors.
    """
    if model.name.startswith(EMBEDDED_PREFIX):
        folder = find_embedded(model.name, where)
    elif (local := Path(model.name).expanduser()).is_dir():
        folder = local
    elif model.name.count("/") > 1 or model.name.startswith((".", "/", "~")):
        fix = f"name a folder that exists, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or {DEFAULT_MODEL}"
        raise RecipeError(f"there is no model {model.name!r}", where=where, fix=fix, code="no-model")
    else:
        folder = fetch_from_hub(model, where, with_weights=with_weights)
    source = ModelSource(model.name, folder, read_config(folder, where))
    if with_weights and not source.list_weight_files():
        fix = "convert the model with save_pretrained(safe_serialization=True)"
        raise ModelLoadingError("the model has no .safetensors files", where=str(folder), fix=fix, code="no-weights")
    return source


def find_embedded(name: str, where: str) -> Path:
    """The converted embedded model; converts it on first use."""
    short = name.removeprefix(EMBEDDED_PREFIX)
    if short not in EMBEDDED_MODELS:
        fix = f"embedded models: {', '.join(EMBEDDED_PREFIX + known for known in EMBEDDED_MODELS)}"
        raise RecipeError(f"there is no model {name!r}", where=where, fix=fix, code="no-model")
    folder = get_cache_folder() / "models" / short
    if not (folder / "checksums.json").exists():
        from utils.backends.embedded_model import convert_embedded_model

        convert_embedded_model(folder)
    verify_sizes(folder)
    return folder


def verify_sizes(folder: Path) -> None:
    """Checks the converted files against their recorded sizes; `hash_file` has the full check at conversion."""
    fix = f"delete {folder} and run again: it will be converted anew"
    try:
        entries = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        sizes = {name: int(entry["bytes"]) for name, entry in entries.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        message = "the converted model is damaged: checksums.json"
        raise ModelLoadingError(message, where=str(folder), fix=fix, code="damaged") from error
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ModelLoadingError(
                f"the converted model is damaged: {name}", where=str(folder), fix=fix, code="damaged"
            )


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch_from_hub(model: ModelSection, where: str, *, with_weights: bool) -> Path:
    """Downloads a hub snapshot with progress bars, or finds it in the cache."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    patterns = ALL_FILES if with_weights else SMALL_FILES
    try:
        return Path(snapshot_download(model.name, revision=model.revision, allow_patterns=patterns))
    except (RepositoryNotFoundError, HFValidationError) as error:
        fix = "check the id; for a gated or private model put HF_TOKEN=… into .env"
        raise RecipeError(f"the hub has no model {model.name!r}", where=where, fix=fix, code="no-model") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        fix = (
            "connect once to download it, name a local folder, or set "
            f"model.name: {DEFAULT_MODEL}, which needs no network"
        )
        message = f"{model.name} is not in the cache and the hub cannot be reached"
        raise ModelLoadingError(message, where=where, fix=fix, code="offline") from error


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Parses config.json."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "a model folder holds config.json, tokenizer.json and .safetensors files"
        raise ModelLoadingError(f"{path} cannot be read: {error}", where=where, fix=fix, code="no-config") from error
    if not isinstance(config, dict):
        raise ModelLoadingError(f"{path} is not a JSON object", where=where, code="no-config")
    return config


def read_header_bytes(path: Path) -> bytes:
    """The JSON header of a safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ModelLoadingError("the safetensors header is too large", where=str(path), code="damaged")
            return file.read(length)
    except (OSError, struct.error) as error:
        raise ModelLoadingError(f"not a safetensors file: {error}", where=str(path), code="damaged") from error


def iterate_tensor_shapes(source: ModelSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every tensor from the file headers: no weights are read."""
    for path in source.list_weight_files():
        try:
            header = json.loads(read_header_bytes(path))
            shapes = [(name, tuple(entry["shape"])) for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise ModelLoadingError("the safetensors header is damaged", where=str(path), code="damaged") from error
        yield from shapes


def list_linear_modules(source: ModelSource) -> list[str]:
    """Last names of the modules that an adapter can attach to: weight matrices inside the numbered layers.

    Read from the weight files where they are here, else from the family table; empty when neither knows.
    """
    found: dict[str, None] = {}
    for name, shape in iterate_tensor_shapes(source):
        parts = name.split(".")
        if len(shape) == 2 and parts[-1] == "weight" and any(part.isdigit() for part in parts):
            found[parts[-2]] = None
    if not found and source.family:
        return list(source.family.lora_targets)
    return sorted(found)
