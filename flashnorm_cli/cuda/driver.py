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
from functools import cache
from importlib import import_module
from typing import Any, NamedTuple

import torch

from flashnorm_cli.cuda import variants
from flashnorm_cli.cuda.variants import Device, Launch, Operation

DTYPES = (torch.bfloat16, torch.float16, torch.float32)  # in the order of variants.DTYPES
MIN_ARCH = 75

CONFIG = "<7I4xQQI4x"  # CUlaunchConfig of cuda.h
ARGUMENTS = "QQQQfIqq"  # struct Args of row.cuh up to its arrays
ROWS_APART = struct.Struct(CONFIG + ARGUMENTS + "Qqq")  # with DIMS = 1
ATTRIBUTE = struct.pack("<IiI60x", 6, 0, 1)  # CUlaunchAttribute: PROGRAMMATIC_STREAM_SERIALIZATION, allowed
_BUFFER = 1024
REFUSED = "cuLaunchKernelEx failed with CUresult {}, which cuda.h explains"


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
_local = threading.local()  # of each thread: `buffer`, for launches packed anew
_kernels: dict[Any, Any] = {}  # (operation, launch, dtype, gain, hidden, device) -> (RawKernel, handle)
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


class Buffer:
    """A launch, packed for the driver, which has read it before it returns."""

    def __init__(self, size: int) -> None:
        self.block = ctypes.create_string_buffer(size)
        at = ctypes.addressof(self.block)
        self._attribute = ctypes.create_string_buffer(ATTRIBUTE, len(ATTRIBUTE))
        self.attribute = ctypes.addressof(self._attribute)
        self._pointers = (ctypes.c_void_p * 1)(at + struct.calcsize(CONFIG))
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


def contiguous_args(plan: Plan) -> tuple[int, ...]:
    """What follows eps in struct Args (row.cuh) where rows follow one another."""
    return plan.size, plan.size, 0, plan.row, plan.row


def init_thread() -> None:
    """Give this thread a CUDA context, which it has not if it never used the GPU: the driver's calls need one."""
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
        more = contiguous_args(plan)
    call = driver_launch()
    if call is None or layout.size > _BUFFER:
        arguments = (a, b, gain, plan.rows, eps, 0, *more)
        return _launch_by_cupy(plan.kernel, plan.blocks, plan.threads, index, layout, arguments)
    if not hasattr(_local, "buffer"):
        _local.buffer = Buffer(_BUFFER)
        init_thread()
    buffer = _local.buffer
    buffer.pack(plan, get_stream(index), layout, a, b, gain, eps, more)
    if error := call(buffer.before, plan.handle, buffer.after, None):
        raise RuntimeError(REFUSED.format(error))
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

    packed = struct.pack("<" + layout.format.removeprefix(CONFIG), *arguments)
    stream = get_stream(index)
    come_in = getattr(cupy().cuda.Stream, "from_external", None)  # what came before it is deprecated since CuPy 14
    with come_in(_Stream(stream)) if come_in else cupy().cuda.ExternalStream(stream, index):
        kernel((blocks,), (threads,), (numpy.frombuffer(packed, dtype=f"V{len(packed)}")[0],))
    return True
