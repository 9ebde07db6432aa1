"""The calls of the norms' kernels: from torch tensors to a launch, and the short way for a call seen before."""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from flashnorm_cli.cuda import driver, variants
from flashnorm_cli.cuda.driver import ARGUMENTS, CONFIG, REFUSED, ROWS_APART, Buffer, Plan, get_device, get_stream
from flashnorm_cli.cuda.variants import Operation

_STREAM, _A, _B, _GAIN = 4, 7, 8, 9  # where those lie in ROWS_APART, in units of 8 bytes
_PLANS_KEPT = 4096
# Of each thread: `ready`, launches packed before. These are, by what they depend on: a guard of the tensors; 64 bit
# words that lack those at _STREAM, _A, _B and _GAIN; what starts it; the GPU, and whether there are others; what that
# must keep alive.
_local = threading.local()
_plans: dict[Any, Plan] = {}  # what a call depends on -> Plan


def launch_cached(
    operation: Operation,
    a: torch.Tensor,
    b: torch.Tensor | None,
    eps: float,
    gain: torch.Tensor | None,
    offset: float,
) -> torch.Tensor | None:
    """Launch a kernel if this thread launched it for just such tensors before; else do nothing and return None.

    The short way of a norm. What torch has kept for guarding compiled code, one call into C++, says whether tensors
    are like those that were checked in full: class, dtype, device, sizes, strides, who differentiates or traces.

    Args:
        a, b: x and out, or x and residual. Without b, an output is made.
    Returns:
        b, or the output.
    """
    new = b is None
    try:
        guard, words, start, index, several, _ = _local.ready[
            operation, a.shape, a.dtype, eps, offset, new, gain is None
        ]
    except (AttributeError, KeyError, TypeError):
        return None
    if b is None:
        if not (guard.check(a) if gain is None else guard.check(a, gain)):
            return None
        b = torch.empty_like(a)
    elif not (guard.check(a, b) if gain is None else guard.check(a, b, gain)):
        return None
    words[_A] = a_at = a.data_ptr()
    words[_B] = b_at = b.data_ptr()
    if gain is not None:
        words[_GAIN] = gain_at = gain.data_ptr()
        if gain_at & 15:
            return None
    if (a_at | b_at) & 15 or a_at == b_at or (several and get_device() != index):
        return None
    words[_STREAM] = get_stream(index)
    if error := start():
        raise RuntimeError(REFUSED.format(error))
    return b


def run(
    operation: Operation,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: float,
    gain: torch.Tensor | None,
    offset: float,
    remember: Literal["b", "new b"] | None = None,
) -> bool:
    """Launch a kernel on two CUDA tensors alike in shape, dtype and device: x and y, or x and residual.

    Rows may lie anywhere: strides and storage offsets are the kernel's business. `gain` is contiguous.
    `remember` lets `launch_cached` do the next call like this one, with a b or without, which is "new b".

    Returns:
        False if nothing was launched: there is no kernel for this dtype, GPU or machine, or more rows than a grid has
        blocks.
    """
    if a.numel() == 0:
        return True
    hidden, size, index = a.size(-1), a.element_size(), a.get_device()
    gain_at, code = (0, 0) if gain is None else (gain.data_ptr(), 2 if offset else 1)
    sizes, a_strides, b_strides = collapse(a.shape[:-1], a.stride()[:-1], b.stride()[:-1])
    a_bytes, b_bytes = [s * size for s in a_strides], [s * size for s in b_strides]
    steps = a.stride(-1), b.stride(-1)
    if steps == (1, 1) or hidden == 1:
        width = variants.width_of(hidden * size, a.data_ptr(), b.data_ptr(), gain_at, *a_bytes, *b_bytes)
    else:
        width = size
    inside = _overlap(a, b)  # blocks that share a row would read what others have written
    key = (operation, a.dtype, a.shape, index, code, width, len(sizes), inside)
    plan = _plans.get(key) or _plan(operation, a, code, width, len(sizes), inside, key)
    if plan is None:
        return False
    whole = width == variants.width_of(hidden * size) and not inside
    if remember and whole and a.is_contiguous() and b.is_contiguous():
        _make_ready(plan, index, operation, a, b if remember == "b" else None, eps, gain, offset)
    layout = struct.Struct(f"{CONFIG}{ARGUMENTS}{len(sizes)}Q{2 * len(sizes)}q")
    more = (steps[0] * size, steps[1] * size, *sizes, *a_bytes, *b_bytes)
    return driver.launch_plan(plan, index, a.data_ptr(), b.data_ptr(), gain_at, eps, layout, more)


