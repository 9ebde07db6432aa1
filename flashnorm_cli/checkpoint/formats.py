"""What a file of tensors holds, by its content: names and shapes, without running or allocating anything of it.

Read are safetensors, torch's zip and older pickles, GGUF, ONNX and NumPy's npz. Pickles are walked by an unpickler
that knows no class and calls nothing (everything that a pickle names becomes an inert stand-in), in pure Python, whose
memo cannot be blown up by an index. Of HDF5, msgpack, TFLite and Core ML only the signature is looked at.
"""

from __future__ import annotations

import ast
import io
import pickle
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from flashnorm_cli.checkpoint.header import LENGTH_BYTES, header_size, parse_header
from flashnorm_cli.errors import CheckpointError

# A pickle of names and shapes takes some kilobytes; more is not looked through.
MAX_PICKLE = 64 << 20
_MAX_TENSORS = 1_000_000
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its zip files

Shapes = list[tuple[str, tuple[int, ...]]]

# What was computed for the weights as they were, and does not fit folded ones.
OPTIMIZER, IMATRIX, ADAPTER = "the state of an optimizer", "an importance matrix", "an adapter"


@dataclass(frozen=True)
class Contents:
    """What a file holds: its format, its tensors where the format tells them, and what it was computed for, if known.

    `entries` are the names and shapes; None where they cannot be told without reading all of it.
    """

    format: str
    entries: Shapes | None = None
    made_for: str | None = None


class _UnreadableError(Exception):
    """The file is not what its first bytes say."""


def look(file: BinaryIO, size: int, name: str) -> Contents | None:
    """What a seekable file of `size` bytes holds; None if it is no format of tensors, or broken.

    `name` only decides between formats without a signature. Raises OSError where the file cannot be read.
    """
    start = file.read(16)
    file.seek(0)
    try:
        for matches, read in _READERS:
            if matches(start, name):
                return read(file, size)
    # A crafted file may make the parsers below raise anything of these; then it holds nothing that can be told.
    except (
        _UnreadableError, CheckpointError, pickle.UnpicklingError, zipfile.BadZipFile, struct.error, ValueError,
        TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError, RecursionError, MemoryError,
        NotImplementedError, SyntaxError, RuntimeError,
    ):  # fmt: skip
        return None
    return None


# ---- safetensors, npz, torch -----------------------------------------------------------------------------------------


def _safetensors(file: BinaryIO, size: int) -> Contents:
    start = file.read(LENGTH_BYTES)
    raw = start + _exactly(file, header_size(start, size, "") - LENGTH_BYTES)
    tensors = parse_header(raw, size, "").tensors
    return Contents("safetensors", [(entry.name, entry.shape) for entry in tensors.values()])


def _zip(file: BinaryIO, size: int) -> Contents:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if pickles:
            with archive.open(min(pickles, key=len)) as member:
                raw = member.read(MAX_PICKLE + 1)
            if len(raw) > MAX_PICKLE:
                raise _UnreadableError
            return _of_object(_Inertly(io.BytesIO(raw)).load())
        entries: Shapes = []
        for name in names:
            if name.endswith(".npy"):
                with archive.open(name) as member:
                    entries.append((name.removesuffix(".npy"), _npy_shape(member.read(1 << 12))))
        if not entries or len(entries) != len(names):
            raise _UnreadableError
        return Contents("npz", entries)


def _npy_shape(start: bytes) -> tuple[int, ...]:
    wide = start[6] > 1
    begin, length = (12, struct.unpack("<I", start[8:12])[0]) if wide else (10, struct.unpack("<H", start[8:10])[0])
    return _shape(ast.literal_eval(start[begin : begin + length].decode("latin-1"))["shape"])


def _old_torch(file: BinaryIO, size: int) -> Contents:
    """A pickle of the magic number, of the protocol, of the machine, and then of the object."""
    raw = io.BytesIO(file.read(MAX_PICKLE))
    if _Inertly(raw).load() != _LEGACY_MAGIC:
        raise _UnreadableError
    _Inertly(raw).load()
    _Inertly(raw).load()
    return _of_object(_Inertly(raw).load())


class _Tensor:
    def __init__(self, shape: object) -> None:
        self.shape = _shape(shape)


