"""What norm_linear computes, in torch's own operators: for the CPU, many rows, gradients, and as the one to beat."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from flashnorm_cli.norms.ops import rms_norm

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
}


def torch_norm_linear(
    x: Tensor, weight: Tensor, eps: float | None, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor:
    y = F.linear(x if eps is None else rms_norm(x, eps), weight, bias)
    if activation is not None:
        gate, up = y.chunk(2, -1)
        y = ACTIVATIONS[activation](gate) * up
    return y if residual is None else residual + y
