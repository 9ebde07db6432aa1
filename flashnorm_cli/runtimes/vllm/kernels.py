"""This project's kernels as implementations of vLLM's operators `rms_norm` and `fused_add_rms_norm`.

Importing this registers them under the name flashnorm. vLLM uses them where it is asked to:

    vllm serve MODEL --ir-op-priority.rms_norm flashnorm --ir-op-priority.fused_add_rms_norm flashnorm

They are called as torch operators (torch.ops.flashnorm), which torch.compile leaves as they are.
"""

# vLLM reads the annotations below, so they may not be strings: no `from __future__ import annotations`.
import torch
from torch import Tensor
from vllm import ir
from vllm.platforms import current_platform

import flashnorm_cli.norms.ops  # noqa: F401  defines torch.ops.flashnorm
from flashnorm_cli.runtimes.vllm.norms import KERNEL

SUPPORTED = current_platform.is_cuda() or current_platform.is_cpu()


def _takes(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    """Norms over whole rows, without a weight or with one of x's dtype, as vLLM's own kernels."""
    return variance_size is None and (weight is None or weight.dtype == x.dtype)


def _takes_both(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return variance_size is None and (weight is None or weight.dtype == x.dtype)


@ir.ops.rms_norm.register_impl(KERNEL, supported=SUPPORTED, supports_args=_takes)  # type: ignore[untyped-decorator]
def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return torch.ops.flashnorm.rms_norm(x, epsilon, weight, 0.0)


@ir.ops.fused_add_rms_norm.register_impl(  # type: ignore[untyped-decorator]
    KERNEL, supported=SUPPORTED, supports_args=_takes_both, inplace=True
)
def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    torch.ops.flashnorm.fused_add_rms_norm(x, x_residual, epsilon, weight, 0.0)
    return x, x_residual
