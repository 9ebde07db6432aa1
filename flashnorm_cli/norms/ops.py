"""`rms_norm` and `fused_add_rms_norm` as functions on torch tensors, and as torch operators of the same names."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.autograd.graph import increment_version

from flashnorm_cli.cuda import driver, norm_calls

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_dispatch_modes = torch._C._len_torch_dispatch_stack
_compiling = torch.compiler.is_compiling
_transforms = torch._C._functorch.peek_interpreter_stack


def rms_norm(
    x: Tensor, eps: float, out: Tensor | None = None, *, weight: Tensor | None = None, offset: float = 0.0
) -> Tensor:
    """RMSNorm over the last dimension: `x * rsqrt(mean(x ** 2) + eps)`, times `weight + offset` if there is one.

    The FlashNorm paper's weightless norm (arXiv 2407.09577); with `weight`, the usual one. Computed in float32 and
    rounded once, as `torch.nn.functional.rms_norm` does. On a GPU it is one launch on torch's current stream, without
    synchronisation, and can be captured in a CUDA graph.

    Args:
        x: any shape (..., hidden), any strides. bfloat16, float16 and float32 run on this project's kernels, other
            dtypes on torch.
        eps: added to the mean of squares; no unit of its own but that of x squared.
        out: where to write: x's shape, dtype and device, any strides without overlap. It may be x itself, but not
            overlap x otherwise. Without it a new contiguous tensor is made.
        weight: shape (hidden,), x's device.
        offset: 0, or 1 for models that compute `1 + weight` (Gemma).
    Returns:
        out, or the new tensor.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    if not _compiling() and _forward_ad._current_level < 0:
        y = norm_calls.launch_cached("rms_norm", x, out, eps, weight, offset)
        if y is not None:
            if out is not None:
                _written(out)
            return y
    return _rms_norm(x, eps, out, weight, offset)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, eps: float, *, weight: Tensor | None = None, offset: float = 0.0
) -> None:
    """Add x to the residual stream and norm it, in place: `residual += x`, then `x = rms_norm(residual)`.

    vLLM's meaning of the name. The sum is rounded to its dtype before the norm is taken of it, as in transformers.

    Args:
        x: shape (..., hidden), any strides; becomes the norm.
        residual: x's shape, dtype and device, not overlapping x; becomes the sum.
        eps, weight, offset: as for `rms_norm`.
    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
        RuntimeError: from torch, if x or residual is a leaf that wants a gradient.
    """
    if (
        not _compiling()
        and _forward_ad._current_level < 0
        and norm_calls.launch_cached("fused_add_rms_norm", x, residual, eps, weight, offset) is not None
    ):
        _written(x, residual)
        return
    _fused_add_rms_norm(x, residual, eps, weight, offset)


def _direct(*tensors: Tensor) -> bool:
    """Whether a kernel may be launched on these: plain CUDA tensors, and nobody who traces or differentiates."""
    return (
        not _compiling()
        and all(type(t) in _PLAIN and t.is_cuda and not t.is_neg() for t in tensors)
        and not _wants_grad(*tensors)
        and _forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and not _dispatch_modes()
        and _transforms() is None  # under vmap or grad a tensor has no memory of its own
    )


