"""What `data.train` and `data.eval` name → the sources of rows: files, globs and hub datasets, each read row by row."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.scratch_rules import TEXT_SUFFIX
from config.structured_config import DataSource
from utils.data_loading import Row, check_file, find_kind, iterate_file, rename_row
from utils.exceptions import DataError, Problem
from utils.messages import is_encodable
from utils.text_files import is_text_file, iterate_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SPLIT = re.compile(r"(?P<source>[\w.-]+/[\w.-]+)\[(?P<split>\w+)\]")  # as places of rows are written
CHUNK = 1 << 20
ROWS_PER_BATCH = 1000


@dataclass(frozen=True)
class RowSource:
    """One file or one split of a hub dataset.

    Attributes:
        name: the file's path, or `org/name[split]`; a row's place is `name:number`.
        weight: how often an epoch sees each of its rows.
        path: the file; None for a hub dataset.
        hub: the hub dataset; None for a file.
    """

    name: str
    weight: float = 1.0
    path: Path | None = None
    hub: DataSource | None = None


def find_sources(asked: str | DataSource | Sequence[str | DataSource], where: str) -> list[RowSource]:
    """Resolves what a recipe names; globs are expanded and sorted.

    Args:
        asked: value of `data.train` or `data.eval`.
        where: place of that key in the recipe, for messages.

    Raises:
        DataError: a file is missing or of an unknown kind, a glob matches nothing, or a file is named twice.
    """
    items = [asked] if isinstance(asked, str | DataSource) else asked
    sources: list[RowSource] = []
    problems: list[Problem] = []
    for item in items:
        try:
            sources += resolve_item(DataSource(source=item) if isinstance(item, str) else item, where)
        except DataError as error:
            problems += error.problems
    problems += find_repeated(sources, where)
    if problems:
        raise DataError.from_problems(problems)
    return sources


def resolve_item(item: DataSource, where: str) -> list[RowSource]:
    """The sources that one entry names."""
    if "://" in item.source:
        text = f"{item.source} is an address, and rows are read from files and from datasets of the hub"
        raise DataError(text, where=where, fix="download it, and name the file", code="address")
    path = Path(item.source)
    if not find_out(path.exists, where):
        if (named := HUB_SPLIT.fullmatch(item.source)) and is_hub_id(named["source"]):
            return resolve_item(item.model_copy(update=named.groupdict()), where)
        if glob.has_magic(item.source):
            return expand_glob(item, where)
        if is_hub_id(item.source):
            return [RowSource(f"{item.source}[{item.split}]", item.weight, None, item)]
    if not is_text_file(path):
        check_file(path)
    if unread := sorted(item.model_fields_set & {"split", "subset", "revision", "streaming"}):
        text = f"{unread[0]} is for hub datasets, and {item.source} is a file"
        raise DataError(text, where=where, fix=f"remove {unread[0]}", code="not-hub")
    return [RowSource(item.source, item.weight, path)]


def find_out(question: Callable[[], bool], where: str) -> bool:
    """Asks the file system; a name that it cannot even look up is the user's problem, not a crash."""
    try:
        return question()
    except (OSError, ValueError) as error:
        text = f"a name in the recipe cannot be looked up: {error.strerror if isinstance(error, OSError) else error}"
        raise DataError(text, where=where, fix="name a file, a glob or a hub dataset id", code="no-file") from error


def expand_glob(item: DataSource, where: str) -> list[RowSource]:
    """The files that a pattern matches, sorted by name, so that every machine reads them in the same order."""
    found = sorted(name for name in glob.glob(item.source, recursive=True) if Path(name).is_file())
    if odd := [name for name in found if not is_encodable(name)]:
        text = f"a file's name is not UTF-8: {odd[0].encode(errors='replace').decode()}"
        raise DataError(text, where=where, fix="rename it", code="no-file")
    readable = [name for name in found if find_kind(Path(name)) or item.source.lower().endswith(TEXT_SUFFIX)]
    if not readable:
        text = f"no data file matches {item.source}"
        fix = f"paths are relative to {Path.cwd()}"
        if found:
            fix = f"it matches {', '.join(found[:3])}, which cannot be read"
        raise DataError(text, where=where, fix=fix, code="no-file")
    return [source for name in readable for source in resolve_item(item.model_copy(update={"source": name}), where)]


def is_hub_id(name: str) -> bool:
    """True for `org/name` that is neither a data file's name nor below a folder that exists."""
    is_file = find_kind(Path(name)) or name.lower().endswith(TEXT_SUFFIX)
    return bool(HUB_ID.fullmatch(name)) and not is_file and not Path(name).parent.exists()


def find_repeated(sources: Sequence[RowSource], where: str) -> Iterator[Problem]:
    """Yields files that are named twice: their rows would count double without a word."""
    seen: set[Any] = set()
    for source in sources:
        hub = source.hub
        key = source.path.resolve() if source.path else hub and (hub.source, hub.subset, hub.split, hub.revision)
        if key in seen:
            fix = f"name it once, with a weight: {{source: {source.name}, weight: 2}}"
            yield Problem("repeated-source", f"{source.name} is named twice", where, fix)
        seen.add(key)


def iterate_rows(
    source: RowSource, columns: Mapping[str, str], unseen: set[str] | None = None
) -> Iterator[Row | Problem]:
    """Yields the rows of a source in order, columns renamed; a bad row is yielded as a problem.

    Args:
        columns: old name → new name; a row may lack one, as an empty cell is absent.
        unseen: old names; those that some row has are taken out of it.

    Raises:
        DataError: the source cannot be read, or holds no rows.
    """
    if source.path is None:
        found = iterate_hub(source)
    else:
        found = iterate_text(source.path) if is_text_file(source.path) else iterate_file(source.path)
    if not columns:
        yield from found
        return
    for row in found:
        if isinstance(row, Problem):
            yield row
            continue
        if unseen:
            unseen.difference_update(row.fields)
        yield rename_row(row, columns)


