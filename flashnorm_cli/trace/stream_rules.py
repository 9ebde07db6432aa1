"""The rules of `stream.py`: what each operation does to the channels of the residual stream, and the tracer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from flashnorm_cli.errors import PlanError
from flashnorm_cli.trace import rules
from flashnorm_cli.trace.companions import constant_along
from flashnorm_cli.trace.forward import run_forwards
from flashnorm_cli.trace.products import ADDING, PLAIN
from flashnorm_cli.trace.state import Call, Weight
from flashnorm_cli.trace.stream import Stream, StreamState
from flashnorm_cli.trace.tracer import GainTracer, defies_rules
from flashnorm_cli.trace.values import SHAPE_ONLY

Rule = Callable[[StreamState, Call], bool]


def _move(state: StreamState, call: Call) -> bool:
    ids = call.ids[0]
    if any(i is not None for i in call.ids[1:]) or (ids is not None and call.name == "diagonal"):
        return False  # a diagonal would look like one vector, and have a channel of each
    if not rules.move(state, call):
        return False
    if ids is not None:
        for moved in map(state.ids_of, call.outs):
            if moved is not None and moved.numel() < ids.numel():
                state.pin_parts(moved)
    return True


def _gather(state: StreamState, call: Call) -> bool:
    """Tokens picked by indices, the same ones for all channels."""
    if call.name == "gather" and call.ids[0] is not None and not _shared(state, call.ids[0], call.args[2]):
        return False
    return rules.gather(state, call)


def _masked_fill(state: StreamState, call: Call) -> bool:
    """Tokens become zero, each with all of its channels."""
    return call.ids[0] is not None and _shared(state, call.ids[0], call.args[1]) and rules.masked_fill(state, call)


def _shared(state: StreamState, ids: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether a tensor that is broadcast to an activation says the same of all of its channels."""
    found = state.channels(ids)
    if found is None:
        return False
    d = found[0] - ids.ndim
    if -d > other.ndim or other.shape[d] == 1 or other.stride(d) == 0:
        return True
    known = state.values.of(other)
    return known is not None and constant_along(known, [d])


def _add(state: StreamState, call: Call) -> bool:
    """Sums of terms on the same axis."""
    if len(call.inputs) == 1:
        return call.weights[0] is not None and rules.add(state, call)
    n = 0 if call.ids[0] is not None else 1
    ids = call.ids[n]
    if ids is None:
        return False
    wide = ids.broadcast_to(call.out.shape)
    if not _add_term(state, call, wide, 1 - n):
        return False
    state.set_ids(call.out, wide)
    return True


def _add_term(state: StreamState, call: Call, ids: torch.Tensor, other: int) -> bool:
    """Input number `other` of a call is added to what `ids`, of the shape of the result, say."""
    found = state.channels(ids)
    if found is None:
        return False
    d, channels = found
    tensor, weight, others = call.inputs[other], call.weights[other], call.ids[other]
    term = None
    if weight is not None:
        from_the_end = d - call.out.ndim
        if -from_the_end <= tensor.ndim and tensor.shape[from_the_end] > 1:
            term = state.axis_of(weight, tensor.ndim + from_the_end)
        if term is not None:
            state.note("write", term)
    elif others is not None:
        there = state.channels(others.broadcast_to(call.out.shape))
        term = there[1] if there is not None and there[0] == d else None
    else:
        known = state.values.of(tensor)
        return known is not None and not bool((known != 0).any())
    if term is None:
        return False
    state.unify(channels, term, "only a part of its channels is added to")
    return True


def _multiply(state: StreamState, call: Call) -> bool:
    """Numbers per token, and gains that are folded, commute with a rotation."""
    if len(call.inputs) == 1:
        return rules.multiply(state, call)
    ids, weights, out = call.ids, call.weights, call.out
    scaled = [n for n in (0, 1) if ids[n] is not None]
    if not scaled or (call.name.startswith("div") and scaled != [0]):
        return False
    n, other = scaled[0], 1 - scaled[0]
    one = ids[n]
    if one is None:
        return False
    if len(scaled) == 2:
        if call.name != "mul" or call.inputs[0] is not call.inputs[1]:
            return False
        state.set_square(out, one)
        return True
    wide = one.broadcast_to(out.shape)
    found = state.channels(wide)
    if found is None:
        return False
    factor, weight = call.inputs[other], weights[other]
    if weight is not None:
        if weight.name not in state.folded or call.name != "mul":
            state.escape_by(wide, weight.name)
            state.set_ids(out, wide)  # so that what it is added to is known to be the same stream
            return True
        state.normalised(weight.name, wide)
    else:
        if not _shared(state, wide, factor):
            return False
    state.set_ids(out, wide)
    return True