def _fits(weight: Tensor, offset: float, x: Tensor) -> bool:
    """Whether a kernel can read this weight as it is."""
    return (
        type(weight) in _PLAIN
        and weight.dtype == x.dtype
        and weight.get_device() == x.get_device()
        and weight.dim() == 1
        and weight.size(0) == x.size(-1)
        and weight.is_contiguous()
        and (offset == 0 or offset == 1)
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def _rms_norm(x: Tensor, eps: float, out: Tensor | None, weight: Tensor | None, offset: float) -> Tensor:
    """Everything but the short way."""
    _check(x, weight, offset)
    if out is not None:
        _check_alike(x, out, "out")
    tensors = [t for t in (x, out, weight) if t is not None]
    if _direct(*tensors) and (weight is None or _fits(weight, offset, x)):
        y = torch.empty_like(x, memory_format=torch.contiguous_format) if out is None else out
        if norm_calls.run("rms_norm", x, y, eps, weight, offset, "new b" if out is None else "b"):
            if out is not None:
                _written(out)
            return y
    elif out is None and not torch.compiler.is_compiling() and not all(type(t) in _PLAIN for t in tensors):
        return torch.ops.flashnorm.rms_norm(x, eps, weight, offset)
    y = _torch_rms_norm(x, eps, weight, offset)
    return y if out is None else out.copy_(y)


def _fused_add_rms_norm(x: Tensor, residual: Tensor, eps: float, weight: Tensor | None, offset: float) -> None:
    _check(x, weight, offset)
    _check_alike(x, residual, "residual")
    if x.numel() and _overlaps(x):
        raise ValueError("x is written, but several of its elements share one place in memory")
    if (
        _direct(x, residual)
        and (weight is None or _fits(weight, offset, x))
        and norm_calls.run("fused_add_rms_norm", x, residual, eps, weight, offset, "b")
    ):
        _written(x, residual)
        return
    _torch_fused_add_rms_norm(x, residual, eps, weight, offset)


def _written(*tensors: Tensor) -> None:
    """Tell autograd, which cannot see a kernel write, in case that it keeps one of these for a gradient."""
    if torch.is_grad_enabled():
        increment_version(tensors)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _check(x: Tensor, weight: Tensor | None, offset: float) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, not a torch tensor")
    if not x.is_floating_point():
        raise TypeError(f"x is {x.dtype}: a norm needs floating point")
    if x.dim() == 0:
        raise ValueError("x has no dimension to take the norm over")
    if offset not in (0, 1):
        raise ValueError(f"offset is {offset}: it can be 0 (w) or 1 (1 + w)")
    if weight is not None:
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {x.shape[-1]} elements in a row")
        if weight.device != x.device:
            raise ValueError(f"weight is on {weight.device}, x on {x.device}")


def _check_alike(x: Tensor, other: Tensor, name: str) -> None:
    if other.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(other.shape)}, x has {tuple(x.shape)}")
    if other.dtype != x.dtype:
        raise TypeError(f"{name} is {other.dtype}, x is {x.dtype}")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device}, x on {x.device}")
    if other.numel() and _overlaps(other):
        raise ValueError(f"{name} is written, but several of its elements share one place in memory")


def _overlaps(x: Tensor) -> bool:
    """Expanded dimensions; more devious overlaps are the caller's."""
    return any(n > 1 and stride == 0 for n, stride in zip(x.shape, x.stride(), strict=True))


def _torch_rms_norm(x: Tensor, eps: float, weight: Tensor | None, offset: float) -> Tensor:
    shape = (x.size(-1),)
    if weight is None or (offset == 0 and weight.dtype == x.dtype):
        return F.rms_norm(x, shape, weight, eps)
    if x.dtype == torch.float64:
        return F.rms_norm(x, shape, weight.double() + offset, eps)
    return F.rms_norm(x.float(), shape, weight.float() + offset, eps).to(x.dtype)


def _torch_fused_add_rms_norm(x: Tensor, residual: Tensor, eps: float, weight: Tensor | None, offset: float) -> None:
    residual.add_(x)
    x.copy_(_torch_rms_norm(residual, eps, weight, offset))


# The same as torch operators, torch.ops.flashnorm.*: for graphs that shall keep the norm as one node. torch.compile
# does better without: inside it, the functions above turn into F.rms_norm, which Inductor fuses with its neighbours.
_library = torch.library.Library("flashnorm", "DEF")
_library.define("rms_norm(Tensor x, float eps, Tensor? weight=None, float offset=0.0) -> Tensor")
_library.define(
    "fused_add_rms_norm(Tensor(a!) x, Tensor(b!) residual, float eps, Tensor? weight=None, float offset=0.0) -> ()"
)


def _op_rms_norm(x: Tensor, eps: float, weight: Tensor | None = None, offset: float = 0.0) -> Tensor:
    _check(x, weight, offset)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if (
        x.is_cuda
        and (weight is None or _fits(weight, offset, x))
        and norm_calls.run("rms_norm", x, y, eps, weight, offset)
    ):
        return y
    return y.copy_(_torch_rms_norm(x, eps, weight, offset))


