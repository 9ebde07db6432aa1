"""Level weights: what every tensor must hold, recomputed from the source, compared bit for bit.

Both checkpoints are streamed once, shard by shard; the sha256 of every folded shard is taken on the way. The
arithmetic is written plainly, apart from that of `rewrite.py`, so that a mistake there is seen here.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, one_thread_each
from flashnorm_cli.errors import CheckpointError
from flashnorm_cli.proof import contract
from flashnorm_cli.proof.blocks import BLOCK_BYTES, Block, ShardReader, blocks
from flashnorm_cli.proof.diagnose import diagnose
from flashnorm_cli.proof.difference import Difference
from flashnorm_cli.proof.figures import WeightsFigures
from flashnorm_cli.proof.pairing import DROPPED, Pair
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.proof.rotated import RotatedTensor

# Another tool may round the gain, and then the product: two units in the last place of the coarser dtype. A fold that
# carries our record has to hold the very bits.
FOREIGN_UNITS = 2.0
MAX_DIAGNOSED = 40

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class _Expected:
    """Where a tensor's values come from, and what happens to them.

    `factor` along `dim`, then a rotation along `rotated`; or `fill` everywhere.
    """

    origin: TensorEntry | None
    origin_shard: str
    dim: int = 0
    factor: torch.Tensor | None = None
    fill: float | None = None
    rotated: tuple[int, ...] = ()


@dataclass
class _Outcome:
    """What the streams leave behind."""

    differences: dict[str, Difference] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0


def check_weights(pair: Pair, workers: int, report: Progress) -> tuple[LevelResult, dict[str, str]]:
    """Compare every tensor and file of a folded checkpoint with what the source and the plan say.

    Returns the level's result (figures: `WeightsFigures`), and the sha256 of each folded shard.
    """
    expected = _expected(pair)
    findings = [*contract.check(pair), *pair.findings]
    comparable = []
    for name, want in expected.items():
        entry = pair.folded.tensors.get(name)
        if entry is None:
            findings.append(Finding(name, _why_missing(pair, name)))
        elif problem := _other_shape(pair, entry, want):
            findings.append(Finding(name, problem))
        else:
            comparable.append(name)
    for name in pair.folded.tensors:
        if name not in expected and pair.states.get(name) is None:
            findings.append(Finding(name, "is not in the source, and no fold adds it"))

    outcome = _stream(pair, {name: expected[name] for name in comparable}, workers, report)
    said = {finding.what for finding in findings}
    rounded: list[str] = []
    wrong: list[str] = []
    for name, difference in outcome.differences.items():
        is_product = expected[name].factor is not None  # what is only copied has nothing to round
        fine = pair.foreign and is_product and difference.largest <= FOREIGN_UNITS
        (rounded if fine else wrong).append(name)
    for i, name in enumerate(wrong):
        if name in said and name in pair.states:
            continue  # a norm that has been described already
        difference = outcome.differences[name]
        why = difference.words
        if not expected[name].rotated and i < MAX_DIAGNOSED:
            why = diagnose(pair, name, difference.largest)
        findings.append(Finding(name, _describe(pair.folded.tensors[name], difference, why), difference.error))
    notes = []
    if rounded:
        units = max(outcome.differences[name].largest for name in rounded)
        notes.append(
            f"{len(rounded)} tensors were rounded in another way than flashnorm rounds, by {units:.1f} units in the "
            "last place at most"
        )
    if pair.plan.rotation is not None:
        notes.append(
            f"the {len(pair.plan.rotation.tensors)} rotated tensors were recomputed in float64, and compared with what "
            "their dtype makes of that, give or take the noise of float32 sums"
        )
    if not pair.gains:
        notes.append("no norm is folded: every one keeps the source's weight")
    notes += contract.notes(pair)
    figures = WeightsFigures(
        tensors=len(expected),
        changed=sum(bool(w.factor is not None or w.fill is not None or w.rotated) for w in expected.values()),
        identical=len(comparable) - len(rounded) - len(wrong),
        rounded_otherwise=len(rounded),
        differing=len(expected) - len(comparable) + len(wrong),
        bytes_read=outcome.bytes_read,
        layout=pair.layout,
        folded=len(pair.gains),
        kept=len(pair.plan.norms) - len(pair.gains),
    )
    status = "failed" if findings else "passed"
    return LevelResult("weights", status, figures, tuple(findings), tuple(notes)), outcome.hashes


# ---- what must be there ----------------------------------------------------------------------------------------------


def _expected(pair: Pair) -> dict[str, _Expected]:
    """Every tensor that the folded checkpoint has to hold."""
    source = pair.source
    expected: dict[str, _Expected] = {}
    for name, entry in source.tensors.items():
        if name in pair.gains:
            if pair.states[name] != DROPPED:
                expected[name] = _Expected(None, "", fill=pair.norms[name].identity)
        elif name in pair.readers:
            reader = pair.readers[name]
            expected[name] = _Expected(entry, source.shard_of[name], reader.dim, pair.factor(reader))
        else:
            expected[name] = _Expected(entry, source.shard_of[name])
    for name in pair.expected_added:
        reader = pair.readers[name]
        origin = reader.values_from or name
        expected[name] = _Expected(source.tensors[origin], source.shard_of[origin], reader.dim, pair.factor(reader))
    if pair.plan.rotation is not None:
        turned = pair.plan.rotation.tensors
        expected.update({n: replace(expected[n], rotated=dims) for n, dims in turned.items() if n in expected})
    return expected


def _why_missing(pair: Pair, name: str) -> str:
    if name in pair.expected_added:
        norms = {run.norm for run in pair.readers[name].runs if run.norm}
        return (
            f"is missing: {', '.join(sorted(norms))} is folded, and its reader is tied to the embedding, so it needs "
            "weights of its own"
        )
    if name in pair.states:
        return "is left out, but it is no folded norm"
    return "is missing"


def _other_shape(pair: Pair, entry: TensorEntry, want: _Expected) -> str | None:
    name = entry.name
    shape, dtype = (
        (want.origin.shape, want.origin.dtype)
        if want.origin is not None
        else (pair.source.tensors[name].shape, pair.source.tensors[name].dtype)
    )
    if entry.shape != shape:
        return f"has shape {list(entry.shape)} instead of {list(shape)}"
    both_float = entry.dtype in TORCH_DTYPE and dtype in TORCH_DTYPE
    if entry.dtype != dtype and not (pair.foreign and both_float):
        return f"is stored as {entry.dtype} instead of {dtype}"
    return None


def _describe(entry: TensorEntry, difference: Difference, why: str) -> str:
    if difference.first is None:
        return why or "differs"
    flat, found, wanted = difference.first
    place = []
    for size in reversed(entry.shape):
        place.append(flat % size)
        flat //= size
    where = f"[{', '.join(str(p) for p in reversed(place))}]"
    total = math.prod(entry.shape)
    many = (
        f"{difference.values:,} of {total:,} values differ, the first at {where}: {found:.6g} instead of {wanted:.6g}"
    )
    return f"{why}; {many}" if why else many


# ---- streaming -------------------------------------------------------------------------------------------------------


def _stream(pair: Pair, expected: dict[str, _Expected], workers: int, report: Progress) -> _Outcome:
    outcome = _Outcome()
    total = sum(header.file_size for header in pair.folded.shards.values())
    lock = threading.Lock()
    stop = threading.Event()

    def on_bytes(folded: int, source: int) -> None:
        if stop.is_set():
            raise InterruptedError
        with lock:
            done[0] += folded
            outcome.bytes_read += folded + source
            report(done[0], total, "Comparing weights")

    done = [0]

    def work(shard: str) -> None:
        try:
            with _ShardStream(pair, shard, expected, on_bytes) as stream:
                differences, digest = stream.run()
            with lock:
                outcome.differences.update(differences)
                outcome.hashes[shard] = digest
        except BaseException:
            stop.set()
            raise

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:  # shards and hashing are the parallelism
        futures = [pool.submit(work, shard) for shard in pair.folded.shards]
        try:
            errors = [error for f in futures if (error := f.exception()) is not None]
        except BaseException:  # KeyboardInterrupt: leaving the pool waits for its threads
            stop.set()
            raise
    for error in sorted(errors, key=lambda e: isinstance(e, InterruptedError)):
        raise error
    order = {name: i for i, name in enumerate(pair.folded.tensors)}
    outcome.differences = dict(sorted(outcome.differences.items(), key=lambda item: order[item[0]]))
    return outcome


class _ShardStream:
    """One folded shard, read once from its first byte to its last: hashed, and compared with what it must hold."""

    def __init__(
        self, pair: Pair, shard: str, expected: dict[str, _Expected], on_bytes: Callable[[int, int], None]
    ) -> None:
        self.pair, self.shard, self.expected, self.on_bytes = pair, shard, expected, on_bytes
        self.digest = hashlib.sha256()
        self.hasher = ThreadPoolExecutor(1)
        self.folded = ShardReader(pair.folded, shard)
        self.sources: dict[str, ShardReader] = {}

    def __enter__(self) -> _ShardStream:
        return self

    def __exit__(self, *_: Any) -> None:
        self.hasher.shutdown(wait=True)
        for reader in (self.folded, *self.sources.values()):
            reader.close()

    def run(self) -> tuple[dict[str, Difference], str]:
        torch.set_flush_denormal(False)
        header = self.pair.folded.shards[self.shard]
        if self.folded.read(0, header.data_start) != header.raw:
            raise CheckpointError(f"{self.folded.path}: changed since its header was read")
        self.digest.update(header.raw)
        self.on_bytes(header.data_start, 0)
        differences = {}
        for entry in sorted(header.tensors.values(), key=lambda entry: entry.start):
            difference = Difference()
            want = self.expected.get(entry.name)
            if want is not None and want.rotated:
                self._compare_rotated(entry, want, difference)
                want = None  # what is left to do is to hash it
            for block in _blocks(entry, want):
                self._compare(entry, want, block, difference)
            if difference.values:
                differences[entry.name] = difference
        return differences, self.digest.hexdigest()

    def _compare_rotated(self, entry: TensorEntry, want: _Expected, difference: Difference) -> None:
        rotation = self.pair.plan.rotation
        if rotation is None or want.origin is None:
            return
        folded = entry, self.folded, self.pair.folded.shards[self.shard].data_start
        base = self.pair.source.shards[want.origin_shard].data_start
        source = want.origin, self._source(want.origin_shard), base
        scale = None if want.factor is None else (want.factor, want.dim)
        self.on_bytes(0, RotatedTensor(folded, source, rotation, want.rotated, scale).compare(difference))

    def _source(self, shard: str) -> ShardReader:
        if shard not in self.sources:
            self.sources[shard] = ShardReader(self.pair.source, shard)
        return self.sources[shard]

    def _compare(self, entry: TensorEntry, want: _Expected | None, block: Block, difference: Difference) -> None:
        """One block. The next one is only read when this one's hash is done: both would share the buffer."""
        size = 1 if block.bytes is not None else TORCH_DTYPE[entry.dtype].itemsize
        start, length = block.first * size, (block.bytes or block.elements) * size
        data = self.folded.view(self.pair.folded.shards[self.shard].data_start + entry.start + start, length)
        hashed = self.hasher.submit(self.digest.update, data)
        from_source = 0
        try:
            if want is not None:
                from_source = self._compare_values(entry, want, block, data, difference)
        finally:
            hashed.result()
        self.on_bytes(length, from_source)

    def _compare_values(
        self, entry: TensorEntry, want: _Expected, block: Block, data: memoryview, difference: Difference
    ) -> int:
        if want.origin is None:
            found = torch.frombuffer(data, dtype=TORCH_DTYPE[entry.dtype])
            expected = torch.full_like(found, want.fill or 0.0)
            _count(found, expected, block.first, difference)
            return 0
        reader = self._source(want.origin_shard)
        base = self.pair.source.shards[want.origin_shard].data_start + want.origin.start
        if block.bytes is not None:  # unscaled, of the same dtype: bytes
            source = reader.view(base + block.first, block.bytes)
            if _memcmp(_address(source), _address(data), block.bytes):
                _count_bytes(entry, source, data, block.first, difference)
            return block.bytes
        size = TORCH_DTYPE[want.origin.dtype].itemsize
        source = reader.view(base + block.first * size, block.elements * size)
        values = torch.frombuffer(source, dtype=TORCH_DTYPE[want.origin.dtype])
        double = want.origin.dtype == "F64" or (want.factor is not None and want.factor.dtype == torch.float64)
        wide = torch.float64 if double else torch.float32
        product = values.to(wide)
        if want.factor is not None:
            # (outer, channels, inner): the block holds whole channels of one or more outer slices.
            part = want.factor[block.channel : block.channel + block.shape[1]]
            product = product.view(block.shape).mul_(part.to(wide)[None, :, None]).flatten()
        found = torch.frombuffer(data, dtype=TORCH_DTYPE[entry.dtype])
        rounded = product.to(found.dtype)
        if _memcmp(rounded.data_ptr(), found.data_ptr(), rounded.nbytes):
            _count(found, rounded, block.first, difference, values.dtype)
        return len(source)