def collapse(
    shape: Sequence[int], a_strides: Sequence[int], b_strides: Sequence[int]
) -> tuple[list[int], list[int], list[int]]:
    """The fewest dimensions that visit the same rows in the same order; one at least."""
    sizes, a_out, b_out = [1], [0], [0]
    for n, a, b in zip(shape, a_strides, b_strides, strict=True):
        if n == 1:
            continue
        if sizes[-1] == 1:
            sizes[-1], a_out[-1], b_out[-1] = n, a, b
        elif a_out[-1] == a * n and b_out[-1] == b * n:
            sizes[-1], a_out[-1], b_out[-1] = sizes[-1] * n, a, b
        else:
            sizes.append(n)
            a_out.append(a)
            b_out.append(b)
    return sizes, a_out, b_out


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the stretches of memory that two tensors span have anything in common."""
    ends = [
        (
            t.data_ptr(),
            t.data_ptr() + t.element_size() * (1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))),
        )
        for t in (a, b)
    ]
    return ends[0][0] < ends[1][1] and ends[1][0] < ends[0][1]


def _plan(
    operation: Operation, a: torch.Tensor, code: int, width: int, dims: int, inside: bool, key: Any
) -> Plan | None:
    """Choose and compile, and remember it under `key`. None where there is no kernel."""
    index, hidden, size = a.get_device(), a.size(-1), a.element_size()
    rows = a.numel() // hidden
    if a.dtype not in driver.DTYPES or driver.why_not(index):
        return None
    choice = variants.choose(operation, hidden, size, width, rows, driver.device(index), dims, weighted=code > 0)
    if inside and operation == "rms_norm":
        choice = replace(choice, split=1)
    plan = driver.plan_of(operation, choice, driver.DTYPES.index(a.dtype), code, hidden, rows, index)
    if plan is not None:
        if len(_plans) >= _PLANS_KEPT:  # a server that sees every number of tokens once
            _plans.clear()
        _plans[key] = plan
    return plan


def _make_ready(
    plan: Plan,
    index: int,
    operation: Operation,
    a: torch.Tensor,
    b: torch.Tensor | None,
    eps: float,
    gain: torch.Tensor | None,
    offset: float,
) -> None:
    """Pack a launch but for its addresses and stream, and let `launch_cached` find it in this thread."""
    guard = driver.guard_of([t for t in (a, b, gain) if t is not None])
    if driver.driver_launch() is None or guard is None:
        return
    if not hasattr(_local, "ready") or len(_local.ready) >= _PLANS_KEPT:
        _local.ready = {}
        driver.init_thread()
    buffer = Buffer(ROWS_APART.size)
    buffer.pack(plan, 0, ROWS_APART, 0, 0, 0, eps, driver.contiguous_args(plan))
    # Arguments that ctypes need not convert.
    before, handle, after = map(ctypes.c_void_p, (buffer.before, plan.handle, buffer.after))
    start = partial(driver.driver_launch(), before, handle, after, None)
    words = memoryview(buffer.block).cast("B").cast("Q")
    key = operation, a.shape, a.dtype, eps, offset, b is None, gain is None
    _local.ready[key] = guard, words, start, index, torch.cuda.device_count() > 1, buffer
