"""Which modules of a model are plain RMSNorms, told from what they compute, and running those on the kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm_cli.norms.ops import rms_norm

_SAME = 1e-5  # relative; float32 against float32


@dataclass(frozen=True)
class PlainNorm:
    """An RMSNorm module: `rms_norm(x, eps) * (weight + offset)`, `weight` being its parameter of that name."""

    eps: float
    offset: float  # 0 for w, 1 for 1 + w
    weight: str

    def parameter(self, module: nn.Module) -> Tensor:
        return module.get_parameter(self.weight)

    def is_identity(self, module: nn.Module) -> bool:
        """Whether the weight changes nothing, as fold leaves it. Reads the weight, so it waits for the GPU."""
        return bool((self.parameter(module).detach() == 1 - self.offset).all())


def read_norm(module: nn.Module) -> PlainNorm | None:
    """Tell whether a module is a plain RMSNorm, by running a copy of it on random numbers.

    Class names and attribute names of 200 model families differ; what they compute is one of two formulas. A copy
    with a random weight is run in float32 on inputs of ordinary and of tiny size (where eps shows) and compared with
    both.

    Returns:
        What it computes, or None: for another module, for one whose forward was replaced, and for weights that are
        not there (meta).
    """
    parameters = dict(module.named_parameters())
    if len(parameters) != 1 or next(module.children(), None) is not None or "forward" in vars(module):
        return None
    (name, weight), *_ = parameters.items()
    if weight.dim() != 1 or weight.numel() == 0 or weight.is_meta or not weight.is_floating_point():
        return None
    candidates = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1}
    if not candidates:
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, weight.numel(), generator=generator)
    x[1] *= 1e-3
    try:
        copy = deepcopy(module).to("cpu", torch.float32)
        with torch.no_grad():
            copy.get_parameter(name).copy_(torch.rand(weight.numel(), generator=generator) + 0.3)
            found = type(module).forward(copy, x.clone())
    except Exception:  # a module of any kind, run with an input that it may not expect
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    gain = copy.get_parameter(name).detach()
    for eps in candidates:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            want = normed * (gain + offset)
            if ((found - want).abs() <= _SAME * (want.abs() + 1e-3 * want.abs().mean(-1, keepdim=True))).all():
                return PlainNorm(eps, offset, name)
    return None


def plain_norms(model: nn.Module) -> dict[str, tuple[nn.Module, PlainNorm]]:
    """The plain RMSNorms of a model by module name. Modules of one class and one set of attributes are run once."""
    known: dict[Any, PlainNorm | None] = {}
    found = {}
    for name, module in model.named_modules():
        weights = list(module.parameters(recurse=False))
        if len(weights) != 1 or weights[0].dim() != 1:
            continue
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str))}
        key = (type(module), weights[0].shape, repr(sorted(plain.items())), "forward" in vars(module))
        if key not in known:
            known[key] = read_norm(module)
        if (norm := known[key]) is not None:
            found[name] = (module, norm)
    return found


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

    Calls that the replacement does not know (more arguments, another dtype than the weight's, where the module's own
    result would be of the wider dtype) go to the module's own forward.

    Yields:
        The names of the modules that were replaced.
    """
    replaced: dict[str, nn.Module] = {}
    try:
        for name, (module, norm) in plain_norms(model).items():
            forward = choose(module, norm)
            if forward is not None:
                module.forward = _guarded(module, norm, forward)
                replaced[name] = module
        yield list(replaced)
    finally:
        for module in replaced.values():
            del module.forward


def _guarded(module: nn.Module, norm: PlainNorm, forward: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    own, dtype = module.forward, norm.parameter(module).dtype

    def guarded(x: Any, *arguments: Any, **more: Any) -> Any:
        if arguments or more or not isinstance(x, Tensor) or x.dtype != dtype:
            return own(x, *arguments, **more)
        return forward(x)

    return guarded
