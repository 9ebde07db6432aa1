"""Write one safetensors shard from another: most bytes copied, some tensors scaled by a gain or filled.

Pure mechanics: which tensor takes which gain is decided elsewhere. Why it is the way it is, measured on ext4
with 2 cores against `cp` (docs/benchmarks/fold_speed.py):

- Chunks go through one small buffer per thread: `preadv`, multiply, `pwrite`. Mapping files into memory and
  whole-tensor temporaries lose to page faults, larger chunks to the cache.
- The target's blocks are reserved at once. Besides an early "disk full", writes into reserved blocks cost about
  half on ext4, and chunks that begin at multiples of their size get whole large folios of the page cache.
- bf16 is widened, multiplied and rounded in three passes: one mixed `torch.mul` does it without the
  vector unit and takes longer than the three.
- torch drops the interpreter lock in its operations, as os.preadv and os.pwrite do, so threads are enough.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flashnorm_cli.errors import CheckpointError, FlashNormError, PlanError
from flashnorm_cli.safetensors_file import Header, TensorEntry, build_header

CHUNK_BYTES = 512 * 1024
RANGE_BYTES = 16 * CHUNK_BYTES  # what a worker takes from the queue at a time

_TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

# A file system, or the pair of them, that cannot do it: copy through memory instead.
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


class GainOverflowError(FlashNormError):
    """A finite weight times its gain is beyond the largest finite value of the tensor's dtype."""


@dataclass(frozen=True)
class Scale:
    """Multiply a tensor by a gain along one dimension.

    The product is computed in float32 (float64 for F64) and rounded once, to nearest even, to the tensor's dtype,
    which is BF16, F16, F32 or F64. `gain` is float32, of shape (shape[dim],), and finite. `origin` says where the
    tensor's values come from, if not from the tensor itself: a file, the entry in it (same dtype and shape), and
    the file's `data_start`. An untied head is the embedding times the final norm's gain.
    """

    dim: int
    gain: torch.Tensor
    origin: tuple[Path, TensorEntry, int] | None = None


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
        if not self.drop and not self.add:
            return self.header
        kept = [(e.name, e.dtype, e.shape) for e in self.header.tensors.values() if e.name not in self.drop]
        added = [(name, dtype, shape) for name, (dtype, shape, _) in self.add.items()]
        return build_header(kept + added, self.header.metadata)


def rewrite_shard(
    job: ShardJob, workers: int = 2, on_bytes: Callable[[int], None] | None = None, *, fsync: bool = True
) -> dict[str, int]:
    """Write `job.target`, which must not exist yet, in `workers` threads.

    `on_bytes` is told how many bytes have been written since it was last called; never two calls at a time, but
    from any thread. `fsync` says whether to return only once the data is on the disk.

    Returns, for each scaled tensor, how many of its values were flushed: weight and gain are not zero, the product
    is. Values that are already inf or NaN in the source are carried over.

    Raises GainOverflowError if a finite value would become inf, PlanError if the job does not fit the header,
    CheckpointError if the source is not what the header says or changes underway, FlashNormError if reading or
    writing fails. On any error the target is removed again.
    """
    with ExitStack() as stack:
        files = _Sources(stack)
        source = files.open(job.source)
        if source.size != job.header.file_size or _read(source.fd, 0, len(job.header.raw)) != job.header.raw:
            raise CheckpointError(f"{job.source}: changed since its header was read")
        header = job.target_header()
        ranges, scalings = _plan(job, header, source, files)
        with _new_file(job.target, header.file_size) as target:
            _write(target, 0, memoryview(header.raw))
            if on_bytes is not None:
                on_bytes(len(header.raw))
            _run(ranges, target, workers, on_bytes)
            files.check_unchanged()
            if fsync:
                os.fsync(target)
    return {scaling.name: scaling.flushed for scaling in scalings}


# --- what to do with which bytes ------------------------------------------------------------------------------


