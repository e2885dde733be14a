"""Models from the hub: taken from its cache without a question to the network, or downloaded, shown and resumed.

A snapshot that is complete in the cache is used as it is; `hf download ID` fetches a newer one. Large files go over plain
HTTP by our own hand: huggingface_hub 2.4 deletes an unfinished file when the download ends, shows no progress in a log and
does not check what arrived. Only names that `is_small` knows and weights in safetensors are ever fetched, never a pickle.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

from config.structured_config import ModelSection
from utils.download_progress import DownloadProgress, FileBar, format_bytes
from utils.exceptions import MachineError, ModelLoadingError
from utils.hub import (
    DISK_FIX,
    RemoteFile,
    check_listing,
    explain_errors,
    find_snapshot,
    get_cache_folder_of,
    is_checkable,
    is_small,
    is_weight,
    list_remote,
    list_within,
    make_offline_error,
    read_cached_tree,
)
from utils.logging import get_logger
from utils.model_headers import WEIGHTS_NAME, list_weight_names
from utils.model_source import hash_file, is_on_hub, read_config

SECONDS_TO_ANSWER = 10.0  # of the hub, before it counts as unreachable
SECONDS_TO_MEASURE = 5.0  # the same where the answer is only nice to have
LARGE_BYTES = 1_000_000  # from here on a file is shown, resumed and checked
# The hub serves no larger file over plain HTTP; such a file is left to huggingface_hub.
MAX_HTTP_BYTES = 50_000_000_000
WORKERS = 4  # files at a time
PIECE_BYTES = 1 << 20
RETRIES = 5  # without a byte between them
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class DownloadStatus:
    """What a run would have to download.

    Attributes:
        cached: everything is here.
        missing_bytes: what is not; None where nobody can say, as without a network.
        files: how many files are missing, as far as known.
        target: the folder in the hub's cache that they go to.
    """

    cached: bool
    missing_bytes: int | None
    files: int
    target: Path


def find_download(model: ModelSection, where: str) -> DownloadStatus | None:
    """What is missing of a hub model; None for local and embedded ones.

    Asks the network only when not even the config is cached, for at most 5 seconds.

    Raises:
        RecipeError, ModelLoadingError: the hub has no such model, keeps it locked, or it has no safetensors.
    """
    from huggingface_hub import is_offline_mode

    if model.init == "scratch" or not is_on_hub(model.name):
        return None
    target = get_cache_folder_of(model)
    with explain_errors(model, where):
        if find_snapshot(model, with_weights=True, trust=is_offline_mode()):
            return DownloadStatus(True, 0, 0, target)
        folder, tree = find_snapshot(model, with_weights=False), read_cached_tree(model)
    if folder and tree:
        names = set(list_weight_names(folder)) or {WEIGHTS_NAME}
        files = [file for file in tree if file.name in names]
    else:
        files = list_within(model, where, SECONDS_TO_MEASURE)
        files = [file for file in files if is_small(file.name, model) or is_weight(file.name)]
    missing = [file for file in files if not (folder and (folder / file.name).is_file())]
    return DownloadStatus(False, sum(file.size for file in missing) if files else None, len(missing), target)


def fetch_snapshot(model: ModelSection, where: str, *, with_weights: bool) -> Path:
    """The folder of a hub model: from the cache where it is complete, else downloaded.

    Raises:
        RecipeError: the hub has no such model or revision.
        ModelLoadingError: no network, no access, no safetensors, or a file arrived damaged.
        MachineError: not enough room on the disk.
    """
    from huggingface_hub import is_offline_mode

    with explain_errors(model, where):
        if found := find_snapshot(model, with_weights=with_weights, trust=is_offline_mode()):
            return found
    if is_offline_mode():
        raise make_offline_error(model, where, "HF_HUB_OFFLINE is set")
    try:
        with explain_errors(model, where):
            folder = find_snapshot(model, with_weights=False) or fetch_small_files(model, where)
            return fetch_weights(model, where, folder) if with_weights else folder
    except ModelLoadingError as error:
        # Another tool may have filled the cache without noting what is complete: better than nothing.
        if error.problems[0].code == "offline" and (
            found := find_snapshot(model, with_weights=with_weights, trust=True)
        ):
            get_logger().warning("The hub cannot be reached: %s is used as the cache has it", model.name)
            return found
        raise


def fetch_small_files(model: ModelSection, where: str) -> Path:
    """Downloads config, tokenizer and templates, after a look at what else there is."""
    listing = list_remote(model, model.revision, SECONDS_TO_ANSWER)
    check_listing(model, where, listing)
    wanted = [file for file in listing if is_small(file.name, model)]
    return download(model, model.revision, wanted, get_cache_folder_of(model))


def fetch_weights(model: ModelSection, where: str, folder: Path) -> Path:
    """Downloads the weights of the commit whose small files are in the folder."""
    commit = folder.name
    read_config(folder, where)  # what cannot be read must not cost a download
    listing = list_remote(model, commit, SECONDS_TO_ANSWER)
    check_listing(model, where, listing)
    names = list_weight_names(folder) or [WEIGHTS_NAME]
    known = {file.name: file for file in listing}
    if absent := [name for name in names if name not in known]:
        message = f"{model.name} has no file {absent[0]}, which its index names"
        raise ModelLoadingError(message, where=where, fix="choose another model or revision", code="no-weights")
    missing = [known[name] for name in names if not (folder / name).is_file()]
    return download(model, commit, missing, folder.parents[1])


def download(model: ModelSection, revision: str | None, files: Sequence[RemoteFile], storage: Path) -> Path:
    """Downloads files of one revision into the hub's cache.

    Args:
        storage: the model's folder in that cache.

    Returns:
        The snapshot folder.
    """
    import glob

    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    blobs = storage / "blobs"
    missing = [file for file in files if not (is_checkable(file) and (blobs / str(file.sha256)).exists())]
    large = [file for file in missing if is_checkable(file) and LARGE_BYTES <= file.size <= MAX_HTTP_BYTES]
    total = sum(file.size for file in missing)
    done = sum(measure_file(find_partial(blobs, file)) for file in large)
    text = f"Downloading {model.name}: {len(missing)} files, {format_bytes(total)}, to {storage}"
    get_logger().info("%s", f"{text} ({format_bytes(done)} are here already)" if done else text)
    check_disk(storage, total - done)
    if large:
        blobs.mkdir(parents=True, exist_ok=True)
        with DownloadProgress(model.name, sum(file.size for file in large), done) as progress:
            download_large_files(partial(download_file, model, revision, blobs, progress), large, progress)
    with disable_progress_bars():
        patterns = [glob.escape(file.name) for file in files]
        return Path(snapshot_download(model.name, revision=revision, allow_patterns=patterns))


def download_large_files(
    fetch: Callable[[RemoteFile], None], files: Sequence[RemoteFile], progress: DownloadProgress
) -> None:
    """Runs `fetch` for several files side by side; the first error, or Ctrl-C, stops them all."""
    with ThreadPoolExecutor(WORKERS) as pool:
        jobs = [pool.submit(fetch, file) for file in files]
        try:
            for job in as_completed(jobs):
                job.result()
        finally:
            progress.stop()
            for job in jobs:
                job.cancel()


def download_file(
    model: ModelSection, revision: str | None, blobs: Path, progress: DownloadProgress, file: RemoteFile
) -> None:
    """Downloads one file, going on where an earlier attempt ended, and checks its SHA-256."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]

    unfinished = find_partial(blobs, file)
    lock = blobs.parents[1] / ".locks" / blobs.parent.name / f"{file.sha256}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if (blobs / str(file.sha256)).exists():  # another process was quicker
            return
        if measure_file(unfinished) > file.size:
            unfinished.unlink()
        with unfinished.open("ab") as handle:
            bar = progress.open_bar(file.name, file.size, handle.tell())
            append_rest(hf_hub_url(model.name, file.name, revision=revision), handle, file.size, bar)
        if hash_file(unfinished) != file.sha256:
            unfinished.unlink()
            message = f"{file.name} arrived damaged: its SHA-256 is not the hub's"
            raise ModelLoadingError(message, where=model.name, fix="run the same command again", code="damaged")
        unfinished.replace(blobs / str(file.sha256))