def _op_fused_add_rms_norm(
    x: Tensor, residual: Tensor, eps: float, weight: Tensor | None = None, offset: float = 0.0
) -> None:
    _check(x, weight, offset)
    _check_alike(x, residual, "residual")
    if (
        x.is_cuda
        and (weight is None or _fits(weight, offset, x))
        and norm_calls.run("fused_add_rms_norm", x, residual, eps, weight, offset)
    ):
        _written(x, residual)
        return
    _torch_fused_add_rms_norm(x, residual, eps, weight, offset)


def _fake_rms_norm(x: Tensor, eps: float, weight: Tensor | None = None, offset: float = 0.0) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_fused_add_rms_norm(*arguments: Any) -> None:
    return None


def _autograd_rms_norm(x: Tensor, eps: float, weight: Tensor | None = None, offset: float = 0.0) -> Tensor:
    if _wants_grad(x) or (weight is not None and _wants_grad(weight)):
        return _torch_rms_norm(x, eps, weight, offset)  # torch knows its gradient
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flashnorm.rms_norm(x, eps, weight, offset)


def _autograd_fused_add_rms_norm(
    x: Tensor, residual: Tensor, eps: float, weight: Tensor | None = None, offset: float = 0.0
) -> None:
    if _wants_grad(x, residual) or (weight is not None and _wants_grad(weight)):
        return _torch_fused_add_rms_norm(x, residual, eps, weight, offset)
    with torch._C._AutoDispatchBelowAutograd():
        torch.ops.flashnorm.fused_add_rms_norm(x, residual, eps, weight, offset)


for _key in ("CPU", "CUDA"):
    _library.impl("rms_norm", _op_rms_norm, _key)
    _library.impl("fused_add_rms_norm", _op_fused_add_rms_norm, _key)
_library.impl("rms_norm", _autograd_rms_norm, "Autograd")
_library.impl("fused_add_rms_norm", _autograd_fused_add_rms_norm, "Autograd")
torch.library.register_fake("flashnorm::rms_norm", _fake_rms_norm, lib=_library)
torch.library.register_fake("flashnorm::fused_add_rms_norm", _fake_fused_add_rms_norm, lib=_library)


def info() -> dict[str, Any]:
    """What the norms run on here, and why: for people who wonder, and for the record of a benchmark.

    Returns:
        path: "cuda, direct launch", "cuda, RawKernel" or "torch"; reason: why it is not the first one, else None;
        then GPU, compute capability, driver, CUDA and versions; None where there is none.
    """
    found: dict[str, Any] = {
        "path": "torch",
        "reason": None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }
    package = driver.cupy()
    found["cupy"] = package.__version__ if package is not None else None
    found |= dict.fromkeys(("gpu", "capability", "driver_cuda", "nvrtc", "gpus"))
    if not torch.cuda.is_available():
        found["reason"] = "torch sees no CUDA device"
        return found
    index = torch.cuda.current_device()
    found["gpus"] = torch.cuda.device_count()
    found["gpu"] = torch.cuda.get_device_name(index)
    found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(index)))
    reason = driver.why_not(index)
    if package is not None:
        try:
            found["driver_cuda"] = _dotted(package.cuda.runtime.driverGetVersion())
            found["nvrtc"] = ".".join(map(str, package.cuda.nvrtc.getVersion()))
        except (ImportError, OSError, RuntimeError) as error:
            reason = reason or f"NVRTC cannot be loaded: {' '.join(str(error).split())}"
    if reason is None:
        x = torch.ones(1, 8, device=f"cuda:{index}")
        reason = None if norm_calls.run("rms_norm", x, torch.empty_like(x), 1e-6, None, 0.0) else driver.why_not(index)
    if reason is None:
        found["path"] = "cuda, direct launch" if driver.driver_launch() else "cuda, RawKernel"
        if driver.driver_launch() is None:
            reason = "libcuda has no cuLaunchKernelEx (CUDA 11.8 and later have): a launch costs 2 us more"
    found["reason"] = reason
    return found


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"
