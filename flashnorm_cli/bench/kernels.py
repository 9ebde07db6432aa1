"""Time the norms on shapes, beside everybody else's, and beside a copy of the same bytes.

A norm reads and writes each element once, so a copy is as fast as it can be. Contenders are checked against float64
first, then take turns on the same rotated buffers. A contender that is wrong is shown as wrong, without a time.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flashnorm_cli.bench.timing import graph_times, host_times, spread
from flashnorm_cli.cuda import driver, variants
from flashnorm_cli.cuda.variants import Launch, Operation
from flashnorm_cli.norms import fused_add_rms_norm, info, rms_norm

EPS = 1e-5
ROTATE = 400_000_000  # bytes that the buffers of one shape take up together: several times an L2
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 1e-6}
ROUNDINGS = 3.1  # what a contender may be off by: those that round before the weight do it twice
HIDDEN = (576, 2048, 4096, 8192, 16384)
TOKENS = (1, 16, 64, 256, 4096, 65536)


@dataclass
class Buffers:
    """One shape's tensors: `sets` of (x, residual or y), and a weight."""

    x: list[Tensor]
    other: list[Tensor]
    weight: Tensor
    kept: dict[int, Any] = field(default_factory=dict)  # outputs of those who allocate, so that theirs rotate, too


# Builds the call that runs a contender on set i. It may raise ImportError: then the contender is not there.
Maker = Callable[[Buffers], Callable[[int], Any]]


@dataclass
class Measurement:
    operation: str
    hidden: int
    tokens: int
    dtype: str
    contender: str
    us: float | None = None  # median device time of a call
    spread: tuple[float, float] | None = None  # 10th and 90th percentile
    gb_per_s: float | None = None
    of_copy: float | None = None  # time of the best copy / time
    host_us: float | None = None
    error: str | None = None  # wrong, or cannot run


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


def _verify(operation: Operation, weighted: bool, call: Callable[[int], Any], b: Buffers) -> str | None:
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


def _copies(operation: Operation, b: Buffers) -> dict[str, Callable[[int], Any]]:
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


