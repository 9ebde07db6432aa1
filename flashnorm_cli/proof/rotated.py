"""Level weights for a rotated tensor: panels of whole vectors, read from both checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.plan.model import PlannedRotation
from flashnorm_cli.proof.blocks import ShardReader
from flashnorm_cli.proof.difference import Difference
from flashnorm_cli.proof.rotation import noise, rotated

PANEL_BYTES = 2**22  # of each checkpoint that a thread holds at a time
BLOCK_ELEMENTS = 2**18  # that are multiplied at a time: smaller ones make threads wait for the interpreter
BLOCK_COLUMNS, ROW_BYTES = 64, 8192  # at the least: torch is slow at short loops, and the system at short reads


class RotatedTensor:
    """A tensor of the folded checkpoint, and where its values come from.

    Args:
        entry, reader, base: the folded tensor, its shard, and where the shard's data begin.
        origin, origin_reader, origin_base: the same of the source.
        scale: what the source is multiplied by before it is rotated, along a dimension; None for nothing.
        dims: along which it is rotated.
    """

    def __init__(
        self,
        folded: tuple[TensorEntry, ShardReader, int],
        source: tuple[TensorEntry, ShardReader, int],
        rotation: PlannedRotation,
        dims: tuple[int, ...],
        scale: tuple[torch.Tensor, int] | None,
    ) -> None:
        self.folded, self.source, self.rotation, self.dims, self.scale = folded, source, rotation, dims, scale
        self.shape = folded[0].shape
        self.left = math.prod(self.shape[: dims[0]])
        self.right = math.prod(self.shape[dims[0] + 1 :])

    def compare(self, difference: Difference) -> int:
        """Add up how it differs from what it must hold; returns the bytes that were read of the source."""
        untouched, read = True, 0
        for outer, inner in self._panels():
            found, before = self._read(self.folded, outer, inner), self._read(self.source, outer, inner)
            read += before.nbytes
            for rows, columns in self._blocks(*found.shape):
                o, i = (range(start, stop)[part] for (start, stop), part in ((outer, rows), (inner, columns)))
                untouched &= self._compare(difference, found[rows, :, columns], before[rows, :, columns], o, i)
            del found, before  # for the next ones
        if untouched and difference.values > math.prod(self.shape) / 2:
            difference.words = "it is not rotated"
        return read

    def _panels(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Ranges of what lies before and behind the first dimension that is rotated."""
        size = max(TORCH_DTYPE[entry.dtype].itemsize for entry in (self.folded[0], self.source[0]))
        one = max(self.rotation.size * self.right * size, 1)
        together = len(self.dims) > 1 or one <= PANEL_BYTES
        rows = max(PANEL_BYTES // one, 1) if together else 1
        columns = self.right if together else max(PANEL_BYTES // self.rotation.size, ROW_BYTES) // size
        for o in range(0, self.left, rows):
            for i in range(0, self.right, max(columns, 1)):
                yield (o, min(o + rows, self.left)), (i, min(i + columns, self.right))

    def _blocks(self, outer: int, channels: int, inner: int) -> Iterator[tuple[slice, slice]]:
        columns = inner if len(self.dims) > 1 else max(BLOCK_ELEMENTS // channels, BLOCK_COLUMNS)
        rows = max(BLOCK_ELEMENTS // (channels * inner), 1)
        for o in range(0, outer, rows):
            for i in range(0, inner, columns):
                yield slice(o, o + rows), slice(i, i + columns)

    def _read(
        self, where: tuple[TensorEntry, ShardReader, int], outer: tuple[int, int], inner: tuple[int, int]
    ) -> torch.Tensor:
        """A panel in its own dtype, of shape (outer, channels, inner)."""
        entry, reader, base = where
        dtype, n, width = TORCH_DTYPE[entry.dtype], self.rotation.size, inner[1] - inner[0]
        start, size = base + entry.start, dtype.itemsize
        data = bytearray((outer[1] - outer[0]) * n * width * size)
        first = start + (outer[0] * n * self.right + inner[0]) * size
        if width == self.right:
            reader.read_into(memoryview(data), first)
        else:
            reader.read_rows(memoryview(data), first, width * size, self.right * size)
        return torch.frombuffer(data, dtype=dtype).view(-1, n, width)

    def _factor(self, gain: torch.Tensor, dim: int, outer: range, inner: range) -> torch.Tensor:
        """The gain of each place of a block, to be broadcast to it: the channel that its place before or behind is."""
        first, gain = self.dims[0], gain.double()
        if dim == first:
            return gain[:, None]
        if dim > first:
            return gain[torch.tensor(inner) // math.prod(self.shape[dim + 1 :]) % len(gain)]
        return gain[torch.tensor(outer) // math.prod(self.shape[dim + 1 : first]) % len(gain)][:, None, None]

    def _compare(
        self, difference: Difference, found: torch.Tensor, source: torch.Tensor, outer: range, inner: range
    ) -> bool:
        """One block. Returns whether it looks as if it were not rotated, if it is wrong."""
        before = source.to(torch.float64, copy=True)
        if self.scale is not None:
            before.mul_(self._factor(*self.scale, outer, inner))
        # A rotation keeps lengths, so this is the square of what is wanted, too; of all blocks, right ones as well.
        difference.reference_squares += torch.linalg.vector_norm(before).square().item()
        full = before.shape if len(self.dims) == 1 else (len(outer), *self.shape[self.dims[0] :])
        dims = tuple(dim - self.dims[0] + 1 for dim in self.dims)
        wanted = rotated(self.rotation, before.view(full), dims).view(before.shape)
        # Nearly all are the product as the dtype rounds it; the others are looked at one by one.
        at = _different(found, wanted.to(found.dtype))
        if not len(at):
            return True
        allowed = noise(self.rotation, before.view(full), dims).expand(full).reshape(before.shape)
        flat = found.flatten(), wanted.flatten(), allowed.flatten()
        at = at[~((flat[0][at].double() - flat[1][at]).abs() <= flat[2][at])]  # NaN too
        some = flat[0][at].double(), flat[1][at], flat[2][at]
        wrong, units = _wrong(found.dtype, *some)
        if not bool(wrong.any()):
            return True
        difference.values += int(wrong.sum())
        gap = (some[0] - some[1]).abs()[wrong].nan_to_num(nan=math.inf, posinf=math.inf)
        difference.squares += gap.square().sum().item()
        difference.largest = max(difference.largest, (gap / units[wrong]).max().item())
        if difference.first is None:
            first = int(wrong.nonzero()[0])
            row, column = divmod(int(at[first]), len(inner))
            place = (outer[0] * self.rotation.size + row) * self.right + inner[column]
            difference.first = place, some[0][first].item(), some[1][first].item()
        return bool((found.double() - before).norm() <= 1e-2 * before.norm())


def _different(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Flat indices of values with other bits. They are few: numpy looks at eight bytes at a time, and is fast."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    other = (a.contiguous().view(bits) ^ b.contiguous().view(bits)).numpy().ravel()
    each = 8 // a.itemsize
    whole = len(other) // each * each
    words = np.flatnonzero(other[:whole].view(np.int64))[:, None] * each + np.arange(each)
    at = np.concatenate([words.ravel(), np.arange(whole, len(other))])
    return torch.from_numpy(at[other[at] != 0])


def _wrong(
    dtype: torch.dtype, found: torch.Tensor, wanted: torch.Tensor, allowed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which values are further from the float64 product than noise and one rounding; the units in the last place."""
    info = torch.finfo(dtype)
    if dtype == torch.float64:
        allowed = allowed * 2.0**-29
    largest = torch.maximum(wanted.abs() + allowed, torch.tensor(info.tiny, dtype=torch.float64))
    unit = largest.log2().floor().exp2() * info.eps
    return ~((found - wanted).abs() <= unit / 2 + allowed), unit  # NaN too