class _Inert:
    """Stands for whatever a pickle names: takes every call and every state, does nothing, keeps what it was given."""

    def __new__(cls, *args: object, **kwargs: object) -> _Inert:
        self = object.__new__(cls)
        self.held = list(args)
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    held: list[object]

    def __call__(self, *args: object) -> _Inert:
        return _Inert(*args)

    def __setstate__(self, state: object) -> None:
        self.held.append(state)

    def __setitem__(self, key: object, value: object) -> None:
        self.held.append({key: value})

    def append(self, value: object) -> None:
        self.held.append(value)

    add = append

    def extend(self, values: Any) -> None:
        self.held.extend(values)


class _Inertly(pickle._Unpickler):
    """Reads a pickle without importing or calling anything that it names."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name.startswith("_rebuild_tensor"):
            return lambda storage, offset, shape, *rest: _Tensor(shape)
        if module == "torch._utils" and name.startswith("_rebuild_parameter"):
            return lambda data, *rest: data
        return dict if (module, name) == ("collections", "OrderedDict") else _Inert

    def persistent_load(self, pid: object) -> _Inert:
        return _Inert()


def _of_object(value: object) -> Contents:
    keys = value.keys() if isinstance(value, dict) else set()
    optimizer = {"state", "param_groups"} <= keys or "optimizer_state_dict" in keys
    return Contents("torch", list(_tensors(value)), OPTIMIZER if optimizer else None)


def _tensors(value: object) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors anywhere in an object of dicts, lists and stand-ins, by the path to them; each container once."""
    waiting, seen, found = [("", value)], {id(value)}, 0
    while waiting:
        name, each = waiting.pop()
        if isinstance(each, _Tensor):
            yield name, each.shape
            found += 1
        if found > _MAX_TENSORS:
            raise _UnreadableError
        if isinstance(each, dict):
            inner = [
                (f"{name}.{key}" if name else str(key), v) for key, v in each.items() if isinstance(key, (str, int))
            ]
        elif isinstance(each, (list, tuple)):
            inner = [(f"{name}.{n}", v) for n, v in enumerate(each)]
        elif isinstance(each, _Inert):
            inner = [(name, v) for v in each.held]
        else:
            continue
        for path, v in inner:
            if isinstance(v, _Tensor) or id(v) not in seen:
                seen.add(id(v))
                waiting.append((path, v))


# ---- GGUF ------------------------------------------------------------------------------------------------------------

_GGUF_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING, _GGUF_ARRAY = 8, 9


def _gguf(file: BinaryIO, size: int) -> Contents:
    data = io.BufferedReader(_Raw(file), 1 << 18)

    def number(format: str) -> int:
        return int(struct.unpack(format, _exactly(data, struct.calcsize(format)))[0])

    def text() -> str:
        return _exactly(data, _bounded(number("<Q"))).decode("utf-8", "replace")

    def value(kind: int) -> str | None:
        if kind == _GGUF_STRING:
            return text()
        if kind == _GGUF_ARRAY:
            inner, count = number("<I"), _bounded(number("<Q"))
            if inner in _GGUF_SIZES:
                data.seek(_GGUF_SIZES[inner] * count, io.SEEK_CUR)
            else:
                for _ in range(count):
                    value(inner)
            return None
        _exactly(data, _GGUF_SIZES[kind])
        return None

    _exactly(data, 8)
    count, pairs = _bounded(number("<Q")), _bounded(number("<Q"))
    facts = {}
    for _ in range(pairs):
        key = text()
        facts[key] = value(number("<I"))
    entries = []
    for _ in range(count):
        name, dims = text(), number("<I")
        if dims > 8:
            raise _UnreadableError
        entries.append((name, tuple(number("<Q") for _ in range(dims))))
        _exactly(data, 12)
    kind = {"imatrix": IMATRIX, "adapter": ADAPTER}.get(facts.get("general.type") or "")
    return Contents("GGUF", entries, kind)


def _old_imatrix(file: BinaryIO, size: int) -> Contents:
    """llama.cpp's importance matrix before it became a GGUF: counts, then names of its tensors."""
    entries, length = struct.unpack("<ii", _exactly(file, 8))
    if not (0 < entries < 1 << 20 and 0 < length < 1 << 10 and _exactly(file, length).endswith(b".weight")):
        raise _UnreadableError
    return Contents("imatrix", None, IMATRIX)


