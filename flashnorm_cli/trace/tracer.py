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

The idea of folding is Graef et al., FlashNorm (arXiv 2407.09577), section 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from flashnorm_cli.trace.companions import constant_along, coordinates, profile, resized, small, varying_dims
from flashnorm_cli.trace.outcomes import outcome
from flashnorm_cli.trace.result import UNUSED, Gain, Reader, Trace
from flashnorm_cli.trace.values import SHAPE_ONLY, Values, tensors_in

if TYPE_CHECKING:
    pass

# A coordinate that was chosen by an index which the trace does not follow.
UNKNOWN = -1
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
# Rules that look at each of several scaled inputs.
TWO_SIDED = JOINS | frozenset("mul mul_ div div_ add add_ sub sub_ rsub".split())
PRODUCTS = frozenset("mm bmm mv dot _grouped_mm grouped_mm_fallback addmm baddbmm addmv addbmm".split())
# A tensor divided by one of these, or multiplied by the reciprocal, has been normalised.
DENOMINATORS = frozenset("rsqrt sqrt linalg_vector_norm norm std".split())
SCORES = "its output is multiplied with a computed tensor (attention scores, or a weight changed on the way)"


@dataclass
class _Weight:
    """A view of a parameter: value = scale * parameter[coords] + offset."""

    name: str
    coords: tuple[torch.Tensor, ...]
    scale: float = 1.0
    offset: float = 0.0


@dataclass
class _Call:
    """One operation: what it was called with, and for each tensor among that its ids and its weight, if any."""

    func: Any
    name: str
    args: Any
    kwargs: Any
    inputs: list[torch.Tensor]
    ids: list[torch.Tensor | None]
    weights: list[_Weight | None]
    out: Any


