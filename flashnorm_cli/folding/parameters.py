"""What a fold does to a parameter in memory: a gain along one dimension, a rotation along others, rounded once.

Some slices of a parameter are widened at a time, along a dimension that no vector to be rotated lies in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashnorm_cli.errors import FlashNormError, GainOverflowError, GainUnderflowError
from flashnorm_cli.folding.edits import any_zero_or_inf
from flashnorm_cli.folding.jobs import FLUSH_LIMIT
from flashnorm_cli.folding.rotation import Rotation

CHUNK_ELEMENTS = 1 << 19  # that are widened to float32 at a time: they stay in a processor's cache

Part = tuple[slice, ...]


@dataclass(frozen=True)
class Change:
    """Multiply by `factor` along `dim`, then every vector along each of `dims` by `rotation`.

    `factor` is float32 (float64 if a gain is) of shape (shape[dim],), None for ones; `rotation` None for none.
    """

    factor: Tensor | None = None
    dim: int = 0
    rotation: Rotation | None = None
    dims: tuple[int, ...] = ()

    def rotated(self, rotation: Rotation, dims: tuple[int, ...]) -> Change:
        """This change, and then a rotation."""
        return replace(self, rotation=rotation, dims=dims)

    def apply(self, weight: Tensor, out: Tensor) -> None:
        """`out` becomes what the change makes of `weight`, rounded once; it may be `weight` itself."""
        for part, product in self._products(weight):
            out[part].copy_(product)

    def refuse(self, name: str, weight: Tensor) -> None:
        """Raise for a parameter that would not survive: new inf, too much that becomes zero, inf that would spread."""
        if self.rotation is not None:
            self._refuse_rotated(name, weight)
        elif self.factor is not None:
            self._refuse_overflow(name, weight, self.factor)
            self._refuse_flushed(name, weight, self.factor)

    # ---- products ---------------------------------------------------------------------------------------------------

    def _wide(self, weight: Tensor) -> torch.dtype:
        """What products are computed in."""
        double = weight.dtype == torch.float64 or (self.factor is not None and self.factor.dtype == torch.float64)
        return torch.float64 if double else torch.float32

    def _products(self, weight: Tensor) -> Iterator[tuple[Part, Tensor]]:
        """What each part of `weight` becomes, not rounded yet; until the next one is asked for."""
        wide = self._wide(weight)
        factor = None if self.factor is None else self.factor.to(weight.device, wide)
        buffers: list[Tensor] = []  # fresh ones for each part fault on every page
        for part in self._parts(weight):
            old = weight[part]
            buffers = buffers or [torch.empty(old.numel(), dtype=wide, device=old.device) for _ in range(2)]
            values, spare = (buffer[: old.numel()].view(old.shape) for buffer in buffers)
            values.copy_(old)
            if factor is not None and self.dim not in self.dims[:1]:
                values.mul_(self._shaped(factor, part))
            if self.rotation is not None:
                values = self._turned(values, spare, factor if self.dim in self.dims[:1] else None, self.rotation)
            yield part, values

    def _parts(self, weight: Tensor) -> Iterator[Part]:
        cut = next((d for d in range(weight.ndim) if d not in self.dims), None)
        if cut is None:
            yield (slice(None),) * weight.ndim
            return
        step = max(CHUNK_ELEMENTS * weight.shape[cut] // max(weight.numel(), 1), 1)
        for i in range(0, weight.shape[cut], step):
            yield tuple(slice(i, i + step) if d == cut else slice(None) for d in range(weight.ndim))

    def _turned(self, values: Tensor, spare: Tensor, gain: Tensor | None, rotation: Rotation) -> Tensor:
        """Rotated along each of `dims`, times a gain along the first of them: in `values` or in `spare`."""
        shape = values.shape
        for dim in self.dims:
            vectors = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
            turned = rotation.turn(values.view(vectors), spare.view(vectors), gain).view(shape)
            if turned.data_ptr() != values.data_ptr():
                values, spare = spare, values
            gain = None
        return values

    def _shaped(self, factor: Tensor, part: Part) -> Tensor:
        """What multiplies a part of a parameter, shaped so that it does."""
        return factor[part[self.dim]].view([-1 if d == self.dim else 1 for d in range(len(part))])

    # ---- refusals ---------------------------------------------------------------------------------------------------

    def _refuse_overflow(self, name: str, weight: Tensor, factor: Tensor) -> None:
        others = [d for d in range(weight.ndim) if d != self.dim]
        peak = torch.linalg.vector_norm(weight, math.inf, others)
        if not bool(peak.isfinite().all()):  # inf and NaN that are there already are carried over
            finite = torch.where(weight.isfinite(), weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
            peak = torch.linalg.vector_norm(finite, math.inf, others)
        wide = self._wide(weight)
        if not bool((peak.to(wide) * factor.to(peak.device, wide).abs()).to(weight.dtype).isfinite().all()):
            raise GainOverflowError(
                f"{name}: a weight times its gain is beyond the largest {_kind(weight)}; fold in another dtype"
            )

    def _refuse_flushed(self, name: str, weight: Tensor, factor: Tensor) -> None:
        magnitudes = factor[factor != 0].abs()
        if not bool((magnitudes < 0.75).any()):  # less than about half of the smallest nonzero value rounds to zero
            return
        flushed = 0
        for part, product in self._products(weight):
            nonzero = self._shaped((factor != 0).to(weight.device), part) & (weight[part] != 0)
            flushed += int((nonzero & (product.to(weight.dtype) == 0)).sum())
        _refuse_zeros(name, weight, flushed, "times their gain")

    def _refuse_rotated(self, name: str, weight: Tensor) -> None:
        flushed = 0
        for _, product in self._products(weight):
            rounded = product.to(weight.dtype)
            if not any_zero_or_inf(rounded):
                continue
            if not bool(product.isfinite().all()):
                raise FlashNormError(f"{name}: holds inf or NaN, which a rotation would spread")
            if not bool(rounded.isfinite().all()):
                raise GainOverflowError(
                    f"{name}: a rotated value is beyond the largest {_kind(weight)}; fold in another dtype"
                )
            flushed += int(product.count_nonzero() - rounded.count_nonzero())
        _refuse_zeros(name, weight, flushed, "rotated")


def _refuse_zeros(name: str, weight: Tensor, flushed: int, changed: str) -> None:
    if flushed > FLUSH_LIMIT * weight.numel():
        raise GainUnderflowError(
            f"{name}: {flushed:,} of {weight.numel():,} values {changed} are too small for {_kind(weight)} and would "
            "become zero: that would be another model; fold in another dtype"
        )


def _kind(weight: Tensor) -> str:
    return str(weight.dtype).removeprefix("torch.")
