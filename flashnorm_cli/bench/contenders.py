"""Who takes part in the benchmark of the norms, how each is called, and the limits: copies of the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashnorm_cli.cuda import driver, variants
from flashnorm_cli.cuda.variants import Launch, Operation
from flashnorm_cli.norms import fused_add_rms_norm, rms_norm

EPS = 1e-5
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
ROUNDINGS = 3.1  # what a contender may be off by: those that round before the weight do it twice


@dataclass
class Buffers:
    """One shape's tensors: `sets` of (x, residual or y), and a weight."""

    x: list[Tensor]
    other: list[Tensor]
    weight: Tensor
    kept: dict[int, Any] = field(default_factory=dict)  # outputs of those who allocate, so that theirs rotate, too


# Builds the call that runs a contender on set i. It may raise ImportError: then the contender is not there.
Maker = Callable[[Buffers], Callable[[int], Any]]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inductor's own, for exactly this shape."""
    torch._dynamo.reset()
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def _keeping(buffers: Buffers, call: Callable[[int], Any]) -> Callable[[int], Any]:
    def run(i: int) -> Any:
        buffers.kept[i] = result = call(i)
        return result

    return run


def _transformers(b: Buffers) -> Callable[[int], Any]:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(b.weight.numel(), eps=EPS).to(b.weight)
    norm.weight.data.copy_(b.weight)
    return _keeping(b, lambda i: norm(b.x[i]))


def _shape(b: Buffers) -> tuple[int]:
    return (b.weight.numel(),)


def _liger(b: Buffers, weight: Tensor | None) -> Callable[[int], Any]:
    function = import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction
    return _keeping(b, lambda i: function.apply(b.x[i], weight, EPS, 0.0, "llama", False, False))


def _liger_fused(b: Buffers) -> Callable[[int], Any]:
    function = import_module("liger_kernel.ops.fused_add_rms_norm").LigerFusedAddRMSNormFunction
    return _keeping(b, lambda i: function.apply(b.x[i], b.other[i], b.weight, EPS, 0.0, "llama", False))


def _quack(b: Buffers) -> Callable[[int], Any]:
    function = import_module("quack").rmsnorm
    return _keeping(b, lambda i: function(b.x[i], None, eps=EPS))


def _flashinfer(b: Buffers) -> Callable[[int], Any]:
    function = import_module("flashinfer.norm").rmsnorm
    return lambda i: function(b.x[i], b.weight, EPS, out=b.other[i])


def _vllm(b: Buffers) -> Callable[[int], Any]:
    import_module("vllm._custom_ops")
    return lambda i: torch.ops._C.rms_norm(b.other[i], b.x[i], b.weight, EPS)


def _vllm_fused(b: Buffers) -> Callable[[int], Any]:
    import_module("vllm._custom_ops")
    return lambda i: torch.ops._C.fused_add_rms_norm(b.x[i], b.other[i], b.weight, EPS)


def _inductor(b: Buffers) -> Callable[[int], Any]:
    shape = _shape(b)
    function = _compiled(lambda x: F.rms_norm(x, shape, None, EPS))
    return _keeping(b, lambda i: function(b.x[i]))


def _inductor_fused(b: Buffers) -> Callable[[int], Any]:
    shape = _shape(b)

    def add_norm(x: Tensor, residual: Tensor) -> None:
        residual.add_(x)
        x.copy_(F.rms_norm(residual, shape, None, EPS))

    function = _compiled(add_norm)
    return lambda i: function(b.x[i], b.other[i])


def _torch_fused(b: Buffers) -> Callable[[int], Any]:
    def call(i: int) -> tuple[Tensor, Tensor]:
        total = b.x[i] + b.other[i]
        return F.rms_norm(total, _shape(b), None, EPS), total

    return _keeping(b, call)


# Name, whether it multiplies by a weight, how to build it. An output is what the call returns, or else set `other`.
NORMS: list[tuple[str, bool, Maker]] = [
    ("flashnorm", False, lambda b: lambda i: rms_norm(b.x[i], EPS, b.other[i])),
    ("flashnorm, weighted", True, lambda b: lambda i: rms_norm(b.x[i], EPS, b.other[i], weight=b.weight)),
    ("flashnorm, no PDL", False, lambda b: _plain_launch("rms_norm", b)),
    ("F.rms_norm(None)", False, lambda b: _keeping(b, lambda i: F.rms_norm(b.x[i], _shape(b), None, EPS))),
    ("F.rms_norm(weight)", True, lambda b: _keeping(b, lambda i: F.rms_norm(b.x[i], _shape(b), b.weight, EPS))),
    ("notebook swap", False, lambda b: _keeping(b, lambda i: _notebook(b.x[i]))),
    ("transformers", True, _transformers),
    ("Inductor, None", False, _inductor),
    ("Liger, None", False, lambda b: _liger(b, None)),
    ("Liger, weight", True, lambda b: _liger(b, b.weight)),
    ("quack, None", False, _quack),
    ("FlashInfer, weight", True, _flashinfer),
    ("vLLM, weight", True, _vllm),
]
FUSED: list[tuple[str, bool, Maker]] = [
    ("flashnorm fused", False, lambda b: lambda i: fused_add_rms_norm(b.x[i], b.other[i], EPS)),
    (
        "flashnorm fused, weighted",
        True,
        lambda b: lambda i: fused_add_rms_norm(b.x[i], b.other[i], EPS, weight=b.weight),
    ),
    ("flashnorm fused, no PDL", False, lambda b: _plain_launch("fused_add_rms_norm", b)),
    ("add, F.rms_norm(None)", False, _torch_fused),
    ("Inductor fused, None", False, _inductor_fused),
    ("Liger fused, weight", True, _liger_fused),
    ("vLLM fused, weight", True, _vllm_fused),
]


