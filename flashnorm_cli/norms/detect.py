"""Which modules of a model are plain RMSNorms, told from what they compute, and running those without a weight."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

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
    both. The module's own weight is not looked at: it may be anywhere.

    Returns:
        What it computes, or None: for another module, and for one whose forward was replaced (accelerate's hooks
        are no replacement).
    """
    parameters = dict(module.named_parameters())
    if len(parameters) != 1 or next(module.children(), None) is not None or not own_forward(module):
        return None
    (name, weight), *_ = parameters.items()
    if weight.dim() != 1 or weight.numel() == 0 or not weight.is_floating_point():
        return None
    candidates = {v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 0.1}
    if (
        not candidates or len(inspect.signature(type(module).forward).parameters) != 2
    ):  # a gate, if only an optional one
        return None
    generator = torch.Generator("cpu").manual_seed(0)
    cpu: dict[str, Any] = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    x = torch.randn(2, 3, weight.numel(), **cpu)
    x[1] *= 1e-3
    gain = torch.rand(weight.numel(), **cpu) + 0.3
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = type(module).forward(copy_with(module, name, gain), x.clone())
    except Exception:  # a module of any kind, run with an input that it may not expect
        return None
    if not isinstance(found, Tensor) or found.shape != x.shape:
        return None
    for eps in candidates:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        for offset in (0.0, 1.0):
            want = normed * (gain + offset)
            if ((found - want).abs() <= _SAME * (want.abs() + 1e-3 * want.abs().mean(-1, keepdim=True))).all():
                return PlainNorm(eps, offset, name)
    return None


def own_forward(module: nn.Module) -> bool:
    """Whether a call ends in the class's forward: nobody has put another one on the instance.

    Accelerate's hooks call it in the end; Hugging Face's `kernels` puts it there where it has nothing better.
    """
    mine = vars(module)
    last = mine.get("_old_forward" if "_hf_hook" in mine else "forward")
    return last is None or getattr(last, "__func__", None) is type(module).forward


def copy_with(module: nn.Module, name: str, weight: Tensor) -> nn.Module:
    """A copy on the CPU, without hooks, with this weight."""
    copy: nn.Module = object.__new__(type(module))
    nn.Module.__init__(copy)
    left = {*vars(copy), "forward", "_old_forward", "_hf_hook"}
    vars(copy).update({key: deepcopy(value) for key, value in vars(module).items() if key not in left})
    for key, buffer in module.named_buffers(recurse=False):
        copy.register_buffer(key, buffer.detach().to("cpu", weight.dtype, copy=True))
    copy.register_parameter(name, nn.Parameter(weight))
    return copy


def norm_reader() -> Callable[[nn.Module], PlainNorm | None]:
    """`read_norm` that runs modules of one class and one set of attributes once."""
    known: dict[Any, PlainNorm | None] = {}

    def read(module: nn.Module) -> PlainNorm | None:
        weights = list(module.parameters(recurse=False))
        if len(weights) != 1 or weights[0].dim() != 1:
            return None
        plain: dict[str, Any] = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str))}
        key = (type(module), weights[0].shape, repr(sorted(plain.items())), own_forward(module))
        if key not in known:
            known[key] = read_norm(module)
        return known[key]

    return read


def plain_norms(model: nn.Module) -> dict[str, tuple[nn.Module, PlainNorm]]:
    """The plain RMSNorms of a model by module name, those whose weights are in memory."""
    read, found = norm_reader(), {}
    for name, module in model.named_modules():
        if not any(p.is_meta for p in module.parameters(recurse=False)) and (norm := read(module)) is not None:
            found[name] = (module, norm)
    return found


# ---- for good: an instance that has no use for its weight ------------------------------------------------------------


# ---- for a while: verify and benchmarks ------------------------------------------------------------------------------
