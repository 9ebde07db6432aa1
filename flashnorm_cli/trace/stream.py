"""Find the residual stream: every parameter that writes into it or reads it, and whether it may be rotated.

A norm without a weight commutes with an orthogonal Q: `rms(Qx) = rms(x)`, so `norm(Qx) = Q norm(x)`. If every writer
of the stream is multiplied by Q on its output side and every reader by Q transposed on its input side, the model
computes the same (QuaRot, Ashkboos et al., arXiv 2404.00456, section 3; SliceGPT, arXiv 2401.15024, section 3.1).
Both are the same edit of a parameter: Q applied to its vectors along the dimension that lies in the stream.

How the stream is found. Each dimension of each parameter is an *axis*. A companion of an activation says which
channel of which axis lies where (see `tracer.py`). A product makes the output carry the parameter's output axis and
declares the input's axis one with the parameter's input axis; a sum declares the axes of its terms one. The stream is
the class of axes of the input embedding. What does not commute with a rotation (a kept gain, an elementwise function,
a slice, a mean over channels, the model's output) *pins* the axes that it touches, and a stream with a pinned axis
cannot be rotated.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flashnorm_cli.trace.companions import profile, small, varying_dims
from flashnorm_cli.trace.state import State, Weight, tensors_in_objects


@dataclass(frozen=True)
class Step:
    """What happens to the stream: "write" or "read" by dimension `dim` of a parameter, or "norm" by a folded gain."""

    kind: str
    name: str
    dim: int


@dataclass(frozen=True)
class Stream:
    """The residual stream of a model.

    `members` are the parameters with a dimension of the stream's channels, by runtime name (the first one of a shared
    parameter), with those dimensions; `norms` the folded gains that normalise it. `pinned` is the reason why it cannot
    be rotated, None if it can. `steps` are who writes it, who reads it and where it is normalised, each once, in the
    order of the forward. `carried` says of parameters that sum over output channels of one other parameter, with
    nothing in between but sums over tokens and factors that its channels share, which one, and which channel of it
    (from 0) stands at each of theirs: attention's output projection has its heads from the values', some repeated.
    """

    size: int
    members: dict[str, tuple[int, ...]]
    norms: tuple[str, ...]
    pinned: str | None
    steps: tuple[Step, ...] = ()
    carried: dict[str, tuple[str, torch.Tensor]] = field(default_factory=dict)

    def parameters(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Those that "write" it, or those that "read" it, with their dimensions of its channels."""
        found: dict[str, tuple[int, ...]] = {}
        for step in self.steps:
            if step.kind == kind:
                found[step.name] = tuple(sorted((*found.get(step.name, ()), step.dim)))
        return found


PART = "only a part of its channels is used"


