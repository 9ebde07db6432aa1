"""Rotate tensors on their way from shard to shard: panels that hold whole vectors, rounded once.

A tensor is seen as (outer, channels, inner) around the dimension that is rotated. A panel is some of `outer` as a
whole, which lies in one piece on disk, or, where one alone is too large, some of `inner`, which is read and written
row by row: a memory map would be shorter, and would kill the process where a file is cut off underneath.

What makes it fast, in CPU time per value, where reading and writing bf16 take 0.6 ns: a panel is multiplied in blocks
that stay in a cache and are large enough that threads do not wait for the interpreter, through buffers that each thread
keeps (fresh ones fault on every page). A Hadamard matrix of order 2048 is three passes of small matrix products, 1.0 ns
(matrices of 64 and 32: 1.3 ns); widening with gain and signs, rounding, and looking for zeros and inf take 0.5 ns. Rows
of 4 kB cost twice as much to read and write as whole tensors do, where they do not begin with a page three times.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.errors import CheckpointError, GainOverflowError, PlanError
from flashnorm_cli.folding.edits import INTEGERS, Rotate, any_zero_or_inf
from flashnorm_cli.folding.shard_files import SourceFile, read_into, write_at

BLOCK_ELEMENTS = 2**19  # that are multiplied at a time: smaller ones make threads wait for the interpreter
BLOCK_COLUMNS = 64  # at the least, of a block that is a part of `inner`: torch is slow at short loops
PANEL_BYTES = 2**26  # that all threads hold at a time
PAGE = 4096  # bytes of a panel's rows, at the least


class Rotating:
    """One tensor's rotation, ready to be applied to its panels. `flushed` counts values that became zero."""

    changed = "rotated"

    def __init__(self, entry: TensorEntry, edit: Rotate) -> None:
        self.name, self.dtype_name, self.shape = entry.name, entry.dtype, entry.shape
        self.flushed, self.elements = 0, math.prod(entry.shape)
        self.rotation, self.dims, self.scale = edit.rotation, tuple(sorted(edit.dims)), edit.scale
        if entry.dtype not in TORCH_DTYPE:
            raise PlanError(f"tensor {entry.name!r}: {entry.dtype} cannot be rotated")
        size, number = self.rotation.size, len(entry.shape)
        if not self.dims or any(not 0 <= dim < number or entry.shape[dim] != size for dim in self.dims):
            raise PlanError(f"tensor {entry.name!r}: {list(self.dims)} of {list(entry.shape)} are not {size} channels")
        gain = self.scale.gain if self.scale else None
        if self.scale and gain is not None:
            fits = 0 <= self.scale.dim < number and gain.shape == (entry.shape[self.scale.dim],)
            if not fits or not gain.isfinite().all():
                raise PlanError(f"tensor {entry.name!r}: its gain does not fit, or is not finite")
        self.outer, self.inner = (
            math.prod(part) for part in (self.shape[: self.dims[0]], self.shape[self.dims[0] + 1 :])
        )
        self.dtype = TORCH_DTYPE[entry.dtype]
        self.itemsize = self.dtype.itemsize
        double = self.dtype == torch.float64 or (gain is not None and gain.dtype == torch.float64)
        self.wide = torch.float64 if double else torch.float32

    @property
    def cell(self) -> int:
        """Whole pages of a row that a panel takes all of, or nothing: about as many as a block takes, if not one."""
        pages = PAGE // self.itemsize
        return max(BLOCK_ELEMENTS // self.rotation.size // pages, 1) * pages

    @property
    def gain(self) -> torch.Tensor | None:
        """The gain of each channel along the first dimension that is rotated, if that is where the gain lies."""
        here = self.scale is not None and self.scale.dim == self.dims[0]
        return self.scale.gain.to(self.wide) if self.scale and here else None

    def factor(self, outer: tuple[int, int], inner: tuple[int, int]) -> torch.Tensor | None:
        """A gain along another dimension, for a part of the tensor: broadcasts to its (outer, channels, inner)."""
        if self.scale is None or self.scale.dim == self.dims[0]:
            return None
        at, dim, gain = self.scale.dim, self.dims[0], self.scale.gain.to(self.wide)
        if at > dim:
            columns = torch.arange(inner[0], inner[1])
            return gain[columns // math.prod(self.shape[at + 1 :]) % len(gain)][None, None, :]
        rows = torch.arange(outer[0], outer[1])
        return gain[rows // math.prod(self.shape[at + 1 : dim]) % len(gain)][:, None, None]


@dataclass(frozen=True)
class Panel:
    """A part of a tensor: `outer` and `inner` are ranges around its first dimension that is rotated.

    Offsets are those of the whole tensor in its files, in bytes.
    """

    rotating: Rotating
    source: SourceFile
    source_offset: int
    target_offset: int
    outer: tuple[int, int]
    inner: tuple[int, int]
    into: int  # elements of a page that lie before the tensor's first one, where all of its rows begin alike

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer[1] - self.outer[0], self.rotating.rotation.size, self.inner[1] - self.inner[0]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.rotating.itemsize

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where it lies, from the start of the tensor: (offset, length) in bytes, in order."""
        _, channels, inner = self.shape
        whole, itemsize = self.rotating.inner, self.rotating.itemsize
        if inner == whole:
            yield self.outer[0] * channels * whole * itemsize, self.length
            return
        for row in range(self.outer[0] * channels, self.outer[1] * channels):
            yield (row * whole + self.inner[0]) * itemsize, inner * itemsize

    def blocks(self) -> Iterator[tuple[slice, slice]]:
        """Parts of it that are multiplied at a time. Along several dimensions, whole vectors of each are needed.

        They are the same however a tensor is cut into panels: another number of columns may be summed in another order.
        """
        outer, channels, inner = self.shape
        cuts = [(0, inner)] if len(self.rotating.dims) > 1 else list(pairwise(self._cuts()))
        rows = max(BLOCK_ELEMENTS // (channels * self.rotating.inner), 1)
        for o in range(0, outer, rows):
            for i, end in cuts:
                yield slice(o, min(o + rows, outer)), slice(i, end)

    def _cuts(self) -> Iterator[int]:
        """Where blocks begin and end along `inner`: cells are cut evenly."""
        start, stop = self.inner
        cell, most = self.rotating.cell, max(BLOCK_ELEMENTS // self.rotating.rotation.size, BLOCK_COLUMNS)
        width = -(-cell // -(-cell // most))
        yield 0
        while start < stop:
            begin = start - (start + self.into) % cell
            start = min(start + width - (start - begin) % width, begin + cell, stop)
            yield start - self.inner[0]


def panels(
    rotating: Rotating, source: SourceFile, source_offset: int, target_offset: int, panel_bytes: int
) -> Iterator[Panel]:
    """The panels of a tensor, in order, of about `panel_bytes`. Along several dimensions, only the first is cut."""
    outer, channels, inner = rotating.outer, rotating.rotation.size, rotating.inner
    if not rotating.elements:
        return
    pages = PAGE // rotating.itemsize
    into = (target_offset // rotating.itemsize) % pages if inner % pages == 0 else 0
    most = max(panel_bytes // rotating.itemsize, BLOCK_ELEMENTS)
    if channels * inner <= most or len(rotating.dims) > 1:
        step, first, width = max(BLOCK_ELEMENTS // (channels * inner), 1), inner, inner
    else:
        step, width = 1, max(most // channels // rotating.cell, 1) * rotating.cell
        first = width - into
    for o in range(0, outer, step):
        for i in pairwise([0, *range(first, inner, width), inner]):
            yield Panel(rotating, source, source_offset, target_offset, (o, min(o + step, outer)), i, into)


class Turner:
    """What one thread rotates panels with: its buffers, which it keeps."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.buffers = [mmap.mmap(-1, PAGE) for _ in range(4)]

    def turn(self, panel: Panel) -> int:
        """Read, scale, rotate, round and write one panel; returns how many values became zero.

        Raises GainOverflowError at a new inf, CheckpointError at one that is there already: it would spread.
        """
        rotating = panel.rotating
        raw = memoryview(self._buffer(0, panel.length))[: panel.length]
        done = 0
        for offset, length in panel.pieces():
            read_into(panel.source, panel.source_offset + offset, raw[done : done + length])
            done += length
        values = torch.frombuffer(raw, dtype=rotating.dtype).view(panel.shape)
        flushed = sum(self._block(panel, values, *block) for block in panel.blocks())
        done = 0
        for offset, length in panel.pieces():
            write_at(self.target, panel.target_offset + offset, raw[done : done + length])
            done += length
        return flushed

    def _block(self, panel: Panel, values: torch.Tensor, rows: slice, columns: slice) -> int:
        """Scale, rotate and round a part of a panel in place; returns how many values became zero."""
        rotating = panel.rotating
        part = values[rows, :, columns]
        wide, spare = self._like(part, rotating.wide, 1), self._like(part, rotating.wide, 2)
        wide.copy_(part)
        outer = panel.outer[0] + rows.start, panel.outer[0] + rows.stop
        factor = rotating.factor(outer, (panel.inner[0] + columns.start, panel.inner[0] + columns.stop))
        if factor is not None:
            wide.mul_(factor)
        gain = rotating.gain
        for dim in rotating.dims:
            before = math.prod(rotating.shape[rotating.dims[0] : dim])
            shape = (len(part) * before, rotating.shape[dim], -1)
            turned = rotating.rotation.turn(wide.view(shape), spare.view(shape), gain)
            if turned.data_ptr() != wide.data_ptr():
                wide, spare = spare, wide
            gain = None
        part.copy_(wide)
        if not any_zero_or_inf(part, self._like(part, INTEGERS[part.itemsize], 3)):
            return 0
        _refuse_infinite(rotating, wide)
        return int(wide.count_nonzero() - part.count_nonzero())

    def _like(self, part: torch.Tensor, dtype: torch.dtype, number: int) -> torch.Tensor:
        """A buffer as a tensor of the shape of `part`."""
        buffer = self._buffer(number, part.numel() * dtype.itemsize)
        return torch.frombuffer(buffer, dtype=dtype, count=part.numel()).view(part.shape)

    def _buffer(self, number: int, nbytes: int) -> mmap.mmap:
        if len(self.buffers[number]) < nbytes:
            self.buffers[number] = mmap.mmap(-1, nbytes)
        return self.buffers[number]


def _refuse_infinite(rotating: Rotating, wide: torch.Tensor) -> None:
    """Raise for what is not finite."""
    if not bool(wide.isfinite().all()):
        raise CheckpointError(f"tensor {rotating.name!r}: holds inf or NaN, which a rotation would spread")
    values = wide.to(rotating.dtype)
    if not bool(values.isfinite().all()):
        raise GainOverflowError(
            f"tensor {rotating.name!r}: a rotated value of {wide[~values.isfinite()][0].item():g} is beyond the "
            f"largest {rotating.dtype_name} value, {torch.finfo(rotating.dtype).max:g}"
        )
