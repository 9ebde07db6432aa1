"""What one forward of a model does with its tensors: which module hands which tensor to whom, told by identity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from flashnorm_cli.trace.forward import call_with, token_ids

TOKENS = 3
# Questions about a tensor that do not read its elements.
_QUESTIONS = set(
    "__get__ size dim ndimension stride is_floating_point numel get_device __len__ data_ptr is_contiguous "
    "storage_offset element_size".split()
)


@dataclass
class Op:
    """A function of torch that was called, in which module's own code, on what."""

    name: str
    scope: str
    inputs: list[Tensor]
    out: Any
    positional: tuple[Any, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)


@dataclass
class Call:
    """A call of a module."""

    arguments: tuple[Any, ...]
    more: dict[str, Any]
    out: Any = None


@dataclass
class Observed:
    """A forward. It holds every tensor that it names, so that no identity is used twice."""

    ops: list[Op] = field(default_factory=list)
    calls: dict[str, list[Call]] = field(default_factory=dict)
    uses: dict[int, list[Op]] = field(default_factory=dict)  # by id of a tensor

    def only_call(self, name: str) -> Call | None:
        """The call of a module that was called once."""
        found = self.calls.get(name, [])
        return found[0] if len(found) == 1 else None

    def uses_of(self, tensor: Any, maker: str) -> list[Op]:
        """What reads a tensor outside the module that made it."""
        ops = self.uses.get(id(tensor), [])
        return [op for op in ops if op.scope != maker and not op.scope.startswith(f"{maker}.")]

    def returned_by(self, tensor: Any) -> set[str]:
        """The modules whose output this very tensor is or is a part of."""
        return {name for name, calls in self.calls.items() for c in calls if any(t is tensor for t in tensors(c.out))}


def tensors(found: Any) -> Iterator[Tensor]:
    """The tensors in arguments or in an output."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, dict):
        for each in found.values():
            yield from tensors(each)
    elif isinstance(found, (list, tuple)):
        for each in found:
            yield from tensors(each)


class _Watch(TorchFunctionMode):
    def __init__(self, seen: Observed) -> None:
        super().__init__()
        self.seen, self.scopes = seen, [""]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", repr(func))
        if name not in _QUESTIONS:
            op = Op(name, self.scopes[-1], [*tensors(args), *tensors(kwargs)], out, tuple(args), dict(kwargs or {}))
            self.seen.ops.append(op)
            for each in {id(t): t for t in op.inputs}.values():
                self.seen.uses.setdefault(id(each), []).append(op)
        return out

    def hooks(self, name: str) -> tuple[Callable[..., None], Callable[..., None]]:
        def enter(module: nn.Module, arguments: Any, more: Any) -> None:
            self.scopes.append(name)
            self.seen.calls.setdefault(name, []).append(Call(arguments, dict(more)))

        def leave(module: nn.Module, arguments: Any, more: Any, out: Any) -> None:
            self.scopes.pop()
            self.seen.calls[name][-1].out = out

        return enter, leave


def inputs_of(model: Any) -> dict[str, Any]:
    """A few token ids on the model's device, and what else its forward cannot do without."""
    device = next(p.device for p in model.parameters() if not p.is_meta)
    return call_with(model, token_ids(model, 1, TOKENS).to(device))


def observe(model: Any) -> Observed:
    """Run a forward over a few tokens and write down who reads what. The model is in eval mode for that time.

    Raises whatever the forward raises.
    """
    seen = Observed()
    watch = _Watch(seen)
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        for name, module in model.named_modules():
            enter, leave = watch.hooks(name)
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        try:
            for module in training:
                module.training = False
            with torch.no_grad(), watch:
                model(**inputs_of(model))
        finally:
            for module in training:
                module.training = True
    return seen
