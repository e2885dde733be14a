"""What a folder from a stranger must not do: choose code, or have files read that nobody looked at.

A model, an adapter or a run is data. Its `config.json` can nevertheless choose code (`auto_map`; the attention kernel of some
repository, CVE-2026-4372) or files (`transformers_weights`, `configuration_files`), and a link can lead out of the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.exceptions import ModelLoadingError, RunError, TunebookError
from utils.model_headers import INDEX_NAME, WEIGHTS_NAME, read_json_object

# Keys with which a config.json chooses code or files in transformers 5.23; besides these, all that begin with an underscore.
CODE_KEYS = frozenset(
    {
        *("auto_map", "trust_remote_code", "code_revision", "custom_generate", "custom_pipelines", "auto_class"),
        *("attn_implementation", "experts_implementation", "use_kernels", "kernel_config"),
        *("transformers_weights", "configuration_files", "extra_files"),
    }
)
# What save_pretrained itself leaves in a config; it is dropped as well, and nobody needs to hear of it.
HARMLESS_KEYS = frozenset(
    {"_name_or_path", "_commit_hash", "_attn_implementation_autoset", "_flash_attn_2_enabled", "_num_labels"}
)
TEMPLATES = "additional_chat_templates"
MAX_TOKENIZER_CONFIG = 50_000_000
# Of torch's distributed checkpoints, which transformers prefers to model.safetensors.
SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
COPY = "copy the file itself there, if you trust it"


def strip_code_keys(value: Any) -> tuple[Any, list[str]]:
    """A config without the keys that choose code or files, at every depth, and the names of those that somebody put there."""
    if isinstance(value, list):
        parts = [strip_code_keys(item) for item in value]
        return [part for part, _ in parts], [name for _, names in parts for name in names]
    if not isinstance(value, dict):
        return value, []
    kept, dropped = {}, []
    for key, inner in value.items():
        if key in CODE_KEYS or key.startswith("_"):
            dropped += [key] if inner is not None and key not in HARMLESS_KEYS else []
            continue
        kept[key], names = strip_code_keys(inner)
        dropped += names
    return kept, dropped


def find_escapes(folder: Path, entries: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Yields (entry, target) of the links that lead out of a folder.

    The files of a snapshot in the hub's cache are links to `blobs/` beside it, which belongs to the same model.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    for entry in entries:
        if entry.is_symlink() and not (target := entry.resolve()).is_relative_to(root):
            yield entry, target


def check_links(folder: Path, error: type[TunebookError], entries: Iterable[Path] | None = None) -> None:
    """Refuses a folder with links that lead out of it: its files would be copied into runs, and shown.

    Args:
        error: class of the error, for whose turn it is.
        entries: what to look at; without, what lies in the folder and in its folder of templates.
    """
    if entries is None:
        entries = [*folder.iterdir(), *(folder / TEMPLATES).glob("*")]
    for entry, target in find_escapes(folder, entries):
        message = f"{entry.name} is a link to {target}, outside of this folder"
        raise error(message, where=str(folder), fix=COPY, code="link")


def check_model_folder(folder: Path) -> None:
    """Refuses a model folder from which a library would load other files than those that are checked and hashed here.

    Raises:
        ModelLoadingError: a link out of the folder, an adapter beside the model, shards beside the weights, or a tokenizer
            whose config names a file elsewhere.
    """
    if not (folder / "config.json").is_file():  # no model: its reader says so
        return
    where = str(folder)
    check_links(folder, ModelLoadingError)
    is_model = any((folder / name).exists() for name in (WEIGHTS_NAME, INDEX_NAME))
    if is_model and (folder / "adapter_config.json").exists():
        # transformers would put the adapter on the model without a word.
        message = "the folder holds both a model and an adapter (adapter_config.json)"
        fix = "move the adapter into a folder of its own, and name that in model.adapter"
        raise ModelLoadingError(message, where=where, fix=fix, code="two-models")
    if shard := next((path.name for path in sorted(folder.iterdir()) if SHARD.match(path.name)), None):
        message = f"{shard} would be loaded instead of the model's other weights"
        fix = "remove it, or save the model with save_pretrained"
        raise ModelLoadingError(message, where=where, fix=fix, code="shards")
    check_tokenizer_config(folder)


def check_tokenizer_config(folder: Path) -> None:
    """Refuses a tokenizer_config.json that is no object, or names a tokenizer file outside of its folder."""
    path = folder / "tokenizer_config.json"
    if not path.is_file():
        return
    names = read_json_object(path, str(path), MAX_TOKENIZER_CONFIG).get("fast_tokenizer_files") or []
    for name in names if isinstance(names, list) else [names]:
        if not isinstance(name, str) or "/" in name or "\\" in name:
            message = f"fast_tokenizer_files names {json.dumps(name)}, which is no file of this folder"
            fix = "use another copy of the model"
            raise ModelLoadingError(message, where=str(path), fix=fix, code="unsafe-tokenizer")


def check_run_links(run: Path) -> None:
    """Refuses a run folder with links that lead out of it.

    Raises:
        RunError: there is one, among the run's own files, its weights or its checkpoints.
    """
    patterns = ("*", "adapter/*", "model/*", "checkpoints/*", "checkpoints/*/*")
    entries = [path for pattern in patterns for path in run.glob(pattern)]
    check_links(run, RunError, entries)
