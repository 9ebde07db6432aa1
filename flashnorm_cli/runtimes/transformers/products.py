"""Linears that run merged, with the norm before them and the residual add behind them: what a forward goes through.

A norm that is deferred hands on the product of its readers in the place of its own output, and each reader takes its
part of it. Who hands what to whom was observed before (deferred.py), tensor by tensor; a reader knows the product by
its identity, so that any other tensor is multiplied as ever.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashnorm_cli.cuda.linear_variants import MAX_ROWS
from flashnorm_cli.norms.linear import norm_linear


class Slot(threading.local):
    """What is under way between two modules, in this thread."""

    product: Tensor | None = None
    left: int = 0  # readers that have not taken their part yet
    residual: Tensor | None = None

    def __reduce__(self) -> Any:  # a copy of a model has nothing under way
        return Slot, ()


class Member(NamedTuple):
    """A linear of a group: where it stands, and its weight."""

    owner: nn.Module
    key: str
    module: nn.Linear


class Group:
    """Linears that read the same input, as one product: their weights are views of one matrix.

    Parameters stay parameters: `state_dict`, `save_pretrained` and the bytes in memory are what they were.
    """

    def __init__(self, members: list[Member], eps: float | None, activation: str | None = None) -> None:
        self.members, self.eps, self.activation = members, eps, activation
        self.slot = Slot()
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        self.parameters: list[nn.Parameter] = []
        self.pointers: list[int] = []
        self.refresh()

    def refresh(self) -> None:
        """Merge the weights where they are not; nothing where they differ in device or dtype (a model half moved)."""
        parts: list[Any] = [member.module.weight for member in self.members]
        biases = [member.module.bias for member in self.members]
        if self.weight is not None and self._merged(parts):
            return
        self.weight = self.bias = None
        everything = [*parts, *(b for b in biases if b is not None)]
        if len({(p.device, p.dtype) for p in everything}) > 1 or any(p.is_meta for p in everything):
            return
        self.weight, self.bias = _merge(parts), _merge(biases) if biases[0] is not None else None
        self.parameters, self.pointers = parts, [p.data_ptr() for p in parts]

    def _merged(self, parts: list[Any]) -> bool:
        return len(parts) == len(self.parameters) and all(
            part is mine and part.data_ptr() == at
            for part, mine, at in zip(parts, self.parameters, self.pointers, strict=True)
        )

    def why_not(self) -> str | None:
        """Why the linears run by themselves now, or None."""
        if self.weight is None:
            return "its readers are on several devices or of several dtypes"
        for (owner, key, module), parameter in zip(self.members, self.parameters, strict=True):
            if owner._modules.get(key) is not module:
                return f"{key} was replaced"
            if module._parameters["weight"] is not parameter:
                return f"the weight of {key} was replaced"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{key} has a hook"
        return None

    def runs(self, x: Tensor) -> bool:
        """Whether the product is for this input, now."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters):
            return False
        if not torch.compiler.is_compiling() and not self._merged(self.parameters):
            self.refresh()
        weight = self.weight
        return (
            weight is not None
            and not (x.is_cuda and x.numel() > MAX_ROWS * x.size(-1))  # no kernel: the library is faster apart
            and self.why_not() is None
            and x.dtype == weight.dtype
            and x.device == weight.device
            and not torch.is_autocast_enabled(x.device.type)
        )

    def product(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        weight = self.weight
        assert_merged(weight)
        return norm_linear(x, weight, self.eps, self.bias, residual, self.activation)  # type: ignore[arg-type]

    def emit(self, x: Tensor, readers: int) -> Tensor | None:
        """The product, for `readers` modules to take; None where they multiply themselves."""
        if not self.runs(x):
            self.slot.product = None
            return None
        y = self.product(x)
        self.slot.product, self.slot.left = y, readers
        return y

    def take(self, x: Tensor) -> bool:
        """Whether x is the product that is under way. The last reader to ask ends it."""
        slot = self.slot
        if slot.product is None:
            return False
        if x is not slot.product:
            slot.product = None
            raise RuntimeError(
                "a linear whose norm is deferred was given another tensor than its norm's output; this forward differs "
                "from the one that was observed: undo with flashnorm_cli.weighted(model)"
            )
        slot.left -= 1
        if slot.left == 0:
            slot.product = None
        return True


def assert_merged(weight: Tensor | None) -> None:
    if weight is None:
        raise RuntimeError("the weights of a merged product are not in memory")


def _merge(parts: list[Any]) -> Tensor:
    """One matrix of which the parameters become views. Where they are already, nothing moves."""
    if (found := _one_already(parts)) is not None:
        return found
    whole = torch.empty(
        (sum(p.size(0) for p in parts), *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device
    )
    at = 0
    for part in parts:
        whole[at : at + part.size(0)].copy_(part.detach())
        part.data = whole[at : at + part.size(0)]
        at += part.size(0)
    return whole


def _one_already(parts: list[Any]) -> Tensor | None:
    """The matrix of which these are the rows, one after another, or None: a captured CUDA graph knows its address."""
    first, at = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.storage_offset() != at or not part.is_contiguous():
            return None
        at += part.numel()
    rows = sum(part.size(0) for part in parts)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


class Swapped(nn.Module):
    """In front of a module's own class, while its norm is deferred."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class is made on the spot, and nobody could import it."""
        return _new, type(self).__bases__, self.__getstate__()


_classes: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _class_of(kind: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    name, about = f"{kind.__name__}{base.__name__}", {"__module__": base.__module__}
    return _classes.setdefault((kind, base), _classes.get((kind, base)) or type(name, (kind, base), about))


def _new(kind: type[nn.Module], base: type[nn.Module]) -> nn.Module:
    cls = _class_of(kind, base)
    return cls.__new__(cls)


def swap(module: nn.Module, kind: type[nn.Module], **attributes: Any) -> None:
    """Give a module a class of this kind in front of its own, and attributes."""
    for name, value in attributes.items():
        object.__setattr__(module, name, value)
    module.__class__ = _class_of(kind, type(module))


def swap_back(module: nn.Module) -> None:
    for name in ("_group", "_part", "_wiring"):
        vars(module).pop(name, None)
    module.__class__ = type(module).__bases__[1]


class _Linear(Swapped):
    _group: Group

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        out = super()._apply(fn, recurse)
        self._group.refresh()
        return out


class Reader(_Linear):
    """A linear behind a deferred norm: takes its rows of the product that the norm hands on."""

    _part: tuple[int, int] | None  # None: all of it

    def forward(self, x: Tensor) -> Tensor:
        if self._group.take(x):
            return x if self._part is None else x[..., self._part[0] : self._part[1]]
        return super().forward(x)


class Inner(_Linear):
    """A linear of a merged MLP, which calls it only where the product is not to be used."""


class Product(_Linear):
    """A linear by itself, to whose product a layer may have it add the residual stream."""

    def forward(self, x: Tensor) -> Tensor:
        slot = self._group.slot
        residual, slot.residual = slot.residual, None
        if self._group.runs(x) and (residual is None or residual.dtype == x.dtype):
            return self._group.product(x, residual)
        y: Tensor = super().forward(x)
        return y if residual is None else residual + y


class Mlp(Swapped):
    """A gated MLP: gate and up as one product with the activation, behind a norm or not."""

    _group: Group
    _part: str  # the name of its last linear

    def forward(self, x: Tensor) -> Tensor:
        group = self._group
        if group.eps is None:
            if not group.runs(x):
                return super().forward(x)
            x = group.product(x)
        elif not group.take(x):
            return super().forward(x)
        out: Tensor = self._modules[self._part](x)  # type: ignore[misc]
        return out


class Wiring(NamedTuple):
    """A layer `x + attention(norm(x))`, then `x + mlp(norm(x))`: the names of its parts."""

    norm: str
    attention: str
    attention_product: Product | None
    second_norm: str
    mlp: str
    mlp_product: Product | None  # None: the layer adds what comes out itself
    passed: frozenset[str]  # keywords that the layer hands to its attention, by their names
    ignored: dict[str, Any]  # keywords that it was called with and does not hand on
    defaults: dict[str, Any]  # keywords that it hands on without having been given them
    extra: bool  # whether it hands on keywords that it does not know
    known: frozenset[str]  # parameters of its forward


class Layer(Swapped):
    """A decoder layer whose residual adds happen in the products before them."""

    _wiring: Wiring

    def forward(self, *arguments: Any, **more: Any) -> Any:
        wiring = self._wiring
        if len(arguments) != 1 or not self._usual(more):
            return super().forward(*arguments, **more)
        x: Tensor = arguments[0]
        modules: Any = self._modules
        normed = modules[wiring.norm](x)
        handed = {**wiring.defaults, **{name: value for name, value in more.items() if name not in wiring.ignored}}
        out = _with_residual(wiring.attention_product, x, modules[wiring.attention], hidden_states=normed, **handed)
        normed = modules[wiring.second_norm](out)
        return _with_residual(wiring.mlp_product, out, modules[wiring.mlp], normed)

    def _usual(self, more: dict[str, Any]) -> bool:
        """Whether this call is like the one that was observed, and nobody listens in between."""
        wiring, modules = self._wiring, self._modules
        for name, value in more.items():
            if name in wiring.passed or name in wiring.defaults:
                continue
            if name in wiring.ignored:
                if not (value is None or value is False or value is wiring.ignored[name]):
                    return False
            elif name in wiring.known or not wiring.extra:
                return False
        listening = (modules[wiring.attention], modules[wiring.mlp], wiring.attention_product, wiring.mlp_product)
        return not self.training and not any(
            m is not None and (m._forward_hooks or m._forward_pre_hooks) for m in listening
        )


def _with_residual(product: Product | None, residual: Tensor, part: nn.Module, *arguments: Any, **more: Any) -> Tensor:
    """What a part of a layer gives, with the residual added in its last product if that is asked."""
    if product is None:
        out = part(*arguments, **more)
        return residual + (out[0] if isinstance(out, tuple) else out)
    slot = product._group.slot
    slot.residual = residual
    try:
        out = part(*arguments, **more)
        out = out[0] if isinstance(out, tuple) else out
        if slot.residual is not None:  # it was not asked
            out = residual + out
    finally:
        slot.residual = None
    return out
