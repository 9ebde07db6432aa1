"""Write one safetensors shard from another: most bytes copied, some tensors scaled by a gain or filled.

Pure mechanics: which tensor takes which gain is decided elsewhere. Why it is the way it is, in CPU time per MiB
on ext4 (Linux 6.18, 2 cores), where `cp` takes 250 us; docs/benchmarks/fold_speed.py measures the whole:

- Chunks of 1 MiB go through one small buffer per thread, which stays in the cache: reading takes 90 us,
  writing 105 us. All in all chunks of 256 KiB cost 30 % more, chunks of 2 MiB three times as much.
- The target's blocks are reserved first. That tells early that the disk is full, and it makes writing
  cheaper than it is for `cp`. Chunks end at multiples of their size in the file, which gives the page cache
  large folios.
- Multiplying takes 130 us where the gain is exact in the tensor's own dtype, as that of a `w` norm is: torch
  multiplies bf16 and fp16 in float32 and rounds once, with the same bits as the three steps of widening,
  multiplying and rounding, which cost half as much again. (One mixed `torch.mul` takes longer still.)
- Looking for overflow and flushes takes 70 us, and nothing where the gain rules both out.
- What does not change goes by `copy_file_range`. On ext4 that is no cheaper than `cp`, and reading and writing
  would be; but it shares blocks where the file system can.
- torch gives up the interpreter lock within its operations, as os.preadv and os.pwrite do: threads suffice.
  A second one helps although ext4 lets one thread at a time write to a file: 0.56 s instead of 0.81 s for a
  model of 2.2 GB (`cp`: 0.59 s).
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashnorm_cli.checkpoint.header import Header, TensorEntry, build_header
from flashnorm_cli.errors import CheckpointError, FlashNormError, PlanError

CHUNK_BYTES = 2**20
RANGE_BYTES = 8 * CHUNK_BYTES  # what a worker takes from the queue at a time

# What can be scaled or filled, and the integers that show its bits.
TORCH_DTYPE = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# The file system, or the pair of them, cannot do it: copy through memory instead.
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class GainOverflowError(FlashNormError):
    """A finite weight times its gain is beyond the largest finite value of the tensor's dtype."""


@dataclass(frozen=True)
class Scale:
    """Multiply a tensor by a gain along one dimension.

    The product is computed in float32 (float64 for F64) and rounded once, to nearest even, to the tensor's
    dtype: BF16, F16, F32 or F64. `gain` is float32, finite, of shape (shape[dim],). `origin` (a file, its
    header, the name of a tensor in it with the same dtype and shape) says where the values come from, if not
    from the tensor itself: an untied head is the embedding times a gain.
    """

    dim: int
    gain: torch.Tensor
    origin: tuple[Path, Header, str] | None = None


@dataclass(frozen=True)
class Fill:
    """Set every element of a BF16, F16, F32 or F64 tensor to `value`: the identity of a folded norm."""

    value: float


Edit = Scale | Fill


@dataclass(frozen=True)
class ShardJob:
    """What to write: `source` with the tensors in `drop` left out, `edits` made, and `add` put at the end.

    `header` is the source's. An added tensor is (dtype, shape, scale), its scale with an `origin`.
    """

    source: Path
    target: Path
    header: Header
    edits: Mapping[str, Edit] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()
    add: Mapping[str, tuple[str, tuple[int, ...], Scale]] = field(default_factory=dict)

    def target_header(self) -> Header:
        """The target's header: the source's own bytes unless tensors are added or dropped."""
        return changed_header(
            self.header, self.drop, {name: (dtype, shape) for name, (dtype, shape, _) in self.add.items()}
        )


def changed_header(header: Header, drop: Collection[str], add: Mapping[str, tuple[str, tuple[int, ...]]]) -> Header:
    """A header without the tensors of `drop` and with those of `add` (dtype, shape) at the end; itself for neither."""
    if not drop and not add:
        return header
    kept = [(e.name, e.dtype, e.shape) for e in header.tensors.values() if e.name not in drop]
    return build_header([*kept, *((name, dtype, shape) for name, (dtype, shape) in add.items())], header.metadata)


