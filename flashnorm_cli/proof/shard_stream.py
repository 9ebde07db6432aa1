"""One folded shard, read once: hashed, and every tensor in it compared with what it must hold.

The arithmetic is written plainly, apart from that of `rewrite.py`, so that a mistake there is seen here.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.errors import CheckpointError
from flashnorm_cli.proof.blocks import BLOCK_BYTES, Block, ShardReader, blocks
from flashnorm_cli.proof.difference import Difference
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.rotated import RotatedTensor

_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


@dataclass(frozen=True)
class Expected:
    """Where a tensor's values come from, and what happens to them.

    `factor` along `dim`, then a rotation along `rotated`; or `fill` everywhere.
    """

    origin: TensorEntry | None
    origin_shard: str
    dim: int = 0
    factor: torch.Tensor | None = None
    fill: float | None = None
    rotated: tuple[int, ...] = ()


class ShardStream:
    """One folded shard, read once from its first byte to its last: hashed, and compared with what it must hold."""

    def __init__(
        self, pair: Pair, shard: str, expected: dict[str, Expected], on_bytes: Callable[[int, int], None]
    ) -> None:
        self.pair, self.shard, self.expected, self.on_bytes = pair, shard, expected, on_bytes
        self.digest = hashlib.sha256()
        self.hasher = ThreadPoolExecutor(1)
        self.folded = ShardReader(pair.folded, shard)
        self.sources: dict[str, ShardReader] = {}

    def __enter__(self) -> ShardStream:
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

    def _compare_rotated(self, entry: TensorEntry, want: Expected, difference: Difference) -> None:
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

    def _compare(self, entry: TensorEntry, want: Expected | None, block: Block, difference: Difference) -> None:
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
        self, entry: TensorEntry, want: Expected, block: Block, data: memoryview, difference: Difference
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


def _blocks(entry: TensorEntry, want: Expected | None) -> Iterator[Block]:
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
