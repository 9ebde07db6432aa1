"""What each contraction does to a gain: a parameter that sums over scaled channels is a reader of the gain."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from flashnorm_cli.trace.companions import constant_along, profile, varying_dims
from flashnorm_cli.trace.rules import Rule
from flashnorm_cli.trace.state import SCORES, Call, State, Weight, words

PLAIN = frozenset("mm bmm mv dot _grouped_mm grouped_mm_fallback".split())
# a + x @ y
ADDING = frozenset("addmm baddbmm addmv addbmm".split())
PRODUCTS = PLAIN | ADDING


@dataclass(frozen=True)
class _Side:
    """One factor of a product; `k` is the dimension that is summed over."""

    ids: torch.Tensor | None
    weight: Weight | None
    k: int
    is_left: bool


def plain_product(state: State, call: Call, weight_dim: int = -2) -> bool:
    _product(state, call.name, call.inputs[0], call.inputs[1], call.out, weight_dim)
    return True


def adding_product(state: State, call: Call) -> bool:
    if call.ids[0] is not None:
        return False
    if call.weights[0] is not None:
        state.other_use(call.weights[0], call.name)
    _product(state, call.name, call.inputs[1], call.inputs[2], call.out)
    return True


def _product(
    state: State, name: str, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, weight_dim: int = -2
) -> None:
    """left[..., i, k] @ right[..., k, j]; `weight_dim` is k's place in `right`."""
    sides = (
        _Side(state.ids_of(left), state.weight_of(left), left.ndim - 1, True),
        _Side(state.ids_of(right), state.weight_of(right), max(right.ndim + weight_dim, 0), False),
    )
    weights = [side.weight for side in sides if side.weight is not None]
    if len(weights) == 2:
        for weight in weights:
            state.other_use(weight, name)
    elif not weights:
        for side, other in (sides, sides[::-1]):
            if side.ids is None:
                continue
            if other.ids is None and name in ("mm", "bmm") and constant_along(side.ids, [side.k]):
                _pass_through(state, side, out)
            else:
                state.escape(side.ids, SCORES)
    elif sides[0].weight is not None:
        _read(state, name, sides[0].weight, sides[0].k, sides[1], out)
    else:
        _read(state, name, weights[0], sides[1].k, sides[0], out)


def _read(state: State, name: str, weight: Weight, along: int, x: _Side, out: torch.Tensor) -> None:
    """The parameter `weight`, summed over its dimension `along`, reads the activation `x`."""
    if x.ids is None:
        state.register_read(weight, along, None, name)
        return
    varying = varying_dims(x.ids)
    if x.k in varying and len(varying) > 1:
        state.other_use(weight, name)
        state.escape(x.ids, f"`{weight.name}` reads it with a different gain per row")
    elif x.k in varying or not varying:
        if not state.register_read(weight, along, profile(x.ids, x.k), name):
            state.escape(x.ids, f"`{weight.name}` does not read it along one dimension")
    else:  # the gain lies along another dimension and passes through
        state.register_read(weight, along, None, name)
        if name in ("mm", "bmm"):
            _pass_through(state, x, out)
        else:
            state.escape(x.ids, words(name))


def _pass_through(state: State, side: _Side, out: torch.Tensor) -> None:
    """The summed dimension carries one gain per row (or column): the product keeps it."""
    ids, k = side.ids, side.k
    if ids is None:
        return
    kept = ids.select(k, 0) if ids.shape[k] else ids.new_zeros(ids.shape[:k] + ids.shape[k + 1 :])
    state.set_ids(out, kept.unsqueeze(-1 if side.is_left else -2).expand(out.shape))


def convolution(state: State, call: Call) -> bool:
    x, weight_tensor, bias, *_rest, transposed, _output_padding, groups = call.args
    ids, weight = state.ids_of(x), state.weight_of(weight_tensor)
    bias_weight = state.weight_of(bias) if isinstance(bias, torch.Tensor) else None
    if bias_weight is not None:
        state.other_use(bias_weight, "convolution")
    depthwise = groups == x.shape[1] == weight_tensor.shape[0]
    if weight is None or transposed or not (groups == 1 or depthwise):
        return False
    along = 1 if groups == 1 else 0  # a depthwise kernel has one filter per channel, along its first dimension
    if ids is None:
        return state.register_read(weight, along, None, "convolution")
    return varying_dims(ids) in ([], [1]) and state.register_read(weight, along, profile(ids, 1), "convolution")


RULES: dict[str, Rule] = {
    **dict.fromkeys(PLAIN, plain_product),
    **dict.fromkeys(ADDING, adding_product),
    "linear": partial(plain_product, weight_dim=-1),
    "convolution": convolution,
}
