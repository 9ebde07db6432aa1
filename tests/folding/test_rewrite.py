"""The executor, against a float64 reference that shares no code with it. All inputs are new in every run."""

from __future__ import annotations

import errno
import math
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from flashnorm_cli.checkpoint.header import build_header, read_header
from flashnorm_cli.errors import CheckpointError, FlashNormError, GainOverflowError, PlanError
from flashnorm_cli.folding import rewrite
from flashnorm_cli.folding.edits import Fill, Scale
from flashnorm_cli.folding.rewrite import ShardJob, rewrite_shard

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# dtype: (bits of the significand, exponent of the smallest normal value, largest value)
FORMATS = {"BF16": (8, -126, (2 - 2**-7) * 2.0**127), "F16": (11, -14, 65504.0)}


# --- the reference: plain bytes and float64 -----------------------------------------------------------------


def to_float64(raw: bytes, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        with np.errstate(invalid="ignore"):  # signalling NaN
            return (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return np.frombuffer(raw, {"F16": "<f2", "F32": "<f4", "F64": "<f8"}[dtype]).astype(np.float64)


def round_to(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded once to `dtype`, to nearest even, still as float64."""
    with np.errstate(over="ignore"):
        if dtype not in FORMATS:
            return values.astype({"F32": np.float32, "F64": np.float64}[dtype]).astype(np.float64)
        bits, smallest, largest = FORMATS[dtype]
        _, exponent = np.frexp(values)
        quantum = np.exp2(np.maximum(exponent - 1, smallest) - (bits - 1.0))
        rounded = np.rint(values / quantum) * quantum
        return np.where(np.abs(rounded) > largest, np.copysign(np.inf, values), rounded)


def reference(raw: bytes, dtype: str, shape: tuple[int, ...], dim: int, gain: torch.Tensor) -> np.ndarray:
    along = [1] * len(shape)
    along[dim] = shape[dim]
    product = to_float64(raw, dtype).reshape(shape) * gain.double().numpy().reshape(along)  # exact
    return round_to(product if dtype == "F64" else round_to(product, "F32"), dtype).reshape(-1)


def random_bytes(dtype: str, shape: tuple[int, ...]) -> bytes:
    return (torch.randn(shape) * 0.1).to(DTYPES[dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()


def random_gain(length: int) -> torch.Tensor:
    return torch.rand(length) * 1.4 + 0.4


def write_file(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], bytes]]) -> ShardJob:
    header = build_header([(name, *tensor[:2]) for name, tensor in tensors.items()], {"format": "pt"})
    path.write_bytes(header.raw + b"".join(tensor[2] for tensor in tensors.values()))
    return ShardJob(path, path.with_suffix(".out"), read_header(path))


def edited(job: ShardJob, **changes: object) -> ShardJob:
    return ShardJob(job.source, job.target, job.header, **changes)  # type: ignore[arg-type]


def data_of(path: Path) -> dict[str, bytes]:
    header, raw = read_header(path), path.read_bytes()
    return {
        name: raw[header.data_start + entry.start : header.data_start + entry.end]
        for name, entry in header.tensors.items()
    }


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many borders in little data."""
    monkeypatch.setattr(rewrite, "CHUNK_BYTES", 4096)
    monkeypatch.setattr(rewrite, "RANGE_BYTES", 3 * 4096)


# --- values -------------------------------------------------------------------------------------------------

SHAPES = [
    ((37, 129), 1),  # a linear layer
    ((129, 37), 0),
    ((3, 5000), 1),  # rows longer than a chunk
    ((3, 5000), 0),
    ((4, 33, 70), 1),  # stacked experts, transposed
    ((4, 33, 70), 2),
    ((2, 3, 9001), 1),
    ((700, 1, 4), 0),  # a depthwise convolution
    ((6000,), 0),
    ((1, 1), 0),
    ((2049, 1), 1),
    ((5, 0, 3), 0),
    ((5, 0, 3), 1),
]


@pytest.mark.parametrize("exact_gain", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_scale_equals_float64(dtype: str, exact_gain: bool, tmp_path: Path):
    """Every shape, in one file whose elements straddle pages: the first tensor has an odd number of bytes."""
    tensors = {"odd": ("U8", (4099,), os.urandom(4099))}
    edits = {}
    for number, (shape, dim) in enumerate(SHAPES):
        gain = random_gain(shape[dim])
        edits[f"t{number}"] = Scale(dim, gain.to(DTYPES[dtype]).float() if exact_gain else gain)
        tensors[f"t{number}"] = (dtype, shape, random_bytes(dtype, shape))
        tensors[f"copied{number}"] = ("I16", (number,), os.urandom(2 * number))
    job = edited(write_file(tmp_path / "source", tensors), edits=edits)
    flushed = rewrite_shard(job, 3)
    assert flushed == dict.fromkeys(edits, 0)
    assert read_header(job.target).raw == job.header.raw
    after = data_of(job.target)
    for name, (_, shape, before) in tensors.items():
        if name in edits:
            expected = reference(before, dtype, shape, edits[name].dim, edits[name].gain)
            np.testing.assert_array_equal(to_float64(after[name], dtype), expected, err_msg=f"{name} {shape}")
        else:
            assert after[name] == before, name


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_chunk_borders_of_the_real_size(extra: int, tmp_path: Path):
    count = rewrite.RANGE_BYTES // 2 + extra
    tensors = {"w": ("BF16", (1, count), random_bytes("BF16", (count,)))}
    gain = random_gain(count)
    job = edited(write_file(tmp_path / "source", tensors), edits={"w": Scale(1, gain)})
    rewrite_shard(job, 2)
    expected = reference(tensors["w"][2], "BF16", (1, count), 1, gain)
    np.testing.assert_array_equal(to_float64(data_of(job.target)["w"], "BF16"), expected)


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("exact_gain", [True, False])
def test_all_bit_patterns(dtype: str, exact_gain: bool, tmp_path: Path):
    """Denormals, signed zeros, inf and NaN included; a row per gain, small gains flush."""
    gain = torch.cat(
        [torch.tensor([0.0, -0.0, 1.0, -1.0, 0.5, 0.75, 1e-3, 1e-7]), torch.randn(24), torch.rand(8) * 1e-5]
    )
    gain = gain.to(DTYPES[dtype]).float() if exact_gain else gain
    patterns = np.tile(np.arange(65536, dtype=np.uint16), (len(gain), 1))

    def multiply() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        before = to_float64(patterns.tobytes(), dtype).reshape(patterns.shape)
        with np.errstate(invalid="ignore"):
            exact = before * gain.double().numpy()[:, None]
            return before, exact, round_to(round_to(exact, "F32"), dtype)

    before, exact, product = multiply()
    patterns[np.isfinite(before) & np.isinf(product)] = 0  # overflow has its own test
    before, exact, product = multiply()
    if exact_gain:  # then rounding to float32 on the way changes nothing
        with np.errstate(invalid="ignore"):
            np.testing.assert_array_equal(round_to(exact, dtype), product)

    shape = patterns.shape
    job = write_file(tmp_path / "source", {"w": (dtype, shape, patterns.tobytes())})
    flushed = rewrite_shard(edited(job, edits={"w": Scale(0, gain)}), 2)
    result = to_float64(data_of(job.target)["w"], dtype).reshape(shape)
    np.testing.assert_array_equal(result, product)  # NaN equals NaN here
    kept_zero = (before == 0) | (gain.numpy() == 0)[:, None]
    assert flushed["w"] == np.count_nonzero((product == 0) & ~kept_zero) > 0
    assert (np.signbit(product) == np.signbit(result))[~np.isnan(product)].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("small_chunks")
def test_flushed_values_are_counted(dtype: str, tmp_path: Path):
    smallest = torch.finfo(DTYPES[dtype]).smallest_normal * torch.finfo(DTYPES[dtype]).eps
    shape = (300, 101)
    values = torch.randn(shape, dtype=torch.float64) * 6 * smallest
    values[torch.rand(shape) < 0.3] = 0
    raw = values.to(DTYPES[dtype]).reshape(-1).view(torch.uint8).numpy().tobytes()
    gain = torch.rand(101) * 0.7
    gain[::7] = 0
    job = write_file(tmp_path / "source", {"w": (dtype, shape, raw)})
    flushed = rewrite_shard(edited(job, edits={"w": Scale(1, gain)}), 2)
    expected = reference(raw, dtype, shape, 1, gain)
    np.testing.assert_array_equal(to_float64(data_of(job.target)["w"], dtype), expected)
    had_weight = to_float64(raw, dtype).reshape(shape) != 0
    assert flushed["w"] == np.count_nonzero(had_weight & (gain.numpy() != 0) & (expected.reshape(shape) == 0))
    assert flushed["w"] > 100


def test_gains_just_above_a_half_can_flush(tmp_path: Path):
    """Rounded to float32 it is a tie, and that goes to the even zero: the shortcut must not miss it."""
    raw = np.full(64, 1, np.uint16).tobytes()  # the smallest bf16
    job = write_file(tmp_path / "source", {"w": ("BF16", (64,), raw)})
    gain = torch.full((64,), 0.5).nextafter(torch.tensor(1.0))
    assert rewrite_shard(edited(job, edits={"w": Scale(0, gain)})) == {"w": 64}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.usefixtures("small_chunks")
def test_a_new_inf_stops_the_fold(dtype: str, sign: int, tmp_path: Path):
    values = torch.randn(9, 1000).to(DTYPES[dtype])
    values[7, 613] = sign * torch.finfo(DTYPES[dtype]).max
    raw = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    tensors = {"fine": ("F16", (4,), bytes(8)), "wide": (dtype, (9, 1000), raw)}
    job = write_file(tmp_path / "source", tensors)
    with pytest.raises(GainOverflowError, match="'wide'") as error:
        rewrite_shard(edited(job, edits={"wide": Scale(1, torch.full((1000,), 1.01))}))
    assert "\n" not in str(error.value)
    assert not job.target.exists()
    # the largest value itself is no overflow
    rewrite_shard(edited(job, edits={"wide": Scale(1, torch.ones(1000))}))
    assert data_of(job.target)["wide"] == raw


@pytest.mark.parametrize("dtype", DTYPES)
def test_inf_and_nan_of_the_source_are_carried_over(dtype: str, tmp_path: Path):
    values = torch.tensor([math.inf, -math.inf, math.nan, 1.0]).to(DTYPES[dtype])
    raw = values.view(torch.uint8).numpy().tobytes()
    job = write_file(tmp_path / "source", {"w": (dtype, (1, 4), raw)})
    assert rewrite_shard(edited(job, edits={"w": Scale(1, torch.full((4,), 3.0))})) == {"w": 0}
    result = to_float64(data_of(job.target)["w"], dtype)
    np.testing.assert_array_equal(result, [math.inf, -math.inf, math.nan, 3.0])


def test_denormals_survive_a_process_that_flushes_them(tmp_path: Path):
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        raw = np.arange(1, 128, dtype=np.uint16).tobytes()  # all positive bf16 denormals
        job = write_file(tmp_path / "source", {"w": ("BF16", (127,), raw)})
        rewrite_shard(edited(job, edits={"w": Scale(0, torch.full((127,), 2.0))}))
    finally:
        torch.set_flush_denormal(False)
    expected = np.arange(1, 128, dtype=np.uint16) * 2
    assert data_of(job.target)["w"] == expected.astype(np.uint16).tobytes()


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.usefixtures("small_chunks")
def test_fill(value: float, tmp_path: Path):
    shapes = {"BF16": (4099,), "F16": (3, 3), "F32": (), "F64": (0,)}
    tensors = {dtype: (dtype, shape, random_bytes(dtype, shape)) for dtype, shape in shapes.items()}
    tensors["other"] = ("BF16", (5,), random_bytes("BF16", (5,)))
    job = edited(write_file(tmp_path / "source", tensors), edits=dict.fromkeys(shapes, Fill(value)))
    assert rewrite_shard(job) == {}
    with safe_open(job.target, "pt") as file:
        for dtype, shape in shapes.items():
            filled = file.get_tensor(dtype)
            assert filled.dtype == DTYPES[dtype]
            assert torch.equal(filled, torch.full(shape, value, dtype=DTYPES[dtype]))
    assert data_of(job.target)["other"] == tensors["other"][2]


# --- layout -------------------------------------------------------------------------------------------------


def test_a_header_is_copied_as_it_is(tmp_path: Path):
    """Spaces, and JSON in another order than the data."""
    text = (
        b'{ "b": {"shape": [2], "dtype":"F32","data_offsets":[4, 12]},\n'
        b'"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}   '
    )
    raw = len(text).to_bytes(8, "little") + text
    source = tmp_path / "source"
    source.write_bytes(raw + np.array([1, 2], "<f2").tobytes() + np.array([3, 4], "<f4").tobytes())
    job = ShardJob(source, tmp_path / "out", read_header(source), {"b": Scale(0, torch.tensor([2.0, 3.0]))})
    rewrite_shard(job)
    assert job.target.read_bytes()[: len(raw)] == raw
    with safe_open(job.target, "pt") as file:
        assert file.get_tensor("a").tolist() == [1, 2]
        assert file.get_tensor("b").tolist() == [6, 12]


@pytest.mark.usefixtures("small_chunks")
def test_drop_and_add(tmp_path: Path):
    """An untied head comes from the embedding of another shard; dropped norms leave no hole."""
    shape = (501, 33)
    other = write_file(
        tmp_path / "other",
        {"x": ("U8", (3,), b"xyz"), "embed": ("BF16", shape, random_bytes("BF16", shape))},
    )
    tensors = {
        "a": ("BF16", (7, 9), random_bytes("BF16", (7, 9))),
        "norm": ("BF16", (9,), random_bytes("BF16", (9,))),
        "b": ("U8", (5000,), os.urandom(5000)),
        "c": ("F32", (9, 7), random_bytes("F32", (9, 7))),
    }
    job = write_file(tmp_path / "source", tensors)
    gain, head_gain = random_gain(9), random_gain(33)
    head = Scale(1, head_gain, (other.source, other.header, "embed"))
    job = edited(job, edits={"c": Scale(0, gain)}, drop=frozenset({"norm"}), add={"lm_head": ("BF16", shape, head)})
    assert rewrite_shard(job, 2) == {"c": 0, "lm_head": 0}
    assert job.target.stat().st_size == job.target_header().file_size
    header, after = read_header(job.target), data_of(job.target)
    assert header.raw == job.target_header().raw
    assert header.metadata == {"format": "pt"}
    assert list(header.tensors) == ["a", "b", "c", "lm_head"]
    assert (after["a"], after["b"]) == (tensors["a"][2], tensors["b"][2])
    np.testing.assert_array_equal(to_float64(after["c"], "F32"), reference(tensors["c"][2], "F32", (9, 7), 0, gain))
    embedding = data_of(other.source)["embed"]
    np.testing.assert_array_equal(
        to_float64(after["lm_head"], "BF16"), reference(embedding, "BF16", shape, 1, head_gain)
    )
    with safe_open(job.target, "pt") as file:
        assert file.get_tensor("lm_head").shape == shape


def test_progress_adds_up(tmp_path: Path, small_chunks: None):
    tensors = {"w": ("F32", (90, 90), random_bytes("F32", (90, 90))), "x": ("I8", (70_001,), bytes(70_001))}
    job = edited(write_file(tmp_path / "source", tensors), edits={"w": Scale(1, random_gain(90))})
    reported: list[int] = []
    rewrite_shard(job, 3, reported.append, fsync=False)
    assert sum(reported) == job.target.stat().st_size
    assert len(reported) > 5


def test_torch_threads_are_restored(tmp_path: Path):
    job = write_file(tmp_path / "source", {"w": ("F32", (8,), bytes(32))})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rewrite_shard(job)
        assert torch.get_num_threads() == 2
        job.source.write_bytes(b"")
        with pytest.raises(CheckpointError):
            rewrite_shard(ShardJob(job.source, tmp_path / "two", job.header))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# --- the system underneath ----------------------------------------------------------------------------------


def copy_file_range_fails(code: int) -> Callable[..., int]:
    def fail(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("fault", ["EXDEV", "ENOSYS", "EINVAL", "EOPNOTSUPP", "missing", "end of file", "short"])
@pytest.mark.usefixtures("small_chunks")
def test_copies_without_copy_file_range(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = {"a": ("U8", (50_001,), os.urandom(50_001)), "b": ("I32", (7,), os.urandom(28))}
    job = write_file(tmp_path / "source", tensors)
    real = getattr(os, "copy_file_range", None)
    if fault == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    elif fault == "end of file":
        monkeypatch.setattr(os, "copy_file_range", lambda *args: 0, raising=False)
    elif fault == "short":
        if real is None:
            pytest.skip("no copy_file_range here")
        calls = []

        def short(source: int, target: int, count: int, at: int, to: int) -> int:
            calls.append(count)
            if len(calls) % 3 == 0:
                raise OSError(errno.EXDEV, "in the middle")
            return real(source, target, min(count, 1001), at, to)

        monkeypatch.setattr(os, "copy_file_range", short)
    else:
        fail = copy_file_range_fails(getattr(errno, fault))
        monkeypatch.setattr(os, "copy_file_range", fail, raising=False)
    rewrite_shard(job)
    assert job.target.read_bytes() == job.source.read_bytes()


@pytest.mark.usefixtures("small_chunks")
def test_short_reads_and_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: read(fd, [buffers[0][:777]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: write(fd, data[:555], at))
    monkeypatch.setattr(os, "copy_file_range", lambda *args: 0, raising=False)
    tensors = {
        "w": ("BF16", (99, 101), random_bytes("BF16", (99, 101))),
        "b": ("U8", (9001,), os.urandom(9001)),
    }
    job = edited(write_file(tmp_path / "source", tensors), edits={"w": Scale(1, random_gain(101))})
    rewrite_shard(job)
    monkeypatch.undo()
    after = data_of(job.target)
    expected = reference(tensors["w"][2], "BF16", (99, 101), 1, job.edits["w"].gain)  # type: ignore[union-attr]
    np.testing.assert_array_equal(to_float64(after["w"], "BF16"), expected)
    assert after["b"] == tensors["b"][2]


@pytest.mark.parametrize("call", ["pwrite", "copy_file_range", "fsync"])
def test_disk_full(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = {"w": ("F32", (64,), random_bytes("F32", (64,))), "x": ("F32", (64,), bytes(256))}
    job = edited(write_file(tmp_path / "source", tensors), edits={"w": Scale(0, random_gain(64))})

    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full, raising=False)
    with pytest.raises(FlashNormError, match="No space left on device") as error:
        rewrite_shard(job)
    assert str(job.target) in str(error.value)
    assert not job.target.exists()


def test_file_too_large_is_told_before_anything_is_written(tmp_path: Path):
    job = write_file(tmp_path / "source", {"x": ("U8", (100_000,), bytes(100_000))})
    reported: list[int] = []
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(FlashNormError, match="File too large"):
            rewrite_shard(job, on_bytes=reported.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not reported
    assert not job.target.exists()


def test_unreadable_source_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    job = write_file(tmp_path / "source", {"w": ("F32", (64,), bytes(256))})
    real = os.preadv

    def broken(fd: int, buffers: list[memoryview], at: int) -> int:
        if at >= job.header.data_start:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, at)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="source: Input/output error"):
        rewrite_shard(edited(job, edits={"w": Scale(0, random_gain(64))}))
    assert not job.target.exists()


def test_target_is_never_replaced_or_followed(tmp_path: Path):
    job = write_file(tmp_path / "source", {"w": ("F32", (64,), random_bytes("F32", (64,)))})
    before = job.source.read_bytes()
    job.target.symlink_to(job.source)  # as in the Hub's cache
    with pytest.raises(FlashNormError, match="File exists"):
        rewrite_shard(job)
    assert job.target.is_symlink()
    job.target.unlink()
    job.target.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FlashNormError, match="File exists"):
        rewrite_shard(job)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(FlashNormError, match="File exists"):
        rewrite_shard(ShardJob(job.source, job.source, job.header))
    assert job.source.read_bytes() == before


@pytest.mark.parametrize(("before", "after"), [(0o600, 0o600), (0o644, 0o640), (0o666, 0o640), (0o4755, 0o750)])
def test_source_may_be_a_symlink_and_the_target_is_a_plain_file(tmp_path: Path, before: int, after: int):
    """With the source's permissions, less the umask, as cp gives them."""
    job = write_file(tmp_path / "blob", {"w": ("F32", (64,), random_bytes("F32", (64,)))})
    job.source.chmod(before)
    link = tmp_path / "link"
    link.symlink_to(job.source)
    umask = os.umask(0o027)
    try:
        rewrite_shard(ShardJob(link, job.target, job.header))
    finally:
        os.umask(umask)
    status = job.target.lstat()
    assert stat.S_ISREG(status.st_mode)
    assert stat.S_IMODE(status.st_mode) == after
    assert job.target.read_bytes() == job.source.read_bytes()


@pytest.mark.parametrize("when", ["before", "underway", "underway to shorter", "only the data before"])
def test_a_source_that_changes_is_noticed(when: str, tmp_path: Path):
    tensors = {"w": ("F32", (64,), random_bytes("F32", (64,)))}
    job = edited(write_file(tmp_path / "source", tensors), edits={"w": Scale(0, random_gain(64))})
    if when == "before":
        job.source.write_bytes(job.source.read_bytes() + b" ")
    if when == "only the data before":
        job.source.write_bytes(job.source.read_bytes().replace(b'"F32"', b'"I32"'))

    def change(done: int) -> None:
        if when == "underway":
            os.utime(job.source, ns=(0, 12345))
        if when == "underway to shorter":
            os.truncate(job.source, job.source.stat().st_size - 1)

    with pytest.raises(CheckpointError, match=r"source: (changed|truncated)"):
        rewrite_shard(job, on_bytes=change)
    assert not job.target.exists()


def test_interrupt_removes_the_target(tmp_path: Path, small_chunks: None):
    job = write_file(tmp_path / "source", {"x": ("U8", (100_000,), bytes(100_000))})
    calls = []

    def interrupt(done: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rewrite_shard(job, 2, interrupt)
    assert not job.target.exists()
    assert len(calls) <= 5  # of 10: the other thread stops too


# --- jobs that do not fit -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"edits": {"nope": Fill(1.0)}}, "no tensor 'nope'"),
        ({"drop": frozenset({"nope"})}, "no tensor 'nope'"),
        (
            {"edits": {"w": Scale(1, torch.ones(4))}},
            r"'w': .*shape \[4\] does not fit dimension 1 of \[4, 6\]",
        ),
        ({"edits": {"w": Scale(2, torch.ones(6))}}, "does not fit"),
        ({"edits": {"w": Scale(-1, torch.ones(6))}}, "does not fit"),
        ({"edits": {"w": Scale(1, torch.ones(1, 6))}}, "does not fit"),
        ({"edits": {"w": Scale(1, torch.ones(6).bfloat16())}}, "bfloat16 gain"),
        ({"edits": {"w": Scale(1, torch.tensor([1, 1, 1, 1, 1, math.nan]))}}, "'w': its gain holds NaN"),
        ({"edits": {"q": Scale(0, torch.ones(8))}}, "'q': U8 cannot take a gain"),
        ({"edits": {"q": Fill(1.0)}}, "'q': U8 cannot be filled"),
        ({"add": {"new": ("F32", (4, 6), Scale(1, torch.ones(6)))}}, "no F32 .* 'new'"),
    ],
)
def test_refuses_a_job_that_does_not_fit(changes: dict, message: str, tmp_path: Path):
    job = write_file(tmp_path / "source", {"w": ("F32", (4, 6), bytes(96)), "q": ("U8", (8,), bytes(8))})
    with pytest.raises(PlanError, match=message):
        rewrite_shard(edited(job, **changes))
    assert not job.target.exists()


def test_refuses_an_origin_that_does_not_fit(tmp_path: Path):
    job = write_file(tmp_path / "source", {"w": ("F32", (4, 6), bytes(96))})
    head = Scale(1, torch.ones(6), (job.source, job.header, "w"))
    for dtype, shape in (("BF16", (4, 6)), ("F32", (6, 4))):
        with pytest.raises(PlanError, match="'w' to scale"):
            rewrite_shard(edited(job, add={"new": (dtype, shape, head)}))
    with pytest.raises(CheckpointError, match="'w' occurs twice"):
        rewrite_shard(edited(job, add={"w": ("F32", (4, 6), head)}))
    with pytest.raises(CheckpointError, match="missing: No such file"):
        gone = Scale(1, torch.ones(6), (tmp_path / "missing", job.header, "w"))
        rewrite_shard(edited(job, add={"new": ("F32", (4, 6), gone)}))