def find_unknown_columns(unseen: set[str], sources: Sequence[RowSource]) -> Iterator[Problem]:
    """Yields names of `data.columns` that no row has: typos more often than not."""
    for name in sorted(unseen):
        fix = "write the name as the rows have it, or remove it"
        yield Problem("missing-column", f"data.columns names {name!r}, which no row has", sources[0].name, fix)


def iterate_hub(source: RowSource) -> Iterator[Row | Problem]:
    """Yields the rows of a hub dataset; where = `org/name[split]:ROW`, from 1."""
    from utils.table_files import make_table_row

    number = 0
    rows = iterate_undecoded(open_hub(source))
    while (fields := read_next(source, rows)) is not None:
        number += 1
        yield make_table_row(fields, f"{source.name}:{number}")
    if not number:
        raise DataError("holds no rows", where=source.name, fix="choose another split", code="no-rows")


def iterate_undecoded(dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields rows as they are stored: decoding an image or a sound would open the path or address that the row names."""
    for table in dataset.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
        yield from table.to_pylist()


def read_next(source: RowSource, rows: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """The next row of a hub dataset, or None at its end.

    Raises:
        DataError: a stream broke off.
    """
    import httpx2
    from datasets.exceptions import DatasetsError

    try:
        return next(rows, None)
    except (OSError, ValueError, RuntimeError, KeyError, DatasetsError, httpx2.HTTPError) as error:
        raise explain_hub_error(source, error) from error


def open_hub(source: RowSource) -> Any:
    """Opens a hub dataset: from the cache, from the hub, or as a stream.

    Returns:
        A `Dataset`, or an `IterableDataset` when `streaming` asks for it.

    Raises:
        DataError: it cannot be had; the fix says how.
    """
    hub = source.hub
    assert hub is not None
    from datasets import disable_progress_bars, enable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError

    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        disable_progress_bars()
    try:
        return load_dataset(
            hub.source, name=hub.subset, split=hub.split, revision=hub.revision, streaming=hub.streaming
        )
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError, DatasetsError) as error:
        raise explain_hub_error(source, error) from error
    finally:
        enable_progress_bars()


def explain_hub_error(source: RowSource, error: Exception) -> DataError:
    """A line with a way out, instead of the library's traceback."""
    hub = source.hub
    assert hub is not None
    text = " ".join(str(error).split())
    message, fix, code = f"cannot be loaded: {text[:300]}", None, "hub"
    if "gated" in text or "401" in text or "403" in text:
        message, code = "needs permission", "hub-gated"
        fix = f"accept its terms on https://huggingface.co/datasets/{hub.source}, and set HF_TOKEN"
    elif "BuilderConfig" in text or "Config name is missing" in text or "Available configs" in text:
        message, code = f"has no subset {hub.subset}" if hub.subset else "has several subsets", "hub-subset"
        fix = f"set subset to one of {', '.join(find_names(text, hub.subset or ''))}"
    elif "offline" in text.lower() or "Couldn't reach" in text or "Couldn't find cache" in text:
        message, code = "is not in the cache, and the hub cannot be reached", "hub-offline"
        fix = f"unset HF_HUB_OFFLINE, or get it on a machine with network: hf download {hub.source} --repo-type dataset"
        if os.environ.get("HF_HUB_OFFLINE", "") in ("", "0"):
            fix = "check the network; or name a file"
    elif "Unknown split" in text or "Bad split" in text:
        message, code = f"has no split {hub.split}", "hub-split"
        fix = f"set split to one of {', '.join(find_names(text, hub.split))}"
    elif "doesn't exist" in text or "404" in text:
        message, code = "is on no hub that this machine reaches, and no such file exists", "no-file"
        fix = "check the spelling; private datasets need HF_TOKEN"
    elif "script" in text:
        message, code = "is a dataset made by a script, which is never run", "hub-script"
        fix = "convert it to Parquet, or use a branch that is: revision: refs/convert/parquet"
    return DataError(message, where=source.name, fix=fix, code=code)


def find_names(text: str, asked: str) -> list[str]:
    """Names that the library lists as available, the one asked for left out."""
    listed = re.findall(r"\[([^\[\]]*)\]", text)
    names = re.findall(r"'?([\w.-]+)'?", listed[-1]) if listed else []
    return [name for name in names if name != asked] or ["those on its page"]


def hash_source(source: RowSource) -> str:
    """What the tokenised cache depends on: sha256 of a file's bytes, or a hub dataset's commit and name.

    Returns:
        Hex digits.

    Raises:
        DataError: the source cannot be read; or a streamed dataset's commit is asked for without network.
    """
    digest = hashlib.sha256()
    if source.path is not None:
        try:
            with source.path.open("rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=source.name, code="unreadable") from error
        return digest.hexdigest()
    hub = source.hub
    assert hub is not None
    version = find_commit(source) if hub.streaming else open_hub(source)._fingerprint
    digest.update("\0".join((hub.source, hub.subset or "", hub.split, version)).encode())
    return digest.hexdigest()


def find_commit(source: RowSource) -> str:
    """The commit that a streamed dataset is read at."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    hub = source.hub
    assert hub is not None
    try:
        return str(HfApi().dataset_info(hub.source, revision=hub.revision).sha)
    except (OSError, ValueError, OfflineModeIsEnabled) as error:
        raise explain_hub_error(source, error) from error
