"""JSON files and safetensors headers of a model folder, read within limits: they come from strangers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from utils.exceptions import ModelLoadingError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
LENGTH_BYTES = 8  # of the number in front of a safetensors header
MAX_HEADER_BYTES = 100_000_000
MAX_INDEX_BYTES = 100_000_000


def read_json_object(path: Path, where: str, max_bytes: int) -> dict[str, Any]:
    """Parses a JSON file of a model folder: these come from strangers, so their size is looked at first."""
    fix = "a model folder holds config.json, tokenizer.json and .safetensors files"
    try:
        if not path.is_file():
            raise ModelLoadingError(f"there is no {path}", where=where, fix=fix, code="no-config")
        if (size := path.stat().st_size) > max_bytes:
            raise ModelLoadingError(f"{path} has {size:,} bytes: too large", where=where, fix=fix, code="no-config")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadingError(f"{path} cannot be read: {error}", where=where, fix=fix, code="no-config") from error
    if not isinstance(value, dict):
        raise ModelLoadingError(f"{path} is not a JSON object", where=where, fix=fix, code="no-config")
    return value


def list_weight_names(folder: Path) -> list[str]:
    """Names of the weight files that transformers would load: the single file, else those in the index; else none.

    Raises:
        ModelLoadingError: the index is damaged, or names anything but a safetensors file of this folder.
    """
    index = folder / INDEX_NAME
    if (folder / WEIGHTS_NAME).exists() or not index.exists():
        return [WEIGHTS_NAME] if (folder / WEIGHTS_NAME).exists() else []
    weight_map = read_json_object(index, str(index), MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelLoadingError("the index has no table of weights", where=str(index), code="damaged")
    names = sorted(set(weight_map.values()))
    for name in names:
        # transformers joins these names to the folder: `../../x` would load a file from anywhere.
        if "/" in name or "\\" in name or not name.endswith(".safetensors"):
            message = f"the index names {name!r}, which is no safetensors file of this folder"
            raise ModelLoadingError(message, where=str(index), fix="use another copy of the model", code="unsafe-index")
    return names


def read_header_bytes(path: Path) -> bytes:
    """The JSON header of a safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(LENGTH_BYTES))
            if length > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ModelLoadingError("the safetensors header is too large", where=str(path), code="damaged")
            return file.read(length)
    except (OSError, struct.error) as error:
        raise ModelLoadingError(f"not a safetensors file: {error}", where=str(path), code="damaged") from error


def parse_header(content: bytes, path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape, and last byte behind the header, of every tensor by name.

    Raises:
        ModelLoadingError: the header is damaged.
    """
    try:
        entries = {name: entry for name, entry in json.loads(content).items() if name != "__metadata__"}
        return {name: (tuple(entry["shape"]), int(entry["data_offsets"][1])) for name, entry in entries.items()}
    except (ValueError, AttributeError, LookupError, TypeError, RecursionError) as error:
        raise ModelLoadingError("the safetensors header is damaged", where=str(path), code="damaged") from error