def _plain_launch(operation: Operation, b: Buffers) -> Callable[[int], Any]:
    """Our kernel launched like everybody else's, to see what programmatic dependent launch gives."""
    x = b.x[0]
    index, hidden, dtype = x.get_device(), x.size(-1), driver.DTYPES.index(x.dtype)
    width = variants.width_of(hidden * x.element_size())
    choice = variants.choose(operation, hidden, x.element_size(), width, x.size(0), driver.device(index))
    plan = driver.plan_of(operation, replace(choice, pdl=False), dtype, 0, hidden, x.size(0), index)
    if plan is None or not choice.pdl:
        raise ImportError("no programmatic dependent launch here")
    return lambda i: driver.launch_plan(plan, index, b.x[i].data_ptr(), b.other[i].data_ptr(), 0, EPS)


def _notebook(x: Tensor) -> Tensor:
    """What the FlashNorm notebook puts in the place of a norm."""
    return F.rms_norm(x.float(), (x.size(-1),), None, EPS).to(x.dtype)


def wrong_result(operation: Operation, weighted: bool, call: Callable[[int], Any], b: Buffers) -> str | None:
    """Run set 0 on fresh values and compare a sample of its rows with float64. Returns what is wrong."""
    x, other = b.x[0], b.other[0]
    x.normal_()
    other.normal_()
    rows = torch.linspace(0, x.size(0) - 1, min(x.size(0), 128), device=x.device).long()
    wide = x[rows] + other[rows] if operation == "fused_add_rms_norm" else x[rows].clone()
    want = wide.double()
    want = want * torch.rsqrt(want.square().mean(-1, keepdim=True) + EPS)
    if weighted:
        want = want * b.weight.double()
    result = call(0)
    if operation == "rms_norm":
        outputs = [(result if isinstance(result, Tensor) else other, want)]
    else:
        y, total = (result[0], result[1]) if isinstance(result, (tuple, list)) else (x, other)
        outputs = [(y, want), (total, wide.double())]
    bound = ROUNDING[x.dtype] * ROUNDINGS
    for got, expected in outputs:
        worst = ((got[rows].double() - expected).abs() / (expected.abs() + 1e-3)).max().item()
        if not worst <= bound:
            return f"wrong: relative error {worst:.2g}"
    return None


def copies(operation: Operation, b: Buffers) -> dict[str, Callable[[int], Any]]:
    """Copy kernels over the bytes of an operation. The fastest is the limit: which one that is depends on the size.

    They are launched as every kernel is; what programmatic dependent launch gives a copy is shown apart.
    """
    makers: dict[str, Callable[[int], Any]] = {}
    for threads, each, policy, pdl in (
        (256, 1, False, False),
        (256, 4, False, False),
        (512, 2, True, False),
        (1024, 1, True, False),
        (256, 1, False, True),
    ):
        choice = Launch(16, threads, each, policy=policy, pdl=pdl)
        call = _copy(choice, operation, b)
        if call is not None:
            makers[f"{'PDL ' if pdl else ''}copy {threads}x{each}{' evict_last' if policy else ''}"] = call
    return makers


def _copy(choice: Launch, operation: Operation, b: Buffers) -> Callable[[int], Any] | None:
    index, count = b.x[0].get_device(), len(b.x)
    accesses = b.x[0].numel() * b.x[0].element_size() // 16
    if operation == "fused_add_rms_norm":
        accesses *= 2
    plan = driver.plan_of("copy", choice, 0, 0, 8, accesses, index)
    if plan is None:
        return None
    plan = plan._replace(blocks=-(-accesses // (choice.threads * choice.rows)), threads=choice.threads)

    def call(i: int) -> None:
        if operation == "fused_add_rms_norm":
            # It reads and writes two tensors. Sets lie side by side, so two of them are one stretch.
            i = 2 * i % (count - count % 2)
        driver.launch_plan(plan, index, b.x[i].data_ptr(), b.other[i].data_ptr(), 0, 0.0)

    return call


def empty_launch(index: int) -> Callable[[int], Any]:
    """A launch that does nothing: a copy of no accesses."""
    plan = driver.plan_of("copy", Launch(16, 32), 0, 0, 8, 1, index)
    if plan is None:
        return lambda i: None
    plan = plan._replace(rows=0)
    return lambda i: driver.launch_plan(plan, index, 0, 0, 0, 0.0)