def _blocks(entry: TensorEntry, want: _Expected | None) -> Iterator[Block]:
    """Cut a tensor so that each block fits the buffers and one slice of the factor scales it."""
    same_dtype = want is None or want.origin is None or want.origin.dtype == entry.dtype
    if want is None or (want.factor is None and want.origin is not None and same_dtype):
        for first in range(0, entry.nbytes, BLOCK_BYTES):
            yield Block(first, bytes=min(BLOCK_BYTES, entry.nbytes - first))
        return
    dtypes = [entry.dtype] if want.origin is None else [entry.dtype, want.origin.dtype]
    limit = BLOCK_BYTES // max(TORCH_DTYPE[dtype].itemsize for dtype in dtypes)
    yield from blocks(entry.shape, None if want.factor is None else want.dim, limit)


def _address(view: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


def _count_bytes(entry: TensorEntry, source: memoryview, data: memoryview, first: int, difference: Difference) -> None:
    """Describe bytes that differ, as values where the dtype is a float."""
    dtype = TORCH_DTYPE.get(entry.dtype, torch.uint8)
    size = dtype.itemsize
    found, expected = torch.frombuffer(data, dtype=dtype), torch.frombuffer(source, dtype=dtype)
    _count(found, expected, first // size, difference)


def _count(
    found: torch.Tensor,
    expected: torch.Tensor,
    first: int,
    difference: Difference,
    source_dtype: torch.dtype | None = None,
) -> None:
    """Add up how one block differs. NaN equals NaN; zeros of either sign are different bits, but no error."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    same = (found.view(bits) == expected.view(bits)) | (found.isnan() & expected.isnan())
    a, b = found.double(), expected.double()
    difference.reference_squares += b.nan_to_num(posinf=0, neginf=0).square().sum().item()
    if bool(same.all()):
        return
    difference.values += int((~same).sum())
    if difference.first is None:
        at = int((~same).nonzero()[0])
        difference.first = first + at, a[at].item(), b[at].item()
    gap = (a - b).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    difference.squares += gap.square().sum().item()
    if found.dtype.is_floating_point:
        coarser = max((torch.finfo(d) for d in (found.dtype, source_dtype or found.dtype)), key=lambda info: info.eps)
        unit = torch.maximum(b.abs(), torch.tensor(coarser.tiny, dtype=torch.float64)).log2().floor().exp2()
        difference.largest = max(difference.largest, (gap / (unit * coarser.eps)).max().item())
    else:
        difference.largest = math.inf
