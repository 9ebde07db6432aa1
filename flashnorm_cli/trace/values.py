"""What is known of the values of meta tensors while a model is traced, and answers where nothing is known.

Positions, masks and token ids depend on no weight: their values are computed beside the meta tensors. Router scores
are unknown. A question about unknown data is answered so that as much of the model as possible runs: "everything is
selected", and conditions hold; further forwards try other answers (`GUESSES`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from flashnorm_cli.errors import PlanError

# Values are only computed for tensors up to this size (positions and masks, never activations).
MAX_KNOWN = 1 << 16
# "Everything is selected" on a tensor larger than this would make the trace itself heavy.
MAX_SELECTED = 1 << 22
# Answers to conditions on unknown data, and unknown numbers, in turn: one row per forward.
GUESSES = ((1,), (0,), (2, 0), (0, 3))
# Only the shape or the dtype of the input is used.
SHAPE_ONLY = frozenset(
    "zeros_like ones_like empty_like full_like rand_like randn_like new_zeros new_ones new_empty new_full "
    "new_empty_strided sym_size sym_numel sym_stride is_same_size".split()
)
# Random or uninitialised: their values are never known.
UNKNOWN_VALUES = ("empty", "new_empty", "rand", "bernoulli", "normal", "multinomial", "uniform", "exponential")


def tensors_in(*values: Any) -> list[torch.Tensor]:
    """The tensors in an operation's arguments or results, those in lists included, in their order."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(*value)
        elif isinstance(value, dict):
            found += tensors_in(*value.values())
    return found


class Values:
    """Values by tensor. `guesses` are the answers of this forward to questions about unknown data."""

    def __init__(self) -> None:
        self._alive: list[torch.Tensor] = []  # addresses of dead tensors would be reused
        self._known: dict[int, torch.Tensor] = {}
        self.guesses: tuple[int, ...] = GUESSES[0]
        self._asked = 0

    def set(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Tell the values of a meta tensor (token ids, a literal)."""
        self._alive.append(tensor)
        self._known[tensor._cdata] = value

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The values of a tensor, real or meta, or None where they are unknown."""
        if tensor.device.type != "meta":
            return tensor
        return self._known.get(tensor._cdata)

    def to_meta(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.device.type != "meta" and value.ndim:
            meta = torch.empty_like(value, device="meta")
            self.set(meta, value)
            return meta
        return value

    def follow(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[torch.Tensor], out: Any) -> None:
        """Compute the values of an operation's results where those of all its inputs are known, and few."""
        outs = tensors_in(out)
        if name.startswith(UNKNOWN_VALUES):
            return
        small = sum(o.numel() for o in outs) <= MAX_KNOWN
        shape_only = name in SHAPE_ONLY
        if not small or (not shape_only and any(self.of(t) is None for t in inputs)):
            if func._schema.is_mutable:
                self._forget(inputs)
            return

        def real(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                known = self.of(value)
                return known if known is not None else torch.zeros((), dtype=value.dtype).expand(value.shape)
            return torch.device("cpu") if isinstance(value, torch.device) else value

        real_args, real_kwargs = tree_map(real, (args, kwargs))
        if "device" in {a.name for a in func._schema.arguments}:
            real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
        try:
            values = func(*real_args, **real_kwargs)
        except (RuntimeError, NotImplementedError, IndexError, TypeError):
            return  # an operation without a CPU kernel for these dtypes: its values stay unknown
        for tensor, value in zip(outs, tensors_in(values), strict=True):
            if tensor.device.type == "meta":
                self.set(tensor, value)

    def _forget(self, inputs: list[torch.Tensor]) -> None:
        """Unknown data was written into a tensor with known values: they, and those of its views, are void."""
        for t in inputs:
            known = self._known.get(t._cdata)
            if known is not None:
                pointer = known.untyped_storage().data_ptr()
                self._known = {k: v for k, v in self._known.items() if v.untyped_storage().data_ptr() != pointer}

    def _select_all(self, mask: torch.Tensor) -> torch.Tensor:
        """Indices of the selected positions, int64 of shape (selected, mask.ndim)."""
        known = self.of(mask)
        if known is None:
            if mask.numel() > MAX_SELECTED:
                raise PlanError(f"a selection over {mask.numel()} unknown values")
            known = torch.ones((), dtype=torch.bool).expand(mask.shape)
        return known.nonzero()

    def _meta_with(self, value: torch.Tensor) -> torch.Tensor:
        meta = torch.empty_like(value, device="meta")
        self.set(meta, value)
        return meta

    def other_guesses(self) -> tuple[tuple[int, ...], ...]:
        """What else to answer, if any condition on unknown data was asked."""
        return GUESSES[1:] if self._asked else ()

    def _guess(self, tensor: torch.Tensor) -> torch.Tensor:
        known = self.of(tensor)
        if known is not None:
            return known
        return torch.full(tensor.shape, self.guesses[self._asked % len(self.guesses)]).to(tensor.dtype)

    def answer(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Answers for operations that need data which a meta tensor does not have; NotImplemented for others."""
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if first is None or first.device.type != "meta":
            return NotImplemented
        if name == "nonzero":
            return self._meta_with(self._select_all(first))
        if name == "_local_scalar_dense":
            if self.of(first) is None:
                self._asked += 1
            return self._guess(first).item()
        if name == "_to_copy" and torch.device(kwargs.get("device") or "meta").type != "meta":
            return self._guess(first).to(kwargs.get("dtype") or first.dtype, copy=True)
        if name == "bincount":
            known, least = self.of(first), args[2] if len(args) > 2 else kwargs.get("minlength", 0)
            counts = known.bincount(minlength=least) if known is not None else torch.ones(max(least, 1)).long()
            return self._meta_with(counts)
        if name == "masked_select":
            source, mask = torch.broadcast_tensors(first, args[1])
            return source[tuple(self._select_all(mask).unbind(1))]
        if name in ("_unique2", "unique_consecutive"):
            flat = self._guess(first).flatten()
            if self.of(first) is None:
                flat = torch.arange(flat.numel()).to(flat.dtype)
            consecutive = name == "unique_consecutive"
            found = torch.unique_consecutive(flat, True, True) if consecutive else torch.unique(flat, True, True, True)
            return tuple(self._meta_with(t) for t in found)
        if name == "repeat_interleave" and func._overloadname == "Tensor":
            return self._meta_with(torch.repeat_interleave(self._guess(first).long()))
        if name == "equal":
            known, other = self.of(first), self.of(args[1])
            return known is None or other is None or torch.equal(known, other)
        return NotImplemented

    def sizes_that_add_up(self, args: Any) -> Any:
        """Sizes that were guessed (tokens per expert) are shared out so that they add up."""
        size, parts = args[0].shape[args[2] if len(args) > 2 else 0], len(args[1])
        if sum(args[1]) == size:
            return args[1]
        return [size // parts + (n < size % parts) for n in range(parts)]

    def without_masks(self, args: Any) -> Any:
        """Boolean indices become the integer indices of everything that they may select."""
        if len(args) < 2 or not isinstance(args[1], (list, tuple)):
            return args
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8):
                indices.extend(self._meta_with(i) for i in self._select_all(index).unbind(1))
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])
