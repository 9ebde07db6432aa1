"""`norm_linear`: an RMSNorm without a weight and the linear behind it as one operation, on torch tensors."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad

from flashnorm_cli.cuda import choices, driver, linear
from flashnorm_cli.cuda.linear import DTYPES, Launch, Problem, Ready
from flashnorm_cli.cuda.linear_variants import ACTIVATIONS, MAX_ROWS, Variant, bucket_of, candidates
from flashnorm_cli.norms import ops, tuning
from flashnorm_cli.norms.linear_torch import torch_norm_linear


def norm_linear(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """`act(W @ norm(x) + bias) + residual`, the norm being `x * rsqrt(mean(x ** 2) + eps)`.

    Proposition 2 of the FlashNorm paper (arXiv 2407.09577): `W @ (x / rms(x)) = (W @ x) / rms(x)`, so one kernel reads
    x and W once and computes both. On a GPU of compute capability 8.0 and later, for bfloat16 and float16 and up to 16
    rows, this project's kernel runs where it was measured to be faster than `rms_norm` and the library's matmul;
    elsewhere those do. The first call with a shape measures that, which takes seconds and waits for the GPU, unless a
    CUDA graph is being captured; choices are kept on disk (docs/kernels.md).

    Args:
        x: shape (..., K), any strides.
        weight: shape (N, K), or (2 N, K) with an activation; x's dtype and device.
        eps: added to the mean of squares; None for a linear without a norm.
        bias: one element per row of weight.
        residual: shape (..., N): added to the product, which is rounded to its dtype first, as a model's own add does.
        activation: "silu", "gelu_tanh" or "gelu": the result is `act(first half) * second half` of the product,
            computed in float32 and rounded once.
    Returns:
        A new contiguous tensor of shape (..., N).
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.flashnorm.norm_linear(x, weight, eps, bias, residual, activation)
    if _forward_ad._current_level < 0:
        y = _launch_cached(x, weight, eps, bias, residual, activation)
        if y is not None:
            return y
    _check(x, weight, bias, residual, activation)
    if _direct(x, weight, bias, residual):
        return _run(x, weight, eps, bias, residual, activation, remember=True)
    return torch.ops.flashnorm.norm_linear(x, weight, eps, bias, residual, activation)


def _direct(*tensors: Tensor | None) -> bool:
    return ops._direct(*(t for t in tensors if t is not None))


def _launch_cached(
    x: Tensor, weight: Tensor, eps: float | None, bias: Tensor | None, residual: Tensor | None, activation: str | None
) -> Tensor | None:
    """Launch a kernel if this thread launched it for just such tensors before; else None."""
    try:
        call = linear._local.ready[id(weight), x.shape, x.dtype, eps, activation, bias is None, residual is None]
    except (AttributeError, KeyError, TypeError):
        return None
    given = [t for t in (x, weight, bias, residual) if t is not None]
    if call.weight() is not weight or not call.guard.check(*given):
        return None
    if (x.data_ptr() | weight.data_ptr()) & 15 or (call.several and driver.get_device() != call.gpu):
        return None
    y = torch.empty(call.shape, dtype=x.dtype, device=x.device)
    linear.go(call, x, weight, y, bias, residual)
    return y


def _run(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str | None,
    remember: bool = False,
) -> Tensor:
    """What both the function and the operator do with checked CUDA tensors."""
    rows = x.numel() // x.size(-1) if x.size(-1) else 0
    variant = None
    if linear.fits(x, weight, rows) and linear.why_not(x.get_device()) is None:
        problem = problem_of(x, weight, eps, residual, activation)
        variant = choose(problem, rows, x.get_device())
    if variant is None or (function := linear.compiled(variant, problem, x.get_device())) is None:
        return torch_norm_linear(x, weight, eps, bias, residual, activation)
    given = [t for t in (x, weight, bias, residual) if t is not None]
    flat, extra = _rows_of(x, rows), None if residual is None else _rows_of(residual, rows)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    shape = (*x.shape[:-1], problem.n)
    index = x.get_device()
    strides = (2 * flat.stride(0), 2 * weight.stride(0), 0 if extra is None else 2 * extra.stride(0))
    launch = Launch(variant, problem, rows, strides, 0.0 if eps is None else eps)
    known = linear.ready()
    guard = None
    as_given = flat.data_ptr() == x.data_ptr() and (bias is None or bias is given[2])
    as_given = as_given and (extra is None or residual is None or extra.data_ptr() == residual.data_ptr())
    key = (id(weight), x.shape, x.dtype, eps, activation, bias is None, residual is None)
    before = known.get(key)
    seen = before.seen if before is not None and before.weight() is weight else [-1]
    if remember and as_given:
        guard = driver.guard_of(given)
    several = torch.cuda.device_count() > 1
    call = Ready(guard, weakref.ref(weight), seen, launch, launch.start(function, index), index, several, shape)
    if guard is not None:
        known[key] = call
    y = torch.empty(shape, dtype=x.dtype, device=x.device)
    linear.go(call, flat, weight, y, bias, extra)
    return y


