"""Watch one forward of a vLLM model before it is compiled: which module handed which tensor to which.

Attention needs vLLM's cache and scheduler, so it is replaced by a plain function of queries, keys and values meanwhile.
Needs vLLM.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

TOKENS = 5


class NotFit(Exception):
    """Why a model, or a part of it, keeps vLLM's own path."""


class Call(NamedTuple):
    """One call of a module, in the order in which they ended."""

    name: str
    given: tuple[Tensor, ...]  # its tensors, by position, then by keyword
    out: tuple[Tensor, ...]


class Body(NamedTuple):
    """The module whose forward runs the decoder layers, and its name."""

    name: str
    module: nn.Module


def body_of(model: nn.Module) -> Body:
    """Raises NotFit where no module of the model runs `layers` over `input_ids` and `positions`."""
    for name, module in model.named_modules():
        takes = inspect.signature(type(module).forward).parameters
        if isinstance(getattr(module, "layers", None), nn.ModuleList) and {"input_ids", "positions"} <= takes.keys():
            return Body(name, module)
    raise NotFit("none of its modules runs decoder layers over input_ids and positions")


def run(body: Body, vocabulary: int) -> Tensor:
    """What the decoder layers and the final norm make of a few tokens, not compiled. Raises NotFit if it fails."""
    device = next(body.module.parameters()).device
    ids = torch.arange(3, 3 + TOKENS, device=device) % vocabulary
    takes = inspect.signature(type(body.module).forward).parameters
    more = {"intermediate_tensors": None} if "intermediate_tensors" in takes else {}
    try:
        with torch.no_grad(), _outside_of_vllm(body.module):
            # The class's own function: calling the module would compile it.
            out: Any = type(body.module).forward(
                body.module, input_ids=ids, positions=torch.arange(TOKENS, device=device), **more
            )
    except NotFit:
        raise
    except Exception as error:  # a model of any kind, outside of vLLM's runner
        raise NotFit(f"a forward over {TOKENS} tokens failed: {type(error).__name__}: {error}") from error
    found = next(_tensors(out), None)
    if found is None or found.dim() != 2:
        raise NotFit("its forward returns something else than hidden states")
    return found


def observe(body: Body, norms: dict[str, Any], vocabulary: int) -> tuple[list[Call], Tensor]:
    """The calls of all modules in one forward, and its result. `norms` run without a weight, by their names."""
    calls: list[Call] = []

    def note(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call(name, tuple(_tensors((args, kwargs))), tuple(_tensors(out))))

    with ExitStack() as stack:
        for name, module in body.module.named_modules(prefix=body.name):
            hook = module.register_forward_hook(partial(note, name), with_kwargs=True)
            stack.callback(hook.remove)
            if name in norms:
                replace(stack, module, "_forward_method", partial(_norm, module.variance_epsilon))
        return calls, run(body, vocabulary)


def is_plain_linear(module: nn.Module) -> bool:
    """A linear of vLLM's with a weight as in the checkpoint, one row of it per output."""
    return isinstance(module, LinearBase) and type(module.quant_method) is UnquantizedLinearMethod


class _Linear(UnquantizedLinearMethod):  # type: ignore[misc]
    """The product as torch has it: on a CPU, vLLM's own waits for weights that are packed later."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


def _norm(eps: float, x: Tensor, residual: Tensor | None = None) -> Any:
    """Out of place, so that each tensor has one meaning."""
    stream = x if residual is None else x + residual
    y = F.rms_norm(stream, stream.shape[-1:], None, eps)
    return y if residual is None else (y, stream)


@contextmanager
def _outside_of_vllm(body: nn.Module) -> Iterator[None]:
    """Attention, experts and plain linears as functions of what they are given."""
    with ExitStack() as stack:
        for module in body.modules():
            if is_plain_linear(module):
                replace(stack, module, "quant_method", _Linear())
            elif {"hidden_states", "router_logits"} <= inspect.signature(type(module).forward).parameters.keys():
                replace(stack, module, "forward", _experts)
            if not isinstance(module, AttentionLayerBase):
                continue
            if not all(hasattr(module, name) for name in ("num_heads", "num_kv_heads", "head_size")):
                raise NotFit(f"its attention is a {type(module).__name__}")
            replace(stack, module, "forward", partial(_attention, module))
        yield


def _experts(hidden_states: Tensor, router_logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states * (1 + router_logits.mean(-1, keepdim=True).tanh())


def _attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    """Some function of all three, token by token."""
    rows, groups = query.size(0), module.num_heads // module.num_kv_heads
    heads = query.reshape(rows, module.num_heads, -1)
    k, v = (t.reshape(rows, module.num_kv_heads, -1).repeat_interleave(groups, 1) for t in (key, value))
    if not heads.shape == k.shape == v.shape:
        raise NotFit("queries, keys and values differ in size")
    return (0.5 * heads + 0.25 * k + v).reshape(rows, -1)


def replace(way_back: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    """Give a module an attribute, or a child, in the place of what it has by that name, until `way_back` is closed.

    A plain callback: a context of `contextlib.contextmanager` would put things back as soon as nobody holds it.
    """
    place: dict[str, Any] = module._modules if name in module._modules else vars(module)
    had, before = name in place, place.get(name)
    place[name] = value
    if had:
        way_back.callback(place.__setitem__, name, before)
    else:
        way_back.callback(place.pop, name)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
