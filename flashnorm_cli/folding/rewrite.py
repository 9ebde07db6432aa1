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

import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from flashnorm_cli.checkpoint.header import Header, build_header
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, float32_products, one_thread_each
from flashnorm_cli.errors import GainOverflowError, GainUnderflowError, PlanError
from flashnorm_cli.folding.edits import INTEGERS, Edit, Fill, Rotate, Scale, _Scaling, any_zero_or_inf
from flashnorm_cli.folding.rotating import PANEL_BYTES, Panel, Rotating, Turner, panels
from flashnorm_cli.folding.shard_files import SourceFile, SourceFiles, new_file, read_into, write_at

CHUNK_BYTES = 2**20
RANGE_BYTES = 8 * CHUNK_BYTES  # what a worker takes from the queue at a time

# The file system, or the pair of them, cannot do it: copy through memory instead.
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}


@dataclass(frozen=True)
class ShardJob:
    """What to write: `source` with the tensors in `drop` left out, `edits` made, and `add` put at the end.

    `header` is the source's. An added tensor is (dtype, shape, edit), its edit with an `origin`. `files` are what
    `checkpoint.disk.facts` said of source files when they were planned with. More than the share `flush_limit` of a
    tensor's values may not become zero.
    """

    source: Path
    target: Path
    header: Header
    edits: Mapping[str, Edit] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()
    add: Mapping[str, tuple[str, tuple[int, ...], Scale | Rotate]] = field(default_factory=dict)
    files: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    flush_limit: float = 1.0

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

    Returns how many values of each tensor were flushed: weight and gain are not zero, the product is. Values that are
    inf or NaN in the source already are carried over where a tensor is scaled, and refused where it is rotated. The
    permissions are the source's, less the umask.

    Raises GainOverflowError if a finite value would become inf, GainUnderflowError if too many would become zero,
    PlanError if the job does not fit the header,
    CheckpointError if the source is not what the header says or changes underway, FlashNormError if the
    target exists or cannot be written. On any error what was written is removed again.
    """
    with ExitStack() as stack:
        files = SourceFiles(stack, job.files)
        header = job.target_header()
        ranges, scalings = _plan(job, header, files)
        mode = stat.S_IMODE(files.open(job.source, job.header).status.st_mode) & 0o777
        with new_file(job.target, header.file_size, mode) as target:
            write_at(target, 0, memoryview(header.raw))
            if on_bytes is not None:
                on_bytes(len(header.raw))
            _run(ranges, target, workers, on_bytes)
            for scaling in scalings:
                _refuse_flushed(scaling, job.flush_limit)
            files.check_unchanged()
            if fsync:
                os.fsync(target)
    return {scaling.name: scaling.flushed for scaling in scalings}


def _refuse_flushed(scaling: _Scaling | Rotating, limit: float) -> None:
    if scaling.flushed > limit * scaling.elements:
        raise GainUnderflowError(
            f"tensor {scaling.name!r}: {scaling.flushed:,} of {scaling.elements:,} values, {scaling.changed}, are too "
            f"small for {scaling.dtype_name} and would become zero: that would be another model. Convert it to "
            f"{'float64' if scaling.itemsize > 2 else 'float32'} and fold that"
        )


# --- what to do with which bytes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Range:
    """A stretch of the target, in bytes.

    `action` is None to copy it, a gain, a rotation, or the value to fill it with.

    `first` is the number of its first element within the tensor. What is filled is not read.
    """

    source: SourceFile
    source_offset: int
    target_offset: int
    length: int
    action: _Scaling | Rotating | torch.Tensor | None = None
    first: int = 0


def _plan(job: ShardJob, header: Header, files: SourceFiles) -> tuple[list[_Range], list[_Scaling | Rotating]]:
    """Every byte of the target's data section in ranges, in the order of the target."""
    for name in (*job.edits, *job.drop):
        if name not in job.header.tensors:
            raise PlanError(f"{job.source}: there is no tensor {name!r} to change")
    source = files.open(job.source, job.header)
    ranges: list[_Range] = []
    scalings: list[_Scaling | Rotating] = []
    for entry in sorted(header.tensors.values(), key=lambda entry: entry.start):
        edit = job.add[entry.name][2] if entry.name in job.add else job.edits.get(entry.name)
        target_offset = header.data_start + entry.start
        if isinstance(edit, Fill):
            if entry.dtype not in TORCH_DTYPE:
                raise PlanError(f"tensor {entry.name!r}: {entry.dtype} cannot be filled with {edit.value}")
            value = torch.tensor(edit.value, dtype=TORCH_DTYPE[entry.dtype])
            ranges.append(_Range(source, 0, target_offset, entry.nbytes, value))
            continue
        if isinstance(edit, (Scale, Rotate)):
            path, origin_header, name = edit.origin or (job.source, job.header, entry.name)
            origin = origin_header.tensors.get(name)
            if origin is None or (origin.dtype, origin.shape) != (entry.dtype, entry.shape):
                raise PlanError(f"{path}: there is no {entry.dtype} {list(entry.shape)} {name!r} to scale")
            offset = origin_header.data_start + origin.start
            scalings.append(_Scaling(entry, edit) if isinstance(edit, Scale) else Rotating(entry, edit))
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


