"""Edits of an adapter's tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashnorm_cli.adapters.kinds import MERGE_HINT, AdapterError
from flashnorm_cli.errors import GainOverflowError


@dataclass(frozen=True)
class Scale:
    """Multiply a tensor by `factor` (1-D, float32 or float64) along `dim`; computed in its dtype, rounded once."""

    dim: int
    factor: torch.Tensor

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(values.dtype, self.factor.dtype)
        factor = self.factor.view([-1 if d == self.dim else 1 for d in range(values.ndim)])
        return (values.to(wide) * factor.to(wide)).to(values.dtype)

    def flushed(self, before: torch.Tensor, after: torch.Tensor) -> int:
        """How many products became zero although neither weight nor factor is."""
        factor = self.factor.view([-1 if d == self.dim else 1 for d in range(before.ndim)])
        return int(((before != 0) & (factor != 0) & (after == 0)).sum())


@dataclass(frozen=True)
class Ratio:
    """Divide a norm's own gain, `scale * weight + offset`, by the one that its readers hold already.

    `gain` is float32 of the norm's shape. Where both are zero nothing comes through: the identity is as good as any.
    """

    gain: torch.Tensor
    scale: float
    offset: float

    def apply(self, values: torch.Tensor) -> torch.Tensor:
        gain, folded = values.double() * self.scale + self.offset, self.gain.double()
        if bool(((folded == 0) & (gain != 0)).any()):
            raise AdapterError("the source's norm is zero where this one is not, so the folded base lost the channel")
        ratio = torch.where(folded == 0, torch.ones_like(gain), gain / folded)
        return ((ratio - self.offset) / self.scale).to(values.dtype)


Edit = Scale | Ratio


def apply(name: str, values: torch.Tensor, edit: Edit) -> tuple[torch.Tensor, int]:
    """A tensor after its edit, and how many of its values became zero.

    Raises GainOverflowError if a finite value would become inf, AdapterError if it cannot be folded.
    """
    if not bool(values.isfinite().all()):
        raise AdapterError(f"{name}: holds inf or NaN; this adapter is broken")
    try:
        result = edit.apply(values)
    except AdapterError as error:
        raise AdapterError(f"{name}: {error}; {MERGE_HINT}") from None
    if not bool(result.isfinite().all()):
        raise GainOverflowError(
            f"{name}: a weight times its gain is beyond the largest {values.dtype} value, "
            f"{torch.finfo(values.dtype).max:g}"
        )
    return result, edit.flushed(values, result) if isinstance(edit, Scale) else 0
