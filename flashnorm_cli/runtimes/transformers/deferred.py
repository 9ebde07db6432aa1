"""Run the readers of each weightless norm together with it, as Proposition 2 of the FlashNorm paper allows.

A forward is observed once: which linears read which norm's output, by the identity of the tensors. From the record it
is known which norms are folded, and from the fold's own rule that nothing but linears reads those. Then

- a norm hands on the product of all its readers, and each of these takes its part: q, k and v are one product;
- a gated MLP runs gate and up as one product with their activation, behind its norm where that is deferred;
- in layers that are `x + attention(norm(x))` and `x + mlp(norm(x))`, the adds happen in the products before them.

No class and no other model is touched, and names play no part. What does not fit keeps the plain path, with a reason.
transformers' fusions of n layers into one (KernelConfig, 5.24) cannot carry this: docs/transformers.md says why.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashnorm_cli.cuda import linear
from flashnorm_cli.cuda.linear_variants import ACTIVATIONS, MEASURED_ROWS
from flashnorm_cli.modeling.quiet import first_line
from flashnorm_cli.norms import tuning
from flashnorm_cli.norms.detect import PlainNorm
from flashnorm_cli.runtimes.transformers.gated_mlp import GatedMlp, read_mlp
from flashnorm_cli.runtimes.transformers.layers import LayerError, read_layer
from flashnorm_cli.runtimes.transformers.observe import Observed, inputs_of, observe, tensors
from flashnorm_cli.runtimes.transformers.products import (
    Group,
    Inner,
    Layer,
    Member,
    Mlp,
    Product,
    Reader,
    Swapped,
    swap,
    swap_back,
)
from flashnorm_cli.runtimes.transformers.swap import is_weightless

logger = logging.getLogger(__name__)
# Of the logits' own size: what the same model may differ by when it rounds elsewhere. A wrong wiring differs by 1.
_CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
_CLOSE_IN_HALVES = 0.15


class _Unfit(Exception):
    """Why a module keeps the plain path."""


def defer(
    model: Any, measure: bool = True, on_progress: Callable[[int, int, str], None] = lambda done, total, what: None
) -> None:
    """Rewire a model whose folded norms are weightless already. `states_of` tells what came of it.

    With `measure`, what kernels run on a GPU is measured now, for all numbers of rows, and not at the first call.
    """
    undefer(model)
    states: dict[str, str | None] = {}
    try:
        seen = observe(model)
    except Exception as error:  # a model of any kind, with inputs that it may not take
        reason = f"its forward over a few tokens failed: {first_line(error)}"
        states |= {name: reason for name, module in model.named_modules() if is_weightless(module)}
    else:
        try:
            _Finder(model, seen, states).swap_all()
        except BaseException:
            undefer(model)
            raise
        if wrong := _differs(model, seen):
            undefer(model)
            states = dict.fromkeys(states, wrong)
        elif measure:
            choose_kernels(model, on_progress)
    object.__setattr__(model, "_flashnorm_deferred", states)
    done = sum(why is None for why in states.values())
    logger.info("%d modules of %s run merged, %d do not", done, type(model).__name__, len(states) - done)


def undefer(model: nn.Module) -> None:
    """The way back: every module of its own class. Weights stay views of one storage, which changes nothing."""
    for module in list(model.modules()):
        if isinstance(module, Swapped):
            swap_back(module)
        vars(module).pop("_deferred", None)
    vars(model).pop("_flashnorm_deferred", None)


def states_of(model: nn.Module) -> dict[str, str | None]:
    """For each folded norm, gated MLP and decoder layer, by module name: None if it runs merged, or why not."""
    states = dict(vars(model).get("_flashnorm_deferred", {}))
    for name, why in states.items():
        module = model.get_submodule(name)
        group = vars(module).get("_deferred") or vars(module).get("_group")
        if why is None and isinstance(group, Group):
            states[name] = group.why_not()
    return states


def choose_kernels(model: nn.Module, on_progress: Callable[[int, int, str], None], again: bool = False) -> None:
    """Measure which kernels run for the model's products, where that is not known yet."""
    wanted: dict[int, list[linear.Problem]] = {}
    for module in model.modules():
        group = vars(module).get("_deferred") or vars(module).get("_group")
        if not isinstance(group, Group) or (weight := group.weight) is None:
            continue
        if not weight.is_cuda or weight.dtype not in linear.DTYPES or weight.size(1) % 8:
            continue
        code = ACTIVATIONS.index(group.activation or "none")
        n, dtype = weight.size(0) // (2 if code else 1), linear.DTYPES.index(weight.dtype)
        for residual in (False, True) if isinstance(module, Product) else (False,):
            problem = linear.Problem(weight.size(1), n, dtype, group.eps is not None, code, residual)
            wanted.setdefault(weight.get_device(), []).append(problem)
    for index, problems in wanted.items():
        if again or tuning.measuring_allowed():
            tuning.tune(problems, index, MEASURED_ROWS, again, on_progress)


