"""Rows of a dataset of the hub: from a download, from the library's cache, over the network or as a stream."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from config.structured_config import DataSource
from utils.data_loading import Row
from utils.exceptions import DataError, Problem

COMMIT = re.compile(r"[0-9a-f]{40}")
ROWS_PER_BATCH = 1000


def name_place(hub: DataSource) -> str:
    """`org/name[split]`; a row's place is this, a colon and its number."""
    return f"{hub.source}[{hub.split}]"


def iterate_hub(hub: DataSource) -> Iterator[Row | Problem]:
    """Yields the rows of a hub dataset; where = `org/name[split]:ROW`, from 1.

    Raises:
        DataError: it cannot be had, a stream broke off, or there are no rows.
    """
    dataset = open_hub(hub)
    from utils.table_files import make_table_row  # imports pyarrow, which a refusal can do without

    rows = iterate_undecoded(dataset)
    number = 0
    while (fields := read_next(hub, rows)) is not None:
        number += 1
        yield make_table_row(fields, f"{name_place(hub)}:{number}")
    if not number:
        raise DataError("holds no rows", where=name_place(hub), fix="choose another split", code="no-rows")


def iterate_undecoded(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields rows as they are stored: decoding an image or a sound would open the path or address that the row names."""
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
        yield from table.to_pylist()


def read_next(hub: DataSource, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next row of a hub dataset, or None at its end.

    Raises:
        DataError: a stream broke off.
    """
    import httpx2
    from datasets.exceptions import DatasetsError

    try:
        return next(rows, None)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, DatasetsError, httpx2.HTTPError) as error:
        raise explain_hub_error(hub, error) from error


def open_hub(hub: DataSource) -> Any:
    """Opens a hub dataset: from a complete download without asking the hub, or else as the library `datasets` does.

    Returns:
        A `Dataset`, or an `IterableDataset` when `streaming` asks for it.

    Raises:
        DataError: it cannot be had; the fix says how.
    """
    from huggingface_hub import is_offline_mode

    folder = find_download(hub)
    if folder is None and is_offline_mode() and not may_be_prepared(hub):
        raise make_offline_error(hub)  # in a tenth of the time that the import below takes
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset_builder
    from datasets.exceptions import DatasetsError

    if is_offline_mode():
        disable_progress_bars()
    source, revision = (hub.source, hub.revision) if folder is None else (str(folder), None)
    try:
        builder = load_dataset_builder(source, name=hub.subset, revision=revision)
        check_files(hub, builder.config.data_files or {}, folder)
        if hub.streaming:
            return builder.as_streaming_dataset(split=hub.split)
        builder.download_and_prepare()
        dataset = builder.as_dataset(split=hub.split)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, ImportError, DatasetsError) as error:
        raise explain_hub_error(hub, error) from error
    finally:
        enable_progress_bars()
    if folder is None:
        check_commit(hub, dataset)
    return dataset


def find_version(hub: DataSource) -> str:
    """What changes when the rows do: the commit of a download or of a stream, or else the library's fingerprint.

    Raises:
        DataError: it cannot be had.
    """
    if (folder := find_download(hub)) is not None:
        return folder.name
    return find_commit(hub) if hub.streaming else str(open_hub(hub)._fingerprint)


def find_download(hub: DataSource) -> Path | None:
    """The folder of `hf download --repo-type dataset` if every file of that commit is there; never asks the network.

    The library's own downloads are no such folder: they hold the files of one split, and a glob over them would take a
    part of the rows for the whole.
    """
    from huggingface_hub import get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HFValidationError, LocalEntryNotFoundError

    asked: dict[str, Any] = {"repo_type": "dataset", "revision": hub.revision}
    try:
        tree = get_cached_repo_tree(hub.source, **asked)
        folder = Path(snapshot_download(hub.source, local_files_only=True, **asked))
    except (CachedRepoTreeNotFoundError, LocalEntryNotFoundError, HFValidationError):
        return None
    return folder if all((folder / file.path).is_file() for file in tree) else None


def may_be_prepared(hub: DataSource) -> bool:
    """True where the library's cache has anything of the dataset's owner; it alone knows how it spells the rest."""
    from huggingface_hub.constants import HF_HOME

    cache = Path(os.environ.get("HF_DATASETS_CACHE") or Path(HF_HOME) / "datasets").expanduser()
    owner = hub.source.partition("/")[0]
    return any(cache.glob(f"{owner}___*"))


