"""What the hub and its cache hold of a model, and what its errors mean. Reading only: `downloads.py` fetches."""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from config.structured_config import ModelSection
from utils.exceptions import MachineError, ModelLoadingError, RecipeError, TunebookError
from utils.model_headers import INDEX_NAME, WEIGHTS_NAME, list_weight_names
from utils.model_source import DEFAULT_MODEL

SHA256 = re.compile(r"[0-9a-f]{64}")
DISK_FIX = "free some, or set HF_HOME to a folder on a larger disk"
NO_WEIGHTS_FIX = (
    f"choose a model with {WEIGHTS_NAME}, or convert this one with save_pretrained(safe_serialization=True)"
)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub model; only large files (LFS) have a SHA-256."""

    name: str
    size: int
    sha256: str | None


def is_small(name: str, model: ModelSection) -> bool:
    """True for what a pre-flight needs: config, tokenizer, templates, index; code only where the recipe trusts it."""
    suffixes = (".json", ".jinja", ".py") if model.trust_remote_code else (".json", ".jinja")
    return "/" not in name and (name.endswith(suffixes) or name == "tokenizer.model")


def is_weight(name: str) -> bool:
    """True for weights as save_pretrained names them; `consolidated.safetensors` would be a second copy."""
    return "/" not in name and name.startswith("model") and name.endswith(".safetensors")


def is_checkable(file: RemoteFile) -> bool:
    """True where the hub knows the file's SHA-256; the pattern keeps a hostile answer from naming a path."""
    return SHA256.fullmatch(file.sha256 or "") is not None


def get_cache_folder_of(model: ModelSection) -> Path:
    """The model's folder in the hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE) / f"models--{model.name.replace('/', '--')}"


def read_cached_tree(model: ModelSection) -> list[RemoteFile]:
    """The hub's list of files as an earlier download noted it; empty if none did."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(model.name, revision=model.revision)
    except CachedRepoTreeNotFoundError:
        return []
    return [RemoteFile(file.path, file.size, None) for file in tree]


def find_snapshot(model: ModelSection, *, with_weights: bool, trust: bool = False) -> Path | None:
    """The snapshot in the cache if it is complete; never touches the network.

    Args:
        trust: without the hub's list of files, take a config and a tokenizer as complete.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(model.name, revision=model.revision, local_files_only=True, allow_patterns=[]))
    except LocalEntryNotFoundError:
        return None
    tree = read_cached_tree(model)
    if not tree and not trust:
        return None
    names = [file.name for file in tree if is_small(file.name, model)] or ["config.json", "tokenizer.json"]
    if not all((folder / name).is_file() for name in names):
        return None
    weights = (list_weight_names(folder) or [WEIGHTS_NAME]) if with_weights else []
    return folder if all((folder / name).is_file() for name in weights) else None


def list_remote(model: ModelSection, revision: str | None, seconds: float) -> list[RemoteFile]:
    """Asks the hub for names, sizes and hashes of a model's files."""
    from huggingface_hub import HfApi

    info = HfApi().model_info(model.name, revision=revision, files_metadata=True, timeout=seconds)
    return [
        RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
        for file in info.siblings or []
    ]


def list_within(model: ModelSection, where: str, seconds: float) -> list[RemoteFile]:
    """`list_remote`, or nothing if there is no answer in time.

    In a thread, because a name server that is silent obeys no timeout of a request.
    """
    found: list[RemoteFile] = []
    errors: list[TunebookError] = []

    def ask() -> None:
        try:
            with explain_errors(model, where):
                listing = list_remote(model, model.revision, seconds)
                check_listing(model, where, listing)
                found.extend(listing)
        except TunebookError as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors and errors[0].problems[0].code not in ("offline", "hub"):
        raise errors[0]
    return list(found)


def check_listing(model: ModelSection, where: str, listing: Sequence[RemoteFile]) -> None:
    """Refuses a model without safetensors while nothing has been downloaded."""
    names = {file.name for file in listing}
    if names & {WEIGHTS_NAME, INDEX_NAME}:
        return
    if "adapter_config.json" in names:
        message, fix = f"{model.name} is an adapter, not a whole model", "name its base model"
    else:
        message, fix = f"{model.name} has no safetensors, and other weights are never loaded", NO_WEIGHTS_FIX
    raise ModelLoadingError(message, where=where, fix=fix, code="no-weights")


def make_offline_error(model: ModelSection, where: str, reason: str) -> ModelLoadingError:
    """The ways on without a network."""
    fix = (
        f"connect once and run this command again or `hf download {model.name}`; or name a local folder; or set "
        f"model.name: {DEFAULT_MODEL}, which needs no network"
    )
    message = f"{model.name} is not complete in the cache, and {reason}"
    return ModelLoadingError(message, where=where, fix=fix, code="offline")


@contextmanager
def explain_errors(model: ModelSection, where: str) -> Iterator[None]:
    """Turns what the hub's library raises into an error that names a fix; addresses and tokens stay out of it."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError

    try:
        yield
    except (HTTPError, HFValidationError, OSError) as error:
        raise explain_error(error, model, where) from error


def explain_error(error: Exception, model: ModelSection, where: str) -> TunebookError:
    """The error that a user can act on."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = model.name
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            message = f"{name} has no revision {model.revision or 'main'!r}"
            return RecipeError(message, where=where, fix="check model.revision", code="no-revision")
        if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
            fix = "check the id; for a private model put HF_TOKEN=… into .env"
            return RecipeError(f"the hub shows no model {name!r}", where=where, fix=fix, code="no-model")
        if status in (401, 403):
            message = f"the hub does not give {name} to this account"
            fix = f"accept the terms on https://huggingface.co/{name} and put HF_TOKEN=… of that account into .env"
            return ModelLoadingError(message, where=where, fix=fix, code="gated")
        return ModelLoadingError(f"the hub answers {status}", where=where, fix="try again later", code="hub")
    if isinstance(error, HFValidationError):
        fix = f"name a folder that exists, a hub id such as Qwen/Qwen2.5-0.5B-Instruct, or {DEFAULT_MODEL}"
        return RecipeError(f"the hub can have no model {name!r}", where=where, fix=fix, code="no-model")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError("the disk is full", where=str(get_cache_folder_of(model)), fix=DISK_FIX, code="disk")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        fix = "make it writable, or set HF_HOME to another folder"
        folder = str(get_cache_folder_of(model))
        return MachineError("the hub's cache cannot be written", where=folder, fix=fix, code="cache")
    return make_offline_error(model, where, "the hub cannot be reached")