class _Scaling:
    """One tensor's gain, ready to be multiplied to any stretch of the flattened tensor.

    A tensor of shape (outer..., channels, inner...) is flattened to (outer * channels * inner,); element i takes
    gain[i // inner % channels].
    """

    def __init__(self, name: str, entry: TensorEntry, scale: Scale) -> None:
        self.name = name
        self.dtype_name = entry.dtype
        self.flushed = 0
        if entry.dtype not in _TORCH:
            raise PlanError(f"tensor {name!r}: {entry.dtype} cannot take a gain")
        gain = scale.gain
        if (
            not 0 <= scale.dim < len(entry.shape)
            or gain.dtype != torch.float32
            or gain.shape != entry.shape[scale.dim : scale.dim + 1]
        ):
            raise PlanError(
                f"tensor {name!r}: a {gain.dtype} gain of shape {tuple(gain.shape)} does not fit dimension"
                f" {scale.dim} of {list(entry.shape)}"
            )
        if not gain.isfinite().all():
            raise PlanError(f"tensor {name!r}: its gain holds NaN or inf")
        self.dtype = _TORCH[entry.dtype]
        # A gain that the tensor's own dtype holds exactly (any `w` norm) needs no wider copy of the tensor: torch
        # multiplies bf16 and fp16 in float32 and rounds once.
        exact = bool((gain.to(self.dtype).float() == gain).all())
        self.product_dtype = self.dtype if exact else torch.float32
        self.itemsize = self.dtype.itemsize
        inner = 1
        for length in entry.shape[scale.dim + 1 :]:
            inner *= length
        # |gain| <= 1 cannot overflow, and only about half of the smallest nonzero value or less rounds to 0.
        magnitudes = gain[gain != 0].abs()
        self.needs_check = bool(((magnitudes > 1) | (magnitudes < 0.75)).any())
        self.gain, self.inner = _even_out(gain.to(self.product_dtype), inner)

    def multiply(self, values: torch.Tensor, first: int, gain: torch.Tensor) -> None:
        """values *= gain in place; `values` is 1-D and begins at element `first` of the flattened tensor."""
        channels, inner = len(gain), self.inner
        period = channels * inner
        done, count = 0, len(values)
        while done < count:
            channel, offset = divmod((first + done) % period, inner)
            left = count - done
            if channel == 0 and offset == 0 and left >= period:
                rows = left // period
                n = rows * period
                values[done : done + n].view(rows, channels, inner).mul_(gain[:, None])
            elif offset == 0 and left >= inner:
                whole = min(left // inner, channels - channel)
                n = whole * inner
                values[done : done + n].view(whole, inner).mul_(gain[channel : channel + whole, None])
            else:
                n = min(left, inner - offset)
                values[done : done + n].mul_(gain[channel])
            done += n


def _even_out(gain: torch.Tensor, inner: int) -> tuple[torch.Tensor, int]:
    """An equivalent (gain, inner) without the short innermost loops that torch is slow at.

    A short `inner` is multiplied out; a short gain is repeated.
    """
    if inner < 64:
        gain, inner = gain.repeat_interleave(inner), 1
    if inner == 1 and 0 < len(gain) < 1024:
        gain = gain.repeat(1024 // len(gain))
    return gain, inner


@dataclass(frozen=True)
class _Range:
    """A stretch of the target. `action` is None for a copy, or what to do with the tensor's elements.

    `first` is the number of the first element within the tensor; offsets and lengths are bytes.
    """

    source: int
    source_offset: int
    target_offset: int
    length: int
    action: _Scaling | torch.Tensor | None = None
    first: int = 0


def _plan(
    job: ShardJob, header: Header, source: _Source, files: _Sources
) -> tuple[list[_Range], list[_Scaling]]:
    """Every byte of the target's data section in ranges, in the order of the target."""
    for name in (*job.edits, *job.drop):
        if name not in job.header.tensors:
            raise PlanError(f"{job.source}: there is no tensor {name!r} to change")
    ranges: list[_Range] = []
    scalings: list[_Scaling] = []
    for entry in sorted(header.tensors.values(), key=lambda entry: entry.start):
        edit = job.add[entry.name][2] if entry.name in job.add else job.edits.get(entry.name)
        offset = header.data_start + entry.start
        if isinstance(edit, Fill):
            if entry.dtype not in _TORCH:
                raise PlanError(f"tensor {entry.name!r}: {entry.dtype} cannot be filled with {edit.value}")
            value = torch.tensor(edit.value, dtype=_TORCH[entry.dtype])
            ranges.extend(_split(_Range(-1, 0, offset, entry.nbytes, value), RANGE_BYTES))
            continue
        if isinstance(edit, Scale) and edit.origin is not None:
            path, origin, data_start = edit.origin
            file = files.open(path)
            if (origin.dtype, origin.shape) != (entry.dtype, entry.shape):
                raise PlanError(f"tensor {entry.name!r} differs in dtype or shape from {origin.name!r}")
        elif entry.name in job.header.tensors:
            file, origin, data_start = source, job.header.tensors[entry.name], job.header.data_start
        else:
            raise PlanError(f"tensor {entry.name!r} is new and has no origin")
        start = data_start + origin.start
        if edit is None:
            last = ranges[-1] if ranges else None
            if (
                last is not None
                and last.action is None
                and last.source_offset + last.length == start  # and the target's ranges are adjacent anyway
            ):
                ranges[-1] = _Range(
                    file.fd, last.source_offset, last.target_offset, last.length + entry.nbytes
                )
            else:
                ranges.append(_Range(file.fd, start, offset, entry.nbytes))
        else:
            scaling = _Scaling(entry.name, entry, edit)
            scalings.append(scaling)
            ranges.extend(_split(_Range(file.fd, start, offset, entry.nbytes, scaling), RANGE_BYTES))
    return ranges, scalings


def _split(whole: _Range, step: int) -> Iterator[_Range]:
    """Cut a range where the target's offset is a multiple of `step`, but never within an element."""
    action = whole.action
    unit = 1 if action is None else action.itemsize
    done = 0
    while done < whole.length:
        to_boundary = step - (whole.target_offset + done) % step
        n = min(to_boundary // unit * unit or step, whole.length - done)
        yield _Range(
            whole.source,
            whole.source_offset + done,
            whole.target_offset + done,
            n,
            action,
            whole.first + done // unit,
        )
        done += n


# --- the work -------------------------------------------------------------------------------------------------


def _run(ranges: list[_Range], target: int, workers: int, on_bytes: Callable[[int], None] | None) -> None:
    """Do all ranges in `workers` threads; the first error stops the others and is raised."""
    queue = iter([part for whole in ranges for part in _split(whole, RANGE_BYTES)])
    lock = threading.Lock()
    stop = threading.Event()

    def work() -> None:
        torch.set_flush_denormal(False)  # a mode of the thread, inherited from whoever started it
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

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the ranges are the parallelism
    try:
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(work) for _ in range(workers)]
            try:
                for future in futures:
                    future.result()
            except BaseException:  # KeyboardInterrupt too: leaving the pool waits for its threads
                stop.set()
                raise
    finally:
        torch.set_num_threads(threads)


class _Worker:
    """One thread's buffers and what it does with them."""

    def __init__(self, target: int, lock: threading.Lock) -> None:
        self.target = target
        self.lock = lock
        # Mapped, not allocated: page aligned, and given back to the system at once.
        self.stored = mmap.mmap(-1, CHUNK_BYTES)
        self.scratch = mmap.mmap(-1, 2 * CHUNK_BYTES)  # a bf16 chunk in float32
        self.view = memoryview(self.stored)

    def do(self, part: _Range) -> None:
        if part.action is None:
            self._copy(part)
            return
        for chunk in _split(part, CHUNK_BYTES):
            if isinstance(chunk.action, _Scaling):
                _read_into(chunk.source, chunk.source_offset, self.view[: chunk.length])
                self._scale(chunk, chunk.action)
            elif chunk.action is not None:
                _tensor(self.stored, chunk.action.dtype, chunk.length).copy_(chunk.action)
            _write(self.target, chunk.target_offset, self.view[: chunk.length])

    def _copy(self, part: _Range) -> None:
        done = _copy_file_range(part, self.target)
        while done < part.length:
            n = min(CHUNK_BYTES, part.length - done)
            _read_into(part.source, part.source_offset + done, self.view[:n])
            _write(self.target, part.target_offset + done, self.view[:n])
            done += n

    def _scale(self, chunk: _Range, scaling: _Scaling) -> None:
        """Multiply the chunk in `self.stored` in place."""
        stored = _tensor(self.stored, scaling.dtype, chunk.length)
        if scaling.dtype == scaling.product_dtype:
            scaling.multiply(stored, chunk.first, scaling.gain)
        else:
            wide = _tensor(self.scratch, torch.float32, 4 * len(stored))
            wide.copy_(stored)
            scaling.multiply(wide, chunk.first, scaling.gain)
            stored.copy_(wide)
        if scaling.needs_check and self._any_odd(stored):
            self._count(chunk, scaling, stored)

    def _any_odd(self, product: torch.Tensor) -> bool:
        """Whether any element is zero, inf or NaN, in two passes over the bits.

        Twice the bits is a number without its sign bit. Less one, and unsigned, that is largest for zero (all
        ones), then for NaN, for inf, and then for the finite values. Half of the unsigned range, added instead
        of the one subtracted, makes it the same order for signed numbers.
        """
        bits = _BITS[product.itemsize]
        half = torch.iinfo(bits).max
        order = _tensor(self.scratch, bits, product.nbytes)
        torch.add(half, product.view(bits), alpha=2, out=order)
        inf = int(torch.tensor(torch.inf, dtype=product.dtype).view(bits).item())
        return order.amax().item() >= 2 * inf - half - 2

    def _count(self, chunk: _Range, scaling: _Scaling, product: torch.Tensor) -> None:
        """Raise at a new inf, and count what was flushed. For the few chunks with an odd element."""
        _read_into(chunk.source, chunk.source_offset, memoryview(self.scratch)[: chunk.length])
        before = _tensor(self.scratch, scaling.dtype, chunk.length)
        if not product.sum(dtype=torch.float64).isfinite():
            new_inf = before.isfinite() & ~product.isfinite()
            if new_inf.any():
                raise GainOverflowError(
                    f"tensor {scaling.name!r}: a weight of {before[new_inf][0].item():g} times its gain is beyond"
                    f" the largest {scaling.dtype_name} value, {torch.finfo(scaling.dtype).max:g}: this norm"
                    f" cannot be folded in {scaling.dtype_name}"
                )
        scaling.multiply(before, chunk.first, (scaling.gain != 0).to(scaling.dtype))
        flushed = int(before.count_nonzero() - product.count_nonzero())
        with self.lock:
            scaling.flushed += flushed


def _tensor(buffer: mmap.mmap, dtype: torch.dtype, nbytes: int) -> torch.Tensor:
    """The first `nbytes` of the buffer as a 1-D tensor."""
    return torch.frombuffer(buffer, dtype=dtype, count=nbytes // dtype.itemsize)


# --- files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    path: Path
    fd: int
    size: int
    mtime_ns: int


class _Sources:
    """Source files, each opened once, closed with `stack`."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._files: dict[Path, _Source] = {}

    def open(self, path: Path) -> _Source:
        if path not in self._files:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"{path}: {error.strerror or error}") from error
            self._stack.callback(os.close, fd)
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{path}: not a regular file")
            self._files[path] = _Source(path, fd, status.st_size, status.st_mtime_ns)
        return self._files[path]

    def check_unchanged(self) -> None:
        for file in self._files.values():
            status = os.fstat(file.fd)
            if (status.st_size, status.st_mtime_ns) != (file.size, file.mtime_ns):
                raise CheckpointError(f"{file.path}: changed while it was being read")


@contextmanager
def _new_file(path: Path, size: int) -> Iterator[int]:
    """A new file of `size` bytes, removed again on any error. Never follows or replaces what is there."""
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise FlashNormError(f"{path}: {error.strerror or error}") from error
    try:
        try:
            _reserve(fd, size)
            yield fd
        finally:
            os.close(fd)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise FlashNormError(f"{path}: {error.strerror or error}") from error
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _reserve(fd: int, size: int) -> None:
    """Make the file `size` bytes long, with its blocks reserved where the file system can do that.

    Not os.posix_fallocate: where the file system cannot, glibc writes a byte into every block instead.
    """
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is not None and size > 0:
        fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        if fallocate(fd, 0, 0, size) != 0 and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.ftruncate(fd, size)


def _copy_file_range(part: _Range, target: int) -> int:
    """Copy within the kernel as far as that goes, and return how far that is in bytes."""
    done = 0
    if not hasattr(os, "copy_file_range"):
        return done
    while done < part.length:
        try:
            n = os.copy_file_range(
                part.source, target, part.length - done, part.source_offset + done, part.target_offset + done
            )
        except OSError as error:
            if error.errno in _NO_COPY_FILE_RANGE:
                break
            raise
        if n == 0:  # the end of the file, or a file system that says so: reading will tell
            break
        done += n
    return done


def _read(fd: int, offset: int, length: int) -> bytes:
    data = bytearray(length)
    _read_into(fd, offset, memoryview(data))
    return bytes(data)


def _read_into(fd: int, offset: int, buffer: memoryview) -> None:
    """Fill the buffer. Short reads go on; the end of the file is an error (EINTR is Python's business)."""
    done = 0
    while done < len(buffer):
        n = os.preadv(fd, [buffer[done:]], offset + done)
        if n == 0:
            raise CheckpointError(f"a source file ended at byte {offset + done}: it was truncated underway")
        done += n


def _write(fd: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