# ---- ONNX: protocol buffers, of which only initializers' names and dimensions are read -------------------------------


def _onnx(file: BinaryIO, size: int) -> Contents:
    data = io.BufferedReader(_Raw(file), 1 << 16)
    entries: Shapes = []
    for field, length, _ in _fields(data, size):
        if field != 7:  # not the graph
            data.seek(length, io.SEEK_CUR)
            continue
        for inner, inner_length, _ in _fields(data, data.tell() + length):
            if inner == 5:
                entries.append(_initializer(data, data.tell() + inner_length))
            else:
                data.seek(inner_length, io.SEEK_CUR)
    if not entries:
        raise _UnreadableError
    return Contents("ONNX", entries)


def _initializer(data: Any, end: int) -> tuple[str, tuple[int, ...]]:
    name, shape = "", []
    for field, length, value in _fields(data, end):
        stop = data.tell() + length
        if field == 1 and value is not None:
            shape.append(value)
        while field == 1 and data.tell() < stop:  # packed
            shape.append(_varint(data))
        if field == 8:
            name = _exactly(data, _bounded(length)).decode("utf-8", "replace")
        data.seek(stop)
    return name, tuple(shape)


def _fields(data: Any, end: int) -> Iterator[tuple[int, int, int | None]]:
    """Fields of a message up to `end`: number, bytes that follow, and the value of those that are numbers."""
    while data.tell() < end:
        key = _varint(data)
        if key & 7 == 2:
            length = _varint(data)
            if data.tell() + length > end:
                raise _UnreadableError
            yield key >> 3, length, None
        elif key & 7 == 0:
            yield key >> 3, 0, _varint(data)
        elif key & 7 in (1, 5):
            yield key >> 3, 8 if key & 7 == 1 else 4, None
        else:
            raise _UnreadableError


def _varint(data: Any) -> int:
    value = 0
    for shift in range(0, 64, 7):
        byte = _exactly(data, 1)[0]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise _UnreadableError


# ---- shared ----------------------------------------------------------------------------------------------------------


class _Raw(io.RawIOBase):
    """A file for BufferedReader, which closes what it is given."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.file.seek(offset, whence)

    def tell(self) -> int:
        return self.file.tell()

    def readinto(self, buffer: Any) -> int:
        block = self.file.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)


def _exactly(file: Any, n: int) -> bytes:
    data: bytes = file.read(n)
    if len(data) != n:
        raise _UnreadableError
    return data


def _bounded(n: int) -> int:
    if n > MAX_PICKLE:
        raise _UnreadableError
    return n


def _shape(value: object) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)) or not all(isinstance(n, int) and n >= 0 for n in value):
        raise _UnreadableError
    return tuple(value)


def _only(format: str) -> Callable[[BinaryIO, int], Contents]:
    return lambda file, size: Contents(format)


_READERS: list[tuple[Callable[[bytes, str], bool], Callable[[BinaryIO, int], Contents]]] = [
    (lambda s, n: s.startswith(b"PK\x03\x04"), _zip),
    (lambda s, n: s.startswith(b"GGUF"), _gguf),
    (lambda s, n: s[8:9] == b"{" and s[4:8] == bytes(4), _safetensors),
    (lambda s, n: s[:1] == b"\x80" and s[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"), _old_torch),
    (lambda s, n: s.startswith(b"\x89HDF\r\n\x1a\n"), _only("HDF5")),
    (lambda s, n: s[4:8] == b"TFL3", _only("TFLite")),
    (lambda s, n: n.endswith(".onnx"), _onnx),
    (lambda s, n: n.endswith(".msgpack") and s[:1] in (b"\xde", b"\xdf", *(bytes([b]) for b in range(0x80, 0x90))),
     _only("msgpack")),
    (lambda s, n: n.endswith((".mlmodel", ".pte", ".ot")) and bool(s), _only("compiled")),
    (lambda s, n: n.endswith((".imatrix", ".dat")), _old_imatrix),
]  # fmt: skip
