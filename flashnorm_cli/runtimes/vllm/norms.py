"""vLLM's own norm modules, without weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # vLLM imports its plugins before it has chosen how to import torch
    from torch import Tensor, nn

KERNEL = "flashnorm"  # what vLLM's --ir-op-priority knows this project's kernels by


log = logging.getLogger("vllm.flashnorm")  # below vLLM's own logger, so that its settings hold


# How a norm runs: with the weight that it holds; without one; or with ones of its activations' dtype, for vLLM's
# passes that hand the weight on and refuse the float32 `1 + w` that its Gemma norms compute.
State = Literal["own", "without", "ones"]


@dataclass(frozen=True)
class Kind:
    """A class of norms of vLLM's: the weight that changes nothing, how a norm of it runs, and how to change that."""

    identity: float
    state: Callable[[Any], State]
    run: Callable[[Any, State], None]


def _rms_norm_state(norm: Any) -> State:
    return "own" if norm.pass_weight or norm.pass_weight_add else "without"


def _run_rms_norm(norm: Any, state: State) -> None:
    norm.pass_weight = norm.pass_weight_add = state != "without"  # its own weight is ones of that dtype


def _gemma(norm: Any, weight: Tensor | None, x: Tensor, residual: Tensor | None) -> Any:
    """`GemmaRMSNorm.forward_native` of vLLM 0.32 with another weight than its float32 `1 + w`."""
    from vllm import ir

    if residual is None:
        return ir.ops.rms_norm(x, weight, norm.variance_epsilon)
    return ir.ops.fused_add_rms_norm(x, residual, weight, norm.variance_epsilon)


def _gemma_without(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    return _gemma(self, None, x, residual)


def _gemma_ones(self: Any, x: Tensor, residual: Tensor | None = None) -> Any:
    return _gemma(self, self.flashnorm_ones, x, residual)


def _gemma_state(norm: Any) -> State:
    method = norm._forward_method
    own = getattr(getattr(method, "__self__", None), "flashnorm_own", method)  # where its readers norm (deferred.py)
    states: dict[Any, State] = {_gemma_without: "without", _gemma_ones: "ones"}
    return states.get(getattr(own, "__func__", None), "own")


def _run_gemma(norm: Any, state: State) -> None:
    if state == "ones":
        norm.register_buffer("flashnorm_ones", norm.weight.detach().new_ones(norm.weight.shape), persistent=False)
    forward = {"without": _gemma_without, "ones": _gemma_ones}.get(state)
    norm._forward_method = MethodType(forward, norm) if forward else norm.dispatch_forward(compile_native=False)


PLAIN = Kind(1.0, _rms_norm_state, _run_rms_norm)
GEMMA = Kind(0.0, _gemma_state, _run_gemma)


def norms_of(model: nn.Module) -> Iterator[tuple[str, Any, Kind]]:
    """The norms of a vLLM model that carry a weight and can run without, with their names and kinds."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm
    from vllm.platforms import current_platform

    gemma_is_plain = current_platform.is_cuda_alike() or current_platform.is_cpu()  # others have kernels for 1 + w
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm) and getattr(module, "has_weight", False) and hasattr(module, "pass_weight_add"):
            yield name, module, PLAIN
        elif (
            isinstance(module, GemmaRMSNorm)
            and type(module).forward_native is GemmaRMSNorm.forward_native  # not a platform's own
            and hasattr(module, "_forward_method")
            and gemma_is_plain
        ):
            yield name, module, GEMMA


def is_identity(weight: Tensor, value: float) -> bool:
    """Whether all elements of a weight that is there are exactly this value. Waits for the GPU."""
    return not weight.is_meta and weight.numel() > 0 and bool((weight.detach() == value).all())


def norm_states(model: nn.Module) -> dict[str, bool]:
    """For each norm of a loaded vLLM model that carries a weight: whether it runs without.

    `LLM.apply_model(norm_states)` asks a running engine; with a separate engine process that needs
    VLLM_ALLOW_INSECURE_SERIALIZATION=1.
    """
    return {name: kind.state(norm) == "without" for name, norm, kind in norms_of(model)}


def norms_with_ones(model: nn.Module) -> list[str]:
    """The norms that run with ones of their activations' dtype in the place of vLLM's float32 `1 + w`."""
    return [name for name, norm, kind in norms_of(model) if kind.state(norm) == "ones"]
