"""Level weights for a rotated tensor: panels of whole vectors, read from both checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.plan.model import PlannedRotation
from flashnorm_cli.proof.blocks import ShardReader
from flashnorm_cli.proof.difference import Difference
from flashnorm_cli.proof.rotation import noise, rotated

PANEL_ELEMENTS = 2**20


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
            read += before.numel() * TORCH_DTYPE[self.source[0].dtype].itemsize
            if self.scale is not None:
                before = before * self._factor(*self.scale, outer, inner)
            full = (outer[1] - outer[0], *self.shape[self.dims[0] :])
            if inner != (0, self.right):
                full = tuple(before.shape)
            dims = tuple(dim - self.dims[0] + 1 for dim in self.dims)
            before = before.reshape(full)
            wanted = rotated(self.rotation, before, dims)
            allowed = noise(self.rotation, before, dims).expand(full)
            untouched = untouched and bool((found.reshape(full) - before).norm() <= 1e-2 * before.norm())
            self._add(difference, found.reshape(full), wanted, allowed, outer, inner)
        if difference.values and untouched:
            difference.words = "it is not rotated"
        return read

    def _panels(self) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        """Ranges of what lies before and behind the first dimension that is rotated."""
        n = self.rotation.size
        together = len(self.dims) > 1 or n * self.right <= PANEL_ELEMENTS
        rows = max(PANEL_ELEMENTS // max(n * self.right, 1), 1) if together else 1
        columns = self.right if together else max(PANEL_ELEMENTS // n, 2048)
        for o in range(0, self.left, rows):
            for i in range(0, self.right, max(columns, 1)):
                yield (o, min(o + rows, self.left)), (i, min(i + columns, self.right))

    def _read(
        self, where: tuple[TensorEntry, ShardReader, int], outer: tuple[int, int], inner: tuple[int, int]
    ) -> torch.Tensor:
        """A panel as float64 of shape (outer, channels, inner)."""
        entry, reader, base = where
        dtype, n, width = TORCH_DTYPE[entry.dtype], self.rotation.size, inner[1] - inner[0]
        start, size = base + entry.start, dtype.itemsize
        if width == self.right:
            rows = (outer[1] - outer[0]) * n
            data = reader.read(start + outer[0] * n * width * size, rows * width * size)
        else:
            first = [start + (row * self.right + inner[0]) * size for row in range(outer[0] * n, outer[1] * n)]
            data = b"".join(reader.read(offset, width * size) for offset in first)
        return torch.frombuffer(bytearray(data), dtype=dtype).view(-1, n, width).double()

    def _factor(self, gain: torch.Tensor, dim: int, outer: tuple[int, int], inner: tuple[int, int]) -> torch.Tensor:
        """The gain of each place of a panel: the channel that a flat index lies in, by plain division."""

        behind = math.prod(self.shape[dim + 1 :])
        rows = torch.arange(outer[0], outer[1])[:, None, None] * self.rotation.size
        flat = (rows + torch.arange(self.rotation.size)[None, :, None]) * self.right
        flat = flat + torch.arange(inner[0], inner[1])
        return gain.double()[flat // behind % len(gain)]

    def _add(
        self,
        difference: Difference,
        found: torch.Tensor,
        wanted: torch.Tensor,
        allowed: torch.Tensor,
        outer: tuple[int, int],
        inner: tuple[int, int],
    ) -> None:
        info = torch.finfo(TORCH_DTYPE[self.folded[0].dtype])
        if info.dtype == "float64":
            allowed = allowed * 2.0**-29
        largest = torch.maximum(wanted.abs() + allowed, torch.tensor(info.tiny, dtype=torch.float64))
        unit = largest.log2().floor().exp2() * info.eps
        gap = (found - wanted).abs()
        wrong = ~(gap <= unit / 2 + allowed)  # NaN too
        difference.reference_squares += wanted.square().sum().item()
        if not bool(wrong.any()):
            return
        difference.values += int(wrong.sum())
        gap = gap.masked_fill(~wrong, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
        difference.squares += gap.square().sum().item()
        difference.largest = max(difference.largest, (gap / unit).max().item())
        if difference.first is None:
            at = int(wrong.flatten().nonzero()[0])
            width = inner[1] - inner[0]
            flat = (outer[0] * self.rotation.size + at // width) * self.right + inner[0] + at % width
            difference.first = flat, found.flatten()[at].item(), wanted.flatten()[at].item()
