"""safetensors files read and written with numpy, row by row: no framework, and never a whole file in memory.

The format is 8 bytes with the length of a JSON header, the header, and the tensors without a gap
(https://github.com/huggingface/safetensors, «Format»).
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from utils.exceptions import ModelLoadingError
from utils.model_headers import LENGTH_BYTES, read_header_bytes

# Bytes of a number; formats that are not here (of less than a byte) are copied, and never computed with.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # torch's names of what `encode` writes
COPY_BYTES = 16 << 20
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        path: the file.
        name: in the file's header.
        dtype: as the header says it, such as `BF16`.
        offset: of its first byte in the file.
        size: in bytes.
    """

    path: Path
    name: str
    dtype: str
    shape: Shape
    offset: int
    size: int

    @property
    def rows(self) -> int:
        """Of the tensor seen as a matrix: all axes but the last; a vector has as many rows as numbers."""
        return math.prod(self.shape[:-1]) if len(self.shape) > 1 else math.prod(self.shape)

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[-1] if len(self.shape) > 1 else 1


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file as its header describes it.

    Attributes:
        tensors: in the order of their bytes.
        metadata: `__metadata__` of the header.
        data: offset of the first tensor.
    """

    path: Path
    tensors: tuple[StoredTensor, ...]
    metadata: dict[str, Any]
    data: int


def read_tensor_file(path: Path) -> TensorFile:
    """Reads and checks a header: every tensor has the bytes that its shape needs, and they cover the file without a gap.

    Raises:
        ModelLoadingError: the header is damaged or too large, or does not describe this file.
    """
    content = read_header_bytes(path)
    data = LENGTH_BYTES + len(content)
    try:
        entries: dict[str, Any] = dict(json.loads(content, object_pairs_hook=refuse_repeated_keys))
        metadata = entries.pop("__metadata__", None)
        metadata = {} if metadata is None else metadata  # mlx writes null where it has none
        if not isinstance(metadata, dict):
            raise TypeError("__metadata__ is no table")
        found = [read_entry(path, name, entry, data) for name, entry in entries.items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        message = f"the safetensors header is damaged: {error}"
        raise ModelLoadingError(message, where=str(path), code="damaged") from error
    found.sort(key=lambda tensor: (tensor.offset, tensor.size))
    end = data
    for tensor in found:
        if tensor.offset != end:
            raise ModelLoadingError(
                f"the bytes of {tensor.name} overlap or leave a gap", where=str(path), code="damaged"
            )
        end += tensor.size
    if (actual := path.stat().st_size) != end:
        message = f"the file has {actual:,} bytes, and its header describes {end:,}"
        raise ModelLoadingError(message, where=str(path), fix="copy or download it again", code="damaged")
    return TensorFile(path, tuple(found), metadata, data)


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object as a dict; two tensors of one name would silently become one."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


def read_entry(path: Path, name: str, entry: Mapping[str, Any], data: int) -> StoredTensor:
    """One tensor of a header.

    Raises:
        ValueError: sizes that no tensor can have, or that do not fit its shape.
    """
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise ValueError(f"{name} has impossible sizes")
    item = ITEM_BYTES.get(str(entry["dtype"]))
    if item is not None and math.prod(shape) * item != end - begin:
        raise ValueError(f"{name} does not have the bytes that its shape needs")
    return StoredTensor(path, name, str(entry["dtype"]), shape, data + begin, end - begin)


def format_header(tensors: Iterable[tuple[str, str, Shape]], metadata: Mapping[str, Any]) -> bytes:
    """Length and header of a file that holds these tensors (name, dtype, shape) in this order.

    The header is padded with spaces, so that the first tensor lies at a multiple of 8.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    content = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    content += b" " * (-len(content) % 8)
    return struct.pack("<Q", len(content)) + content


def read_exactly(descriptor: int, buffer: Bytes, offset: int) -> None:
    """Fills a buffer from a file.

    Raises:
        OSError: the file ends before the buffer is full.
    """
    done = 0
    while done < len(buffer):
        count = os.preadv(descriptor, [buffer[done:].data], offset + done)
        if count == 0:
            raise OSError(f"the file ends {len(buffer) - done:,} bytes too early")
        done += count


def write_exactly(descriptor: int, buffer: Bytes, offset: int) -> None:
    """Writes a whole buffer into a file."""
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:].data, offset + done)


def announce_read(descriptor: int, offset: int, size: int) -> None:
    """Lets the system fetch bytes from the disk while something else is computed; only Linux is asked."""
    if sys.platform == "linux":
        os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)


