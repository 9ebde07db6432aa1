"""Follow every norm gain through one forward pass on the meta device.

The trace answers, from the model's own forward and nothing else: where is a gain multiplied in, which
parameters contract the scaled channels afterwards, and what else happens to the scaled tensor.

How it works. `GainTracer` is a `TorchDispatchMode`: it sees every ATen operation, after Python composites
(`F.linear`, `einsum`, `matmul`, `F.rms_norm`, ...) have been broken down to a few dozen of them. Beside each
interesting meta tensor it keeps a small real companion of the same shape, mostly made of stride-0 dimensions:

- *ids* of an activation: at each position, which channel of which gain that value is scaled by (0: none).
  Data movement (view, transpose, slice, cat, ...) is applied to the companion as it is to the tensor, so that
  tiled per-head gains, slices and concatenations need no code of their own.
- *coords* of a parameter's view: for each dimension of the parameter, the coordinate that each value came from.
- *values* of a tensor that depends on no weight (positions, masks, token ids): see `values.py`.

A matrix product of ids with a parameter makes the parameter a *reader*: its channel `coords` has to take the
gain that `ids` names. Whatever does not commute with a per-channel gain makes the gain *escape*, and its norm
keeps its weight. Operations whose result depends on unknown data (`nonzero` of router scores, `item`, boolean
masks) answer "everything is selected", so that a loop over experts visits each of them.

Where to read: `state.py` holds what is known, `rules.py` and `products.py` say what each operation does to it,
`judge.py` draws the conclusions, `forward.py` runs the model.

The idea of folding is Graef et al., FlashNorm (arXiv 2407.09577), section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flashnorm_cli.trace import products, rules
from flashnorm_cli.trace.outcomes import outcome
from flashnorm_cli.trace.products import PRODUCTS
from flashnorm_cli.trace.state import Call, State, words
from flashnorm_cli.trace.values import SHAPE_ONLY, tensors_in

# By operation. One that has no rule lets no gain pass.
RULES: dict[str, rules.Rule] = {**rules.RULES, **products.RULES}
# Indices among their arguments may be boolean masks.
_INDEXED = rules.GATHERS | frozenset("index_put index_put_ _index_put_impl_".split())


class GainTracer(TorchDispatchMode):
    """Records into `self.state` what happens to gains while the mode is active. See the module's docstring."""

    def __init__(self, model: torch.nn.Module, state: State | None = None) -> None:
        super().__init__()
        self.state = state or State(model)
        self.auxiliary = False  # a forward after the first

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # companions are real tensors, also where the meta device is the default
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        state, name = self.state, _name_of(func)
        state.digest.update(name.encode())
        state.digest.update(repr([a for a in args if isinstance(a, (int, float, bool))]).encode())
        answer = state.values.answer(func, name, args, kwargs)
        if answer is not NotImplemented:
            if name == "_local_scalar_dense" and state.values.of(args[0]) is None:
                state.asked.setdefault(state.module)
            state.escape_through_answer(name, args)
            return answer
        args, kwargs, inputs = self._followable(name, args, kwargs)
        out = outcome(func, args, kwargs)
        if not inputs or any(t.device.type == "meta" for t in inputs):
            state.values.follow(func, name, args, kwargs, inputs, out)
        if self.auxiliary and name in PRODUCTS and any(t.numel() == 0 for t in inputs):
            return out  # no token for this expert: nothing can be learnt from it
        self._propagate(func, name, args, kwargs, inputs, out)
        rules.follow_normalisation(state, name, args, inputs, out)
        if func._schema.is_mutable:
            state.drop_reshaped(inputs, name)
        return out

    def _followable(self, name: str, args: Any, kwargs: Any) -> tuple[Any, Any, list[torch.Tensor]]:
        """The arguments without what the meta device cannot take (masks, guessed sizes, tensors with values), and the
        tensors among them."""
        values = self.state.values
        if name in _INDEXED:
            args = values.without_masks(args)
        if name == "split_with_sizes":
            args = (args[0], values.sizes_that_add_up(args), *args[2:])
        inputs = tensors_in(args, kwargs)
        on_meta = any(t.device.type == "meta" for t in inputs)
        if on_meta and any(t.device.type != "meta" and t.ndim for t in inputs):
            args, kwargs = tree_map(values.to_meta, (args, kwargs))
            inputs = tensors_in(args, kwargs)
        return args, kwargs, inputs

    def _propagate(self, func: Any, name: str, args: Any, kwargs: Any, inputs: list[torch.Tensor], out: Any) -> None:
        """Ask the operation's rule where the gains of its inputs go. None may be lost silently."""
        state = self.state
        ids = [state.ids_of(t) for t in inputs]
        weights = [state.weight_of(t) for t in inputs]
        for tensor, scaled, weight in zip(inputs, ids, weights, strict=True):
            if weight is not None:
                state.trace.reached.add(weight.name)
            elif tensor.device.type == "meta" and scaled is None:
                state.escape_through_alias(tensor, name)
        if any(i is not None for i in ids) or any(weights):
            self._follow(Call(func, name, args, kwargs, inputs, ids, weights, out))

    def _follow(self, call: Call) -> None:
        state, name, ids = self.state, call.name, call.ids
        if name in SHAPE_ONLY:
            return
        state.accounted_for = False
        if name not in rules.TWO_SIDED and name not in PRODUCTS:
            for i in ids[1:]:
                if i is not None:  # a bias, a fill value: it is not what the rules look at
                    state.escape(i, words(name))
        rule = RULES.get(name)
        if rule is None or defies_rules(call) or not rule(state, call):
            _escape_unknown_op(state, call)
        if not state.accounted_for:
            for lost in ids:
                if lost is not None:
                    state.escape(lost, words(name))


def _name_of(func: Any) -> str:
    if func.namespace != "aten" and str(func.overloadpacket) != "transformers.grouped_mm_fallback":
        return str(func.overloadpacket)  # somebody's own operation: its name says nothing about what it does
    return str(func.overloadpacket.__name__)


def defies_rules(call: Call) -> bool:
    """Writing into `out=`, which may have older views; and what no gain commutes with."""
    writes = any(a.kwarg_only and a.alias_info is not None for a in call.func._schema.arguments)
    return writes or bool(call.kwargs.get("rounding_mode")) or _narrows(call.name, call.out)


def _narrows(name: str, out: Any) -> bool:
    """A cast to integers or to 8-bit floats, whose rounding depends on the scale."""
    return name == "_to_copy" and not (out.dtype.is_complex or (out.dtype.is_floating_point and out.itemsize >= 2))


def _escape_unknown_op(state: State, call: Call) -> None:
    state.escape_all(call, words(call.name))