class GainTracer(TorchDispatchMode):
    """Records into `self.trace` what happens to gains while the mode is active. See the module's docstring."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        # All that is known of a tensor is kept under its `_cdata`, the address of what the Python object stands
        # for: the object itself may come to stand for another tensor. Addresses of the dead are reused: keep alive.
        self._alive: list[Any] = []
        self._ids: dict[int, torch.Tensor] = {}
        self._weights: dict[int, _Weight] = {}
        self._normed: set[int] = set()
        self._denominator: set[int] = set()
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._weight_storages: dict[int, str] = {}
        self._ids_storages: dict[int, torch.Tensor] = {}
        self._uses: dict[str, list[tuple[int, torch.Tensor, str]]] = {}  # reader -> (dim, ids, module)
        self._other: dict[str, tuple[str, str]] = {}  # parameter -> first (operation, module) that is not a read
        self._next_id = 1
        self._accounted_for = True
        self.auxiliary = False  # a forward after the first
        self.values = Values()
        self._asked: dict[str, None] = {}
        self._modules: list[str] = []
        self._names = {id(m): name for name, m in model.named_modules()}
        self._digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            self._shapes[name] = tuple(parameter.shape)
            self._set_weight(parameter, _Weight(name, coordinates(tuple(parameter.shape))))

    # ---- where we are -------------------------------------------------------------------------------------------

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Know the module that is running, for the words of a reason."""

        def enter(module: torch.nn.Module, _args: Any) -> None:
            self._modules.append(self._names.get(id(module), type(module).__name__))

        def leave(_module: torch.nn.Module, _args: Any, _out: Any) -> None:
            self._modules.pop()

        before = torch.nn.modules.module.register_module_forward_pre_hook(enter)
        after = torch.nn.modules.module.register_module_forward_hook(leave)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    @property
    def module(self) -> str:
        return self._modules[-1] if self._modules and self._modules[-1] else "the model"

    # ---- recording ----------------------------------------------------------------------------------------------

    def _keep(self, tensor: torch.Tensor) -> None:
        self._alive.append(tensor)

    def _set_ids(self, tensor: torch.Tensor, ids: torch.Tensor) -> None:
        self._accounted_for = True
        self._keep(tensor)
        self._ids[tensor._cdata] = ids
        self._ids_storages[tensor.untyped_storage()._cdata] = ids

    def _set_weight(self, tensor: torch.Tensor, weight: _Weight) -> None:
        self._keep(tensor)
        self._weights[tensor._cdata] = weight
        self._weight_storages[tensor.untyped_storage()._cdata] = weight.name

    def escape(self, ids: torch.Tensor, why: str) -> None:
        """The gains in `ids` cannot be folded; the first reason stands."""
        self._accounted_for = True
        for name in self.trace.gains_of(ids):
            self.trace.kept.setdefault(name, f"{why} in `{self.module}`")

    def _other_use(self, weight: _Weight, operation: str) -> None:
        self._other.setdefault(weight.name, (operation, self.module))

    def _read(self, weight: _Weight, along: int, ids: torch.Tensor | None, operation: str) -> bool:
        """`weight` is contracted along its view's dimension `along` with channels scaled by the 1-D `ids`.

        Returns False where the contraction does not run along exactly one dimension of the parameter.
        """
        dims = [d for d, c in enumerate(weight.coords) if along in varying_dims(c)]
        if len(dims) != 1 or varying_dims(weight.coords[dims[0]]) != [along] or weight.offset != 0.0:
            self._other_use(weight, operation)
            return False
        dim = dims[0]
        full = torch.full((self._shapes[weight.name][dim],), UNUSED)
        full[profile(weight.coords[dim], along)] = ids if ids is not None else 0
        self._uses.setdefault(weight.name, []).append((dim, full, self.module))
        self._accounted_for = True
        return True

    def _normalised_afresh(self, tensor: torch.Tensor) -> bool:
        """Normalised, and not scaled by a gain that could still be folded."""
        ids = self._ids.get(tensor._cdata)
        still = ids is not None and any(name not in self.trace.kept for name in self.trace.gains_of(ids))
        return tensor._cdata in self._normed and not still

    def _birth(self, out: torch.Tensor, weight: _Weight, coords: tuple[torch.Tensor, ...]) -> None:
        """`out` is a normalised activation times the gain `weight`, whose coords are broadcast to out's shape."""
        shape = self._shapes[weight.name]
        if weight.scale == 0.0 or any(bool((small(c) == UNKNOWN).any()) for c in coords):
            self._other_use(weight, "index" if weight.scale else "mul")
            return
        gain = self.trace.gains.get(weight.name)
        if gain is None:
            gain = Gain(weight.name, shape, self.module, weight.scale, weight.offset, self._next_id)
            self._next_id += gain.size
            self.trace.gains[weight.name] = gain
        elif (gain.scale, gain.offset) != (weight.scale, weight.offset):
            self.trace.kept.setdefault(weight.name, "its weight is used in two different conventions")
        flat = torch.zeros((), dtype=torch.int64)
        for n, c in zip(shape, coords, strict=True):
            flat = flat * n + c
        self._set_ids(out, (flat + gain.first_id).expand(out.shape))

    # ---- dispatch -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # companions are real tensors, also where the meta device is the default
            return self._dispatch(func, args, kwargs or {})

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace != "aten" and str(func.overloadpacket) != "transformers.grouped_mm_fallback":
            name = str(func.overloadpacket)  # somebody's own operation: its name says nothing about what it does
        self._digest.update(name.encode())
        self._digest.update(repr([a for a in args if isinstance(a, (int, float, bool))]).encode())
        answer = self.values.answer(func, name, args, kwargs)
        if answer is not NotImplemented:
            if name == "_local_scalar_dense" and self.values.of(args[0]) is None:
                self._asked.setdefault(self.module)
            self.lose(name, args)
            return answer
        if name in GATHERS or name in ("index_put", "index_put_", "_index_put_impl_"):
            args = self.values.without_masks(args)
        if name == "split_with_sizes":
            args = (args[0], self.values.sizes_that_add_up(args), *args[2:])
        inputs = tensors_in(args, kwargs)
        on_meta = any(t.device.type == "meta" for t in inputs)
        if on_meta and any(t.device.type != "meta" and t.ndim for t in inputs):
            args, kwargs = tree_map(self.values.to_meta, (args, kwargs))
            inputs = tensors_in(args, kwargs)
        out = outcome(func, args, kwargs)
        if on_meta or not inputs:
            self.values.follow(func, name, args, kwargs, inputs, out)
        if self.auxiliary and name in PRODUCTS and any(t.numel() == 0 for t in inputs):
            return out  # no token for this expert: nothing can be learnt from it
        for t in inputs:
            if t._cdata in self._weights:
                self.trace.reached.add(self._weights[t._cdata].name)
            elif t.device.type == "meta" and t._cdata not in self._ids:
                self._alias(t, name)
        scaled = [self._ids[t._cdata] for t in inputs if t._cdata in self._ids]
        if scaled or any(t._cdata in self._weights for t in inputs):
            self._accounted_for = name in SHAPE_ONLY
            ids = [self._ids.get(t._cdata) for t in inputs]
            weights = [self._weights.get(t._cdata) for t in inputs]
            self._propagate(_Call(func, name, args, kwargs, inputs, ids, weights, out))
            if not self._accounted_for:  # no rule said where the gain went: it must not be lost silently
                for lost in scaled:
                    self.escape(lost, _words(name))
        self._propagate_norm(name, args, inputs, out)
        if func._schema.is_mutable:
            self._drop_reshaped(inputs, name)
        return out

    def _alias(self, tensor: torch.Tensor, name: str) -> None:
        """Another object for the memory of a weight or of a scaled tensor (`nn.Parameter(w)`): out of our sight."""
        storage = tensor.untyped_storage()._cdata
        if storage in self._weight_storages:
            alias = self._weight_storages[storage]
            self.trace.reached.add(alias)
            self._other.setdefault(alias, (name, self.module))
        if storage in self._ids_storages:
            self.escape(self._ids_storages[storage], _words(name))

    def _drop_reshaped(self, inputs: list[torch.Tensor], name: str) -> None:
        """An operation in place has changed a tensor's shape (`transpose_`): its companion, escaped, is void."""
        for t in inputs:
            if t._cdata in self._ids and self._ids[t._cdata].shape != t.shape:
                self.escape(self._ids.pop(t._cdata), _words(name))
            weight = self._weights.get(t._cdata)
            if weight is not None and any(c.shape != t.shape for c in weight.coords):
                self._other_use(self._weights.pop(t._cdata), name)

    def same_weight(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether two tensors are the same view of the same parameter."""
        mine, yours = self._weights.get(a._cdata), self._weights.get(b._cdata)
        if mine is None or yours is None:
            return False
        same = all(
            x.data_ptr() == y.data_ptr() and x.stride() == y.stride()
            for x, y in zip(mine.coords, yours.coords, strict=True)
        )
        return same and (mine.name, mine.scale, mine.offset) == (yours.name, yours.scale, yours.offset)

    def lose(self, name: str, args: Any) -> None:
        """An answer carries no ids: whatever scaled its inputs has escaped."""
        for tensor in tensors_in(args):
            ids, weight = self._ids.get(tensor._cdata), self._weights.get(tensor._cdata)
            if ids is not None:
                self.escape(ids, f"its output decides what the model does (`{name}`)")
            if weight is not None:
                self.trace.reached.add(weight.name)
                self._other_use(weight, name)

    # ---- what is normalised -------------------------------------------------------------------------------------

    def _propagate_norm(self, name: str, args: Any, inputs: list[torch.Tensor], out: Any) -> None:
        """Know normalised activations, so that only norms count as gains and not layer scales or skip weights."""
        outs = tensors_in(out)

        def mark(which: set[int]) -> None:
            for o in outs:
                self._keep(o)
                which.add(o._cdata)

        if name in DENOMINATORS or (name == "pow" and isinstance(args[1], float) and abs(args[1]) == 0.5):
            mark(self._denominator)
            return
        denominators = [t._cdata in self._denominator for t in inputs]
        if name in ("mul", "mul_", "div", "div_") and len(inputs) == 2 and any(denominators):
            mark(self._denominator if all(denominators) else self._normed)
        elif any(denominators) and name not in ("mm", "bmm", "addmm"):
            mark(self._denominator)
        elif any(t._cdata in self._normed for t in inputs) and (
            name in MOVES or name in SAME or name in GATHERS or name in ("mul", "mul_", "div", "div_", "neg")
        ):
            mark(self._normed)

    # ---- gains --------------------------------------------------------------------------------------------------

    def _propagate(self, call: _Call) -> None:
        func, name, inputs, ids, weights, out = call.func, call.name, call.inputs, call.ids, call.weights, call.out
        if name in SHAPE_ONLY:
            return
        if name not in TWO_SIDED and name not in PRODUCTS:
            for i in ids[1:]:
                if i is not None:  # a bias, a fill value: it is not what the rules below look at
                    self.escape(i, _words(name))
        writes = any(a.kwarg_only and a.alias_info is not None for a in func._schema.arguments)
        if writes or call.kwargs.get("rounding_mode") or _narrows(name, out):
            self._anything_else(call)  # out= may have older views; and what no gain commutes with
        elif (name in MOVES or name in SAME) and func._overloadname != "dtype":  # view(dtype) reinterprets the bits
            self._move(call)
        elif name in GATHERS and self._gather(call):
            pass
        elif name in JOINS and not any(weights):
            self._join(call)
        elif name in ("mul", "mul_", "div", "div_"):
            self._multiply(call)
        elif name in ("add", "sub", "rsub", "neg", "add_", "sub_"):
            self._add(call)
        elif name in ("sum", "mean", "constant_pad_nd", "masked_fill", "masked_fill_", "repeat_interleave"):
            self._along_tokens(call)
        elif name in PRODUCTS and not name.startswith(("add", "badd")):
            self._product(name, inputs[0], inputs[1], out)
        elif name in PRODUCTS and name.startswith(("add", "badd")) and ids[0] is None:
            if weights[0] is not None:
                self._other_use(weights[0], name)
            self._product(name, inputs[1], inputs[2], out)
        elif name == "linear":
            self._product(name, inputs[0], inputs[1], out, weight_dim=-1)
        elif name == "convolution" and self._convolution(call.args, out):
            pass
        elif name in ("native_layer_norm", "_fused_rms_norm", "rms_norm"):
            self._fused_norm(name, call.args, inputs, out)
        else:
            self._anything_else(call)

    def _anything_else(self, call: _Call) -> None:
        self._escape_all(call, _words(call.name))

    def _escape_all(self, call: _Call, why: str) -> None:
        for ids in call.ids:
            if ids is not None:
                self.escape(ids, why)
        for weight in call.weights:
            if weight is not None:
                self._other_use(weight, call.name)

    def _move(self, call: _Call) -> None:
        name, out = call.name, call.out

        def moved(companion: torch.Tensor) -> list[torch.Tensor]:
            if name in SAME:
                return [companion]
            if name in ("view", "_unsafe_view"):  # the companion of a contiguous tensor need not be contiguous
                return [companion.reshape(out.shape)]
            result = call.func(companion, *call.args[1:], **call.kwargs)
            return list(result) if isinstance(result, (list, tuple)) else [result]

        outs = list(out) if isinstance(out, (list, tuple)) else [out]
        ids, weight = call.ids[0], call.weights[0]
        if ids is not None:
            for o, companion in zip(outs, moved(ids), strict=True):
                self._set_ids(o, companion)
        if weight is not None:
            parts = [moved(c) for c in weight.coords] if weight.coords else []
            for n, o in enumerate(outs):
                coords = tuple(p[n] for p in parts)
                self._set_weight(o, _Weight(weight.name, coords, weight.scale, weight.offset))

    def _gather(self, call: _Call) -> bool:
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
            self._set_ids(out, gathered(ids))
        if weight is not None:
            # Which rows were picked is unknown: the coordinates that vary along them are lost, the others stand.
            coords = tuple(
                gathered(c) if constant_along(c, picked) else torch.full((), UNKNOWN).expand(out.shape)
                for c in weight.coords
            )
            self._set_weight(out, _Weight(weight.name, coords, weight.scale, weight.offset))
        return True

    def _join(self, call: _Call) -> None:
        zero = torch.zeros((), dtype=torch.int64)
        pairs = zip(call.inputs, call.ids, strict=True)
        companions = [i if i is not None else zero.expand(t.shape) for t, i in pairs]
        self._set_ids(call.out, call.func(companions, *call.args[1:], **call.kwargs))

    def _multiply(self, call: _Call) -> None:
        name, args, inputs, ids, weights, out = call.name, call.args, call.inputs, call.ids, call.weights, call.out
        in_place = name.endswith("_")
        if len(inputs) == 1 or (len(inputs) == 2 and not any(weights) and ids[1] is None):
            # A number, or an activation without a gain, scales the tensor: the gain stays where it was.
            if isinstance(args[0], torch.Tensor) and ids[0] is not None:
                self._set_ids(out, ids[0].broadcast_to(out.shape))
            elif weights[0] is not None and not in_place and isinstance(args[1], (int, float)):
                mine, factor = weights[0], args[1] if name == "mul" else 1 / args[1]
                self._set_weight(out, _Weight(mine.name, mine.coords, mine.scale * factor, mine.offset * factor))
            else:
                self._anything_else(call)
            return
        if ids[0] is None and ids[1] is not None and not any(weights) and name == "mul":
            self._set_ids(out, ids[1].broadcast_to(out.shape))
            return
        w = next((w for w in weights if w is not None), None)
        other = inputs[0] if weights[0] is None else inputs[1]
        both = weights[0] is not None and weights[1] is not None
        if w is not None and not both and name == "mul" and self._normalised_afresh(other):
            self._birth(out, w, tuple(c.broadcast_to(out.shape) for c in w.coords))
            return
        what = f"`{w.name}`" if w is not None else "another scaled tensor"
        self._escape_all(call, f"its output is multiplied by {what}")

    def _add(self, call: _Call) -> None:
        name, args, inputs, ids, weights, out = call.name, call.args, call.inputs, call.ids, call.weights, call.out
        if len(inputs) == 1 and weights[0] is not None and not name.endswith("_"):
            w, alpha = weights[0], call.kwargs.get("alpha", 1)
            number = args[1] * alpha if name in ("add", "sub") else 0
            sign = -1.0 if name in ("rsub", "neg") else 1.0
            if name == "sub":
                number = -number
            elif name == "rsub":
                number, sign = args[1], -float(alpha)
            self._set_weight(out, _Weight(w.name, w.coords, sign * w.scale, sign * w.offset + number))
            return
        if name == "neg" and ids[0] is not None:
            self._set_ids(out, ids[0])
            return
        if len(inputs) == 2 and ids[0] is not None and ids[1] is not None:
            # g*a + g*b = g*(a + b): the same gain at each position.
            left, right = torch.broadcast_tensors(ids[0], ids[1])
            if left.shape == out.shape and torch.equal(left, right):
                self._set_ids(out, left)
                return
            self._escape_all(call, "its channels are mixed with each other (as rotary embeddings do)")
        else:
            self._escape_all(call, "its output is added to another tensor (a residual or skip connection)")

    def _along_tokens(self, call: _Call) -> None:
        """Linear operations over dimensions that the gain does not vary along."""
        name, args, out = call.name, call.args, call.out
        tagged = call.ids[0]
        if tagged is None or any(call.weights):
            self._anything_else(call)
        elif name in ("sum", "mean"):
            dims = args[1] if len(args) > 1 and args[1] else list(range(tagged.ndim))
            dims = [dims] if isinstance(dims, int) else dims
            if constant_along(tagged, dims):
                keep = bool(args[2]) if len(args) > 2 else bool(call.kwargs.get("keepdim", False))
                self._set_ids(out, tagged.amax(dims, keepdim=keep) if tagged.numel() else tagged.new_zeros(out.shape))
            else:
                self.escape(tagged, _words(name))
        elif name == "constant_pad_nd":
            pads, value = args[1], args[2] if len(args) > 2 else 0
            padded = [tagged.ndim - 1 - n // 2 for n, p in enumerate(pads) if p]
            if value == 0 and constant_along(tagged, padded):
                for d in padded:
                    tagged = resized(tagged, d, out.shape[d])
                self._set_ids(out, tagged)
            else:
                self.escape(tagged, _words(name))
        elif name.startswith("masked_fill"):
            fill = args[2]
            if isinstance(fill, torch.Tensor):
                known = self.values.of(fill)
                fill = known.item() if known is not None else None
            if fill == 0:
                self._set_ids(out, tagged.broadcast_to(out.shape))
            else:
                self.escape(tagged, _words(name))
        else:  # repeat_interleave
            self._anything_else(call)

    def _product(
        self, name: str, left: torch.Tensor, right: torch.Tensor, out: torch.Tensor, weight_dim: int = -2
    ) -> None:
        """left[..., i, k] @ right[..., k, j]; `weight_dim` is k's place in `right`."""
        sides = []
        for tensor, k in ((left, left.ndim - 1), (right, max(right.ndim + weight_dim, 0))):
            sides.append((tensor, self._ids.get(tensor._cdata), self._weights.get(tensor._cdata), k))
        (_, left_ids, left_weight, _), (_, right_ids, right_weight, _) = sides
        if left_weight is not None and right_weight is not None:
            self._other_use(left_weight, name)
            self._other_use(right_weight, name)
            return
        if left_weight is None and right_weight is None:
            for n, (_, ids, _, k) in enumerate(sides):
                other = right_ids if n == 0 else left_ids
                if ids is None:
                    continue
                if other is None and name in ("mm", "bmm") and constant_along(ids, [k]):
                    self._through_product(ids, k, n == 0, out)
                else:
                    self.escape(ids, SCORES)
            return
        weight, weight_k = (left_weight, sides[0][3]) if left_weight is not None else (right_weight, sides[1][3])
        ids, k = (right_ids, sides[1][3]) if left_weight is not None else (left_ids, sides[0][3])
        if weight is None:
            return
        if ids is None:
            self._read(weight, weight_k, None, name)
            return
        varying = varying_dims(ids)
        if k in varying and len(varying) > 1:
            self._other_use(weight, name)
            self.escape(ids, f"`{weight.name}` reads it with a different gain per row")
        elif k in varying or not varying:
            if not self._read(weight, weight_k, profile(ids, k), name):
                self.escape(ids, f"`{weight.name}` does not read it along one dimension")
        else:  # the gain lies along another dimension and passes through
            self._read(weight, weight_k, None, name)
            if name in ("mm", "bmm"):
                self._through_product(ids, k, left_weight is None, out)
            else:
                self.escape(ids, _words(name))

    def _through_product(self, ids: torch.Tensor, k: int, is_left: bool, out: torch.Tensor) -> None:
        """The summed dimension carries one gain per row (or column): the product keeps it."""
        kept = ids.select(k, 0) if ids.shape[k] else ids.new_zeros(ids.shape[:k] + ids.shape[k + 1 :])
        self._set_ids(out, kept.unsqueeze(-1 if is_left else -2).expand(out.shape))

    def _convolution(self, args: Any, out: torch.Tensor) -> bool:
        x, weight_tensor, bias, *_rest, transposed, _output_padding, groups = args
        ids, weight = self._ids.get(x._cdata), self._weights.get(weight_tensor._cdata)
        if isinstance(bias, torch.Tensor) and bias._cdata in self._weights:
            self._other_use(self._weights[bias._cdata], "convolution")
        depthwise = groups == x.shape[1] == weight_tensor.shape[0]
        if weight is None or transposed or not (groups == 1 or depthwise):
            return False
        along = 1 if groups == 1 else 0  # a depthwise kernel has one filter per channel, along its first dimension
        if ids is None:
            return self._read(weight, along, None, "convolution")
        return varying_dims(ids) in ([], [1]) and self._read(weight, along, profile(ids, 1), "convolution")

    def _fused_norm(self, name: str, args: Any, inputs: list[torch.Tensor], out: Any) -> None:
        result = out[0] if isinstance(out, (list, tuple)) else out
        x_ids = self._ids.get(inputs[0]._cdata)
        if x_ids is not None:
            self.escape(x_ids, _words(name))
        weight = self._weights.get(args[2]._cdata) if isinstance(args[2], torch.Tensor) else None
        self._keep(result)
        self._normed.add(result._cdata)
        if weight is None:
            return
        self._birth(result, weight, tuple(c.broadcast_to(result.shape) for c in weight.coords))
        if name == "native_layer_norm" and isinstance(args[3], torch.Tensor):
            self.trace.kept.setdefault(weight.name, "it is a LayerNorm with a bias, which folding a gain does not move")

    # ---- the end ------------------------------------------------------------------------------------------------

    def leave_modules(self) -> None:
        """The forward is over, if by an error."""
        self._modules.clear()

    def returned(self, output: Any) -> None:
        """The forward has returned `output`: gains in it have left the model."""
        for tensor in _tensors_in(output):
            ids = self._ids.get(tensor._cdata)
            if ids is not None:
                for name in self.trace.gains_of(ids):
                    self.trace.kept.setdefault(name, "the model returns its output")

    def finish(self) -> Trace:
        """Judge every use once all forwards are over."""
        trace = self.trace
        for name, uses in self._uses.items():
            dim, ids, module = uses[0]
            merged = ids.clone()
            conflict: list[str] = []
            for other_dim, other, _ in uses[1:]:
                if other_dim != dim:
                    conflict += trace.gains_of(merged) + trace.gains_of(other)
                    continue
                differ = (merged != other) & (merged != UNUSED) & (other != UNUSED)
                conflict += trace.gains_of(merged[differ]) + trace.gains_of(other[differ])
                merged = torch.where(merged == UNUSED, other, merged)
            fed = trace.gains_of(merged)
            trace.fed.update(fed, conflict)
            for gain in conflict:
                trace.kept.setdefault(gain, f"`{name}`, which reads it, also reads an input without this gain")
            if name in self._other:
                operation, where = self._other[name]
                for gain in fed:
                    if operation == "embedding" and gain not in trace.kept:
                        trace.tied_conflicts.setdefault(gain, set()).add(name)
                    else:
                        trace.kept.setdefault(
                            gain, f"`{name}`, which reads it, has another use (`{operation}` in `{where}`)"
                        )
            if name in trace.gains:  # also multiplied element by element, elsewhere
                for gain in fed:
                    trace.kept.setdefault(gain, f"`{name}`, which reads it, is a gain itself")
            if fed:
                trace.readers[name] = Reader(name, dim, merged, module)
        for gain in trace.gains:
            if gain in self._other:
                operation, where = self._other[gain]
                trace.kept.setdefault(gain, f"its weight has another use (`{operation}` in `{where}`)")
            elif gain in trace.readers or gain in self._uses:
                trace.kept.setdefault(gain, "its weight is also used as a linear layer's")
            elif gain not in trace.fed:
                trace.kept.setdefault(gain, "nothing that can take the gain reads its output")
        for gain in trace.kept:
            trace.tied_conflicts.pop(gain, None)
        trace.fingerprint = self._digest.hexdigest()
        trace.asked = tuple(self._asked)
        return trace


def _narrows(name: str, out: Any) -> bool:
    """A cast to integers or to 8-bit floats, whose rounding depends on the scale."""
    return name == "_to_copy" and not (out.dtype.is_complex or (out.dtype.is_floating_point and out.itemsize >= 2))


def _words(operation: str) -> str:
    """What an operation does to a gain, for somebody who knows the model and not ATen."""
    name = operation.rstrip("_")
    if "attention" in name:
        return SCORES
    if name in (
        "pow",
        "square",
        "linalg_vector_norm",
        "native_layer_norm",
        "rms_norm",
        "_fused_rms_norm",
        "mean",
        "var",
    ):
        return "its output is normalised or averaged again"
    if name in ("copy", "index_put", "index_copy", "slice_scatter", "scatter", "index_add"):
        return "its output is written into another tensor"
    return f"its output goes through `{name}`, which a per-channel gain cannot pass,"


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in nested outputs, caches and other plain objects included."""
    seen: set[int] = set()
    todo = [value]
    while todo:
        value = todo.pop()
        if isinstance(value, torch.Tensor):
            yield value
        elif not isinstance(value, (str, bytes, int, float, type, torch.nn.Module)) and id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, dict):
                todo.extend(value.values())
            elif isinstance(value, (list, tuple, set)):
                todo.extend(value)
            todo.extend(vars(value).values() if hasattr(value, "__dict__") else ())
            slots = [slot for cls in type(value).__mro__ for slot in getattr(cls, "__slots__", ())]
            todo.extend(getattr(value, slot, None) for slot in slots)
