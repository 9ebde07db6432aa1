"""Compile the kernels with NVRTC, through CuPy, and launch them on torch's tensors and streams.

A norm of one token takes one microsecond on the GPU, so what a launch costs on the host is what a user feels. The
usual way (`RawKernel.__call__` in an ExternalStream, arrays through DLPack) costs 12 to 50 us a call. Here arguments
are packed into one struct per thread, and the function handle goes straight to CuPy's binding of `cuLaunchKernel`.
That binding is not public: where it is missing, `RawKernel.__call__` is used.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from typing import Any

import torch

from flashnorm_cli.norms import launch
from flashnorm_cli.norms.launch import Device, Launch, Operation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of launch.DTYPES
MIN_ARCH = 75

_ARGUMENTS = "<QQQQfIqq"  # struct Args of row.cuh up to its arrays
ROWS_APART = struct.Struct(_ARGUMENTS + "Qqq")  # with DIMS = 1
_PLANS_KEPT = 4096

_lock = threading.Lock()
_local = threading.local()
_kernels: dict[Any, Any] = {}  # (operation, launch, dtype, gain, hidden, device) -> (RawKernel, handle)
_plans: dict[Any, tuple[Any, int, int, int]] = {}  # what a call depends on -> (RawKernel, handle, blocks, threads)
_broken: list[str] = []  # why compiling failed, once it has

get_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: torch.cuda.current_device())
get_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)


@cache
def cupy() -> Any:
    """CuPy, or None. Imported when the first CUDA tensor comes along."""
    try:
        return import_module("cupy")
    except ImportError:
        return None


@cache
def driver_launch() -> Any:
    """CuPy's binding of cuLaunchKernel, or None where this version of CuPy has none of that name."""
    try:
        return getattr(import_module("cupy_backends.cuda.api.driver"), "launchKernel", None)
    except ImportError:
        return None


@cache
def device(index: int) -> Device:
    """What the choice of a variant has to know of a GPU."""
    properties = torch.cuda.get_device_properties(index)
    return Device(
        arch=properties.major * 10 + properties.minor,
        processors=properties.multi_processor_count,
        l2=getattr(properties, "L2_cache_size", 4 << 20),
    )


