"""Safetensors headers: read, check, build. No tensor data is touched and torch is not imported.

A safetensors file is 8 bytes with the length N of the header (little endian), N bytes of JSON, and the data
section. The JSON maps each tensor's name to its dtype, shape and `[start, end)` byte offsets within the data
section, which the tensors must cover exactly once.

Everything that `safetensors` 0.8 refuses is refused here, before the long job instead of in the middle of it.
Three things that it lets pass although the format forbids them are refused as well: names that occur twice
(its last one wins), an entry written as a list, and fields that the format does not know.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.files import open_file
from flashnorm_cli.checkpoint.json_files import MAX_DIGITS
from flashnorm_cli.errors import CheckpointError, quoted, shown

# Bits, not bytes: F4 and F6 pack several values into a byte.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

LENGTH_BYTES = 8
MAX_JSON_BYTES = 100_000_000  # safetensors' own limit
METADATA_KEY = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_U64_MAX = 2**64 - 1


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a header. `start` and `end` are bytes from the beginning of the data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """A checked header. `raw` is the length and the JSON as on disk; `tensors` keep the order of the JSON."""

    raw: bytes
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str] | None

    @property
    def data_start(self) -> int:
        """Where the data section begins, in bytes from the beginning of the file."""
        return len(self.raw)

    @cached_property
    def file_size(self) -> int:
        """Size in bytes of the whole file."""
        return self.data_start + max((entry.end for entry in self.tensors.values()), default=0)


def tensor_nbytes(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Size in bytes of a tensor, or None where it would end within a byte (sub-byte dtypes).

    Raises KeyError for an unknown dtype and OverflowError for a size beyond 64 bits, like safetensors.
    """
    elements = 1
    for length in shape:
        elements *= length
        if elements > _U64_MAX:  # checked at every step, so that a later 0 does not hide it
            raise OverflowError
    bits = elements * DTYPE_BITS[dtype]
    if bits > _U64_MAX:
        raise OverflowError
    return bits // 8 if bits % 8 == 0 else None


def header_size(start: bytes, file_size: int, where: str) -> int:
    """Bytes that the whole header takes, length included, read from at least the first 8 bytes of a file.

    `where` names the file in errors. Raises CheckpointError if the length cannot be right.
    """
    if file_size < LENGTH_BYTES or len(start) < LENGTH_BYTES:
        raise CheckpointError(f"{where}: truncated: {file_size} bytes cannot hold a safetensors header")
    length = int.from_bytes(start[:LENGTH_BYTES], "little")
    if start.startswith(b"version "):
        raise CheckpointError(f"{where}: is a Git LFS pointer, not the file itself; run: git lfs pull")
    if length > MAX_JSON_BYTES:
        raise CheckpointError(f"{where}: not safetensors: its header would be {length} bytes long")
    if LENGTH_BYTES + length > file_size:
        raise CheckpointError(
            f"{where}: truncated: the header takes {LENGTH_BYTES + length} bytes, the file has {file_size}"
        )
    return LENGTH_BYTES + length


