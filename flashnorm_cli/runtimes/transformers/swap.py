"""Norm modules of a transformers model that run without their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm_cli.norms.detect import PlainNorm, copy_with, plain_norms
from flashnorm_cli.norms.ops import rms_norm
from flashnorm_cli.runtimes.transformers.products import Group

# (dtype of the input, dtype of the weight) -> (dtype that is normed in, dtype of the result)
_Ways = dict[tuple[torch.dtype, torch.dtype], tuple[torch.dtype, torch.dtype]]


class _Absent:
    """Hides an attribute of the base class: Hugging Face's `kernels` replaces the forward of what has this one."""

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        raise AttributeError("kernel_layer_name")


class _Weightless(nn.Module):
    """What `make_weightless` puts in front of a norm's own class.

    The parameter stays where it is, for state dicts, for code that asks its dtype, and for the way back; calls do not
    read it. A call that is not the plain one (more arguments, float64) goes to the class's own forward.
    """

    _plain_norm: PlainNorm
    _ways: _Ways
    _wanted_grad: bool  # whether the weight is to be trained once it is in use again
    _deferred: Group | None = None  # the product of its readers, which it hands on in the place of its own output
    _readers: int = 0
    kernel_layer_name = _Absent()

    def forward(self, *arguments: Any, **more: Any) -> Any:
        norm = self._plain_norm
        if len(arguments) == 1 and not more:
            x: Tensor = arguments[0]
            group = self._deferred
            if group is not None and not self._forward_hooks and (product := group.emit(x, self._readers)) is not None:
                return product
            weight: Any = self._parameters[norm.weight]
            way = self._ways.get((x.dtype, weight.dtype))
            if way is not None:
                y = rms_norm(x if x.dtype == way[0] else x.to(way[0]), norm.eps)
                return y if y.dtype == way[1] else y.to(way[1])
        return super().forward(*arguments, **more)

    def extra_repr(self) -> str:
        return ", ".join(part for part in (super().extra_repr(), "weightless") if part)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *more: Any) -> None:
        norm, (_, _, _, _, errors) = self._plain_norm, more
        weight = state_dict.get(prefix + norm.weight)
        if weight is not None and not weight.is_meta and bool((weight != 1 - norm.offset).any()):
            errors.append(
                f"{prefix}{norm.weight} is not the identity, but this norm is weightless and would not read it; "
                "undo that with flashnorm_cli.weighted(model) first"
            )
        super()._load_from_state_dict(state_dict, prefix, *more)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles: the class is made on the spot, and nobody could import it."""
        return _new_weightless, (type(self).__mro__[2],), self.__getstate__()


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _weightless_class(base: type[nn.Module]) -> type[nn.Module]:
    name, about = f"Weightless{base.__name__}", {"__module__": base.__module__}
    return _classes.setdefault(base, _classes.get(base) or type(name, (_Weightless, base), about))


def _new_weightless(base: type[nn.Module]) -> nn.Module:
    cls = _weightless_class(base)
    return cls.__new__(cls)


def is_weightless(module: nn.Module) -> bool:
    return isinstance(module, _Weightless)


def weightless_ways(module: nn.Module, norm: PlainNorm) -> _Ways:
    """How `rms_norm` gives what the module gives with an identity weight, by dtypes of input and weight.

    A residual stream in float32 before a bfloat16 norm, or a norm kept in float32: classes differ in the dtype of the
    result, and in when they round to it. A copy of the module is asked. Combinations for which no order of casts comes
    within one rounding are left out (a class that computes in bfloat16 throughout, say); on a CPU, all that are here
    give the same bits for the classes of transformers 5.24.
    """
    halves = (torch.bfloat16, torch.float16)
    shape, ways = norm.parameter(module).shape, _Ways()
    generator = torch.Generator("cpu").manual_seed(0)
    values = torch.randn(16, *shape, generator=generator, dtype=torch.float32, device="cpu")
    for theirs in (*halves, torch.float32):
        identity = torch.full(shape, 1 - norm.offset, dtype=theirs, device="cpu")
        for mine in (*halves, torch.float32):
            x = values.to(mine)
            try:
                with torch.no_grad(), torch.device("cpu"):
                    found = type(module).forward(copy_with(module, norm.weight, identity), x.clone())
            except (RuntimeError, TypeError):  # a formula that knows no mixed dtypes
                continue
            inside = dict.fromkeys((mine, torch.promote_types(mine, theirs)))
            ours = {each: rms_norm(x.to(each), norm.eps).to(found.dtype) for each in inside}
            near = torch.finfo(found.dtype).eps * (8 if found.dtype == torch.float32 else 1)
            same = [each for each, y in ours.items() if torch.equal(y, found)]
            same += [each for each, y in ours.items() if ((y - found).abs() <= near * found.abs()).all()]
            if same:
                ways[mine, theirs] = same[0], found.dtype
    return ways


def make_weightless(module: nn.Module, norm: PlainNorm, ways: _Ways | None = None) -> None:
    """Let a plain RMSNorm whose weight is the identity run without it, from now on. Its class becomes a subclass.

    The weight gets no gradient any more, so it is frozen, lest optimizers and DistributedDataParallel wait for one.
    """
    parameter = norm.parameter(module)
    mine: Any = module
    mine._plain_norm, mine._wanted_grad = norm, parameter.requires_grad
    mine._ways = weightless_ways(module, norm) if ways is None else ways
    parameter.requires_grad_(False)
    _become(module, _weightless_class(type(module)))


def make_weighted(module: nn.Module) -> None:
    """The way back: the module's own class, and its weight trained if it was before."""
    mine: Any = module
    if mine._wanted_grad:
        mine._plain_norm.parameter(module).requires_grad_(True)
    del mine._plain_norm, mine._ways, mine._wanted_grad
    vars(module).pop("_deferred", None)
    _become(module, type(module).__mro__[2])


