"""Weights that lie on a quantizer's grid: trained for few bits, or quantized once and stored as floats again.

No header tells. A fold is exact for them as for others, but its products lie off the grid: who quantizes the fold pays
for a rounding that the source has behind it. A sample of each kind of reader is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.names import layer_of, pattern_of

if TYPE_CHECKING:
    from torch import Tensor

    from flashnorm_cli.checkpoint.model import Checkpoint
    from flashnorm_cli.plan.model import Plan

KINDS, ROWS, COLUMNS = 8, 32, 1024  # how many kinds of readers, rows of each, and values of each row are looked at
MOST_BYTES = 1 << 25  # of the first expert of a stack, which is read whole
FEW = ((32, 16), (256, 64))  # so many values in a group of that size: 4 bits, 6 bits
REPEATED = 0.6  # values other than zero that are distinct, at most: a pruned matrix has few that repeat
GROUPS = 16  # groups that are looked at, at least
# So many mantissas in a group of floats of 8 bits, and of 4 bits, times one scale; bfloat16 alone makes 80 in 128.
MANTISSAS = ((128, 8, 8), (16, 2, 4))
CLEAR = 2.0**-9  # of a group's largest value: smaller ones may have lost their last bits in float16
# Steps in the largest value of a group, and between its smallest and its largest: integers of 5, 6 and 8 bits.
SIZES, LARGEST, SPAN = (16, 32, 64, 128), (15, 16, 31, 32, 127, 127.5, 128), (31, 63, 254, 255)
SMALLEST_F16 = 2.0**-14  # below it float16 is a grid itself
# Where a value lies on a grid is told from steps 1 to 16, which bfloat16 moves by 0.03 of a step; at random it is 0.25.
# Of groups with some such steps, most have to lie on it.
NEAR, OFF, SAMPLES, MOST = 16, 0.06, 200, 0.7
MOST_STEPS = 300  # of a row whose smallest value is taken for the step


@dataclass(frozen=True)
class OnGrid:
    """A reader whose values lie on a grid, what tells it, and whether all that was looked at is made for few bits."""

    tensor: str
    what: str
    all_few: bool

    @property
    def line(self) -> str:
        return (
            f"`{pattern_of(self.tensor)}` holds {self.what}: a fold moves them off that grid, and quantizing the fold "
            "will cost more than quantizing the source"
        )


def on_grid(samples: Iterable[tuple[str, Tensor]]) -> OnGrid | None:
    """The first of some kinds of readers whose values lie on a quantizer's grid, or None.

    Args:
        samples: the name of one reader of each kind, and rows of it as `grid_in` takes them.
    """
    first, every = None, True
    for name, rows in samples:
        what = grid_in(rows)
        first = first or ((name, what) if what else None)
        every = every and what is not None and _few_bits(rows)
    return None if first is None else OnGrid(*first, every)


def readers_on_grid(checkpoint: Checkpoint, readers: Mapping[str, int]) -> OnGrid | None:
    """`on_grid` of a checkpoint's readers, by their names on disk and the dimension along which each takes gains.

    A few hundred kB of each kind are read, from the disk or by ranged requests.
    """
    kinds: dict[str, str] = {}
    for name in readers:
        if layer_of(name) and name in checkpoint.tensors:
            kinds.setdefault(pattern_of(name), name)
    looked_at = ((name, _sample(checkpoint, name, readers[name])) for name in list(kinds.values())[:KINDS])
    return on_grid((name, rows) for name, rows in looked_at if rows is not None)


def plan_on_grid(checkpoint: Checkpoint, plan: Plan) -> OnGrid | None:
    """`readers_on_grid` of a plan; of one that rotates, also of the tensors that are rotated on another side."""
    return readers_on_grid(checkpoint, _inputs(checkpoint, plan))


def _inputs(checkpoint: Checkpoint, plan: Plan) -> dict[str, int]:
    """The tensors on disk that a plan changes, and the dimension of each along which a quantizer's groups lie."""
    inputs = {r.tensor: r.dim for r in plan.readers if r.values_from is None and r.tensor in checkpoint.tensors}
    for name, (dim, *_) in plan.rotation.tensors.items() if plan.rotation else ():
        if name in checkpoint.tensors and len(checkpoint.tensors[name].shape) == 2:
            inputs.setdefault(name, 1 - dim)
    return inputs


