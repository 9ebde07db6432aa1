"""The ways in which a model's norms are run for a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.norms import fused_add_rms_norm
from flashnorm_cli.norms.detect import PlainNorm, plain_norms
from flashnorm_cli.runtimes.transformers.deferred import choose_kernels, defer, states_of, undefer
from flashnorm_cli.runtimes.transformers.swap import norms_replaced, on_kernel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TUNED_INDUCTOR = "stock, coordinate descent"  # stock; under torch.compile, with Inductor's own search
WAYS = (
    "stock",
    "notebook swap",
    "F.rms_norm",
    "flashnorm",
    "flashnorm fused",
    "flashnorm deferred",
    "no norms",
)
COMPILED_WAYS = ("stock", TUNED_INDUCTOR, "flashnorm", "flashnorm deferred", "no norms")


def tune_model(model: PreTrainedModel, on_progress: Callable[[int, int, str], None]) -> None:
    """Measure again which kernels run for the products of a model on a GPU, and keep that on disk."""
    with norms_replaced(model):
        defer(model, measure=False)
        try:
            choose_kernels(model, on_progress, again=True)
        finally:
            undefer(model)


@contextmanager
def swapped(model: PreTrainedModel, way: str) -> Iterator[None]:
    """Run the model's norms another way, one of WAYS, within the block.

    Raises:
        FlashNormError: the way is not for this model.
    """
    if way in ("stock", TUNED_INDUCTOR):
        yield
    elif way == "flashnorm deferred":
        with norms_replaced(model):
            defer(model)
            try:
                if all(states_of(model).values()):
                    reason = next((why for why in states_of(model).values() if why), "its norms carry weights: fold it")
                    raise FlashNormError(f"nothing can be deferred: {reason}")
                yield
            finally:
                undefer(model)
    elif way == "flashnorm fused":
        with _fused(model):
            yield
    else:
        choose = on_kernel if way == "flashnorm" else lambda module, norm: _forward(way, module, norm)
        with norms_replaced(model, choose) as names:
            if not names:
                raise FlashNormError("the model has no plain RMSNorm")
            yield


def _forward(way: str, module: nn.Module, norm: PlainNorm) -> Callable[[Tensor], Tensor]:
    weight = norm.parameter(module).detach()
    eps, shape = norm.eps, weight.shape
    gain: Any = None if norm.is_identity(module) else (weight.float() + norm.offset).to(weight.dtype)

    def notebook(x: Tensor) -> Tensor:
        y = F.rms_norm(x.float(), shape, None, eps).to(x.dtype)
        return y if gain is None else y * gain

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "notebook swap": notebook,
        "F.rms_norm": lambda x: F.rms_norm(x, shape, gain, eps),
        "no norms": lambda x: x,
    }
    return ways[way]


@contextmanager
def _fused(model: PreTrainedModel) -> Iterator[None]:
    """Let each norm add what the block before it left: layers hand on (their output, the residual stream)."""
    base: Any = model.base_model
    found = {id(module): norm for module, norm in plain_norms(model).values()}
    layers: Any = getattr(base, "layers", None)
    final: Any = getattr(base, "norm", None)
    parts = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
    if layers is None or id(final) not in found or any(set(dict(x.named_children())) != parts for x in layers):
        raise FlashNormError("fusing is written for layers of two norms, attention and MLP, as Llama's")
    if any(id(n) not in found for layer in layers for n in (layer.input_layernorm, layer.post_attention_layernorm)):
        raise FlashNormError("fusing is written for plain RMSNorms")
    stream: list[Tensor] = []  # the residual stream, while it is not in the layers' output

    def add_norm(module: nn.Module) -> Callable[[Tensor], None]:
        norm = found[id(module)]
        eps, offset = norm.eps, norm.offset
        weight = None if norm.is_identity(module) else norm.parameter(module)
        return lambda x: fused_add_rms_norm(x, stream[0], eps, weight=weight, offset=offset)

    def layer_forward(layer: Any, first: bool) -> Callable[..., Tensor]:
        before, after = add_norm(layer.input_layernorm), add_norm(layer.post_attention_layernorm)
        start, attention, mlp = (
            on_kernel(layer.input_layernorm, found[id(layer.input_layernorm)]),
            layer.self_attn,
            layer.mlp,
        )

        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            x = hidden_states
            if first:
                stream[:] = [x]
                x = start(x)
            else:
                before(x)
            x, _ = attention(hidden_states=x, **arguments)
            after(x)
            out: Tensor = mlp(x)
            return out

        return forward

    last = add_norm(final)

    def final_forward(x: Tensor) -> Tensor:
        last(x)
        return x

    changed = [*layers, final]
    for i, layer in enumerate(layers):
        layer.forward = layer_forward(layer, i == 0)
    final.forward = final_forward
    try:
        yield
    finally:
        for module in changed:
            del module.forward
