"""What is known while a forward is traced: which gain scales which value, and what happened to each gain."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flashnorm_cli.trace.companions import coordinates, profile, small, varying_dims
from flashnorm_cli.trace.result import UNUSED, Gain, Trace
from flashnorm_cli.trace.values import Values, tensors_in

# A coordinate that was chosen by an index which the trace does not follow.
UNKNOWN = -1
SCORES = "its output is multiplied with a computed tensor (attention scores, or a weight changed on the way)"
_NORMALISING = "pow square linalg_vector_norm native_layer_norm rms_norm _fused_rms_norm mean var".split()
_WRITING = "copy index_put index_copy slice_scatter scatter index_add".split()


@dataclass(frozen=True)
class Weight:
    """A view of a parameter: value = scale * parameter[coords] + offset."""

    name: str
    coords: tuple[torch.Tensor, ...]
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Call:
    """One operation: what it was called with, and for each tensor among that its ids and its weight, if any."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    inputs: list[torch.Tensor]
    ids: list[torch.Tensor | None]
    weights: list[Weight | None]
    out: Any

    @property
    def outs(self) -> list[torch.Tensor]:
        return list(self.out) if isinstance(self.out, (list, tuple)) else [self.out]


class State:
    """Everything that is known of tensors, by their `_cdata`, and of the uses of gains and of parameters.

    `_cdata` is the address of what the Python object stands for: the object itself may come to stand for another
    tensor. Addresses of the dead are reused, so what is known is kept alive.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.trace = Trace()
        self.values = Values()
        self.digest = hashlib.sha256()  # of the sequence of operations
        self.asked: dict[str, None] = {}  # modules in which unknown data decided what was computed
        self.uses: dict[str, list[tuple[int, torch.Tensor, str]]] = {}  # reader -> (dim, ids, module)
        self.other_uses: dict[str, tuple[str, str]] = {}  # parameter -> first (operation, module) that is not a read
        self.accounted_for = True  # whether some rule said where the gains of the running operation went
        self._alive: list[torch.Tensor] = []
        self._ids: dict[int, torch.Tensor] = {}
        self._weights: dict[int, Weight] = {}
        self._ids_storages: dict[int, torch.Tensor] = {}
        self._weight_storages: dict[int, str] = {}
        self._normalised: set[int] = set()
        self._denominators: set[int] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._next_id = 1
        self._modules: list[str] = []
        self._names = {id(m): name for name, m in model.named_modules()}
        for name, parameter in model.named_parameters():
            self.shapes[name] = tuple(parameter.shape)
            self.set_weight(parameter, Weight(name, coordinates(tuple(parameter.shape))))

    # ---- where we are -------------------------------------------------------------------------------------------

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Know the module that is running, for the words of a reason."""
        thread = threading.get_ident()  # the hooks see the modules of every thread, and others may trace, too

        def enter(module: torch.nn.Module, _args: Any) -> None:
            if threading.get_ident() == thread:
                self._modules.append(self._names.get(id(module), type(module).__name__))

        def leave(_module: torch.nn.Module, _args: Any, _out: Any) -> None:
            if threading.get_ident() == thread:
                self._modules.pop()

        before = torch.nn.modules.module.register_module_forward_pre_hook(enter)
        after = torch.nn.modules.module.register_module_forward_hook(leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    @property
    def module(self) -> str:
        return self._modules[-1] if self._modules and self._modules[-1] else "the model"

    def leave_modules(self) -> None:
        """The forward is over, if by an error."""
        self._modules.clear()

    # ---- tensors ------------------------------------------------------------------------------------------------

    def ids_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        return self._ids.get(tensor._cdata)

    def weight_of(self, tensor: torch.Tensor) -> Weight | None:
        return self._weights.get(tensor._cdata)

    def set_ids(self, tensor: torch.Tensor, ids: torch.Tensor) -> None:
        self.accounted_for = True
        self._alive.append(tensor)
        self._ids[tensor._cdata] = ids
        self._ids_storages[tensor.untyped_storage()._cdata] = ids

    def set_weight(self, tensor: torch.Tensor, weight: Weight) -> None:
        self._alive.append(tensor)
        self._weights[tensor._cdata] = weight
        self._weight_storages[tensor.untyped_storage()._cdata] = weight.name

    def is_denominator(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor is a norm, or its reciprocal: what is multiplied by it has been normalised."""
        return tensor._cdata in self._denominators

    def is_normalised(self, tensor: torch.Tensor) -> bool:
        return tensor._cdata in self._normalised

    def is_normalised_afresh(self, tensor: torch.Tensor) -> bool:
        """Normalised, and not scaled by a gain that could still be folded."""
        ids = self.ids_of(tensor)
        still = ids is not None and any(name not in self.trace.kept for name in self.trace.gains_of(ids))
        return self.is_normalised(tensor) and not still

    def mark_denominator(self, *tensors: torch.Tensor) -> None:
        self._alive += tensors
        self._denominators.update(t._cdata for t in tensors)

    def mark_normalised(self, *tensors: torch.Tensor) -> None:
        self._alive += tensors
        self._normalised.update(t._cdata for t in tensors)

    def same_weight(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether two tensors are the same view of the same parameter."""
        first, second = self.weight_of(a), self.weight_of(b)
        if first is None or second is None:
            return False
        same = all(
            x.data_ptr() == y.data_ptr() and x.stride() == y.stride()
            for x, y in zip(first.coords, second.coords, strict=True)
        )
        return same and (first.name, first.scale, first.offset) == (second.name, second.scale, second.offset)

    # ---- what happens to gains and weights -------------------------------------------------------------------------

    def register_gain(self, out: torch.Tensor, weight: Weight, coords: tuple[torch.Tensor, ...]) -> None:
        """`out` is a normalised activation times the gain `weight`, whose coords are broadcast to out's shape."""
        shape = self.shapes[weight.name]
        if weight.scale == 0.0 or any(bool((small(c) == UNKNOWN).any()) for c in coords):
            self.other_use(weight, "index" if weight.scale else "mul")
            return
        gain = self.trace.gains.get(weight.name)
        if gain is None:
            gain = Gain(weight.name, shape, self.module, weight.scale, weight.offset, self._next_id)
            self._next_id += gain.size
            self.trace.gains[weight.name] = gain
        elif (gain.scale, gain.offset) != (weight.scale, weight.offset):
            self.trace.kept.setdefault(weight.name, "its weight is used in two different conventions")
        flat = torch.zeros((), dtype=torch.int64)
        for n, c in zip(shape, coords, strict=True):
            flat = flat * n + c
        self.set_ids(out, (flat + gain.first_id).expand(out.shape))

    def register_read(self, weight: Weight, along: int, ids: torch.Tensor | None, operation: str) -> bool:
        """`weight` is contracted along its view's dimension `along` with channels scaled by the 1-D `ids`.

        Returns False where the contraction does not run along exactly one dimension of the parameter.
        """
        dims = [d for d, c in enumerate(weight.coords) if along in varying_dims(c)]
        if len(dims) != 1 or varying_dims(weight.coords[dims[0]]) != [along] or weight.offset != 0.0:
            self.other_use(weight, operation)
            return False
        dim = dims[0]
        full = torch.full((self.shapes[weight.name][dim],), UNUSED)
        full[profile(weight.coords[dim], along)] = ids if ids is not None else 0
        self.uses.setdefault(weight.name, []).append((dim, full, self.module))
        self.accounted_for = True
        return True

    def other_use(self, weight: Weight, operation: str) -> None:
        """A parameter is used in a way that no gain can be folded into."""
        self.other_uses.setdefault(weight.name, (operation, self.module))

    def escape(self, ids: torch.Tensor, why: str) -> None:
        """The gains in `ids` cannot be folded; the first reason stands."""
        self.accounted_for = True
        for name in self.trace.gains_of(ids):
            self.trace.kept.setdefault(name, f"{why} in `{self.module}`")

    def escape_all(self, call: Call, why: str) -> None:
        """Nothing that the operation was given can be followed through it."""
        for ids in call.ids:
            if ids is not None:
                self.escape(ids, why)
        for weight in call.weights:
            if weight is not None:
                self.other_use(weight, call.name)

    def escape_through_answer(self, name: str, args: Any) -> None:
        """An answer carries no ids: whatever scaled its inputs has escaped."""
        for tensor in tensors_in(args):
            ids, weight = self.ids_of(tensor), self.weight_of(tensor)
            if ids is not None:
                self.escape(ids, f"its output decides what the model does (`{name}`)")
            if weight is not None:
                self.trace.reached.add(weight.name)
                self.other_use(weight, name)

    def escape_through_alias(self, tensor: torch.Tensor, name: str) -> None:
        """Another object for the memory of a weight or of a scaled tensor (`nn.Parameter(w)`): out of our sight."""
        storage = tensor.untyped_storage()._cdata
        if storage in self._weight_storages:
            alias = self._weight_storages[storage]
            self.trace.reached.add(alias)
            self.other_uses.setdefault(alias, (name, self.module))
        if storage in self._ids_storages:
            self.escape(self._ids_storages[storage], words(name))

    def drop_reshaped(self, inputs: list[torch.Tensor], name: str) -> None:
        """An operation in place has changed a tensor's shape (`transpose_`): its companion, escaped, is void."""
        for t in inputs:
            ids, weight = self.ids_of(t), self.weight_of(t)
            if ids is not None and ids.shape != t.shape:
                self.escape(self._ids.pop(t._cdata), words(name))
            if weight is not None and any(c.shape != t.shape for c in weight.coords):
                self.other_use(self._weights.pop(t._cdata), name)

    def on_output(self, output: Any) -> None:
        """The forward has returned `output`: gains in it have left the model."""
        for tensor in tensors_in_objects(output):
            ids = self.ids_of(tensor)
            if ids is not None:
                for name in self.trace.gains_of(ids):
                    self.trace.kept.setdefault(name, "the model returns its output")


def words(operation: str) -> str:
    """What an operation does to a gain, for somebody who knows the model and not ATen."""
    name = operation.rstrip("_")
    if "attention" in name:
        return SCORES
    if name in _NORMALISING:
        return "its output is normalised or averaged again"
    if name in _WRITING:
        return "its output is written into another tensor"
    return f"its output goes through `{name}`, which a per-channel gain cannot pass,"


def tensors_in_objects(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested outputs, caches and other plain objects included."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif not isinstance(value, (str, bytes, int, float, type, torch.nn.Module)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                todo.extend(value)
            todo.extend(vars(value).values() if hasattr(value, "__dict__") else ())
            slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
            todo.extend(getattr(value, slot, None) for slot in slots)
