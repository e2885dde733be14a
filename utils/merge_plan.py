"""What a merge writes, decided from headers alone before a byte is written: every file, every tensor, and what changes in it.

Files keep their names, tensors their place and number format. A plan is made in full or not at all: what needs a framework is
told by `NeedsFramework`, what is wrong by an error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.adapter_changes import TIED, BaseTensors, Change, NeedsFramework, Replacement, TokenRows
from utils.adapter_reader import AdapterReader
from utils.exceptions import ModelLoadingError
from utils.model_headers import INDEX_NAME, MAX_INDEX_BYTES, WEIGHTS_NAME, list_weight_names, read_json_object
from utils.model_source import ModelSource
from utils.tensor_files import FLOATS, ITEM_BYTES, Shape, StoredTensor, TensorFile, format_header, read_tensor_file


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor that will be written.

    Attributes:
        offset: of its first byte in the new file.
        source: the base's tensor; None for a reward head that the base lacks.
        changes: in the order in which the adapters were trained.
    """

    name: str
    dtype: str
    shape: Shape
    offset: int
    source: StoredTensor | None
    changes: tuple[Change, ...] = ()

    @property
    def is_copy(self) -> bool:
        """Its bytes are the base's."""
        source = self.source
        return not self.changes and source is not None and (source.dtype, source.shape) == (self.dtype, self.shape)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.source.size if self.is_copy and self.source else math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def stored(self) -> StoredTensor:
        """The same tensor as one of a file that has no place yet: its rows and columns."""
        return StoredTensor(Path(), self.name, self.dtype, self.shape, self.offset, self.size)


@dataclass(frozen=True)
class PlannedFile:
    """A file that will be written.

    Attributes:
        name: of the base's file, and of the new one.
        header: the bytes in front of the tensors; the base's own where no tensor gets another size.
    """

    name: str
    source: TensorFile
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def size(self) -> int:
        """In bytes."""
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


@dataclass(frozen=True)
class MergePlan:
    """All weight files of a merged model.

    Attributes:
        index: content of the index file; None for a model in one file.
        vocabulary: rows of a grown embedding, 0 where it keeps its size.
        dropped: tensors of the base that the merged model has no use for.
    """

    files: tuple[PlannedFile, ...]
    index: dict[str, Any] | None
    vocabulary: int = 0
    dropped: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[PlannedTensor]:
        """Of all files."""
        return [tensor for file in self.files for tensor in file.tensors]


def plan_merge(source: ModelSource, adapters: Sequence[Path], added_ids: Sequence[int], is_reward: bool) -> MergePlan:
    """Plans base + adapters.

    Args:
        adapters: folders, in the order in which they were trained.
        added_ids: ids of the tokens that the last adapter's run added.
        is_reward: the merged model ends in a reward head.

    Raises:
        AdapterError: an adapter does not fit.
        ModelLoadingError: the base's files are damaged.
        NeedsFramework: only peft and transformers can merge this.
    """
    if source.is_packed:
        raise NeedsFramework("the base's own files are quantised")
    files = read_files(source.folder)
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    vocabulary = find_vocabulary(source, added_ids)
    changes: dict[str, tuple[Change, ...]] = {}
    added: dict[str, StoredTensor] = {}
    for folder in adapters:
        is_last = folder == adapters[-1]
        reader = AdapterReader(
            folder, BaseTensors(tensors, source.model_type, vocabulary if is_last else 0, is_reward and is_last)
        )
        reader.read()
        added.update(reader.added)
        for name, change in reader.changes.items():
            changes[name] = (*changes.get(name, ()), change)
    check_tied(source, tensors, changes)
    shapes = {name: find_new_shape(tensors[name], parts, vocabulary) for name, parts in changes.items()}
    check_growth(source, tensors, shapes, vocabulary)
    # A reward model has its own head; the one over the vocabulary would be a tensor without a place.
    heads = ("lm_head.", "embed_out.") if is_reward and not source.is_reward else ()
    dropped = tuple(name for name in tensors if name.startswith(heads))
    planned = [plan_file(file, changes, shapes, dropped, added if file is files[-1] else {}) for file in files]
    return MergePlan(tuple(planned), plan_index(source.folder, planned), vocabulary, dropped)


def plan_copy(folder: Path, dtype: str) -> MergePlan:
    """Plans a copy of a model in another number format.

    Args:
        dtype: torch's name of the format that all floats get.

    Raises:
        NeedsFramework: a format that is not computed with here.
        ModelLoadingError: damaged files.
    """
    if dtype not in FLOATS:
        raise NeedsFramework(f"the base is stored as {dtype}")
    files, planned = read_files(folder), []
    for file in files:
        entries = []
        for tensor in file.tensors:
            if tensor.dtype == "F64":
                raise NeedsFramework(f"{tensor.name} is stored as F64")
            entries.append(
                (tensor.name, FLOATS[dtype] if tensor.dtype in FLOATS.values() else tensor.dtype, tensor, ())
            )
        planned.append(lay_out(file, [(name, kind, one.shape, one, parts) for name, kind, one, parts in entries]))
    return MergePlan(tuple(planned), plan_index(folder, planned))