def measure(
    operation: Operation,
    hidden: int,
    tokens: int,
    dtype: torch.dtype = torch.bfloat16,
    trials: int = 11,
    host: bool = False,
    extra: Sequence[tuple[str, bool, Maker]] = (),
    only: Sequence[str] = (),
) -> list[Measurement]:
    """Check and time every contender that is installed, on one shape.

    Args:
        operation: "rms_norm" or "fused_add_rms_norm".
        trials: turns of each contender.
        host: measure the host's time per call, too.
        extra: more contenders: name, whether they multiply by a weight, and a function that builds the call.
        only: names to keep; all if empty.
    Returns:
        One measurement per contender; those not importable are left out. The limits are named "copy" and
        "empty launch".
    """
    device = torch.device("cuda")
    size = torch.empty((), dtype=dtype).element_size()
    count = hidden * tokens
    per_set = 2 * count * size
    sets = max(2, min(-(-ROTATE // per_set), 100))
    space = [torch.empty(sets * count, dtype=dtype, device=device).normal_() for _ in range(2)]
    x, other = ([s[i * count : (i + 1) * count].view(tokens, hidden) for i in range(sets)] for s in space)
    weight = (torch.rand(hidden, device=device) * 1.4 + 0.4).to(dtype)
    b = Buffers(x, other, weight)
    name = str(dtype).removeprefix("torch.")
    measured: dict[str, Measurement] = {}
    calls: dict[str, Callable[[int], Any]] = {}
    table = NORMS if operation == "rms_norm" else FUSED
    with torch.no_grad():
        for contender, weighted, make in (*table, *extra):
            if only and contender not in only:
                continue
            mine = Buffers(x, other, weight)
            try:
                call = make(mine)
                error = _verify(operation, weighted, call, b)
            except ImportError:
                continue
            except Exception as problem:  # other people's code
                error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
            measured[contender] = Measurement(operation, hidden, tokens, name, contender, error=error)
            if error is None:
                calls[contender] = call
        limits = {**_copies(operation, b), "empty launch": _empty(device.index or torch.cuda.current_device())}
        for each in (*x, *other):
            if count * sets < 2**31:
                each.normal_()
        launches = max(4, 2 * sets) if per_set > 4_000_000 else 200
        times, failed = graph_times({**calls, **limits}, sets, launches, trials)
        hosts: dict[str, float] = {}
        if host:
            # A plain launch of ours goes past the checks that a call makes.
            callers = {n: c for n, c in calls.items() if not n.endswith("no PDL")}
            if operation == "rms_norm" and "flashnorm" in callers:  # most others make their output, too
                callers["flashnorm"] = lambda i: rms_norm(x[i], EPS)
            hosts = host_times(callers)
    torch.cuda.empty_cache()  # graphs keep their outputs' memory
    copies = {n: median(t) for n, t in times.items() if n.startswith("copy")}
    best = min(copies, key=lambda n: copies[n])
    for contender, problem_text in failed.items():
        if contender in measured:
            measured[contender].error = problem_text
    times["copy"] = times[best]
    times["PDL copy"] = times[next(n for n in times if n.startswith("PDL copy"))]
    moved = per_set * (2 if operation == "fused_add_rms_norm" else 1)
    for contender in ("copy", "PDL copy", "empty launch"):
        measured[contender] = Measurement(operation, hidden, tokens, name, contender)
    for contender, each_one in measured.items():
        if contender not in times:
            continue
        values = times[contender]
        each_one.us = round(median(values), 4)
        each_one.spread = spread(values, 4)
        each_one.host_us = round(hosts[contender], 3) if contender in hosts else None
        if contender != "empty launch":
            each_one.gb_per_s = round(moved / each_one.us / 1e3, 1)
            each_one.of_copy = round(copies[best] / each_one.us, 4)
    return list(measured.values())


def _empty(index: int) -> Callable[[int], Any]:
    """A launch that does nothing: a copy of no accesses."""
    plan = driver.plan_of("copy", Launch(16, 32), 0, 0, 8, 1, index)
    if plan is None:
        return lambda i: None
    plan = plan._replace(rows=0)
    return lambda i: driver.launch_plan(plan, index, 0, 0, 0, 0.0)


def record(command: str, results: Sequence[Measurement], **more: Any) -> dict[str, Any]:
    """What a result has to say of its origin: command, date, machine, versions."""
    versions = {}
    for package in ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "flashinfer-python", "vllm"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "norms": info(),
        "versions": versions,
        "method": (
            f"CUDA graphs of repeated calls, in turns, buffers rotated over {ROTATE // 10**6} MB or 100 sets; "
            "us: median, spread: 10th and 90th percentile, copy: the fastest of four copy kernels"
        ),
        **more,
        "results": [asdict(r) for r in results],
    }


def measure_cpu(hidden: int, tokens: int, dtype: torch.dtype = torch.bfloat16, trials: int = 11) -> list[Measurement]:
    """The norms that run on a CPU, where this project's functions are torch's: to see what one would lose or gain."""
    x = [torch.randn(tokens, hidden).to(dtype)]
    other = [torch.empty_like(x[0])]
    b = Buffers(x, other, (torch.rand(hidden) * 1.4 + 0.4).to(dtype))
    found: dict[str, Measurement] = {}
    calls: dict[str, Callable[[int], Any]] = {}
    names = ("flashnorm", "F.rms_norm(None)", "F.rms_norm(weight)", "notebook swap", "transformers")
    with torch.no_grad():
        for name, weighted, make in NORMS:
            if name not in names:
                continue
            # Without `out`, which torch would have to copy into.
            call = (lambda i: rms_norm(x[i], EPS)) if name == "flashnorm" else make(Buffers(x, other, b.weight))
            error = _verify("rms_norm", weighted, call, b)
            found[name] = Measurement("rms_norm", hidden, tokens, str(dtype).removeprefix("torch."), name, error=error)
            if error is None:
                calls[name] = call
        for name, us in host_times(calls, max(1, 2_000_000 // (hidden * tokens)), trials).items():
            found[name].us = round(us, 3)
    return list(found.values())
