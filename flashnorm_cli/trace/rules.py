"""What each operation does to a gain: data movement and element-wise operations.

A rule is a function of the state and the call. It says where the gains go, and returns True; False means that it
does not cover this call, so that whatever scales its inputs escapes. `products.py` holds the rules of contractions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashnorm_cli.trace.companions import constant_along, resized
from flashnorm_cli.trace.state import UNKNOWN, Call, State, Weight, words
from flashnorm_cli.trace.values import tensors_in

Rule = Callable[[State, Call], bool]

# Applied to the companion exactly as to the tensor: they only move values.
MOVES = frozenset(
    """view _unsafe_view reshape permute transpose t unsqueeze squeeze expand select slice split split_with_sizes
    chunk unbind unflatten alias detach flip roll narrow diagonal repeat unfold movedim swapaxes
    tensor_split""".split()
)
# The result has the input's shape and values (up to rounding): the companion is shared.
SAME = frozenset("_to_copy clone contiguous lift lift_fresh lift_fresh_copy positive view_copy".split())
# Gathers along dimensions: fine as long as the ids do not vary along the gathered dimension.
GATHERS = frozenset("index index_select gather".split())
JOINS = frozenset("cat stack".split())
SCALINGS = frozenset("mul mul_ div div_".split())
ADDITIONS = frozenset("add add_ sub sub_ rsub".split())
# Rules that look at each of several scaled inputs.
TWO_SIDED = JOINS | SCALINGS | ADDITIONS
# A tensor divided by one of these, or multiplied by the reciprocal, has been normalised.
DENOMINATORS = frozenset("rsqrt sqrt linalg_vector_norm norm std".split())


def follow_normalisation(state: State, name: str, args: Any, inputs: list[torch.Tensor], out: Any) -> None:
    """Know normalised activations, so that only norms count as gains and not layer scales or skip weights."""
    outs = tensors_in(out)
    if name in DENOMINATORS or (name == "pow" and isinstance(args[1], float) and abs(args[1]) == 0.5):
        state.mark_denominator(*outs)
        return
    denominators = [state.is_denominator(t) for t in inputs]
    if name in SCALINGS and len(inputs) == 2 and any(denominators):
        (state.mark_denominator if all(denominators) else state.mark_normalised)(*outs)
    elif any(denominators) and name not in ("mm", "bmm", "addmm"):
        state.mark_denominator(*outs)
    elif any(state.is_normalised(t) for t in inputs) and (name in MOVES | SAME | GATHERS | SCALINGS or name == "neg"):
        state.mark_normalised(*outs)


def move(state: State, call: Call) -> bool:
    if call.func._overloadname == "dtype":  # view(dtype) reinterprets the bits
        return False

    def moved(companion: torch.Tensor) -> list[torch.Tensor]:
        if call.name in SAME:
            return [companion]
        if call.name in ("view", "_unsafe_view"):  # the companion of a contiguous tensor need not be contiguous
            return [companion.reshape(call.out.shape)]
        result = call.func(companion, *call.args[1:], **call.kwargs)
        return list(result) if isinstance(result, (list, tuple)) else [result]

    ids, weight = call.ids[0], call.weights[0]
    if ids is not None:
        for out, companion in zip(call.outs, moved(ids), strict=True):
            state.set_ids(out, companion)
    if weight is not None:
        parts = [moved(c) for c in weight.coords] if weight.coords else []
        for n, out in enumerate(call.outs):
            state.set_weight(out, Weight(weight.name, tuple(p[n] for p in parts), weight.scale, weight.offset))
    return True


def gather(state: State, call: Call) -> bool:
    """Rows picked by indices. The companion is constant along the picked dimensions, so index 0 stands for all."""
    name, args, out = call.name, call.args, call.out
    if any(i is not None for i in call.ids[1:]) or any(call.weights[1:]):
        return False
    if name == "index":
        rows: Any = [None if i is None else torch.zeros(i.shape, dtype=torch.int64) for i in args[1]]
        picked = [d for d, i in enumerate(rows) if i is not None]
    else:
        picked = [args[1] % call.inputs[0].ndim]

    def gathered(companion: torch.Tensor) -> torch.Tensor:
        if name == "index":
            for d in range(companion.ndim):  # keep what is constant small: a stack of experts is large
                if d not in picked and companion.stride(d) == 0:
                    companion = companion.narrow(d, 0, min(1, companion.shape[d]))
            return call.func(companion, rows).expand(out.shape)
        for d in range(companion.ndim):
            size = out.shape[d]
            companion = resized(companion, d, size) if d in picked else companion.narrow(d, 0, size)
        return companion

    ids, weight = call.ids[0], call.weights[0]
    if ids is not None:
        if not constant_along(ids, picked):
            return False
        state.set_ids(out, gathered(ids))
    if weight is not None:
        # Which rows were picked is unknown: the coordinates that vary along them are lost, the others stand.
        coords = tuple(
            gathered(c) if constant_along(c, picked) else torch.full((), UNKNOWN).expand(out.shape)
            for c in weight.coords
        )
        state.set_weight(out, Weight(weight.name, coords, weight.scale, weight.offset))
    return True


def join(state: State, call: Call) -> bool:
    if any(call.weights):
        return False
    zero = torch.zeros((), dtype=torch.int64)
    pairs = zip(call.inputs, call.ids, strict=True)
    companions = [i if i is not None else zero.expand(t.shape) for t, i in pairs]
    state.set_ids(call.out, call.func(companions, *call.args[1:], **call.kwargs))
    return True


def multiply(state: State, call: Call) -> bool:
    inputs, ids, weights, out = call.inputs, call.ids, call.weights, call.out
    if len(inputs) == 1 or (len(inputs) == 2 and not any(weights) and ids[1] is None):
        return _scale(state, call)
    if ids[0] is None and ids[1] is not None and not any(weights) and call.name == "mul":
        state.set_ids(out, ids[1].broadcast_to(out.shape))
        return True
    weight = next((w for w in weights if w is not None), None)
    other = inputs[0] if weights[0] is None else inputs[1]
    both = weights[0] is not None and weights[1] is not None
    if weight is not None and not both and call.name == "mul" and state.is_normalised_afresh(other):
        state.register_gain(out, weight, tuple(c.broadcast_to(out.shape) for c in weight.coords))
        return True
    what = f"`{weight.name}`" if weight is not None else "another scaled tensor"
    state.escape_all(call, f"its output is multiplied by {what}")
    return True


def _scale(state: State, call: Call) -> bool:
    """A number, or an activation without a gain, scales the tensor: the gain stays where it was."""
    args, ids, weight = call.args, call.ids[0], call.weights[0]
    if isinstance(args[0], torch.Tensor) and ids is not None:
        state.set_ids(call.out, ids.broadcast_to(call.out.shape))
    elif weight is not None and not call.name.endswith("_") and isinstance(args[1], (int, float)):
        factor = args[1] if call.name == "mul" else 1 / args[1]
        state.set_weight(call.out, Weight(weight.name, weight.coords, weight.scale * factor, weight.offset * factor))
    else:
        return False
    return True


def add(state: State, call: Call) -> bool:
    ids, out = call.ids, call.out
    if len(call.inputs) == 1 and call.weights[0] is not None and not call.name.endswith("_"):
        state.set_weight(out, _shifted(call, call.weights[0]))
        return True
    if len(call.inputs) == 2 and ids[0] is not None and ids[1] is not None:
        # g*a + g*b = g*(a + b): the same gain at each position.
        left, right = torch.broadcast_tensors(ids[0], ids[1])
        if left.shape == out.shape and torch.equal(left, right):
            state.set_ids(out, left)
        else:
            state.escape_all(call, "its channels are mixed with each other (as rotary embeddings do)")
    else:
        state.escape_all(call, "its output is added to another tensor (a residual or skip connection)")
    return True


def _shifted(call: Call, weight: Weight) -> Weight:
    """A weight plus or minus a number (`1 + w`)."""
    alpha = call.kwargs.get("alpha", 1)
    number, sign = call.args[1] * (1 if call.name == "rsub" else alpha), 1.0
    if call.name == "sub":
        number = -number
    elif call.name == "rsub":
        sign = -float(alpha)
    return Weight(weight.name, weight.coords, sign * weight.scale, sign * weight.offset + number)


def negate(state: State, call: Call) -> bool:
    weight = call.weights[0]
    if weight is not None:
        state.set_weight(call.out, Weight(weight.name, weight.coords, -weight.scale, -weight.offset))
    elif call.ids[0] is not None:
        state.set_ids(call.out, call.ids[0])
    return True


def reduce(state: State, call: Call) -> bool:
    """Sums and means over dimensions that the gain does not vary along."""
    ids, args = call.ids[0], call.args
    if ids is None or any(call.weights):
        return False
    dims = args[1] if len(args) > 1 and args[1] else list(range(ids.ndim))
    dims = [dims] if isinstance(dims, int) else dims
    if not constant_along(ids, dims):
        return False
    keep = bool(args[2]) if len(args) > 2 else bool(call.kwargs.get("keepdim", False))
    state.set_ids(call.out, ids.amax(dims, keepdim=keep) if ids.numel() else ids.new_zeros(call.out.shape))
    return True


def pad(state: State, call: Call) -> bool:
    ids, args = call.ids[0], call.args
    if ids is None or any(call.weights):
        return False
    pads, value = args[1], args[2] if len(args) > 2 else 0
    padded = [ids.ndim - 1 - n // 2 for n, p in enumerate(pads) if p]
    if value != 0 or not constant_along(ids, padded):
        return False
    for d in padded:
        ids = resized(ids, d, call.out.shape[d])
    state.set_ids(call.out, ids)
    return True


def masked_fill(state: State, call: Call) -> bool:
    ids, fill = call.ids[0], call.args[2]
    if ids is None or any(call.weights):
        return False
    if isinstance(fill, torch.Tensor):
        known = state.values.of(fill)
        fill = known.item() if known is not None else None
    if fill != 0:
        return False
    state.set_ids(call.out, ids.broadcast_to(call.out.shape))
    return True


def layer_norm(state: State, call: Call) -> bool:
    """A norm in one operation: what it is given is normalised again, and its weight is a gain."""
    result = call.outs[0]
    x_ids = state.ids_of(call.inputs[0])
    if x_ids is not None:
        state.escape(x_ids, words(call.name))
    weight = state.weight_of(call.args[2]) if isinstance(call.args[2], torch.Tensor) else None
    state.mark_normalised(result)
    if weight is not None:
        state.register_gain(result, weight, tuple(c.broadcast_to(result.shape) for c in weight.coords))
        if call.name == "native_layer_norm" and isinstance(call.args[3], torch.Tensor):
            why = "it is a LayerNorm with a bias, which folding a gain does not move"
            state.trace.kept.setdefault(weight.name, why)
    return True


RULES: dict[str, Rule] = {
    **dict.fromkeys(MOVES | SAME, move),
    **dict.fromkeys(GATHERS, gather),
    **dict.fromkeys(JOINS, join),
    **dict.fromkeys(SCALINGS, multiply),
    **dict.fromkeys(ADDITIONS, add),
    "neg": negate,
    "sum": reduce,
    "mean": reduce,
    "constant_pad_nd": pad,
    "masked_fill": masked_fill,
    "masked_fill_": masked_fill,
    "native_layer_norm": layer_norm,
    "rms_norm": layer_norm,
    "_fused_rms_norm": layer_norm,
}
