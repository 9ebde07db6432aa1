"""Rotate tensors on their way from shard to shard: panels that hold whole vectors, one product each, rounded once.

A tensor is seen as (outer, channels, inner) around the dimension that is rotated. A panel is some of `outer` as a
whole, which lies in one piece on disk, or, where one alone is too large, some of `inner`, which is read and written
row by row: a memory map would be shorter, and would kill the process where a file is cut off underneath.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.errors import CheckpointError, GainOverflowError, PlanError
from flashnorm_cli.folding.edits import Rotate, any_zero_or_inf
from flashnorm_cli.folding.shard_files import SourceFile, read_into, write_at

PANEL_ELEMENTS = 2**20  # that are multiplied at a time: larger matrices fall out of the processor's cache
ROW_BYTES = 4096  # of a panel that is read row by row, at the least: a call for each row takes as long as 4 kB


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
        self.dtype = TORCH_DTYPE[entry.dtype]
        self.itemsize = self.dtype.itemsize
        double = self.dtype == torch.float64 or (gain is not None and gain.dtype == torch.float64)
        self.wide = torch.float64 if double else torch.float32

    def factor(self, panel: Panel, inner: tuple[int, int]) -> torch.Tensor | None:
        """The gain of each value of a part of a panel, to be broadcast to its shape (outer, channels, inner)."""
        if self.scale is None:
            return None
        at, dim = self.scale.dim, panel.dim
        gain = self.scale.gain.to(self.wide)
        if at == dim:
            return gain[None, :, None]
        if at > dim:
            columns = torch.arange(inner[0], inner[1])
            return gain[columns // math.prod(self.shape[at + 1 :]) % len(gain)][None, None, :]
        outer = torch.arange(panel.outer[0], panel.outer[1])
        return gain[outer // math.prod(self.shape[at + 1 : dim]) % len(gain)][:, None, None]


@dataclass(frozen=True)
class Panel:
    """A part of a tensor: `outer` and `inner` are ranges around `dim`, offsets those of the whole tensor, in bytes."""

    rotating: Rotating
    source: SourceFile
    source_offset: int
    target_offset: int
    dim: int
    outer: tuple[int, int]
    inner: tuple[int, int]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.outer[1] - self.outer[0], self.rotating.shape[self.dim], self.inner[1] - self.inner[0]

    @property
    def length(self) -> int:
        return math.prod(self.shape) * self.rotating.itemsize

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Where it lies, from the start of the tensor: (offset, length) in bytes, in order."""
        _, channels, inner = self.shape
        whole, itemsize = math.prod(self.rotating.shape[self.dim + 1 :]), self.rotating.itemsize
        if inner == whole:
            yield self.outer[0] * channels * whole * itemsize, self.length
            return
        for row in range(self.outer[0] * channels, self.outer[1] * channels):
            yield (row * whole + self.inner[0]) * itemsize, inner * itemsize


def panels(rotating: Rotating, source: SourceFile, source_offset: int, target_offset: int) -> Iterator[Panel]:
    """The panels of a tensor, in order. One that is rotated along several dimensions is cut before the first only."""
    shape, dim = rotating.shape, rotating.dims[0]
    outer, inner = math.prod(shape[:dim]), math.prod(shape[dim + 1 :])
    if not rotating.elements:
        return
    one = shape[dim] * inner
    if one <= PANEL_ELEMENTS or len(rotating.dims) > 1:
        step, width = max(PANEL_ELEMENTS // one, 1), inner
    else:
        step, width = 1, max(PANEL_ELEMENTS // shape[dim], ROW_BYTES // rotating.itemsize)
    for o in range(0, outer, step):
        for i in range(0, inner, width):
            ends = (o, min(o + step, outer)), (i, min(i + width, inner))
            yield Panel(rotating, source, source_offset, target_offset, dim, *ends)


def rotate_panel(panel: Panel, target: int) -> int:
    """Read, scale, rotate, round and write one panel; returns how many values became zero.

    Raises GainOverflowError at a new inf, CheckpointError at one that is there already: it would spread.
    """
    rotating = panel.rotating
    raw = memoryview(bytearray(panel.length))
    done = 0
    for offset, length in panel.pieces():
        read_into(panel.source, panel.source_offset + offset, raw[done : done + length])
        done += length
    values = torch.frombuffer(raw, dtype=rotating.dtype).view(panel.shape)
    flushed = 0
    step = max(PANEL_ELEMENTS // (panel.shape[0] * panel.shape[1]), 1) if len(rotating.dims) == 1 else panel.shape[2]
    for first in range(panel.inner[0], panel.inner[1], step):
        inner = first, min(first + step, panel.inner[1])
        flushed += _rotate(panel, values[:, :, inner[0] - panel.inner[0] : inner[1] - panel.inner[0]], inner)
    done = 0
    for offset, length in panel.pieces():
        write_at(target, panel.target_offset + offset, raw[done : done + length])
        done += length
    return flushed


def _rotate(panel: Panel, values: torch.Tensor, inner: tuple[int, int]) -> int:
    """Scale, rotate and round a part of a panel in place; returns how many values became zero."""
    rotating = panel.rotating
    wide = values.to(rotating.wide, memory_format=torch.contiguous_format)
    factor = rotating.factor(panel, inner)
    wide = rotating.rotation.along(wide if factor is None else wide * factor)
    for dim in rotating.dims[1:]:
        between = math.prod(rotating.shape[panel.dim : dim])
        wide = rotating.rotation.along(wide.reshape(panel.shape[0] * between, rotating.shape[dim], -1))
    wide = wide.reshape(values.shape)
    rounded = wide.to(rotating.dtype)
    values.copy_(rounded)
    if not any_zero_or_inf(rounded):
        return 0
    _refuse_infinite(panel, wide)
    return int(wide.count_nonzero() - rounded.count_nonzero())


def _refuse_infinite(panel: Panel, wide: torch.Tensor) -> None:
    """Raise for what is not finite."""
    rotating = panel.rotating
    if not bool(wide.isfinite().all()):
        raise CheckpointError(f"tensor {rotating.name!r}: holds inf or NaN, which a rotation would spread")
    values = wide.to(rotating.dtype)
    if not bool(values.isfinite().all()):
        raise GainOverflowError(
            f"tensor {rotating.name!r}: a rotated value of {wide[~values.isfinite()][0].item():g} is beyond the "
            f"largest {rotating.dtype_name} value, {torch.finfo(rotating.dtype).max:g}"
        )