def check_files(hub: DataSource, files: Mapping[str, Sequence[str]], folder: Path | None) -> None:
    """Refuses a dataset whose card names files that are not its own: the library would read any file of this machine.

    Args:
        files: of each split.
        folder: the download; None where the files are on the hub.

    Raises:
        DataError: it does.
    """
    for name in itertools.chain.from_iterable(files.values()):
        # A file of a download is a link to the cache's folder of this dataset.
        is_own = (
            name.startswith("hf://")
            if folder is None
            else Path(name).resolve().is_relative_to(folder.parents[1].resolve())
        )
        if not is_own:
            fix = "do not use it, or name files that you have looked at"
            raise DataError(
                f"its card names a file outside of it: {name}", where=name_place(hub), fix=fix, code="hub-outside"
            )


def check_commit(hub: DataSource, dataset: Any) -> None:
    """Refuses rows of another commit than the recipe pins.

    Without a network the library reads whatever it prepared last, and says so in a log at most.

    Raises:
        DataError: they are.
    """
    pinned = hub.revision or ""
    folders = {Path(file["filename"]).parent.name for file in dataset.cache_files}
    if not COMMIT.fullmatch(pinned) or folders <= {pinned}:
        return
    message = f"is in the cache as of commit {min(folders)}, and the recipe pins {pinned}"
    raise DataError(message, where=name_place(hub), fix=f"with a network: {write_download(hub)}", code="hub-commit")


def write_download(hub: DataSource) -> str:
    """The command that makes a dataset readable without a network."""
    command = f"hf download {hub.source} --repo-type dataset"
    return command if hub.revision is None else f"{command} --revision {hub.revision}"


def make_offline_error(hub: DataSource) -> DataError:
    """The ways on without a network."""
    from huggingface_hub import is_offline_mode

    message = "is not in the cache, and the hub cannot be reached"
    fix = "check the network; or name a file"
    if is_offline_mode():
        fix = f"unset HF_HUB_OFFLINE, or get it on a machine with network: {write_download(hub)}"
    return DataError(message, where=name_place(hub), fix=fix, code="hub-offline")


def explain_hub_error(hub: DataSource, error: Exception) -> DataError:
    """A line with a way out, instead of the library's traceback."""
    text = " ".join(f"{error}: {error.__cause__}".split() if error.__cause__ else str(error).split())
    message, fix, code = f"cannot be loaded: {text[:300]}", None, "hub"
    if "gated" in text or re.search(r"\b40[13]\b", text):
        message, code = "needs permission", "hub-gated"
        fix = f"accept its terms on https://huggingface.co/datasets/{hub.source}, and set HF_TOKEN"
    elif "BuilderConfig" in text or "Config name is missing" in text or "Available configs" in text:
        message, code = f"has no subset {hub.subset}" if hub.subset else "has several subsets", "hub-subset"
        fix = f"set subset to one of {', '.join(find_names(text, hub.subset or ''))}"
    elif "offline" in text.lower() or "Couldn't reach" in text or "Couldn't find cache" in text:
        return make_offline_error(hub)
    elif "Unknown split" in text or "Bad split" in text:
        message, code = f"has no split {hub.split}", "hub-split"
        fix = f"set split to one of {', '.join(find_names(text, hub.split))}"
    elif "doesn't exist" in text or "404" in text:
        message, code = "is on no hub that this machine reaches, and no such file exists", "no-file"
        fix = "check the spelling; private datasets need HF_TOKEN"
    elif "script" in text:
        message, code = "is a dataset made by a script, which is never run", "hub-script"
        fix = "convert it to Parquet, or use a branch that is: revision: refs/convert/parquet"
    return DataError(message, where=name_place(hub), fix=fix, code=code)


def find_names(text: str, asked: str) -> list[str]:
    """Names that the library lists as available, the one asked for left out."""
    listed = re.findall(r"\[([^\[\]]*)\]", text)
    names = re.findall(r"'?([\w.-]+)'?", listed[-1]) if listed else []
    return [name for name in names if name != asked] or ["those on its page"]


def find_commit(hub: DataSource) -> str:
    """The commit that a streamed dataset is read at."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return str(HfApi().dataset_info(hub.source, revision=hub.revision).sha)
    except (OSError, ValueError, OfflineModeIsEnabled) as error:
        raise explain_hub_error(hub, error) from error
