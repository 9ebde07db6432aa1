"""Headers: what safetensors refuses is refused, what it accepts and the format allows is accepted."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flashnorm_cli.checkpoint.header import DTYPE_BITS, Header, build_header, header_size, parse_header, read_header
from flashnorm_cli.errors import CheckpointError


def tensor(dtype="F32", shape=(2,), start=0, end=8):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def file_bytes(header: dict | bytes | str, data: int = 8) -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header)
    if isinstance(header, str):
        header = header.encode()
    return len(header).to_bytes(8, "little") + header + bytes(data)


def safetensors_accepts(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except SafetensorError:
        return False
    return True


ONE = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
# name: (file, what the message says)
BAD = {
    "empty file": (b"", "truncated"),
    "seven bytes": (bytes(7), "truncated"),
    "header longer than the file": ((100).to_bytes(8, "little") + b"{}", "truncated"),
    "header over 100 MB": ((100_000_001).to_bytes(8, "little") + b"{}", "not safetensors"),
    "no JSON": (file_bytes(b"{]"), "not JSON"),
    "nothing": (file_bytes(b"", 0), "not JSON"),
    "not UTF-8": (file_bytes(b'{"\xff":' + ONE.encode() + b"}"), "not JSON"),
    "byte order mark": (file_bytes(b"\xef\xbb\xbf{}", 0), "not JSON"),
    "trailing NUL": (file_bytes(b"{}\0", 0), "not JSON"),
    "half a surrogate pair": (file_bytes('{"\\ud800":' + ONE + "}"), "not JSON"),
    "NaN": (file_bytes('{"a":NaN}'), "not JSON"),
    "control character": (file_bytes('{"a\n":' + ONE + "}"), "not JSON"),
    "deep nesting": (file_bytes('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deeply"),
    "huge number": (file_bytes('{"a":' + ONE.replace("[2]", "[" + "9" * 5000 + "]") + "}"), "not JSON"),
    "array": (file_bytes("[]", 0), "not a JSON object"),
    "unknown dtype": (file_bytes({"a": tensor("F33")}), "'a' has the unknown dtype 'F33'"),
    "lower case dtype": (file_bytes({"a": tensor("f32")}), "unknown dtype"),
    "dtype no text": (file_bytes({"a": tensor(32)}), "dtype"),
    "negative length": (file_bytes({"a": tensor(shape=(-2,))}), "shape"),
    "minus zero": (file_bytes('{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', 0), "shape"),
    "fraction": (file_bytes({"a": tensor(shape=(2.0,))}), "shape"),
    "truth as a length": (file_bytes({"a": tensor(shape=(True,), end=4)}, 4), "shape"),
    "shape is no list": (file_bytes('{"a":{"dtype":"F32","shape":2,"data_offsets":[0,8]}}'), "shape"),
    "length over 64 bits": (file_bytes({"a": tensor(shape=(2**64, 0), end=0)}, 0), "shape"),
    "elements over 64 bits": (file_bytes({"a": tensor(shape=(2**63, 4, 0), end=0)}, 0), "impossible shape"),
    "bits over 64 bits": (file_bytes({"a": tensor(shape=(2**62,), end=2**64 - 1)}), "impossible shape"),
    "offset no number": (file_bytes({"a": tensor(start="0")}), "data offsets"),
    "offset null": (file_bytes({"a": tensor(start=None)}), "data offsets"),
    "negative offset": (file_bytes({"a": tensor(start=-8, end=0)}), "data offsets"),
    "three offsets": (
        file_bytes({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}),
        "data offsets",
    ),
    "start behind end": (file_bytes({"a": tensor(start=8, end=0)}), "data offsets"),
    "size not matching": (file_bytes({"a": tensor(end=4)}, 4), "takes 4 bytes, but F32 [2] are 8 bytes"),
    "ends within a byte": (file_bytes({"a": tensor("F4", (3,), end=2)}, 2), "ends within a byte"),
    "overlap": (file_bytes({"a": tensor(), "b": tensor(start=4, end=12)}, 12), "'b' overlaps"),
    "same place twice": (file_bytes({"a": tensor(), "b": tensor()}), "overlaps"),
    "hole": (file_bytes({"a": tensor(), "b": tensor(start=12, end=20)}, 20), "'b' has a hole before it"),
    "hole at the start": (file_bytes({"a": tensor(start=4, end=12)}, 12), "hole"),
    "empty tensor inside another": (
        file_bytes({"a": tensor(), "b": tensor(shape=(0,), start=4, end=4)}),
        "overlaps",
    ),
    "data missing": (file_bytes({"a": tensor()}, 7), "truncated: tensor 'a' ends at byte 8 of 7"),
    "trailing bytes": (file_bytes({"a": tensor()}, 9), "1 bytes after the last tensor"),
    "metadata of numbers": (file_bytes({"__metadata__": {"a": 1}}, 0), "__metadata__"),
    "metadata is text": (file_bytes({"__metadata__": "a"}, 0), "__metadata__"),
    "missing field": (file_bytes('{"a":{"dtype":"F32","shape":[2]}}'), "needs exactly"),
    "tensor is null": (file_bytes('{"a":null}', 0), "needs exactly"),
}
# The format forbids these, and safetensors accepts them.
BAD_FOR_US = {
    "tensor twice": (file_bytes('{"a":' + ONE + ',"a":' + ONE + "}"), "'a' occurs twice"),
    "tensor twice, escaped": (file_bytes('{"a":' + ONE + ',"\\u0061":' + ONE + "}"), "'a' occurs twice"),
    "metadata key twice": (file_bytes('{"__metadata__":{"k":"1","k":"2"}}', 0), "'k' occurs twice"),
    "unknown field": (file_bytes({"a": {**tensor(), "scale": 1}}), "needs exactly"),
    "tensor as a list": (file_bytes({"a": ["F32", [2], [0, 8]]}), "needs exactly"),
}
GOOD = {
    "nothing in it": file_bytes({}, 0),
    "metadata only": file_bytes({"__metadata__": {"format": "pt"}}, 0),
    "metadata null": file_bytes({"__metadata__": None, "a": tensor()}),
    "scalar": file_bytes({"a": tensor(shape=(), end=4)}, 4),
    "no elements": file_bytes({"a": tensor(shape=(0, 7), end=0), "b": tensor(), "c": tensor("I8", (0,), 8, 8)}),
    "no elements of 2**63": file_bytes({"a": tensor(shape=(0, 2**63, 4), end=0)}, 0),
    "data in another order": file_bytes({"a": tensor(start=8, end=16), "b": tensor()}, 16),
    "unaligned": file_bytes({"a": tensor("U8", (1,), 0, 1), "b": tensor(start=1, end=9)}, 9),
    "white space": file_bytes(b" \n\t" + json.dumps({"a": tensor()}, indent=1).encode() + b"  \r\n "),
    "empty name": file_bytes({"": tensor()}),
    "name of another script": file_bytes(json.dumps({"größe.权重\U0001f980": tensor()}, ensure_ascii=False)),
    "escaped name": file_bytes(json.dumps({"größe.\U0001f980\n": tensor()})),
    "sub-byte": file_bytes({"a": tensor("F4", (4,), 0, 2), "b": tensor("F6_E2M3", (2, 2), 2, 5)}, 5),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_safetensors_refuses(name: str, tmp_path: Path):
    data, message = BAD[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert not safetensors_accepts(path)
    with pytest.raises(CheckpointError) as error:
        read_header(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", BAD_FOR_US)
def test_refuses_what_only_the_format_forbids(name: str, tmp_path: Path):
    data, message = BAD_FOR_US[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    assert safetensors_accepts(path), "no longer a difference: move it to BAD"
    with pytest.raises(CheckpointError, match=message):
        read_header(path)


@pytest.mark.parametrize("name", GOOD)
def test_accepts_what_safetensors_accepts(name: str, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(GOOD[name])
    header = read_header(path)
    assert header.raw == GOOD[name][: header.data_start]
    assert header.file_size == len(GOOD[name])
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(header.tensors)
        assert file.metadata() == header.metadata


def test_mutated_headers_are_never_accepted_against_safetensors(tmp_path: Path):
    """Random single-token damage: whatever safetensors refuses, we refuse."""
    rng = random.Random()
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": tensor(), "b": tensor("BF16", (3, 1), 8, 14)})
    path = tmp_path / "model.safetensors"
    parts = [*'{}[]",: 0123456789-.eE\\u', "true", "null", "dtype", "shape", "F16", "U8", "a", "99"]
    refused = 0
    for _ in range(1500):
        start = rng.randrange(len(text))
        mutated = text[:start] + rng.choice(parts) + text[start + rng.randrange(3) :]
        path.write_bytes(file_bytes(mutated, 14 + rng.choice([0, 0, 0, -1, 1, 8])))
        try:
            read_header(path)
        except CheckpointError:
            refused += 1
            continue
        assert safetensors_accepts(path), mutated
    assert refused > 500


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_knows_the_size_of_every_dtype(dtype: str, tmp_path: Path):
    header = build_header([("a", dtype, (8, 3))], None)
    assert header.tensors["a"].nbytes == 3 * DTYPE_BITS[dtype]
    path = tmp_path / "model.safetensors"
    path.write_bytes(header.raw + bytes(header.tensors["a"].nbytes))
    assert safetensors_accepts(path)


def test_knows_every_dtype_of_safetensors(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(BAD["unknown dtype"][0])
    with pytest.raises(SafetensorError) as error, safe_open(path, "pt"):
        pass
    listed = str(error.value).split("expected one of ")[1].split(" at line")[0]
    assert {name.strip("` ") for name in listed.split(",")} == set(DTYPE_BITS)


def test_reads_what_save_file_writes(tmp_path: Path):
    tensors = {
        "b": torch.randn(3, 5).bfloat16(),
        "a": torch.randn(7),
        "scalar": torch.tensor(1.0, dtype=torch.float64),
        "empty": torch.empty(0, 4, dtype=torch.float16),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == list(json.loads(header.raw[8:]))[1:]
    data = path.read_bytes()[header.data_start :]
    for name, value in tensors.items():
        entry = header.tensors[name]
        assert entry.shape == tuple(value.shape)
        assert data[entry.start : entry.end] == value.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_header_over_http(tmp_path: Path):
    """The first bytes of a file and its size are enough; more bytes than the header do not matter."""
    data = file_bytes({"a": tensor()})
    size = header_size(data[:8], len(data), "hub")
    assert parse_header(data[:size], len(data), "hub") == parse_header(data, len(data), "hub")
    with pytest.raises(CheckpointError, match=r"hub: truncated: 10 of \d+ header bytes"):
        parse_header(data[:10], len(data), "hub")
    with pytest.raises(CheckpointError, match="hub: truncated"):
        parse_header(data, len(data) - 1, "hub")


def test_unreadable_file(tmp_path: Path):
    with pytest.raises(CheckpointError, match="No such file"):
        read_header(tmp_path / "missing.safetensors")
    with pytest.raises(CheckpointError, match="Is a directory"):
        read_header(tmp_path)


def test_build_header_is_what_safetensors_writes(tmp_path: Path):
    """Same dtype and sorted names: the order that safetensors chooses itself, so the bytes are the same."""
    tensors = {name: torch.randn(size) for name, size in (("a", 3), ("b.ü", 5), ("c", 0))}
    path = tmp_path / "model.safetensors"
    for metadata in (None, {}, {"format": "pt"}):
        save_file(tensors, path, metadata)
        built = build_header([(name, "F32", tuple(t.shape)) for name, t in tensors.items()], metadata)
        assert built.raw == read_header(path).raw
        assert built.file_size == path.stat().st_size


def test_build_header_keeps_order_and_packs():
    header = build_header([("z", "U8", (3,)), ("a", "F32", ()), ("m", "BF16", (0, 2))], {"k": "v"})
    assert isinstance(header, Header)
    assert [(e.name, e.start, e.end) for e in header.tensors.values()] == [
        ("z", 0, 3),
        ("a", 3, 7),
        ("m", 7, 7),
    ]
    assert len(header.raw) % 8 == 0


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([("a", "F32", (1,)), ("a", "F32", (1,))], "'a' occurs twice"),
        ([("__metadata__", "F32", (1,))], "__metadata__"),
        ([("a", "F5", (1,))], "unknown dtype"),
        ([("a", "F4", (1,))], "within a byte"),
    ],
)
def test_build_header_refuses(entries: list, message: str):
    with pytest.raises(CheckpointError, match=message):
        build_header(entries, {"k": "v"})
