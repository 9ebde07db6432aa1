"""Compile and launch the kernels of norm_linear, which `kernels/norm_linear` holds.

A launch goes to the driver as those of the norms do (driver.py), with shared memory and another struct of arguments.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashnorm_cli.cuda import driver
from flashnorm_cli.cuda.linear_variants import MAX_ROWS, Kernel, Variant, source

DTYPES = (torch.bfloat16, torch.float16)
MIN_ARCH = 80
_LAUNCH = struct.Struct(driver.CONFIG + "QQQQQqqqIIfI")  # and struct Args of shared.cuh
# Where things lie in a launch: in units of 8 bytes, and `early` of 4.
STREAM, X, W, Y, BIAS, RESIDUAL, EARLY = 4, 7, 8, 9, 10, 11, 33
_KEPT = 4096


class Problem(NamedTuple):
    """What a choice of a variant depends on, apart from the GPU."""

    k: int
    n: int  # outputs; W has twice as many rows under an activation
    dtype: int  # a position in DTYPES
    norm: bool
    activation: int  # a position in linear_variants.ACTIVATIONS
    residual: bool


class Compiled(NamedTuple):
    kernel: Any  # the RawKernel
    handle: int  # its CUfunction


_compile_lock = threading.Lock()
_compiled: dict[Any, Compiled] = {}
_broken: list[str] = []
_local = threading.local()


def why_not(index: int) -> str | None:
    """Why the kernels cannot run on this GPU, or None if they can."""
    if reason := driver.unavailable(index):
        return reason
    if driver.device(index).arch < MIN_ARCH:
        return f"compute capability {driver.device(index).arch / 10} is below {MIN_ARCH / 10}"
    if driver.driver_launch() is None:
        return "libcuda has no cuLaunchKernelEx (CUDA 11.8 and later have)"
    return _broken[0] if _broken else None


def compiled(variant: Variant, problem: Problem, index: int) -> Compiled | None:
    """A variant, compiled for a GPU, or None if NVRTC cannot. Several threads may compile at once.

    CuPy keeps the binary on disk: 0.1 to 1 s the first time, milliseconds in later processes.
    """
    key = (variant, problem.k, problem.dtype, problem.norm, problem.activation, index)
    if (found := _compiled.get(key)) is not None:
        return found
    package = driver.cupy()
    name: Kernel = variant.kernel
    options = variant.options(
        problem.dtype, problem.k, problem.norm, problem.activation, driver.device(index).arch >= 90
    )
    try:
        raw = package.RawKernel(source(name), name, options)
        with package.cuda.Device(index):
            raw.compile()
            raw.max_dynamic_shared_size_bytes = variant.shared_bytes
            raw.preferred_shared_memory_carveout = 100
            found = Compiled(raw, raw.kernel.ptr)
    except (ImportError, OSError, RuntimeError, package.cuda.compiler.CompileException) as error:
        # NVRTC is missing, or older than this GPU. The library computes the same; info() tells why.
        _broken.append(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return None
    with _compile_lock:
        return _compiled.setdefault(key, found)


class Launch:
    """A launch, packed for the driver but for addresses and stream. Belongs to one thread."""

    def __init__(
        self, variant: Variant, problem: Problem, rows: int, strides: tuple[int, int, int], eps: float
    ) -> None:
        self.block = ctypes.create_string_buffer(_LAUNCH.size)
        at = ctypes.addressof(self.block)
        self._attribute = ctypes.create_string_buffer(driver.ATTRIBUTE, len(driver.ATTRIBUTE))
        self._pointers = (ctypes.c_void_p * 1)(at + struct.calcsize(driver.CONFIG))
        self.before, self.after = ctypes.c_void_p(at), ctypes.c_void_p(ctypes.addressof(self._pointers))
        # fmt: off
        _LAUNCH.pack_into(
            self.block, 0, variant.blocks(problem.n, problem.activation), 1, 1, variant.threads, 1, 1,
            variant.shared_bytes, 0, ctypes.addressof(self._attribute), 0,
            0, 0, 0, 0, 0, *strides, rows, problem.n, eps, 0,
        )
        # fmt: on
        self.words = memoryview(self.block).cast("B").cast("Q")
        self.halves = memoryview(self.block).cast("B").cast("I")

    def start(self, function: Compiled, index: int) -> Any:
        """What launches this, on the stream that is written into it; it returns the driver's error or 0."""
        self.halves[12] = int(driver.device(index).arch >= 90)  # the number of attributes
        return partial(driver.driver_launch(), self.before, ctypes.c_void_p(function.handle), self.after, None)


class Ready(NamedTuple):
    """A call that was checked and packed before, in this thread."""

    guard: Any  # torch's guard of the tensors
    weight: Any  # weak reference to W: weights that come and go at one address are not the same
    seen: list[int]  # W's version when it was last read, -1 if never
    launch: Launch
    start: Any
    gpu: int
    several: bool  # whether there are other GPUs
    shape: tuple[int, ...]  # of y


def ready() -> dict[Any, Ready]:
    """The calls that this thread has packed. A thread without a CUDA context gets one."""
    found: dict[Any, Ready] | None = getattr(_local, "ready", None)
    if found is None or len(found) >= _KEPT:
        found = _local.ready = {}
        driver.init_thread()
    return found


def version_of(weight: Tensor) -> int:
    """W's version, or -1 where torch keeps none: then it may change unseen."""
    return -1 if weight.is_inference() else weight._version


def go(call: Ready, x: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    """Launch. Weights are read ahead of the kernel before only if they were read before, and have not changed since:

    else that kernel might be the one that writes them, and let this one come early.
    """
    launch = call.launch
    words, version = launch.words, version_of(weight)
    launch.halves[EARLY] = early = int(version == call.seen[0] and version >= 0)
    if not early:
        call.seen[0] = version
    words[X], words[W], words[Y] = x.data_ptr(), weight.data_ptr(), y.data_ptr()
    words[BIAS] = 0 if bias is None else bias.data_ptr()
    words[RESIDUAL] = 0 if residual is None else residual.data_ptr()
    words[STREAM] = driver.get_stream(call.gpu)
    if call.several and driver.get_device() != call.gpu:
        with torch.cuda.device(call.gpu):
            error = call.start()
    else:
        error = call.start()
    if error:
        raise RuntimeError(f"cuLaunchKernelEx failed with CUresult {error}, which cuda.h explains")


def fits(x: Tensor, weight: Tensor, rows: int) -> bool:
    """Whether a kernel can read x (rows x K, unit stride) and W as they lie."""
    return (
        x.dtype in DTYPES
        and weight.dtype == x.dtype
        and 1 <= rows <= MAX_ROWS
        and x.size(-1) % 8 == 0
        and x.size(-1) > 0
        and weight.stride(-1) == 1
        and weight.stride(0) % 8 == 0
        and weight.stride(0) > 0
        and weight.data_ptr() % 16 == 0
        and weight.get_device() == x.get_device()
    )