class StreamState(State):
    """A `State` whose ids say which channel of which axis lies where.

    `folded` are gains that are the identity, `kept` why others are not.
    """

    def __init__(self, model: torch.nn.Module, folded: Collection[str], kept: Mapping[str, str]) -> None:
        super().__init__(model)
        self.folded, self.kept = frozenset(folded), kept
        self.norms: dict[str, int] = {}  # folded gain -> an axis that it normalises
        self._steps: dict[Step, int] = {}  # with its axis, in the order of the forward
        self._squares: dict[int, torch.Tensor] = {}
        self._measured: set[int] = set()  # axes whose vectors' length something goes by, as a norm does
        self._axes = [(name, dim) for name, shape in self.shapes.items() for dim in range(len(shape))]
        self._number = {axis: n for n, axis in enumerate(self._axes)}
        sizes = torch.tensor([self.shapes[name][dim] for name, dim in self._axes])
        self._sizes = sizes
        self._firsts = 1 + torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)[:-1]])
        self._parent = list(range(len(self._axes)))
        self._pinned: dict[int, str] = {}  # in order: the first reason of a class of axes is the one that is given
        self._reasons: dict[int, set[str]] = {}  # all of them
        self._sums: dict[tuple[str, str], list[torch.Tensor]] = {}  # reader and the reason it gives, what it sums over

    # ---- axes ---------------------------------------------------------------------------------------------------

    def axes_in(self, ids: torch.Tensor) -> list[int]:
        present = small(ids).flatten().unique()
        return (torch.bucketize(present[present > 0], self._firsts, right=True) - 1).unique().tolist()

    def axis_of(self, weight: Weight, along: int) -> torch.Tensor | None:
        """Ids, 1-D, of a parameter's view along its dimension `along`; None where they differ elsewhere, too."""
        along %= weight.coords[0].ndim if weight.coords else 1
        dims = [d for d, c in enumerate(weight.coords) if along in varying_dims(c)]
        if len(dims) != 1 or varying_dims(weight.coords[dims[0]]) != [along] or weight.offset != 0.0:
            return None
        first = self._firsts[self._number[weight.name, dims[0]]]
        return profile(weight.coords[dims[0]], along) + first

    def is_all_of(self, weight: Weight) -> bool:
        """Whether a view of a parameter leaves none of it out."""
        sizes = zip(weight.coords, self.shapes[weight.name], strict=True)
        return all(small(c).unique().numel() == size for c, size in sizes)

    def unify(self, a: torch.Tensor, b: torch.Tensor, why: str) -> None:
        """Two 1-D ids lie on each other, channel by channel: their axes are one."""
        whole = [self._whole_axis(ids) for ids in (a, b)]
        first, second = whole
        if first is None or second is None or len(a) != len(b):
            self.pin(a, why)
            self.pin(b, why)
            return
        self._parent[self._root(first)] = self._root(second)

    def _whole_axis(self, ids: torch.Tensor) -> int | None:
        """The axis whose channels these are, all of them, in order."""
        axes = self.axes_in(ids)
        if len(axes) != 1:
            return None
        axis, n = axes[0], len(ids)
        whole = n == int(self._sizes[axis]) and torch.equal(ids, torch.arange(n) + self._firsts[axis])
        return axis if whole else None

    def measure(self, ids: torch.Tensor) -> bool:
        """The length of vectors with these ids is taken; False where they are not all channels of an axis, in order."""
        axis = self._whole_axis(ids)
        if axis is not None:
            self._measured.add(axis)
        return axis is not None

    def _root(self, axis: int) -> int:
        while self._parent[axis] != axis:
            self._parent[axis] = self._parent[self._parent[axis]]
            axis = self._parent[axis]
        return axis

    def note(self, kind: str, ids: torch.Tensor) -> None:
        """The parameter whose axis this is writes, or reads, an activation."""
        for axis in self.axes_in(ids):
            self._steps.setdefault(Step(kind, *self._axes[axis]), axis)

    def normalised(self, gain: str, ids: torch.Tensor) -> None:
        """A folded gain scales the normalised activation with these ids."""
        for axis in self.axes_in(ids):
            self.norms.setdefault(gain, axis)
        self._steps.setdefault(Step("norm", gain, 0), self.norms[gain])

    # ---- what happens to them -----------------------------------------------------------------------------------

    def channels(self, ids: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """The one dimension along which channels lie, and their ids; rows may be of several axes, which become one."""
        varying = varying_dims(ids)
        if not varying or not bool((small(ids) > 0).all()):
            return None
        starts = [d for d in varying if ids.shape[d] > 1 and self._runs_along(ids, d)]
        if len(starts) != 1:
            return None
        d = starts[0]
        rows = small(ids).movedim(d, -1).reshape(-1, ids.shape[d]).unique(dim=0)
        for row in rows[1:]:
            self.unify(rows[0], row, PART)
        return d, rows[0]

    def _runs_along(self, ids: torch.Tensor, d: int) -> bool:
        steps = small(ids).diff(dim=d) if small(ids).shape[d] > 1 else None
        return steps is not None and bool((steps == 1).all())

    def pin(self, ids: torch.Tensor, why: str) -> None:
        for axis in self.axes_in(ids):
            self._pin(axis, why)

    def _pin(self, axis: int, why: str) -> None:
        self._pinned.setdefault(axis, why)
        self._reasons.setdefault(axis, set()).add(why)

    def pin_parts(self, ids: torch.Tensor) -> None:
        """Pin each axis of which `ids` name some channels only: what is done to them may not be done to the rest.

        Parts that are joined again in their order would look like the whole vector.
        """
        present = small(ids).flatten().unique()
        for axis in self.axes_in(present):
            first = self._firsts[axis]
            if int(((present >= first) & (present < first + self._sizes[axis])).sum()) < int(self._sizes[axis]):
                self._pin(axis, f"a part of its channels is taken by itself in `{self.module}`")

    def escape_by(self, ids: torch.Tensor, weight: str) -> None:
        """A weight that is no folded gain multiplies channels one by one."""
        why = f" ({self.kept[weight]})" if weight in self.kept else ""
        self.escape(ids, f"it is multiplied by `{weight}`, a weight that is kept{why},")

    def escape(self, ids: torch.Tensor, why: str) -> None:
        self.accounted_for = True
        self.pin(ids, f"{why} in `{self.module}`")

    def sums(self, weight: Weight, ids: torch.Tensor, k: int, why: str) -> None:
        """A parameter sums over dimension `k` of an activation; `why` is the reason of its escape, if it is one."""
        if varying_dims(ids) == [k]:
            self._sums.setdefault((weight.name, f"{why} in `{self.module}`"), []).append(profile(ids, k))

    def on_output(self, output: Any) -> None:
        for tensor in tensors_in_objects(output):
            ids = self.ids_of(tensor)
            if ids is not None:
                self.pin(ids, "the model returns it")

    def set_square(self, tensor: torch.Tensor, ids: torch.Tensor) -> None:
        self.set_ids(tensor, ids)  # kept alive, and seen by whatever has no rule
        self._squares[tensor._cdata] = ids

    def is_square(self, tensor: torch.Tensor) -> bool:
        return tensor._cdata in self._squares

    # ---- the end ------------------------------------------------------------------------------------------------

    def judge(self, embedding: str, unreached: Collection[str]) -> Stream:
        """The stream of the embedding's second dimension."""
        for name, (operation, where) in self.other_uses.items():
            for dim in range(len(self.shapes[name])):
                self._pinned.setdefault(
                    self._number[name, dim], f"`{name}` has another use (`{operation}` in `{where}`)"
                )
        root = self._root(self._number[embedding, 1])
        axes = [axis for axis in range(len(self._axes)) if self._root(axis) == root]
        members: dict[str, tuple[int, ...]] = {}
        for axis in axes:
            name, dim = self._axes[axis]
            members[name] = (*members.get(name, ()), dim)
        size = self.shapes[embedding][1]
        pinned = next((why for axis, why in self._pinned.items() if self._root(axis) == root), None)
        if size < 2:
            pinned = "it has one channel"
        elif pinned is None and root not in map(self._root, self._measured):
            pinned = f"no norm normalises what `{embedding}` gives, so it is not the residual stream"
        elif pinned is None and unreached:
            pinned = f"`{next(iter(unreached))}` was not reached by the forward, and may read or write it"
        norms = tuple(name for name, axis in self.norms.items() if self._root(axis) == root)
        steps = tuple(step for step, axis in self._steps.items() if self._root(axis) == root)
        return Stream(size, members, norms, pinned, steps, self._carried())

    def _carried(self) -> dict[str, tuple[str, torch.Tensor]]:
        found: dict[str, tuple[str, torch.Tensor]] = {}
        roots = [self._root(axis) for axis in range(len(self._axes))]
        for (name, why), sums in self._sums.items():
            axes = self.axes_in(sums[0])
            if (
                len(axes) != 1
                or any(not torch.equal(sums[0], other) for other in sums)
                or not bool((sums[0] > 0).all())
            ):
                continue
            source = self._axes[axes[0]][0]
            one = {self._axes[axis][0] for axis, root in enumerate(roots) if root == roots[axes[0]]}
            bias = f"{source.rpartition('.')[0]}.bias"
            if one <= {source, bias, name} and self._reasons.get(axes[0], set()) <= {PART, why}:
                found[name] = source, sums[0] - self._firsts[axes[0]]
        return found