def read_header(path: Path) -> Header:
    """Read and check the header of the file at `path`. Raises CheckpointError, also if it cannot be read."""
    try:
        with open_file(path) as file:
            file_size = file.seek(0, 2)
            file.seek(0)
            start = file.read(LENGTH_BYTES)
            raw = start + file.read(header_size(start, file_size, str(path)) - LENGTH_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from error
    return parse_header(raw, file_size, str(path))


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check a header that was read from anywhere, for example over HTTP.

    `raw` holds at least the whole header (`header_size` tells how much that is), `file_size` is the size in
    bytes of the file that it came from, `where` names that file in errors. Raises CheckpointError.
    """
    size = header_size(raw, file_size, where)
    if len(raw) < size:
        raise CheckpointError(f"{where}: truncated: {len(raw)} of {size} header bytes arrived")
    raw = bytes(raw[:size])
    fields = _parse_json(raw[LENGTH_BYTES:], where)
    metadata = _check_metadata(fields.pop(METADATA_KEY, None), where)
    tensors = {name: _check_entry(name, value, where) for name, value in fields.items()}
    _check_layout(tensors.values(), file_size - size, where)
    return Header(raw, tensors, metadata)


def build_header(entries: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None) -> Header:
    """Header of a new file that holds `entries` (name, dtype, shape) one after the other, in that order.

    Padded with spaces to a multiple of 8 bytes, as safetensors does. Raises CheckpointError for entries that
    cannot be written: a name twice, an unknown dtype, a size that is no whole number of bytes.
    """
    where = "new header"
    fields: dict[str, Any] = {} if metadata is None else {METADATA_KEY: dict(metadata)}
    position = 0
    for name, dtype, shape in entries:
        if name in fields or name == METADATA_KEY:
            raise CheckpointError(f"{where}: tensor {quoted(name)} occurs twice")
        end = position + _checked_nbytes(name, dtype, shape, where)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(LENGTH_BYTES, "little") + text
    return parse_header(raw, len(raw) + position, where)


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `text`, as strictly as safetensors' parser reads it, and without duplicate keys."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    def parse_int(digits: str) -> int | float:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"a number of {len(digits)} digits")
        return -0.0 if digits == "-0" else int(digits)  # Python would make a valid 0 of it

    def object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{where}: {quoted(twice)} occurs twice in the header")
        return result

    try:
        value = json.loads(
            text.decode(),
            parse_constant=refuse,
            parse_int=parse_int,
            object_pairs_hook=object_without_duplicates,
        )
        if b"\\u" in text:  # Python lets half a surrogate pair pass; encoding it fails
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise CheckpointError(f"{where}: the header is not JSON: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: the header is not a JSON object")
    return value


def _check_metadata(value: Any, where: str) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise CheckpointError(f"{where}: {METADATA_KEY} does not map text to text")
    return value


def _check_entry(name: str, value: Any, where: str) -> TensorEntry:
    """One tensor's JSON, everything checked that does not depend on the other tensors."""
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        raise CheckpointError(f"{where}: tensor {quoted(name)} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str):
        raise CheckpointError(f"{where}: tensor {quoted(name)} has the dtype {quoted(dtype)}")
    if not _is_sizes(shape):
        raise CheckpointError(f"{where}: tensor {quoted(name)} has the shape {shown(shape)}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: tensor {quoted(name)} has the data offsets {shown(offsets)}")
    entry = TensorEntry(name, dtype, tuple(shape), *offsets)
    nbytes = _checked_nbytes(name, dtype, entry.shape, where)
    if entry.nbytes != nbytes:
        raise CheckpointError(
            f"{where}: tensor {quoted(name)} takes {entry.nbytes} bytes, but {dtype} {shown(shape)} are {nbytes} bytes"
        )
    return entry


def _is_sizes(value: Any) -> bool:
    # type(), because True is an int for isinstance
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _U64_MAX for n in value)


def _checked_nbytes(name: str, dtype: str, shape: tuple[int, ...], where: str) -> int:
    try:
        nbytes = tensor_nbytes(dtype, shape)
    except KeyError:
        raise CheckpointError(f"{where}: tensor {quoted(name)} has the unknown dtype {quoted(dtype)}") from None
    except OverflowError:
        raise CheckpointError(f"{where}: tensor {quoted(name)} has the impossible shape {shown(list(shape))}") from None
    if nbytes is None:
        raise CheckpointError(f"{where}: tensor {quoted(name)}: {dtype} {shown(list(shape))} ends within a byte")
    return nbytes


def _check_layout(entries: Iterable[TensorEntry], data_size: int, where: str) -> None:
    """The tensors must cover the `data_size` bytes of the data section without hole or overlap."""
    position = 0
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "has a hole before it"
            raise CheckpointError(
                f"{where}: tensor {quoted(entry.name)} {problem}: it starts at byte {entry.start}, not {position}"
            )
        position = entry.end
        if position > data_size:
            raise CheckpointError(
                f"{where}: truncated: tensor {quoted(entry.name)} ends at byte {position} of {data_size} data bytes"
            )
    if position < data_size:
        raise CheckpointError(f"{where}: {data_size - position} bytes after the last tensor")
