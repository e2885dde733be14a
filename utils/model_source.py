"""Where a model's files are: an embedded model, a local folder, or a hub id. No framework is loaded here."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from config.model_families import ModelFamily, find_family
from config.structured_config import ModelSection
from utils.exceptions import ModelLoadingError, RecipeError
from utils.model_headers import LENGTH_BYTES, list_weight_names, parse_header, read_header_bytes, read_json_object
from utils.model_safety import check_model_folder, strip_code_keys

EMBEDDED_PREFIX = "embedded/"
EMBEDDED_MODELS = {"smollm2-135m-instruct": "llama"}  # name → model_type, known before the first conversion
DEFAULT_MODEL = EMBEDDED_PREFIX + next(iter(EMBEDDED_MODELS))
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Sizes in config.json, under the names of most architectures; some hold a list with one for each layer.
SIZES = ("vocab_size", "hidden_size", "n_embd", "num_hidden_layers", "n_layer", "num_attention_heads", "n_head")
MAX_CONFIG_BYTES = 10_000_000


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine's disk.

    Attributes:
        name: as the recipe says it.
        folder: holds config.json, the tokenizer and, once fetched, safetensors.
        config: the parsed config.json; without the keys that choose code, unless the recipe trusts the model's code.
        adapter: folder of a finished adapter that is folded into the weights when they are loaded.
        seed: of the weights of a new model, which are on no disk; None for all others.
        ignored: names of the keys of config.json that choose code and were left out.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    adapter: Path | None = None
    seed: int | None = None
    ignored: tuple[str, ...] = ()

    @property
    def model_type(self) -> str:
        """The architecture's name in transformers."""
        return str(self.config.get("model_type", ""))

    @property
    def is_reward(self) -> bool:
        """True for a model that ends in one number instead of a vocabulary."""
        names = self.config.get("architectures")
        return isinstance(names, list) and any(str(name).endswith("ForSequenceClassification") for name in names)

    @property
    def is_packed(self) -> bool:
        """True if the files hold few bits a weight; older folders of mlx-lm say so in `quantization` alone."""
        return bool(self.config.get("quantization_config") or self.config.get("quantization"))

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
        """The safetensors files that transformers would load; in a folder without its names, all there are."""
        names = list_weight_names(self.folder)
        files = [self.folder / name for name in names] if names else sorted(self.folder.glob("*.safetensors"))
        return [path for path in files if path.is_file()]

    def hash_weights(self) -> str:
        """SHA-256 over the names, sizes and headers of the weight files: fast, and different for a different model."""
        digest = hashlib.sha256()
        if self.seed is not None:  # a new model's weights follow from these two
            digest.update(json.dumps([self.config, self.seed], sort_keys=True).encode())
        for path in self.list_weight_files():
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + read_header_bytes(path))
            with path.open("rb") as file:  # a sample of the numbers themselves: fine-tunes share names and sizes
                for part in range(16):
                    file.seek(path.stat().st_size * part // 16)
                    digest.update(file.read(4096))
        return digest.hexdigest()

    def hash_adapter(self) -> str | None:
        """SHA-256 over config and weights of the adapter that is folded in, or None without one."""
        if self.adapter is None:
            return None
        parts = [hash_file(self.adapter / name) for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def get_cache_folder() -> Path:
    """Folder for converted models: TUNEBOOK_CACHE, or ~/.cache/tunebook."""
    return Path(os.environ.get("TUNEBOOK_CACHE") or Path.home() / ".cache" / "tunebook").expanduser()


def find_model(
    model: ModelSection, where: str, *, with_weights: bool, adapter_where: str = "model.adapter"
) -> ModelSource:
    """Finds the model's folder, downloading from the hub what is missing, and the adapter that is folded into it.

    Args:
        model: the recipe's section.
        where: `file:line` of model.name, for errors.
        with_weights: False fetches only the config and the tokenizer, which is all that a pre-flight needs.
        adapter_where: `file:line` of model.adapter, for errors.

    Raises:
        RecipeError: no such embedded model or folder, or no such adapter.
        AdapterError: an adapter that does not fit.
        ModelLoadingError: not in the cache while offline, not reachable, incomplete, or without safetensors.
        MachineError: not enough room on the disk.
    """
    if model.name.startswith(EMBEDDED_PREFIX):
        folder = find_embedded(model.name, where)
    elif (local := Path(model.name).expanduser()).is_dir():
        folder = local
    elif is_on_hub(model.name):
        from utils.downloads import fetch_snapshot

        folder = fetch_snapshot(model, where, with_weights=with_weights)
    else:
        fix = f"name a folder that exists, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or {DEFAULT_MODEL}"
        raise RecipeError(f"there is no model {model.name!r}", where=where, fix=fix, code="no-model")
    source = open_folder(model, folder, where)
    if with_weights:
        check_weight_files(source)
    if model.adapter is None:
        return source
    from utils.adapter_source import find_adapter

    return replace(source, adapter=find_adapter(model.adapter, source, adapter_where))


def open_folder(model: ModelSection, folder: Path, where: str) -> ModelSource:
    """What a model's folder holds, after a look at what it must not hold."""
    check_model_folder(folder)
    config = read_config(folder, where)
    if model.trust_remote_code:
        return ModelSource(model.name, folder, config)
    kept, ignored = strip_code_keys(config)
    return ModelSource(model.name, folder, kept, ignored=tuple(dict.fromkeys(ignored)))


def is_on_hub(name: str) -> bool:
    """True for what can only be a hub id: no embedded model, no folder and nothing that looks like a path."""
    is_path = name.count("/") > 1 or name.startswith((".", "/", "~")) or Path(name).expanduser().is_dir()
    return not (is_path or name.startswith(EMBEDDED_PREFIX))


def check_weight_files(source: ModelSource) -> None:
    """The weights are there, all of them, as safetensors.

    Raises:
        ModelLoadingError: none at all, files missing that the index names, or a file that ends too early.
    """
    names = list_weight_names(source.folder)
    if missing := [name for name in names if not (source.folder / name).is_file()]:
        message = f"{len(missing)} of {len(names)} weight files are missing, such as {missing[0]}"
        fix = "copy or download the whole folder again"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix, code="incomplete")
    if not source.list_weight_files():
        what = "is an adapter, not a whole model" if (source.folder / "adapter_config.json").exists() else ""
        fix = "name its base model" if what else "convert the model with save_pretrained(safe_serialization=True)"
        message = f"the model {what or 'has no .safetensors files'}"
        raise ModelLoadingError(message, where=str(source.folder), fix=fix, code="no-weights")
    for path in source.list_weight_files():
        header = read_header_bytes(path)
        end = max((end for _, end in parse_header(header, path).values()), default=0)
        lacking = LENGTH_BYTES + len(header) + end - path.stat().st_size
        if lacking > 0:
            fix = "copy or download it again"
            raise ModelLoadingError(
                f"the file ends {lacking:,} bytes too early", where=str(path), fix=fix, code="damaged"
            )


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


def read_config(folder: Path, where: str) -> dict[str, Any]:
    """Parses config.json, and refuses sizes that no model can have.

    Raises:
        ModelLoadingError: not readable, or not the config of a model.
    """
    config = read_json_object(folder / "config.json", where, MAX_CONFIG_BYTES)
    for key in SIZES:
        value = config.get(key)
        if not isinstance(value, list | None) and (type(value) is not int or value < 1):
            message = f"config.json says {key}: {json.dumps(value)}, which is no whole number above 0"
            fix = "use another copy of the model"
            raise ModelLoadingError(message, where=str(folder / "config.json"), fix=fix, code="bad-config")
    return config


def iterate_tensor_shapes(source: ModelSource) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yields name and shape of every tensor from the file headers: no weights are read."""
    for path in source.list_weight_files():
        for name, (shape, _) in parse_header(read_header_bytes(path), path).items():
            yield name, shape


def list_modules(source: ModelSource) -> list[str]:
    """Last names of all modules that have weights; the output head too where its weights are the input embedding's.

    Empty before the weights are downloaded.
    """
    found = {name.split(".")[-2] for name, _ in iterate_tensor_shapes(source) if "." in name}
    return sorted({*found, "lm_head"}) if found else []


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