@cache
def unavailable(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or None if they can."""
    if torch.version.cuda is None:
        return "torch was built without CUDA"
    if device(index).arch < MIN_ARCH:
        return f"compute capability {device(index).arch / 10} is below {MIN_ARCH / 10}"
    if cupy() is None:
        return "CuPy is not installed (pip install 'flashnorm-cli[cuda13]', or [cuda12])"
    return None


def why_not(index: int) -> str | None:
    """Like `unavailable`, and once a compilation has failed, its error."""
    return unavailable(index) or (_broken[0] if _broken else None)


def run(
    operation: Operation,
    a: torch.Tensor,
    b: torch.Tensor,
    eps: float,
    gain: torch.Tensor | None,
    offset: float,
) -> bool:
    """Launch a kernel on two CUDA tensors alike in shape, dtype and device: x and y, or x and residual.

    Rows may lie anywhere: strides and storage offsets are the kernel's business. Returns False if nothing was
    launched: there is no kernel for this dtype, GPU or machine, or more rows than a grid has blocks.
    """
    count = a.numel()
    if count == 0:
        return True
    hidden, index = a.size(-1), a.get_device()
    code = 0 if gain is None else 2 if offset else 1
    a_at, b_at, gain_at = a.data_ptr(), b.data_ptr(), 0 if gain is None else gain.data_ptr()
    if a.is_contiguous() and b.is_contiguous() and not (a_at | b_at | gain_at) & 15 and a_at != b_at:
        # The usual case, short: nothing to find out about the tensors but their shape.
        key = (operation, a.dtype, hidden, count, index, code)
        plan = _plans.get(key)
        if plan is None:
            size = a.element_size()
            plan = _plan(operation, a, hidden, count, code, launch.width_of(hidden * size), 1, False, key)
            if plan is None:
                return False
        row = hidden * a.element_size()
        step = a.element_size()  # used only where an access is one element
        arguments: tuple[Any, ...] = (a_at, b_at, gain_at, count // hidden, eps, 0, step, step, 0, row, row)
        return launch_plan(plan, index, ROWS_APART, arguments)
    return _run_anywhere(operation, a, b, eps, gain_at, code)


def _run_anywhere(operation: Operation, a: torch.Tensor, b: torch.Tensor, eps: float, gain: int, code: int) -> bool:
    """`run` for rows at any strides and addresses, and for y in place of x."""
    hidden, count, size = a.size(-1), a.numel(), a.element_size()
    sizes, a_strides, b_strides = collapse(a.shape[:-1], a.stride()[:-1], b.stride()[:-1])
    a_bytes, b_bytes = [s * size for s in a_strides], [s * size for s in b_strides]
    steps = a.stride(-1), b.stride(-1)
    if steps == (1, 1) or hidden == 1:
        width = launch.width_of(hidden * size, a.data_ptr(), b.data_ptr(), gain, *a_bytes, *b_bytes)
    else:
        width = size
    inside = _meet(a, b)  # blocks that share a row would read what others have written
    key = (operation, a.dtype, hidden, count, a.get_device(), code, width, len(sizes), inside)
    plan = _plans.get(key) or _plan(operation, a, hidden, count, code, width, len(sizes), inside, key)
    if plan is None:
        return False
    layout = struct.Struct(f"{_ARGUMENTS}{len(sizes)}Q{2 * len(sizes)}q")
    head = (a.data_ptr(), b.data_ptr(), gain, count // hidden, eps, 0, steps[0] * size, steps[1] * size)
    return launch_plan(plan, a.get_device(), layout, (*head, *sizes, *a_bytes, *b_bytes))


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


def _meet(a: torch.Tensor, b: torch.Tensor) -> bool:
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
    operation: Operation,
    a: torch.Tensor,
    hidden: int,
    count: int,
    code: int,
    width: int,
    dims: int,
    inside: bool,
    key: Any,
) -> tuple[Any, int, int, int] | None:
    """Choose and compile, and remember it under `key`. None where there is no kernel."""
    index, rows = a.get_device(), count // hidden
    if a.dtype not in DTYPES or why_not(index):
        return None
    choice = launch.choose(operation, hidden, a.element_size(), width, rows, device(index), dims)
    if inside and operation == "rms_norm":
        choice = replace(choice, split=1)
    if choice.blocks(rows) > launch.MAX_BLOCKS:
        return None
    found = kernel(operation, choice, DTYPES.index(a.dtype), code, hidden, index)
    if found is None:
        return None
    plan = (*found, choice.blocks(rows), choice.threads * choice.rows)
    if len(_plans) >= _PLANS_KEPT:  # a server that sees every number of tokens once
        _plans.clear()
    _plans[key] = plan
    return plan


def kernel(
    operation: Operation, choice: Launch, dtype: int, gain: int, hidden: int, index: int
) -> tuple[Any, int] | None:
    """The compiled variant on a GPU and its function handle, or None if NVRTC cannot compile it here.

    CuPy keeps the binary on disk: 0.1 s the first time, milliseconds in later processes.
    """
    key = (operation, choice, dtype, gain, hidden, index)
    with _lock:
        if key not in _kernels:
            package = cupy()
            try:
                raw = package.RawKernel(launch.source(operation), operation, choice.options(dtype, gain, hidden))
                with package.cuda.Device(index):
                    raw.compile()
                    _kernels[key] = (raw, raw.kernel.ptr)
            except (ImportError, OSError, RuntimeError, package.cuda.compiler.CompileException) as error:
                # NVRTC is missing, or older than this GPU. Torch computes the same; info() tells why.
                _broken.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                return None
        found: tuple[Any, int] = _kernels[key]
        return found


class _Arguments:
    """The launch arguments of one thread: a block that is packed anew for each launch, and the pointer to it."""

    def __init__(self) -> None:
        self.size = 1024
        self.block = ctypes.create_string_buffer(self.size)
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.block))
        self.address = ctypes.addressof(self.pointers)
        # A thread that has not touched CUDA yet has no context, which the driver's calls need.
        torch.cuda.set_device(torch.cuda.current_device())


def launch_plan(plan: tuple[Any, int, int, int], index: int, layout: struct.Struct, arguments: tuple[Any, ...]) -> bool:
    """Launch (RawKernel, handle, blocks, threads) on torch's current stream of a GPU. Always True."""
    if get_device() != index:
        with torch.cuda.device(index):
            return launch_plan(plan, index, layout, arguments)
    raw, handle, blocks, threads = plan
    try:
        mine = _local.arguments
    except AttributeError:
        mine = _local.arguments = _Arguments()
    call = driver_launch()
    if call is None or layout.size > mine.size:
        import numpy

        block = numpy.frombuffer(layout.pack(*arguments), dtype=f"V{layout.size}")[0]
        with cupy().cuda.ExternalStream(get_stream(index), index):
            raw((blocks,), (threads,), (block,))
        return True
    layout.pack_into(mine.block, 0, *arguments)
    # The driver copies the arguments before it returns, so the block is free for the next launch.
    call(handle, blocks, 1, 1, threads, 1, 1, 0, get_stream(index), mine.address, 0)
    return True
