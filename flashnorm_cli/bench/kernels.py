"""Time the norms on shapes, beside everybody else's, and beside a copy of the same bytes.

A norm reads and writes each element once, so a copy is as fast as it can be. Contenders are checked against float64
first, then take turns on the same rotated buffers. A contender that is wrong is shown as wrong, without a time.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

import torch
from torch import Tensor

from flashnorm_cli.bench.contenders import (
    EPS,
    FUSED,
    NORMS,
    Buffers,
    Maker,
    copies,
    empty_launch,
    wrong_result,
)
from flashnorm_cli.bench.timing import Call, graph_times, host_times, spread
from flashnorm_cli.cuda.variants import Operation
from flashnorm_cli.norms import info, rms_norm

ROTATE = 400_000_000  # bytes that the buffers of one shape take up together: several times an L2
HIDDEN = (576, 2048, 4096, 8192, 16384)
TOKENS = (1, 16, 64, 256, 4096, 65536)
CPU_HIDDEN, CPU_TOKENS = (576, 2048, 4096, 8192), (1, 16, 256, 4096)
QUICK_HIDDEN, QUICK_TOKENS = (2048, 8192), (1, 256)
ON_CPU = ("F.rms_norm(None)", "F.rms_norm(weight)", "notebook swap", "transformers")


@dataclass
class Measurement:
    operation: Operation
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
    b = Buffers(x, other, (torch.rand(hidden, device=device) * 1.4 + 0.4).to(dtype))
    blank = Measurement(operation, hidden, tokens, str(dtype).removeprefix("torch."), "")
    table = [row for row in (*(NORMS if operation == "rms_norm" else FUSED), *extra) if not only or row[0] in only]
    with torch.no_grad():
        measured, calls = _checked(table, b, blank)
        limits = {**copies(operation, b), "empty launch": empty_launch(device.index or torch.cuda.current_device())}
        for each in (*x, *other):
            if count * sets < 2**31:
                each.normal_()
        launches = max(4, 2 * sets) if per_set > 4_000_000 else 200
        times, failed = graph_times({**calls, **limits}, sets, launches, trials)
        hosts = _host_times(operation, calls, x) if host else {}
    torch.cuda.empty_cache()  # graphs keep their outputs' memory
    for contender, problem in failed.items():
        if contender in measured:
            measured[contender].error = problem
    moved = per_set * (2 if operation == "fused_add_rms_norm" else 1)
    return _filled(measured, blank, times, hosts, moved)


def _checked(
    table: Sequence[tuple[str, bool, Maker]], b: Buffers, blank: Measurement
) -> tuple[dict[str, Measurement], dict[str, Call]]:
    """Who is installed, with what is wrong with it; and the calls of those with whom nothing is."""
    measured: dict[str, Measurement] = {}
    calls: dict[str, Call] = {}
    for contender, weighted, make in table:
        try:
            call = make(Buffers(b.x, b.other, b.weight))
            error = wrong_result(blank.operation, weighted, call, b)
        except ImportError:
            continue
        except Exception as problem:  # other people's code
            error = f"{type(problem).__name__}: {' '.join(str(problem).split())[:160]}"
        measured[contender] = replace(blank, contender=contender, error=error)
        if error is None:
            calls[contender] = call
    return measured, calls


def _host_times(operation: Operation, calls: dict[str, Call], x: list[Tensor]) -> dict[str, float]:
    # A plain launch of ours goes past the checks that a call makes.
    callers = {n: c for n, c in calls.items() if not n.endswith("no PDL")}
    if operation == "rms_norm" and "flashnorm" in callers:  # most others make their output, too
        callers["flashnorm"] = lambda i: rms_norm(x[i], EPS)
    return host_times(callers)


def _filled(
    measured: dict[str, Measurement],
    blank: Measurement,
    times: dict[str, list[float]],
    hosts: dict[str, float],
    moved: int,
) -> list[Measurement]:
    """The measurements with their times, and those of the limits, the best copy standing for all of them."""
    medians = {n: median(t) for n, t in times.items() if n.startswith("copy")}
    best = min(medians, key=lambda n: medians[n])
    times["copy"] = times[best]
    times["PDL copy"] = times[next(n for n in times if n.startswith("PDL copy"))]
    for limit in ("copy", "PDL copy", "empty launch"):
        measured[limit] = replace(blank, contender=limit)
    for contender, each in measured.items():
        if contender not in times:
            continue
        values = times[contender]
        each.us = round(median(values), 4)
        each.spread = spread(values, 4)
        each.host_us = round(hosts[contender], 3) if contender in hosts else None
        if contender != "empty launch":
            each.gb_per_s = round(moved / each.us / 1e3, 1)
            each.of_copy = round(medians[best] / each.us, 4)
    return list(measured.values())


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
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "norms": info(),
        "versions": versions,
        "method": (
            "host time of repeated calls, in turns; us: median"
            if more.get("device") == "cpu"
            else f"CUDA graphs of repeated calls, in turns, buffers rotated over {ROTATE // 10**6} MB or 100 sets; "
            "us: median, spread: 10th and 90th percentile, copy: the fastest of four copy kernels"
        ),
        **more,
        "results": [asdict(r) for r in results],
    }


def measure_cpu(
    hidden: int, tokens: int, dtype: torch.dtype = torch.bfloat16, trials: int = 11, seconds: float | None = None
) -> list[Measurement]:
    """The norms that run on a CPU. This project's own is not among them: there it is torch's, F.rms_norm(None).

    After `seconds`, turns that are left are given up; a turn is made to take a tenth of them at most, or one call.
    """
    x = [torch.randn(tokens, hidden).to(dtype)]
    b = Buffers(x, [torch.empty_like(x[0])], (torch.rand(hidden) * 1.4 + 0.4).to(dtype))
    blank = Measurement("rms_norm", hidden, tokens, str(dtype).removeprefix("torch."), "")
    with torch.no_grad():
        found, calls = _checked([row for row in NORMS if row[0] in ON_CPU], b, blank)
        many = max(1, 2_000_000 // (hidden * tokens))
        if seconds is not None:  # what a call takes here decides how many of them a turn may hold
            start = time.perf_counter()
            for call in calls.values():
                call(0)
            one = (time.perf_counter() - start) / max(len(calls), 1)
            many = max(1, min(many, int(seconds / 10 / max(len(calls), 1) / max(one, 1e-7))))
        for name, us in host_times(calls, many, trials, seconds).items():
            found[name].us = round(us, 3)
    return list(found.values())