def rewrite_shard(
    job: ShardJob, workers: int = 2, on_bytes: Callable[[int], None] | None = None, *, fsync: bool = True
) -> dict[str, int]:
    """Write `job.target`, which must not exist yet, in `workers` threads.

    `on_bytes` is told how many bytes have been written since it was last called; from any thread, but never
    twice at a time. `fsync` says whether to return only once the data is on the disk.

    Returns how many values of each scaled tensor were flushed: weight and gain are not zero, the product is.
    Values that are inf or NaN in the source already are carried over.

    Raises GainOverflowError if a finite value would become inf, PlanError if the job does not fit the header,
    CheckpointError if the source is not what the header says or changes underway, FlashNormError if the
    target exists or cannot be written. On any error what was written is removed again.
    """
    with ExitStack() as stack:
        files = _Sources(stack)
        header = job.target_header()
        ranges, scalings = _plan(job, header, files)
        with _new_file(job.target, header.file_size) as target:
            _write(target, 0, memoryview(header.raw))
            if on_bytes is not None:
                on_bytes(len(header.raw))
            _run(ranges, target, workers, on_bytes)
            files.check_unchanged()
            if fsync:
                os.fsync(target)
    return {scaling.name: scaling.flushed for scaling in scalings}


# --- what to do with which bytes ----------------------------------------------------------------------------