def append_rest(url: str, handle: BinaryIO, size: int, bar: FileBar) -> None:
    """Downloads what is missing of a file; a connection that breaks off is opened again.

    Raises:
        httpx2.HTTPError: no access, or no byte in several attempts.
    """
    from httpx2 import RemoteProtocolError, TransportError

    failures = 0
    while (before := handle.tell()) < size:
        try:
            append_pieces(url, handle, size, bar)
            if handle.tell() == before:
                raise RemoteProtocolError("an empty answer")
        except TransportError:
            failures = failures + 1 if handle.tell() <= before else 1
            if failures >= RETRIES:
                raise
            time.sleep(RETRY_SECONDS)


def append_pieces(url: str, handle: BinaryIO, size: int, bar: FileBar) -> None:
    """One request for the rest of a file; begins again where the server knows no ranges."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    # Compressed, a range would count other bytes. The client itself sends the token to no other host.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", "Range": f"bytes={handle.tell()}-"}
    with get_session().stream("GET", url, headers=headers, timeout=SECONDS_TO_ANSWER) as response:
        hf_raise_for_status(response)
        if response.status_code != 206 and handle.tell():
            bar.update(-handle.tell())
            handle.seek(0)
            handle.truncate()
        for piece in response.iter_bytes(PIECE_BYTES):
            handle.write(piece)
            bar.update(len(piece))
            if handle.tell() > size:  # not the file that was listed: its hash will say so
                return


def find_partial(blobs: Path, file: RemoteFile) -> Path:
    """Where a file lies while it is not complete."""
    return blobs / f"{file.sha256}.incomplete"


def measure_file(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def check_disk(folder: Path, needed: int) -> None:
    """Refuses a download that does not fit.

    Raises:
        MachineError: fewer bytes are free than needed.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"the download needs {format_bytes(needed)}, and {format_bytes(free)} are free"
        raise MachineError(message, where=str(folder), fix=DISK_FIX, code="disk")
