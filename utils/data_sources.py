"""What `data.train` and `data.eval` name → the sources of rows: files, globs and hub datasets, each read row by row."""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config.scratch_rules import TEXT_SUFFIX
from config.structured_config import DataSource
from utils.data_loading import Row, check_file, find_kind, iterate_file, rename_row
from utils.exceptions import DataError, Problem
from utils.hub_datasets import find_version, iterate_hub, name_place
from utils.messages import is_encodable
from utils.text_files import is_text_file, iterate_text

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_SPLIT = re.compile(r"(?P<source>[\w.-]+/[\w.-]+)\[(?P<split>\w+)\]")  # as places of rows are written
CHUNK = 1 << 20


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
            return [RowSource(name_place(item), item.weight, None, item)]
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
        assert source.hub is not None
        found = iterate_hub(source.hub)
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
    digest.update("\0".join((hub.source, hub.subset or "", hub.split, find_version(hub))).encode())
    return digest.hexdigest()
