"""Compile the kernels with NVRTC, through CuPy, and launch them on torch's tensors and streams.

A norm of one token takes one microsecond on the GPU, so what a launch costs on the host is what a user feels. The
usual way (`RawKernel.__call__` in an ExternalStream, arrays through DLPack) costs 12 to 50 us a call. Here all that a
launch says is packed into one buffer per thread, and goes straight to the driver's `cuLaunchKernelEx`, which also takes
the attribute for programmatic dependent launch (CUDA programming guide). Where the driver cannot be reached that way,
`RawKernel.__call__` is used.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from importlib import import_module
from typing import Any, Literal, NamedTuple

import torch

from flashnorm_cli.cuda import variants
from flashnorm_cli.cuda.variants import Device, Launch, Operation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of variants.DTYPES
MIN_ARCH = 75

_CONFIG = "<7I4xQQI4x"  # CUlaunchConfig of cuda.h
_ARGUMENTS = "QQQQfIqq"  # struct Args of row.cuh up to its arrays
ROWS_APART = struct.Struct(_CONFIG + _ARGUMENTS + "Qqq")  # with DIMS = 1
_ATTRIBUTE = struct.pack("<IiI60x", 6, 0, 1)  # CUlaunchAttribute: PROGRAMMATIC_STREAM_SERIALIZATION, allowed
_STREAM, _A, _B, _GAIN = 4, 7, 8, 9  # where those lie, in units of 8 bytes
_BUFFER = 1024
_PLANS_KEPT = 4096
_REFUSED = "cuLaunchKernelEx failed with CUresult {}, which cuda.h explains"


class Plan(NamedTuple):
    """A compiled variant with its grid, for one number of rows."""

    kernel: Any  # the RawKernel
    handle: int  # its CUfunction
    blocks: int
    threads: int
    pdl: int  # launch attributes: 1 with programmatic dependent launch, else 0
    rows: int
    row: int  # bytes of a row of contiguous tensors
    size: int  # bytes of an element


try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # of a torch to come: then each call is checked in full
    TensorGuards = None  # type: ignore[misc, assignment]


def guard_of(tensors: Sequence[torch.Tensor]) -> Any:
    """Torch's guard, as compiled code has it, of tensors like these; None where torch has none."""
    if TensorGuards is None:
        return None
    return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