def _rows_of(x: Tensor, rows: int) -> Tensor:
    """x as rows at one stride, 16 bytes at a time; copied only where it does not lie so."""
    flat = x.reshape(rows, x.size(-1))
    if flat.stride(-1) != 1 or flat.stride(0) % 8 or flat.data_ptr() % 16 or flat.stride(0) < 0:
        flat = flat.contiguous() if not flat.is_contiguous() else flat.clone()
    return flat


def problem_of(
    x: Tensor, weight: Tensor, eps: float | None, residual: Tensor | None, activation: str | None
) -> Problem:
    n = weight.size(0) // (2 if activation else 1)
    code = ACTIVATIONS.index(activation or "none")
    return Problem(x.size(-1), n, DTYPES.index(x.dtype), eps is not None, code, residual is not None)


def choose(problem: Problem, rows: int, index: int) -> Variant | None:
    """The variant for a shape, measured if it was not yet; None for the library."""
    bucket = bucket_of(rows)
    choice = choices.choice_of(problem, bucket, index)
    if choice is None and tuning.measuring_allowed():
        choice = tuning.tune([problem], index, [bucket]).get((problem, bucket))
    if choice is not None:
        return choice.variant
    # Not measured: for one row any variant beats the library, by all that was measured.
    device = driver.device(index)
    every = candidates(problem.k, problem.activation, bucket, device.arch)
    return every[0] if rows == 1 and every else None


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str | None) -> None:
    ops._check(x, None, 0.0)
    if activation is not None and activation not in ACTIVATIONS[1:]:
        raise ValueError(f"activation is {activation!r}: it can be {', '.join(ACTIVATIONS[1:])} or None")
    if weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {x.size(-1)} elements in a row")
    if activation is not None and weight.size(0) % 2:
        raise ValueError(f"weight has {weight.size(0)} rows, which are no two halves")
    n = weight.size(0) // (2 if activation else 1)
    wanted = {"weight": (weight, None), "bias": (bias, (weight.size(0),)), "residual": (residual, (*x.shape[:-1], n))}
    for name, (tensor, shape) in wanted.items():
        if tensor is None:
            continue
        if shape is not None and tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
        if tensor.dtype != x.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, x is {x.dtype}")
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")


# The same as a torch operator, torch.ops.flashnorm.norm_linear. Under torch.compile the function above becomes it: the
# product with its norm and epilogue is what Inductor's own templates do not have.
ops._library.define(
    "norm_linear(Tensor x, Tensor weight, float? eps, Tensor? bias=None, Tensor? residual=None, "
    "str? activation=None) -> Tensor"
)


def _op(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    _check(x, weight, bias, residual, activation)
    if x.is_cuda and 0 < x.numel() <= MAX_ROWS * x.size(-1):
        y = _launch_cached(x, weight, eps, bias, residual, activation)
        return _run(x, weight, eps, bias, residual, activation, remember=True) if y is None else y
    return torch_norm_linear(x, weight, eps, bias, residual, activation).contiguous()


def _fake(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.size(0) // 2 if activation else weight.size(0)))


def _autograd(
    x: Tensor,
    weight: Tensor,
    eps: float | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    if ops._wants_grad(*(t for t in (x, weight, bias, residual) if t is not None)):
        return torch_norm_linear(x, weight, eps, bias, residual, activation)  # torch knows its gradient
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashnorm.norm_linear(x, weight, eps, bias, residual, activation)


for _key in ("CPU", "CUDA"):
    ops._library.impl("norm_linear", _op, _key)
ops._library.impl("norm_linear", _autograd, "Autograd")
torch.library.register_fake("flashnorm::norm_linear", _fake, lib=ops._library)


def describe() -> dict[str, Any]:
    """What norm_linear runs on here, why not on its kernels if so, and which choices are known.

    Returns:
        norm_linear: "kernels where they were measured to be faster" or "torch"; norm_linear_reason; and where there are
        kernels norm_linear_choices (shapes and numbers of rows that were measured), norm_linear_on_kernels (of these,
        where a kernel won), norm_linear_file (where they are kept). None where there is none.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("norm_linear_reason", "norm_linear_choices", "norm_linear_on_kernels", "norm_linear_file")
    )
    if not torch.cuda.is_available():
        return {"norm_linear": "torch", **found, "norm_linear_reason": "torch sees no CUDA device"}
    index = torch.cuda.current_device()
    if reason := linear.why_not(index):
        return {"norm_linear": "torch", **found, "norm_linear_reason": reason}
    known = choices.known_choices(index)
    return {
        "norm_linear": "kernels where they were measured to be faster",
        "norm_linear_reason": None,
        "norm_linear_choices": len(known),
        "norm_linear_on_kernels": sum(choice.variant is not None for choice in known.values()),
        "norm_linear_file": str(choices.file_of(choices.gpu_name(index))),
    }