def _square(state: StreamState, call: Call) -> bool:
    if call.ids[0] is None or (call.name == "pow" and call.args[1] != 2):
        return False
    state.set_square(call.out, call.ids[0])
    return True


def _mean_of_squares(state: StreamState, call: Call) -> bool:
    """`|x|^2` is invariant."""
    ids, args = call.ids[0], call.args
    found = state.channels(ids) if ids is not None else None
    dims = args[1] if len(args) > 1 and args[1] is not None else None
    if found is None or dims is None or found[0] not in [d % call.inputs[0].ndim for d in dims]:
        return False
    state.accounted_for = True
    return state.measure(found[1])


def _vector_norm(state: StreamState, call: Call) -> bool:
    ids, args = call.ids[0], call.args
    found = state.channels(ids) if ids is not None else None
    dims = args[2] if len(args) > 2 else None
    if found is None or (len(args) > 1 and args[1] != 2) or not dims:
        return False
    state.accounted_for = True
    return found[0] in [d % call.inputs[0].ndim for d in dims] and state.measure(found[1])


def _same_square(state: StreamState, call: Call) -> bool:
    if call.ids[0] is None:
        return False
    state.set_square(call.out, call.ids[0])
    return True


def _rms_norm(state: StreamState, call: Call) -> bool:
    ids = call.ids[0]
    found = state.channels(ids) if ids is not None else None
    weight = state.weight_of(call.args[2]) if isinstance(call.args[2], torch.Tensor) else None
    has_weight = isinstance(call.args[2], torch.Tensor)
    if ids is None:
        return False
    if found is None or found[0] != ids.ndim - 1 or len(call.args[1]) != 1 or not state.measure(found[1]):
        return False
    if has_weight and (weight is None or weight.name not in state.folded):
        if weight is not None:
            state.escape_by(ids, weight.name)
        else:
            state.escape(ids, "its norm multiplies it by a computed tensor")
        state.set_ids(call.outs[0], ids)
        return True
    if weight is not None:
        state.normalised(weight.name, ids)
    state.set_ids(call.outs[0], ids)
    return True


def _embedding(state: StreamState, call: Call) -> bool:
    weight = call.weights[0]
    if weight is None or any(i is not None for i in call.ids) or call.inputs[0].ndim != 2:
        return False
    channels = state.axis_of(weight, 1)
    if channels is None:
        return False
    state.note("write", channels)
    state.pin_parts(channels)
    state.set_ids(call.out, channels.expand(call.out.shape))
    return True


def _product(state: StreamState, call: Call, left: int = 0, k_of_right: int = -2) -> bool:
    """left[..., i, k] @ right[..., k, j], inputs `left` and `left + 1` of the call."""
    sides = [(call.inputs[n], call.ids[n], call.weights[n]) for n in (left, left + 1)]
    ks = (sides[0][0].ndim - 1, max(sides[1][0].ndim + k_of_right, 0))
    (_, left_ids, left_weight), (_, right_ids, right_weight) = sides
    rest = range(left + 2, len(call.inputs))
    if any(call.ids[n] is not None or call.weights[n] is not None for n in rest):
        return False  # e.g. a bias that the operation adds by itself
    if left_weight is not None and right_weight is not None:
        return False
    if left_weight is None and right_weight is None:
        return _product_of_activations(state, call, (left_ids, right_ids), ks)
    n = 0 if left_weight is not None else 1
    weight, view = sides[n][2], sides[n][0]
    if weight is None:
        return False
    _read(state, call, weight, ks[n], sides[1 - n][1], ks[1 - n])
    if view.ndim < 2:
        state.accounted_for = True
        return True
    j = view.ndim - 2 if n == 0 else view.ndim - 1 if k_of_right == -2 else view.ndim - 2
    written = state.axis_of(weight, j)
    if view.shape[j] == 1 and state.is_all_of(weight):
        pass  # one number per token, and no channel of anything
    elif written is None:
        state.other_use(weight, call.name)
    else:
        state.note("write", written)
        state.pin_parts(written)
        place = call.out.ndim - (2 if n == 0 and sides[1][0].ndim > 1 else 1)
        shape = [-1 if d == place else 1 for d in range(call.out.ndim)]
        state.set_ids(call.out, written.view(shape).expand(call.out.shape))
    state.accounted_for = True
    return True