def _parts(whole: _Range, workers: int) -> Iterator[_Range | Panel]:
    """What a worker takes from the queue at a time."""
    if isinstance(whole.action, Rotating):
        return panels(whole.action, whole.source, whole.source_offset, whole.target_offset, PANEL_BYTES // workers)
    return _split(whole, RANGE_BYTES)


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
    queue = (part for whole in ranges for part in _parts(whole, workers))
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

    with one_thread_each(), float32_products(), ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work) for _ in range(workers)]
        try:
            for future in futures:
                future.result()
        except BaseException:  # KeyboardInterrupt too: leaving the pool waits for its threads
            stop.set()
            raise


class _Worker:
    """One thread's buffers, and what it does with them."""

    def __init__(self, target: int, lock: threading.Lock) -> None:
        self.target = target
        self.lock = lock
        # Mapped, not allocated: page aligned, and given back to the system at once.
        self.chunk = mmap.mmap(-1, CHUNK_BYTES)
        self.scratch = mmap.mmap(-1, 4 * CHUNK_BYTES)  # a bf16 chunk in float32, or in float64
        self.view = memoryview(self.chunk)
        self.turner = Turner(target)

    def do(self, part: _Range | Panel) -> None:
        if isinstance(part, Panel):
            flushed = self.turner.turn(part)
            with self.lock:
                part.rotating.flushed += flushed
            return
        if part.action is None:
            part = _copy_file_range(part, self.target)
        for chunk in _split(part, CHUNK_BYTES):
            view = self.view[: chunk.length]
            if isinstance(chunk.action, torch.Tensor):
                _tensor(self.chunk, chunk.action.dtype, chunk.length).copy_(chunk.action)
            else:
                read_into(chunk.source, chunk.source_offset, view)
                if isinstance(chunk.action, _Scaling):
                    self._scale(chunk, chunk.action)
            write_at(self.target, chunk.target_offset, view)

    def _scale(self, chunk: _Range, scaling: _Scaling) -> None:
        """Multiply the values in `self.chunk` in place."""
        values = _tensor(self.chunk, scaling.dtype, chunk.length)
        if scaling.dtype == scaling.product_dtype:
            scaling.multiply(values, chunk.first, scaling.gain)
        else:
            wide = _tensor(self.scratch, scaling.product_dtype, scaling.product_dtype.itemsize * len(values))
            wide.copy_(values)
            scaling.multiply(wide, chunk.first, scaling.gain)
            values.copy_(wide)
        order = _tensor(self.scratch, INTEGERS[values.itemsize], values.nbytes)
        if scaling.needs_check and any_zero_or_inf(values, order):
            self._count(chunk, scaling, values)

    def _count(self, chunk: _Range, scaling: _Scaling, product: torch.Tensor) -> None:
        """Raise at a new inf, and count what was flushed. Only chunks with a zero or inf get here."""
        read_into(chunk.source, chunk.source_offset, memoryview(self.scratch)[: chunk.length])
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


def _copy_file_range(part: _Range, target: int) -> _Range:
    """Copy within the kernel as far as that goes, and return what is left to copy.

    Where the file system can share blocks (XFS, btrfs), this does: ranges are cut at multiples of its blocks.
    """
    while part.length > 0 and hasattr(os, "copy_file_range"):
        try:
            n = os.copy_file_range(part.source.fd, target, part.length, part.source_offset, part.target_offset)
        except OSError as error:
            if error.errno == errno.EINTR:  # Python repeats other calls by itself
                continue
            if error.errno in _NO_COPY_FILE_RANGE:
                break
            raise
        if n == 0:  # the end of the file, or a file system that only says so: reading will tell
            break
        part = _after(part, n)
    return part