_lock = threading.Lock()
# Of each thread: `buffer`, for launches packed anew; and `ready`, launches packed before. These are, by what they
# depend on: a guard of the tensors; 64 bit words that lack those at _STREAM, _A, _B and _GAIN; what starts it; the GPU,
# and whether there are others; what that must keep alive.
_local = threading.local()
_kernels: dict[Any, Any] = {}  # (operation, launch, dtype, gain, hidden, device) -> (RawKernel, handle)
_plans: dict[Any, Plan] = {}  # what a call depends on -> Plan
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
    """The driver's cuLaunchKernelEx (CUDA 11.8 and later), or None."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        function = driver.cuLaunchKernelEx
    except (OSError, AttributeError):
        return None
    function.argtypes, function.restype = (ctypes.c_void_p,) * 4, ctypes.c_int
    return function


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


def again(
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
        raise RuntimeError(_REFUSED.format(error))
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
    `remember` lets `again` do the next call like this one, with a b or without, which is "new b".

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
    inside = _meet(a, b)  # blocks that share a row would read what others have written
    key = (operation, a.dtype, a.shape, index, code, width, len(sizes), inside)
    plan = _plans.get(key) or _plan(operation, a, code, width, len(sizes), inside, key)
    if plan is None:
        return False
    whole = width == variants.width_of(hidden * size) and not inside
    if remember and whole and a.is_contiguous() and b.is_contiguous():
        _make_ready(plan, index, operation, a, b if remember == "b" else None, eps, gain, offset)
    layout = struct.Struct(f"{_CONFIG}{_ARGUMENTS}{len(sizes)}Q{2 * len(sizes)}q")
    more = (steps[0] * size, steps[1] * size, *sizes, *a_bytes, *b_bytes)
    return launch_plan(plan, index, a.data_ptr(), b.data_ptr(), gain_at, eps, layout, more)


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
    operation: Operation, a: torch.Tensor, code: int, width: int, dims: int, inside: bool, key: Any
) -> Plan | None:
    """Choose and compile, and remember it under `key`. None where there is no kernel."""
    index, hidden, size = a.get_device(), a.size(-1), a.element_size()
    rows = a.numel() // hidden
    if a.dtype not in DTYPES or why_not(index):
        return None
    choice = variants.choose(operation, hidden, size, width, rows, device(index), dims, weighted=code > 0)
    if inside and operation == "rms_norm":
        choice = replace(choice, split=1)
    plan = plan_of(operation, choice, DTYPES.index(a.dtype), code, hidden, rows, index)
    if plan is not None:
        if len(_plans) >= _PLANS_KEPT:  # a server that sees every number of tokens once
            _plans.clear()
        _plans[key] = plan
    return plan


def plan_of(
    operation: Operation, choice: Launch, dtype: int, gain: int, hidden: int, rows: int, index: int
) -> Plan | None:
    """A variant, compiled for a GPU. `dtype` and `gain` are positions in DTYPES and variants.GAINS."""
    if choice.blocks(rows) > variants.MAX_BLOCKS:
        return None
    found = kernel(operation, choice, dtype, gain, hidden, index)
    if found is None:
        return None
    size = DTYPES[dtype].itemsize
    return Plan(*found, choice.blocks(rows), choice.threads * choice.rows, int(choice.pdl), rows, hidden * size, size)


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
                raw = package.RawKernel(variants.source(operation), operation, choice.options(dtype, gain, hidden))
                with package.cuda.Device(index):
                    raw.compile()
                    _kernels[key] = (raw, raw.kernel.ptr)
            except (ImportError, OSError, RuntimeError, package.cuda.compiler.CompileException) as error:
                # NVRTC is missing, or older than this GPU. Torch computes the same; info() tells why.
                _broken.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
                return None
        found: tuple[Any, int] = _kernels[key]
        return found


class _Buffer:
    """A launch, packed for the driver, which has read it before it returns."""

    def __init__(self, size: int) -> None:
        self.block = ctypes.create_string_buffer(size)
        at = ctypes.addressof(self.block)
        self._attribute = ctypes.create_string_buffer(_ATTRIBUTE, len(_ATTRIBUTE))
        self.attribute = ctypes.addressof(self._attribute)
        self._pointers = (ctypes.c_void_p * 1)(at + struct.calcsize(_CONFIG))
        self.before, self.after = at, ctypes.addressof(self._pointers)  # what the driver takes around the function

    def pack(
        self, plan: Plan, stream: int, layout: struct.Struct, a: int, b: int, gain: int, eps: float, more: Sequence[int]
    ) -> None:
        _, _, blocks, threads, pdl, rows, _, _ = plan
        # fmt: off
        layout.pack_into(
            self.block, 0, blocks, 1, 1, threads, 1, 1, 0, stream, self.attribute, pdl,
            a, b, gain, rows, eps, 0, *more,
        )
        # fmt: on


def _follow_on(plan: Plan) -> tuple[int, ...]:
    """What follows eps in struct Args (row.cuh) where rows follow one another."""
    return plan.size, plan.size, 0, plan.row, plan.row


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
    """Pack a launch but for its addresses and stream, and let `again` find it in this thread."""
    if driver_launch() is None or TensorGuards is None:
        return
    if not hasattr(_local, "ready") or len(_local.ready) >= _PLANS_KEPT:
        _enter()
    guard = guard_of([t for t in (a, b, gain) if t is not None])
    buffer = _Buffer(ROWS_APART.size)
    buffer.pack(plan, 0, ROWS_APART, 0, 0, 0, eps, _follow_on(plan))
    # Arguments that ctypes need not convert.
    before, handle, after = map(ctypes.c_void_p, (buffer.before, plan.handle, buffer.after))
    start = partial(driver_launch(), before, handle, after, None)
    words = memoryview(buffer.block).cast("B").cast("Q")
    key = operation, a.shape, a.dtype, eps, offset, b is None, gain is None
    _local.ready[key] = guard, words, start, index, torch.cuda.device_count() > 1, buffer


def _enter() -> None:
    """Set up this thread, which has no CUDA context yet if it never used the GPU: the driver's calls need one."""
    _local.ready, _local.buffer = {}, _Buffer(_BUFFER)
    torch.cuda.set_device(torch.cuda.current_device())


def launch_plan(
    plan: Plan,
    index: int,
    a: int,
    b: int,
    gain: int,
    eps: float,
    layout: struct.Struct = ROWS_APART,
    more: tuple[int, ...] | None = None,
) -> bool:
    """Launch on torch's current stream of GPU `index`; a, b and gain are addresses. Always True.

    Without `more`, rows follow one another; with it, it holds what follows eps in struct Args (row.cuh).

    Raises:
        RuntimeError: the driver refused; CUDA errors of earlier kernels come up here as well.
    """
    if get_device() != index:
        with torch.cuda.device(index):
            return launch_plan(plan, index, a, b, gain, eps, layout, more)
    if more is None:
        more = _follow_on(plan)
    call = driver_launch()
    if call is None or layout.size > _BUFFER:
        arguments = (a, b, gain, plan.rows, eps, 0, *more)
        return _launch_by_cupy(plan.kernel, plan.blocks, plan.threads, index, layout, arguments)
    if not hasattr(_local, "buffer"):
        _enter()
    buffer = _local.buffer
    buffer.pack(plan, get_stream(index), layout, a, b, gain, eps, more)
    if error := call(buffer.before, plan.handle, buffer.after, None):
        raise RuntimeError(_REFUSED.format(error))
    return True


class _Stream(NamedTuple):
    """A stream of another library, in the CUDA stream protocol."""

    handle: int

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.handle


def _launch_by_cupy(
    kernel: Any, blocks: int, threads: int, index: int, layout: struct.Struct, arguments: tuple[Any, ...]
) -> bool:
    import numpy

    packed = struct.pack("<" + layout.format.removeprefix(_CONFIG), *arguments)
    stream = get_stream(index)
    come_in = getattr(cupy().cuda.Stream, "from_external", None)  # what came before it is deprecated since CuPy 14
    with come_in(_Stream(stream)) if come_in else cupy().cuda.ExternalStream(stream, index):
        kernel((blocks,), (threads,), (numpy.frombuffer(packed, dtype=f"V{len(packed)}")[0],))
    return True