def _read(state: StreamState, call: Call, weight: Weight, along: int, ids: torch.Tensor | None, k: int) -> None:
    """A parameter sums over the channels of an activation."""
    channels = state.axis_of(weight, along)
    if channels is None:
        state.other_use(weight, call.name)
    else:
        state.note("read", channels)
    why = f"`{weight.name}` reads it across its channels and others"
    if ids is not None:
        state.sums(weight, ids, k, why)
    found = state.channels(ids) if ids is not None else None
    if found is not None and channels is not None and found[0] == k:
        state.unify(found[1], channels, f"`{weight.name}` reads a part of its channels")
        return
    if ids is not None:
        state.escape(ids, why)
    if channels is not None:
        state.pin(channels, f"`{weight.name}` reads something else in `{state.module}`")


def _product_of_activations(
    state: StreamState, call: Call, ids: tuple[torch.Tensor | None, torch.Tensor | None], ks: tuple[int, int]
) -> bool:
    found = [state.channels(i) if i is not None else None for i in ids]
    first, second = found
    if ids[0] is not None and ids[1] is not None:
        if first is None or second is None or (first[0], second[0]) != ks:
            return False
        state.unify(first[1], second[1], "its channels are multiplied with other ones")  # <x, y> is invariant
        state.accounted_for = True
        return True
    n = 0 if ids[0] is not None else 1
    one, place = ids[n], found[n]
    if one is None or place is None or place[0] == ks[n] or call.name not in ("mm", "bmm"):
        return False
    kept = one.select(ks[n], 0)
    state.set_ids(call.out, kept.unsqueeze(-1 if n == 0 else -2).expand(call.out.shape))
    return True


def _adding_product(state: StreamState, call: Call) -> bool:
    """bias + x @ W: the bias is one more writer."""
    if not _product(state, call, left=1):
        return False
    written = state.ids_of(call.out)
    if written is None:
        return call.ids[0] is None and (call.weights[0] is None or call.inputs[0].numel() == 1)
    return _add_term(state, call, written, 0)


def _linear(state: StreamState, call: Call) -> bool:
    return _product(state, call, k_of_right=-1)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(rules.MOVES | rules.SAME, _move),
    **dict.fromkeys(rules.GATHERS, _gather),
    **dict.fromkeys(rules.JOINS, rules.join),
    **dict.fromkeys(rules.ADDITIONS, _add),
    **dict.fromkeys(rules.SCALINGS, _multiply),
    **dict.fromkeys(PLAIN, _product),
    **dict.fromkeys(ADDING, _adding_product),
    "linear": _linear,
    "embedding": _embedding,
    "neg": rules.negate,
    "pow": _square,
    "square": _square,
    "sum": rules.reduce,
    "mean": rules.reduce,
    "constant_pad_nd": rules.pad,
    "masked_fill": _masked_fill,
    "masked_fill_": _masked_fill,
    "linalg_vector_norm": _vector_norm,
    "rms_norm": _rms_norm,
    "_fused_rms_norm": _rms_norm,
}
_SQUARE_RULES: dict[str, Rule] = {
    **dict.fromkeys(rules.SAME, _same_square),
    "mean": _mean_of_squares,
    "sum": _mean_of_squares,
}


class StreamTracer(GainTracer):
    """Records into `self.state`, a `StreamState`, what happens to the channels of activations."""

    state: StreamState

    def __init__(self, model: torch.nn.Module, folded: Collection[str], kept: Mapping[str, str]) -> None:
        super().__init__(model, StreamState(model, folded, kept))

    def _follow(self, call: Call) -> None:
        state = self.state
        if call.name in SHAPE_ONLY:
            return
        state.accounted_for = False
        squares = [t for t in call.inputs if state.is_square(t)]
        does = (
            "gives it what is not rotated"
            if call.name in rules.ADDITIONS | rules.JOINS
            else "does not commute with a rotation"
        )
        why = f"`{call.name}`, which {does}, is applied to it"
        rule = _SQUARE_RULES.get(call.name) if squares else _RULES.get(call.name)
        if rule is None or defies_rules(call) or not rule(state, call):
            state.escape_all(call, why)


def trace_stream(model: Any, folded: Collection[str], kept: Mapping[str, str] | None = None) -> Stream:
    """The residual stream of a model on the meta device, in eval mode, whose gains `folded` are the identity.

    `kept` says of others why they are not, for the words of a reason.

    Raises:
        PlanError: the forward cannot run on the meta device, or there is no one input embedding.
    """
    tracer = StreamTracer(model, folded, kept or {})
    run_forwards(model, tracer)
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # transformers' own answer for models with several
        embedding = None
    weight = getattr(embedding, "weight", None)
    name = next((name for name, parameter in model.named_parameters() if parameter is weight), None)
    if name is None:
        raise PlanError(f"{type(model).__name__} does not say which embedding its residual stream starts from")
    unreached = [n for n, _ in model.named_parameters() if n not in tracer.state.trace.reached]
    return tracer.state.judge(name, unreached)
