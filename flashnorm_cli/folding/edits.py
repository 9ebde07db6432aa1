"""Edits of a tensor on its way from shard to shard."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from flashnorm_cli.checkpoint.header import Header, TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.errors import PlanError
from flashnorm_cli.folding.rotation import Rotation


@dataclass(frozen=True)
class Scale:
    """Multiply a tensor by a gain along one dimension.

    The product is computed in float32 (float64 where gain or tensor are) and rounded once, to nearest even, to the
    tensor's dtype: BF16, F16, F32 or F64. `gain` is float32 or float64, finite, of shape (shape[dim],). `origin` (a
    file, its header, the name of a tensor in it with the same dtype and shape) says where the values come from, if not
    from the tensor itself: an untied head is the embedding times a gain.
    """

    dim: int
    gain: torch.Tensor
    origin: tuple[Path, Header, str] | None = None


@dataclass(frozen=True)
class Fill:
    """Set every element of a BF16, F16, F32 or F64 tensor to `value`: the identity of a folded norm."""

    value: float


@dataclass(frozen=True)
class Rotate:
    """Multiply a tensor by the gain of `scale`, if there is one, and then every vector along each of `dims` by Q.

    Both in float32 (float64 where gain or tensor are), rounded once to the tensor's dtype: BF16, F16, F32 or F64.
    """

    rotation: Rotation
    dims: tuple[int, ...]
    scale: Scale | None = None

    @property
    def origin(self) -> tuple[Path, Header, str] | None:
        return self.scale.origin if self.scale else None


Edit = Scale | Fill | Rotate


class _Scaling:
    """One tensor's gain, ready to be multiplied to any stretch of the flattened tensor.

    A tensor of shape (outer..., channels, inner...) is flattened to (outer * channels * inner,); element i
    takes gain[i // inner % channels].
    """

    changed = "times their gain"

    def __init__(self, entry: TensorEntry, scale: Scale) -> None:
        self.name = entry.name
        self.dtype_name = entry.dtype
        self.flushed = 0
        self.elements = math.prod(entry.shape)
        gain, dim = scale.gain.contiguous(), scale.dim
        if entry.dtype not in TORCH_DTYPE:
            raise PlanError(f"tensor {entry.name!r}: {entry.dtype} cannot take a gain")
        is_gain = gain.dtype in (torch.float32, torch.float64)
        if not 0 <= dim < len(entry.shape) or not is_gain or gain.shape != (entry.shape[dim],):
            raise PlanError(
                f"tensor {entry.name!r}: a {gain.dtype} gain of shape {list(gain.shape)} does not fit"
                f" dimension {dim} of {list(entry.shape)}"
            )
        if not gain.isfinite().all():
            raise PlanError(f"tensor {entry.name!r}: its gain holds NaN or inf")
        self.dtype = TORCH_DTYPE[entry.dtype]
        self.itemsize = self.dtype.itemsize
        # A gain that the tensor's own dtype holds exactly needs no wider copy of the tensor (see the top).
        exact = bool((gain.to(self.dtype).to(gain.dtype) == gain).all())
        self.product_dtype = self.dtype if exact else gain.dtype
        # |gain| <= 1 cannot overflow, and only about half of the smallest nonzero value or less rounds to 0.
        magnitudes = gain[gain != 0].abs()
        self.needs_check = bool(((magnitudes > 1) | (magnitudes < 0.75)).any())
        inner = math.prod(entry.shape[dim + 1 :])
        self.gain, self.inner = _without_short_loops(gain.to(self.product_dtype), inner)

    def multiply(self, values: torch.Tensor, first: int, gain: torch.Tensor) -> None:
        """values *= gain in place; `values` is 1-D and begins at element `first` of the flattened tensor."""
        channels, inner = len(gain), self.inner
        period = channels * inner
        done, count = 0, len(values)
        while done < count:
            channel, offset = divmod((first + done) % period, inner)
            left = count - done
            if channel == 0 and offset == 0 and left >= period:  # as many whole periods as there are
                n = left // period * period
                values[done : done + n].view(-1, channels, inner).mul_(gain[:, None])
            elif offset == 0 and left >= inner:  # whole channels up to the end of the period
                whole = min(left // inner, channels - channel)
                n = whole * inner
                values[done : done + n].view(whole, inner).mul_(gain[channel : channel + whole, None])
            else:  # the rest of one channel
                n = min(left, inner - offset)
                values[done : done + n].mul_(gain[channel])
            done += n


def _without_short_loops(gain: torch.Tensor, inner: int) -> tuple[torch.Tensor, int]:
    """An equivalent (gain, inner) whose innermost loop is long, because torch is slow at short ones."""
    if inner < 64:
        gain, inner = gain.repeat_interleave(inner), 1
    if inner == 1 and 0 < len(gain) < 1024:
        gain = gain.repeat(1024 // len(gain))
    return gain, inner


# As wide as values of so many bytes.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def any_zero_or_inf(values: torch.Tensor, order: torch.Tensor | None = None) -> bool:
    """Whether any element is zero, inf or NaN, in two passes over the bits.

    Twice the bits are a number without its sign bit. Less one, and unsigned, it is largest for zero (all ones), then
    for NaN, for inf, and then for the finite values. Adding half of the unsigned range instead of subtracting one makes
    it the same order for signed numbers. `order` is a buffer for that, of integers as wide as the values.
    """
    bits = INTEGERS[values.itemsize]
    half = torch.iinfo(bits).max
    order = torch.add(half, values.view(bits), alpha=2, out=order)
    inf = int(torch.tensor(torch.inf, dtype=values.dtype).view(bits).item())
    return order.amax().item() >= 2 * inf - half - 2