def copy_in_kernel(source: int, target: int, size: int, source_offset: int, target_offset: int) -> int:
    """Copies bytes between two open files without bringing them into the process, as far as Linux can.

    Returns:
        How many bytes were copied, from the first one on.
    """
    done = 0
    if sys.platform == "linux":
        try:
            while done < size:
                part = min(size - done, COPY_BYTES)
                if not (count := os.copy_file_range(source, target, part, source_offset + done, target_offset + done)):
                    break
                done += count
        except OSError:  # other file systems, or a full disk, which the caller's own write will show
            return done
    return done


def copy_bytes(source: int, target: int, size: int, source_offset: int, target_offset: int) -> None:
    """Copies bytes between two open files.

    Raises:
        OSError: the source ends too early, or the disk is full.
    """
    done = copy_in_kernel(source, target, size, source_offset, target_offset)
    buffer = np.empty(min(size - done, COPY_BYTES), np.uint8)
    while done < size:
        part = buffer[: min(size - done, COPY_BYTES)]
        read_exactly(source, part, source_offset + done)
        write_exactly(target, part, target_offset + done)
        done += len(part)


def decode(raw: Bytes, dtype: str, out: Floats) -> None:
    """Bytes of a tensor as float32, which holds every value of the three formats.

    Args:
        raw: `BF16`, `F16` or `F32`, contiguous.
        out: as many numbers as `raw` holds, contiguous.
    """
    if dtype == "BF16":  # the upper half of a float32
        bits = out.view(np.uint32)
        np.copyto(bits, raw.view(np.uint16))
        np.left_shift(bits, 16, out=bits)
    else:
        np.copyto(out, raw.view(np.float32 if dtype == "F32" else np.float16))


def encode(values: Floats, dtype: str, out: Bytes, scratch: Floats) -> None:
    """float32 as bytes of a tensor, rounded to the nearest value, and to the even one between two; NaN stays NaN.

    Args:
        dtype: `BF16`, `F16` or `F32`.
        out: the bytes.
        scratch: as many numbers as `values`; overwritten.
    """
    if dtype != "BF16":
        with np.errstate(over="ignore"):  # beyond float16: infinity, which whoever asked looks for
            np.copyto(out.view(np.float32 if dtype == "F32" else np.float16), values, casting="same_kind")
        return
    bits, rounded, halves = values.view(np.uint32), scratch.view(np.uint32), out.view(np.uint16)
    np.right_shift(bits, 16, out=rounded)  # the last bit that stays decides between two equally near ones
    np.bitwise_and(rounded, 1, out=rounded)
    np.add(rounded, 0x7FFF, out=rounded)
    np.add(rounded, bits, out=rounded)
    np.right_shift(rounded, 16, out=rounded)
    np.copyto(halves, rounded, casting="unsafe")
    if np.isnan(values.max(initial=0.0)):  # NaN wins every comparison; its payload might have been carried away
        lost = np.isnan(values)
        halves[lost] = (bits[lost] >> 16).astype(np.uint16) | 0x0040


def is_finite(raw: Bytes, dtype: str) -> bool:
    """False where encoded numbers hold an infinity or a NaN: the bits of their exponent are all ones."""
    largest, sign = {"BF16": (0x7F7F, 0x8000), "F16": (0x7BFF, 0x8000), "F32": (0x7F7FFFFF, 0x80000000)}[dtype]
    unsigned, signed = (np.uint32, np.int32) if dtype == "F32" else (np.uint16, np.int16)
    if raw.size == 0:
        return True
    # As unsigned integers negative numbers lie above all positive ones, as signed ones below: two maxima see both ends.
    return int(raw.view(signed).max()) <= largest and int(raw.view(unsigned).max()) <= sign | largest


def read_floats(tensor: StoredTensor, start: int = 0, stop: int | None = None) -> Floats:
    """Rows of a stored tensor as float32, shape (rows, columns).

    Raises:
        OSError: the file ends too early.
    """
    count = (tensor.rows if stop is None else stop) - start
    raw = np.empty(count * tensor.columns * ITEM_BYTES[tensor.dtype], np.uint8)
    descriptor = os.open(tensor.path, os.O_RDONLY)
    try:
        read_exactly(descriptor, raw, tensor.offset + start * tensor.columns * ITEM_BYTES[tensor.dtype])
    finally:
        os.close(descriptor)
    out = np.empty(count * tensor.columns, np.float32)
    decode(raw, tensor.dtype, out)
    return out.reshape(count, tensor.columns)