def read_files(folder: Path) -> list[TensorFile]:
    """Headers of the weight files that transformers would load, in the order of their names.

    Raises:
        ModelLoadingError: damaged, or a tensor that stands in two of them.
        NeedsFramework: weights under other names.
    """
    names = list_weight_names(folder)
    if not names:
        raise NeedsFramework("the base's weights do not have the usual file names")
    files = [read_tensor_file(folder / name) for name in names]
    seen: set[str] = set()
    for file in files:
        if twice := seen & {tensor.name for tensor in file.tensors}:
            raise ModelLoadingError(f"{min(twice)} stands in two files", where=str(file.path), code="damaged")
        seen |= {tensor.name for tensor in file.tensors}
    return files


def find_vocabulary(source: ModelSource, added_ids: Sequence[int]) -> int:
    """Rows that embedding and head need once tokens are added, or 0 where they have them to spare.

    Raises:
        NeedsFramework: the config does not say how many there are.
    """
    if not added_ids:
        return 0
    rows = source.config.get("vocab_size")
    if type(rows) is not int or min(added_ids) > rows:
        raise NeedsFramework("config.json does not say to how many tokens the new ones are added")
    return max(added_ids) + 1 if max(added_ids) >= rows else 0


def find_new_shape(tensor: StoredTensor, changes: Sequence[Change], vocabulary: int) -> Shape:
    """Shape of a tensor after its changes."""
    shape = tensor.shape
    for change in changes:
        if isinstance(change, Replacement):
            shape = change.tensor.shape
        elif isinstance(change, TokenRows) and vocabulary > shape[0]:
            shape = (vocabulary, *shape[1:])
    return shape


def check_tied(
    source: ModelSource, tensors: Mapping[str, StoredTensor], changes: Mapping[str, Sequence[Change]]
) -> None:
    """Leaves to the framework a head that is the embedding, and is stored beside it all the same."""
    if source.config.get("tie_word_embeddings", True) is False:
        return
    shapes = {tensors[name].shape for name in changes}
    for name, tensor in tensors.items():
        if TIED.fullmatch(name) and tensor.shape in shapes:
            raise NeedsFramework(f"{name} shares the embedding's matrix, and the files hold it twice")


def check_growth(
    source: ModelSource, tensors: Mapping[str, StoredTensor], shapes: Mapping[str, Shape], vocabulary: int
) -> None:
    """Whatever has a row for each token grows together, and every new row is the adapter's.

    Raises:
        NeedsFramework: a tensor that looks like an embedding or a head keeps its rows.
    """
    if not vocabulary:
        return
    rows = source.config["vocab_size"]
    for name, tensor in tensors.items():
        is_end = tensor.shape[:1] == (rows,) and not any(part.isdigit() for part in name.split("."))
        if is_end and shapes.get(name, tensor.shape)[0] != vocabulary:
            raise NeedsFramework(f"{name} has {rows} rows, and the adapter brings none for the added tokens")


def plan_file(
    file: TensorFile,
    changes: Mapping[str, tuple[Change, ...]],
    shapes: Mapping[str, Shape],
    dropped: Sequence[str],
    added: Mapping[str, StoredTensor],
) -> PlannedFile:
    """Plans one file of the base."""
    entries: list[Entry] = [
        (one.name, one.dtype, shapes.get(one.name, one.shape), one, changes.get(one.name, ()))
        for one in file.tensors
        if one.name not in dropped
    ]
    floats = [one.dtype for one in file.tensors if one.dtype in FLOATS.values()]
    dtype = max(set(floats), key=floats.count, default="F32")
    entries += [(name, dtype, tensor.shape, None, (Replacement(tensor),)) for name, tensor in added.items()]
    return lay_out(file, entries)


Entry = tuple[str, str, Shape, StoredTensor | None, tuple[Change, ...]]


def lay_out(file: TensorFile, entries: list[Entry]) -> PlannedFile:
    """Gives every tensor its place: its old one, unless a size has changed in the file.

    Args:
        entries: name, dtype, shape, source and changes.
    """
    same = [(one.name, one.dtype, one.shape) for one in file.tensors] == [entry[:3] for entry in entries]
    if same:
        header = read_front(file)
    else:
        # Large numbers first, as safetensors writes them: then each one lies at a multiple of its size.
        if unknown := [name for name, dtype, *_ in entries if dtype not in ITEM_BYTES]:
            raise NeedsFramework(f"{unknown[0]} has a number format of less than a byte")
        entries = sorted(entries, key=lambda entry: -ITEM_BYTES[entry[1]])
        header = format_header([entry[:3] for entry in entries], file.metadata)
    tensors, offset = [], len(header)
    for name, dtype, shape, source, parts in entries:
        tensors.append(PlannedTensor(name, dtype, shape, offset, source, parts))
        offset += tensors[-1].size
    return PlannedFile(file.path.name, file, header, tuple(tensors))


def read_front(file: TensorFile) -> bytes:
    """Everything in front of the first tensor."""
    with file.path.open("rb") as opened:
        return opened.read(file.data)


def plan_index(folder: Path, files: Sequence[PlannedFile]) -> dict[str, Any] | None:
    """The index of the new files: the base's, with new sizes and names; None where there is none."""
    if [file.name for file in files] == [WEIGHTS_NAME]:
        return None
    path = folder / INDEX_NAME
    index = read_json_object(path, str(path), MAX_INDEX_BYTES)
    index["weight_map"] = {tensor.name: file.name for file in files for tensor in file.tensors}
    metadata = index.get("metadata")
    if isinstance(metadata, dict):
        if "total_size" in metadata:
            metadata["total_size"] = sum(tensor.size for file in files for tensor in file.tensors)
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(math.prod(one.shape) for file in files for one in file.tensors)
    return index
