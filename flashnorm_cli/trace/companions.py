"""Small real tensors that stand beside meta tensors of the same shape, mostly made of stride-0 dimensions.

See `trace.py` for what they say. Everything here costs as much as the values that differ, not as the shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def small(companion: torch.Tensor) -> torch.Tensor:
    """The same values without the repetitions that stride-0 dimensions stand for."""
    for d in range(companion.ndim):
        if companion.stride(d) == 0 and companion.shape[d]:
            companion = companion.narrow(d, 0, 1)
    return companion


def count_nonzero(companion: torch.Tensor) -> int:
    """Positions of a companion that are not 0, repetitions counted."""
    values = small(companion)
    return int((values != 0).sum()) * (companion.numel() // max(values.numel(), 1))


def varying_dims(companion: torch.Tensor) -> list[int]:
    """Dimensions along which a companion is not constant."""
    if not companion.numel():
        return []
    companion = small(companion)
    return [
        d
        for d in range(companion.ndim)
        if companion.shape[d] > 1 and bool((companion != companion.narrow(d, 0, 1)).any())
    ]


def profile(companion: torch.Tensor, dim: int) -> torch.Tensor:
    """The 1-D values along `dim` of a companion that is constant along all others."""
    if not companion.numel():
        return companion.new_zeros(companion.shape[dim])
    index: list[Any] = [0] * companion.ndim
    index[dim] = slice(None)
    return companion[tuple(index)]


def constant_along(companion: torch.Tensor, dims: Iterable[int]) -> bool:
    wanted = {d % companion.ndim for d in dims}
    return not wanted & set(varying_dims(companion))


def coordinates(shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """One stride-0 coordinate tensor per dimension."""
    return tuple(
        torch.arange(n).view([-1 if i == d else 1 for i in range(len(shape))]).expand(shape)
        for d, n in enumerate(shape)
    )


def resized(companion: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """A companion that is constant along `dim`, with that dimension resized."""
    one = companion.narrow(dim, 0, 1) if companion.shape[dim] else companion.new_zeros(()).expand_as(companion)
    shape = list(companion.shape)
    shape[dim] = size
    return one.expand(shape)