class _Scaling:
    """One tensor's gain, ready to be multiplied to any stretch of the flattened tensor.

    A tensor of shape (outer..., channels, inner...) is flattened to (outer * channels * inner,); element i
    takes gain[i // inner % channels].
    """

    def __init__(self, entry: TensorEntry, scale: Scale) -> None:
        self.name = entry.name
        self.dtype_name = entry.dtype
        self.flushed = 0
        gain, dim = scale.gain.contiguous(), scale.dim
        if entry.dtype not in TORCH_DTYPE:
            raise PlanError(f"tensor {entry.name!r}: {entry.dtype} cannot take a gain")
        if not 0 <= dim < len(entry.shape) or gain.dtype != torch.float32 or gain.shape != (entry.shape[dim],):
            raise PlanError(
                f"tensor {entry.name!r}: a {gain.dtype} gain of shape {list(gain.shape)} does not fit"
                f" dimension {dim} of {list(entry.shape)}"
            )
        if not gain.isfinite().all():
            raise PlanError(f"tensor {entry.name!r}: its gain holds NaN or inf")
        self.dtype = TORCH_DTYPE[entry.dtype]
        self.itemsize = self.dtype.itemsize
        # A gain that the tensor's own dtype holds exactly needs no wider copy of the tensor (see the top).
        exact = bool((gain.to(self.dtype).float() == gain).all())
        self.product_dtype = self.dtype if exact else torch.float32
        # |gain| <= 1 cannot overflow, and only about half of the smallest nonzero value or less rounds to 0.
        magnitudes = gain[gain != 0].abs()
        self.needs_check = bool(((magnitudes > 1) | (magnitudes < 0.75)).any())
        inner = math.prod(entry.shape[dim + 1 :])
        self.gain, self.inner = _without_short_loops(gain.to(self.product_dtype), inner)

    def multiply(self, values: torch.Tensor, first: int, gain: torch.Tensor) -> None:
        """values *= gain in place; `values` is 1-D and begins at element `first` of the flattened tensor."""
        channels, inner = len(gain), self.inner
        period = channels * inner
        done, count = 0, len(values)
        while done < count:
            channel, offset = divmod((first + done) % period, inner)
            left = count - done
            if channel == 0 and offset == 0 and left >= period:  # as many whole periods as there are
                n = left // period * period
                values[done : done + n].view(-1, channels, inner).mul_(gain[:, None])
            elif offset == 0 and left >= inner:  # whole channels up to the end of the period
                whole = min(left // inner, channels - channel)
                n = whole * inner
                values[done : done + n].view(whole, inner).mul_(gain[channel : channel + whole, None])
            else:  # the rest of one channel
                n = min(left, inner - offset)
                values[done : done + n].mul_(gain[channel])
            done += n


def _without_short_loops(gain: torch.Tensor, inner: int) -> tuple[torch.Tensor, int]:
    """An equivalent (gain, inner) whose innermost loop is long, because torch is slow at short ones."""
    if inner < 64:
        gain, inner = gain.repeat_interleave(inner), 1
    if inner == 1 and 0 < len(gain) < 1024:
        gain = gain.repeat(1024 // len(gain))
    return gain, inner


@dataclass(frozen=True)
class _Range:
    """A stretch of the target, in bytes. `action` is None to copy it, a gain, or the value to fill it with.

    `first` is the number of its first element within the tensor. What is filled is not read.
    """

    source: _Source
    source_offset: int
    target_offset: int
    length: int
    action: _Scaling | torch.Tensor | None = None
    first: int = 0


def _plan(job: ShardJob, header: Header, files: _Sources) -> tuple[list[_Range], list[_Scaling]]:
    """Every byte of the target's data section in ranges, in the order of the target."""
    for name in (*job.edits, *job.drop):
        if name not in job.header.tensors:
            raise PlanError(f"{job.source}: there is no tensor {name!r} to change")
    source = files.open(job.source, job.header)
    ranges: list[_Range] = []
    scalings: list[_Scaling] = []
    for entry in sorted(header.tensors.values(), key=lambda entry: entry.start):
        edit = job.add[entry.name][2] if entry.name in job.add else job.edits.get(entry.name)
        target_offset = header.data_start + entry.start
        if isinstance(edit, Fill):
            if entry.dtype not in TORCH_DTYPE:
                raise PlanError(f"tensor {entry.name!r}: {entry.dtype} cannot be filled with {edit.value}")
            value = torch.tensor(edit.value, dtype=TORCH_DTYPE[entry.dtype])
            ranges.append(_Range(source, 0, target_offset, entry.nbytes, value))
            continue
        if isinstance(edit, Scale):
            path, origin_header, name = edit.origin or (job.source, job.header, entry.name)
            origin = origin_header.tensors.get(name)
            if origin is None or (origin.dtype, origin.shape) != (entry.dtype, entry.shape):
                raise PlanError(f"{path}: there is no {entry.dtype} {list(entry.shape)} {name!r} to scale")
            offset = origin_header.data_start + origin.start
            scalings.append(_Scaling(entry, edit))
            file = files.open(path, origin_header)
            ranges.append(_Range(file, offset, target_offset, entry.nbytes, scalings[-1]))
            continue
        source_offset = job.header.data_start + job.header.tensors[entry.name].start
        last = ranges[-1] if ranges else None
        if last and last.action is None and last.source_offset + last.length == source_offset:
            ranges[-1] = replace(last, length=last.length + entry.nbytes)  # one copy for both
        else:
            ranges.append(_Range(source, source_offset, target_offset, entry.nbytes))
    return ranges, scalings


def _split(whole: _Range, step: int) -> Iterator[_Range]:
    """Cut a range where the target's offset is a multiple of `step`, or before the element that is there."""
    itemsize = 1 if whole.action is None else whole.action.itemsize
    while whole.length > 0:
        to_boundary = step - whole.target_offset % step
        length = min(to_boundary // itemsize * itemsize or step, whole.length)
        yield replace(whole, length=length)
        whole = _after(whole, length)


def _after(whole: _Range, length: int) -> _Range:
    """What is left of a range behind its first `length` bytes."""
    itemsize = 1 if whole.action is None else whole.action.itemsize
    return replace(
        whole,
        source_offset=whole.source_offset + length,
        target_offset=whole.target_offset + length,
        length=whole.length - length,
        first=whole.first + length // itemsize,
    )


# --- the work -----------------------------------------------------------------------------------------------


def _run(ranges: list[_Range], target: int, workers: int, on_bytes: Callable[[int], None] | None) -> None:
    """Do all ranges in `workers` threads; the first error stops the others and is raised."""
    queue = (part for whole in ranges for part in _split(whole, RANGE_BYTES))
    lock = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        torch.set_flush_denormal(False)  # a mode of the thread, inherited from the one that started it
        worker = _Worker(target, lock)
        try:
            while not stop.is_set():
                with lock:
                    part = next(queue, None)
                if part is None:
                    return
                worker.do(part)
                if on_bytes is not None:
                    with lock:
                        on_bytes(part.length)
        except BaseException:
            stop.set()
            raise

    with _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:  # KeyboardInterrupt too: leaving the pool waits for its threads
            stop.set()
            raise


_thread_setting = threading.Lock()
_rewriting: list[int] = []  # torch's setting as each shard that is being rewritten in this process found it


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Keep torch from starting threads: the ranges are the parallelism. Several shards may be under way at a time."""
    with _thread_setting:
        _rewriting.append(torch.get_num_threads() if not _rewriting else _rewriting[0])
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _thread_setting:
            before = _rewriting.pop()
            if not _rewriting:
                torch.set_num_threads(before)


class _Worker:
    """One thread's buffers, and what it does with them."""

    def __init__(self, target: int, lock: threading.Lock) -> None:
        self.target = target
        self.lock = lock
        # Mapped, not allocated: page aligned, and given back to the system at once.
        self.chunk = mmap.mmap(-1, CHUNK_BYTES)
        self.scratch = mmap.mmap(-1, 2 * CHUNK_BYTES)  # a bf16 chunk in float32
        self.view = memoryview(self.chunk)

    def do(self, part: _Range) -> None:
        if part.action is None:
            part = _copy_file_range(part, self.target)
        for chunk in _split(part, CHUNK_BYTES):
            view = self.view[: chunk.length]
            if isinstance(chunk.action, torch.Tensor):
                _tensor(self.chunk, chunk.action.dtype, chunk.length).copy_(chunk.action)
            else:
                _read_into(chunk.source, chunk.source_offset, view)
                if chunk.action is not None:
                    self._scale(chunk, chunk.action)
            _write(self.target, chunk.target_offset, view)

    def _scale(self, chunk: _Range, scaling: _Scaling) -> None:
        """Multiply the values in `self.chunk` in place."""
        values = _tensor(self.chunk, scaling.dtype, chunk.length)
        if scaling.dtype == scaling.product_dtype:
            scaling.multiply(values, chunk.first, scaling.gain)
        else:
            wide = _tensor(self.scratch, torch.float32, 4 * len(values))
            wide.copy_(values)
            scaling.multiply(wide, chunk.first, scaling.gain)
            values.copy_(wide)
        if scaling.needs_check and self._any_zero_or_inf(values):
            self._count(chunk, scaling, values)

    def _any_zero_or_inf(self, product: torch.Tensor) -> bool:
        """Whether any element is zero, inf or NaN, in two passes over the bits.

        Twice the bits are a number without its sign bit. Less one, and unsigned, it is largest for zero (all
        ones), then for NaN, for inf, and then for the finite values. Adding half of the unsigned range instead
        of subtracting one makes it the same order for signed numbers.
        """
        bits = _BITS[product.itemsize]
        half = torch.iinfo(bits).max
        order = _tensor(self.scratch, bits, product.nbytes)
        torch.add(half, product.view(bits), alpha=2, out=order)
        inf = int(torch.tensor(torch.inf, dtype=product.dtype).view(bits).item())
        return order.amax().item() >= 2 * inf - half - 2

    def _count(self, chunk: _Range, scaling: _Scaling, product: torch.Tensor) -> None:
        """Raise at a new inf, and count what was flushed. Only chunks with a zero or inf get here."""
        _read_into(chunk.source, chunk.source_offset, memoryview(self.scratch)[: chunk.length])
        before = _tensor(self.scratch, scaling.dtype, chunk.length)
        if not product.sum(dtype=torch.float64).isfinite():
            new_inf = before.isfinite() & ~product.isfinite()
            if new_inf.any():
                raise GainOverflowError(
                    f"tensor {scaling.name!r}: a weight of {before[new_inf][0].item():g} times its gain is"
                    f" beyond the largest {scaling.dtype_name} value, {torch.finfo(scaling.dtype).max:g}"
                )
        # What is zero because its gain is zero was not flushed.
        scaling.multiply(before, chunk.first, (scaling.gain != 0).to(scaling.dtype))
        flushed = int(before.count_nonzero() - product.count_nonzero())
        with self.lock:
            scaling.flushed += flushed


def _tensor(buffer: mmap.mmap, dtype: torch.dtype, nbytes: int) -> torch.Tensor:
    """The first `nbytes` of the buffer as a 1-D tensor."""
    return torch.frombuffer(buffer, dtype=dtype, count=nbytes // dtype.itemsize)


# --- files --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    path: Path
    fd: int
    size: int
    mtime_ns: int


class _Sources:
    """Source files, each opened and compared with its header once, closed with `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, _Source] = {}

    def open(self, path: Path, header: Header) -> _Source:
        if path in self._files:
            return self._files[path]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        self._stack.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        source = _Source(path, fd, status.st_size, status.st_mtime_ns)
        raw = bytearray(header.data_start)
        if source.size == header.file_size:
            _read_into(source, 0, memoryview(raw))
        if raw != header.raw:
            raise CheckpointError(f"{path}: changed since its header was read")
        self._files[path] = source
        return source

    def check_unchanged(self) -> None:
        for source in self._files.values():
            status = os.fstat(source.fd)
            if (status.st_size, status.st_mtime_ns) != (source.size, source.mtime_ns):
                raise CheckpointError(f"{source.path}: changed while it was being read")


@contextmanager
def _new_file(path: Path, size: int) -> Iterator[int]:
    """A new file of `size` bytes, removed again on any error. Never follows or replaces what is there."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise FlashNormError(f"{path}: {error.strerror}") from error
    try:
        try:
            _reserve(fd, size)
            yield fd
        finally:
            os.close(fd)
    except BaseException as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise FlashNormError(f"{path}: {error.strerror}") from error
        raise


def _reserve(fd: int, size: int) -> None:
    """Make the file `size` bytes long, with its blocks reserved where the file system can do that.

    Not os.posix_fallocate: where the file system cannot, glibc writes a byte into every block instead.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 0, 0, size) != 0:
            code = ctypes.get_errno()
            if code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise OSError(code, os.strerror(code))
    os.ftruncate(fd, size)


def _copy_file_range(part: _Range, target: int) -> _Range:
    """Copy within the kernel as far as that goes, and return what is left to copy.

    Where the file system can share blocks (XFS, btrfs), this does: ranges are cut at multiples of its blocks.
    """
    while part.length > 0 and hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(part.source.fd, target, part.length, part.source_offset, part.target_offset)
        except OSError as error:
            if error.errno in _NO_COPY_FILE_RANGE:
                break
            raise
        if n == 0:  # the end of the file, or a file system that only says so: reading will tell
            break
        part = _after(part, n)
    return part


def _read_into(source: _Source, offset: int, buffer: memoryview) -> None:
    """Fill the buffer from `offset` of the source."""
    done = 0
    while done < len(buffer):  # a read may be short; one that a signal interrupts is repeated by Python
        try:
            n = os.preadv(source.fd, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{source.path}: {error.strerror}") from error
        if n == 0:
            raise CheckpointError(f"{source.path}: truncated while it was being read")
        done += n


def _write(fd: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