class _Finder:
    """Finds what fits in an observed forward, and swaps it."""

    def __init__(self, model: Any, seen: Observed, states: dict[str, str | None]) -> None:
        self.model, self.seen, self.states = model, seen, states
        self.modules: dict[str, nn.Module] = dict(model.named_modules())
        self.shared = Counter(id(p) for m in self.modules.values() for p in m._parameters.values() if p is not None)
        self.known_mlps: dict[Any, GatedMlp | None] = {}
        self.held_by: dict[str, dict[str, str]] = {}  # layer -> child that is a deferred norm -> child with its readers

    def swap_all(self) -> None:
        self.norms()
        self.mlps()
        self.layers()
        self.head()

    def norms(self) -> None:
        for name, module in self.modules.items():
            if not is_weightless(module):
                continue
            try:
                self._defer_norm(name, module)
                self.states[name] = None
            except _Unfit as reason:
                self.states[name] = str(reason)

    def _defer_norm(self, name: str, module: nn.Module) -> None:
        norm: PlainNorm = vars(module)["_plain_norm"]
        call = self.seen.only_call(name)
        if call is None or not isinstance(call.out, Tensor):
            raise _Unfit(f"it was called {len(self.seen.calls.get(name, []))} times in one forward")
        if module._forward_hooks or module._forward_pre_hooks or "_hf_hook" in vars(module):
            raise _Unfit("it has a hook")
        readers = []
        for op in self.seen.uses_of(call.out, name):
            reader = self.modules.get(op.scope)
            if op.name != "linear" or not isinstance(reader, nn.Linear) or op.positional[0] is not call.out:
                raise _Unfit(f"its output is also read by {op.name} in {op.scope or 'the model'}")
            readers.append(op.scope)
        if others := self.seen.returned_by(call.out) - {name}:
            raise _Unfit(f"its output is what {min(others) or 'the model'} returns")
        if not readers or len(set(readers)) != len(readers):
            raise _Unfit("no linear reads it" if not readers else f"{readers[0]} is called twice")
        self._check_together(readers)
        inside = readers[0].rpartition(".")[0]
        mlp = self._mlp(inside)
        if mlp is not None and set(readers) == {f"{inside}.{key}" for key in (mlp.gate, mlp.up) if key}:
            heard = self.seen.only_call(inside)
            if heard is not None and heard.arguments and heard.arguments[0] is call.out:
                self._swap_mlp(inside, mlp, norm.eps, module)
                self._note(name, inside)
                return
        group = Group([self._member(each) for each in readers], norm.eps)
        at = 0
        for each in readers:
            rows = next(iter(self.modules[each].parameters())).size(0)
            swap(self.modules[each], Reader, _group=group, _part=None if len(readers) == 1 else (at, at + rows))
            at += rows
        object.__setattr__(module, "_deferred", group)
        object.__setattr__(module, "_readers", len(readers))
        self._note(name, inside)

    def _note(self, norm: str, inside: str) -> None:
        """Remember that a child of a layer is a norm whose readers are in another child."""
        layer, _, key = norm.rpartition(".")
        if inside.startswith(f"{layer}.") or not layer:
            child = inside.removeprefix(f"{layer}.").partition(".")[0]
            self.held_by.setdefault(layer, {})[key] = child

    def mlps(self) -> None:
        """Gated MLPs whose norm is not deferred."""
        for name, module in list(self.modules.items()):
            mlp = None if isinstance(module, Swapped) else self._mlp(name)
            if mlp is None or self.seen.only_call(name) is None:
                continue
            try:
                self._check_together([f"{name}.{key}" for key in (mlp.gate, mlp.up) if key])
                self._swap_mlp(name, mlp, None, None)
                self.states[name] = None
            except _Unfit as reason:
                self.states[name] = str(reason)

    def _mlp(self, name: str) -> GatedMlp | None:
        module = self.modules.get(name)
        if module is None:
            return None
        kinds: list[Any] = []
        for key, child in module.named_children():
            if isinstance(child, nn.Linear):
                kinds.append((key, type(child), child.in_features, child.out_features, child.bias is None))
            elif next(child.parameters(), None) is None:
                kinds.append((key, type(child), repr(child)))
            else:
                return None
        kind = (type(module), tuple(kinds))
        if kind not in self.known_mlps:
            self.known_mlps[kind] = read_mlp(module)
        return self.known_mlps[kind]

    def _swap_mlp(self, name: str, mlp: GatedMlp, eps: float | None, norm: nn.Module | None) -> None:
        inner = [f"{name}.{key}" for key in (mlp.gate, mlp.up) if key]
        group = Group([self._member(each) for each in inner], eps, mlp.activation)
        for each in inner:
            swap(self.modules[each], Inner, _group=group)
        swap(self.modules[name], Mlp, _group=group, _part=mlp.down)
        down = f"{name}.{mlp.down}"
        if self._unfit(down) is None:
            swap(self.modules[down], Product, _group=Group([self._member(down)], None))
        if norm is not None:
            object.__setattr__(norm, "_deferred", group)
            object.__setattr__(norm, "_readers", 1)

    def layers(self) -> None:
        for name, norms in self.held_by.items():
            layer = self.modules[name]
            try:
                if self.seen.only_call(name) is None or "forward" in vars(layer) or "_hf_hook" in vars(layer):
                    raise LayerError("its forward was replaced, or it was not called once")
                wiring, product = read_layer(name, layer, norms, self.seen, self.modules)
                if reason := self._unfit(product):
                    raise LayerError(f"{product} {reason}")
                swap(self.modules[product], Product, _group=Group([self._member(product)], None))
                last: Any = self.modules[product]
                swap(layer, Layer, _wiring=wiring._replace(attention_product=last))
                self.states[name] = None
            except LayerError as reason:
                self.states[name] = f"keeps its own adds: {reason}"

    def head(self) -> None:
        head = self.model.get_output_embeddings()
        name = next((n for n, m in self.modules.items() if m is head), None) if head is not None else None
        if name is not None and self._unfit(name, tied=True) is None:
            swap(self.modules[name], Product, _group=Group([self._member(name)], None))

    def _member(self, name: str) -> Member:
        owner, _, key = name.rpartition(".")
        module: Any = self.modules[name]
        return Member(self.modules[owner], key, module)

    def _check_together(self, names: list[str]) -> None:
        for name in names:
            if reason := self._unfit(name):
                raise _Unfit(f"{name} {reason}")
        modules: list[Any] = [self.modules[name] for name in names]
        if len({(m.weight.device, m.weight.dtype, m.in_features, m.bias is None) for m in modules}) > 1:
            raise _Unfit("its readers differ in device, dtype, width or bias")

    def _unfit(self, name: str, tied: bool = False) -> str | None:
        """Why a linear cannot be swapped."""
        module = self.modules[name]
        if type(module) is not nn.Linear:
            return f"is a {type(module).__name__}, not a plain linear"
        weight: Any = module.weight
        if "forward" in vars(module) or "_hf_hook" in vars(module):
            return "has a forward of its own"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            return "has a hook"
        if type(weight) is not nn.Parameter or type(weight.data) is not Tensor or weight.is_meta:
            return "has a weight that is not a plain tensor in memory"
        if not weight.is_floating_point() or weight.element_size() < 2 or not weight.is_contiguous():
            return f"has a weight of {weight.dtype}"
        if not tied and any(self.shared[id(p)] > 1 for p in module.parameters()):
            return "shares its weight with another module"
        return None


def _differs(model: Any, seen: Observed) -> str | None:
    """Run the observed forward again and compare: a wiring that was misread does not go unnoticed."""
    want = next(
        tensors(seen.calls[""][0].out if isinstance(seen.calls[""][0].out, tuple) else dict(seen.calls[""][0].out))
    )
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.no_grad():
            out = model(**inputs_of(model))
    except Exception as error:  # what the rewired model stumbles over is the reason
        return f"the rewired forward failed: {first_line(error)}"
    finally:
        for module in training:
            module.training = True
    got = next(tensors(out if isinstance(out, tuple) else dict(out)))
    off = ((got.float() - want.float()).norm() / want.float().norm()).item()
    if off <= _CLOSE.get(want.dtype, _CLOSE_IN_HALVES):
        return None
    return f"the rewired forward gives other numbers (off by {off:.2g} of their size)"