def with_grid_note(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """A plan with a line where its readers lie on a grid; those of shards that are not on this disk are left out."""
    here = {shard for shard in checkpoint.shards if (checkpoint.folder / shard).is_file()}
    inputs = _inputs(checkpoint, plan)
    found = readers_on_grid(checkpoint, {n: dim for n, dim in inputs.items() if checkpoint.shard_of[n] in here})
    return plan if found is None else replace(plan, notes=(*plan.notes, found.line))


def _sample(checkpoint: Checkpoint, name: str, dim: int) -> Tensor | None:
    """Some of a reader's values, of what is no float or too large nothing: a matrix, the first of a stack of them."""
    from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, read_tensor

    entry = checkpoint.tensors[name]
    if entry.dtype not in TORCH_DTYPE or len(entry.shape) not in (2, 3):
        return None
    rows = min(entry.shape[0], ROWS if dim == 1 else COLUMNS) if len(entry.shape) == 2 else 1
    if rows * math.prod(entry.shape[1:]) * TORCH_DTYPE[entry.dtype].itemsize > MOST_BYTES:
        return None
    return rows_along(read_tensor(checkpoint, name, (0, rows)), dim)


def rows_along(values: Tensor, dim: int) -> Tensor | None:
    """Rows of a matrix, or of the first of a stack, along dimension `dim` of it, as `grid_in` takes them."""
    import torch

    if values.dim() == 3 and dim > 0:
        values, dim = values[0], dim - 1
    if values.dim() != 2 or values.shape[dim] < FEW[0][0]:
        return None
    rows = values.detach().movedim(dim, -1)[:ROWS, :COLUMNS].double().cpu()
    return rows[rows.abs().amax(1) > SMALLEST_F16] if values.dtype == torch.float16 else rows


def grid_in(rows: Tensor) -> str | None:
    """What a grid looks like on which all values of a matrix lie, as the end of "holds ...", or None.

    Args:
        rows: floats of shape (rows, values), groups of a quantizer along the second dimension.
    """
    for size, values in FEW:
        if _few_values(rows, size, values):
            return f"at most {values} values in each {size} (trained or made for {values.bit_length() - 1} bits)"
    for size, mantissas, bits in MANTISSAS:
        if _few_mantissas(rows, size, mantissas):
            return f"at most {mantissas} mantissas in each {size} (trained or made for floats of {bits} bits)"
    if _multiples(rows):
        return "multiples of one step in each group (trained or made for 8 bits)"
    return None


def _groups(rows: Tensor, size: int) -> Tensor | None:
    whole = rows.shape[1] // size * size
    if not whole:
        return None
    groups = rows[:, :whole].reshape(-1, size)
    groups = groups[groups.amax(1) > groups.amin(1)]  # a constant group tells nothing
    return groups if len(groups) >= GROUPS else None


def _distinct(values: Tensor) -> Tensor:
    """How many values of each row differ."""
    return values.sort(1).values.diff(dim=1).ne(0).sum(1) + 1


def _few_values(rows: Tensor, size: int, most: int) -> bool:
    groups = _groups(rows, size)
    if groups is None:
        return False
    distinct, zeros = _distinct(groups), groups.eq(0).sum(1)
    others = (size - zeros).sum()
    return bool((distinct <= most).all()) and bool((distinct - zeros.gt(0).int()).sum() <= REPEATED * others)


def _few_bits(rows: Tensor) -> bool:
    """4 bits or fewer, and zero is one of the values: so training for few bits leaves weights.

    What llama.cpp has quantized with a minimum per group (Q4_1, Q4_K) has no zero.
    """
    size, values = FEW[0]
    groups = _groups(rows, size)
    return _few_values(rows, size, values) and groups is not None and bool(groups.eq(0).any(1).float().mean() > 0.5)


def _few_mantissas(rows: Tensor, size: int, most: int) -> bool:
    groups = _groups(rows, size if rows.shape[1] >= size else size // 2)
    if groups is None:
        return False
    clear = groups.where(groups.abs() > groups.abs().amax(1, keepdim=True) * CLEAR, 0.0)
    mantissas = clear.abs().frexp().mantissa  # of zero it is zero
    few = (_distinct(mantissas) - mantissas.eq(0).any(1).int() <= most).all()
    return bool(few) and bool(clear.ne(0).sum() > clear.numel() // 2)


def _multiples(rows: Tensor) -> bool:
    import torch

    for size in (*SIZES, rows.shape[1]):
        groups = _groups(rows, size)
        if groups is None:
            continue
        largest, span = groups.abs().amax(1, keepdim=True), groups.amax(1, keepdim=True) - groups.amin(1, keepdim=True)
        fits = [_off(groups / step) for step in (*(largest / q for q in LARGEST), *(span / q for q in SPAN))]
        means = [(off / near.clamp(min=1)).where(near >= 4, math.inf) for off, near in fits]
        best = torch.stack(means).amin(0)  # a group's grid is the one that fits best
        told = best.isfinite().sum()
        if told >= GROUPS and (best < OFF).sum() > MOST * told:
            return True
    smallest = rows.abs().where(rows != 0, math.inf).amin(1, keepdim=True)
    few = (rows.abs().amax(1) / smallest[:, 0]).le(MOST_STEPS)
    off, near = _off((rows / smallest)[few], first=1.5)
    return bool(few.sum() * 2 > len(rows) and near.sum() >= SAMPLES and off.sum() < OFF * near.sum())


def _off(steps: Tensor, first: float = 0.5) -> tuple[Tensor, Tensor]:
    """How far values, in steps of a grid, lie off it, in all, and how many tell; by row."""
    near = (steps.abs() >= first) & (steps.abs() <= NEAR + 0.5)
    return ((steps - steps.round()).abs() * near).sum(1), near.sum(1)
