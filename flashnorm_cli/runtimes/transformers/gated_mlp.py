"""Which modules are gated MLPs, `down(act(gate(x)) * up(x))`, told from what they compute."""

from __future__ import annotations

from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flashnorm_cli.norms.linear_torch import ACTIVATIONS

_SAME = 1e-5  # relative; float32 against float32
_IN, _INNER = 6, 10


class GatedMlp(NamedTuple):
    """The names of its linears. Without `up`, `gate` holds both halves, the gate first."""

    gate: str
    up: str | None
    down: str
    activation: str


def read_mlp(module: nn.Module) -> GatedMlp | None:
    """Tell whether a module is a gated MLP, by running a copy of it with small random linears.

    Names differ between families; what they compute is one formula. Children other than linears are shared with the
    copy (activations), so they may hold no parameters.
    """
    linears = [name for name, child in module.named_children() if type(child) is nn.Linear]
    others = [child for child in module.children() if type(child) is not nn.Linear]
    if len(linears) not in (2, 3) or "forward" in vars(module) or any(True for c in others for _ in c.parameters()):
        return None
    if any(True for _ in module.parameters(recurse=False)):
        return None
    for roles in permutations(linears):
        gate, *middle, down = roles
        up = middle[0] if middle else None
        small = _small(module, gate, up, down)
        if small is None:
            continue
        x = torch.randn(2, 3, _IN, generator=torch.Generator().manual_seed(1))
        try:
            with torch.no_grad(), torch.device("cpu"):
                found = type(module).forward(small, x.clone())
        except Exception:  # a module of any kind, run with an input that it may not expect
            continue
        if not isinstance(found, Tensor) or found.shape != x.shape:
            continue
        for name, activate in ACTIVATIONS.items():
            with torch.no_grad():
                first = small.get_submodule(gate)(x)
                halves = first.chunk(2, -1) if up is None else (first, small.get_submodule(up)(x))
                want = small.get_submodule(down)(activate(halves[0]) * halves[1])
            if (found - want).abs().max() <= _SAME * want.abs().max():
                return GatedMlp(gate, up, down, name)
    return None


def _small(module: nn.Module, gate: str, up: str | None, down: str) -> nn.Module | None:
    """A copy in eval mode on the CPU whose linears are small; None where the shapes cannot be those of the roles."""
    sizes = {gate: (_IN, _INNER if up else 2 * _INNER), down: (_INNER, _IN)} | ({up: (_IN, _INNER)} if up else {})
    last: Any = module.get_submodule(down)
    for name in sizes:
        child: Any = module.get_submodule(name)
        wide = last.in_features * (2 if name == gate and up is None else 1)
        if name != down and (child.out_features, child.in_features) != (wide, last.out_features):
            return None
    copy: nn.Module = object.__new__(type(module))
    nn.Module.__init__(copy)
    vars(copy).update({key: value for key, value in vars(module).items() if key not in vars(copy)})
    generator = torch.Generator().manual_seed(0)
    for name, child in module.named_children():
        if name not in sizes:
            copy.add_module(name, child)
            continue
        linear = nn.Linear(*sizes[name], bias=child.bias is not None, device="cpu", dtype=torch.float32)
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        copy.add_module(name, linear)
    copy.training = False
    return copy