def _become(module: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of an instance, and what stands on it that is bound to the old one's forward (`own_forward`)."""
    hooked = "_old_forward" in vars(module)
    if not hooked:
        vars(module).pop("forward", None)
    module.__class__ = cls
    if hooked:  # accelerate calls the forward that it found
        module._old_forward = MethodType(cls.forward, module)  # type: ignore[assignment]


# Given a module and what it is, the forward for it; None to leave it alone.
Choose = Callable[[nn.Module, PlainNorm], Callable[[Tensor], Tensor] | None]


def on_kernel(module: nn.Module, norm: PlainNorm) -> Callable[[Tensor], Tensor]:
    """A forward on this project's kernel, weightless where the weight is the identity."""
    if norm.is_identity(module):
        return lambda x: rms_norm(x, norm.eps)
    weight = norm.parameter(module)
    return lambda x: rms_norm(x, norm.eps, weight=weight, offset=norm.offset)


@contextmanager
def norms_replaced(model: nn.Module, choose: Choose = on_kernel) -> Iterator[list[str]]:
    """Run a model's plain RMSNorms another way within the block, instance by instance.

    With `on_kernel`, those whose weight is the identity run as `weightless` makes them. Calls that another replacement
    does not know (more arguments, another dtype than the weight's, where the module's own result would be of the wider
    dtype) go to the module's own forward.

    Yields:
        The names of the modules that were replaced.
    """
    replaced: dict[str, nn.Module] = {}
    ways: dict[Any, _Ways] = {}
    try:
        for name, (module, norm) in plain_norms(model).items():
            if choose is on_kernel and norm.is_identity(module):
                kind = type(module), norm, norm.parameter(module).shape
                ways[kind] = ways[kind] if kind in ways else weightless_ways(module, norm)
                make_weightless(module, norm, ways[kind])
                replaced[name] = module
            elif "forward" not in vars(module) and (forward := choose(module, norm)) is not None:
                module.forward = _guarded(module, norm, forward)
                replaced[name] = module
        yield list(replaced)
    finally:
        for module in replaced.values():
            if is_weightless(module):
                make_weighted(module)
            else:
                del module.forward


def _guarded(module: nn.Module, norm: PlainNorm, forward: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    own, dtype = module.forward, norm.parameter(module).dtype

    def guarded(x: Any, *arguments: Any, **more: Any) -> Any:
        if arguments or more or not isinstance(x, Tensor) or x.dtype != dtype:
            return own(x, *arguments, **more)
        return forward(x)

    return guarded
