"""Reading tensors in blocks that fit a small buffer, without mapping files into memory."""

from __future__ import annotations

import math
import mmap
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import CheckpointError

BLOCK_BYTES = 2**20
READ_AHEAD = 16 * BLOCK_BYTES
MOST_OPEN = 64  # far below the usual limit of 1024 files, and enough for every thread's few


@dataclass(frozen=True)
class Block:
    """A stretch of a tensor: from its element `first` on, of shape (outer, channels, inner), `channel` the first one.

    Where bytes are to be compared, `bytes` is their number, and `first` counts bytes too.
    """

    first: int
    shape: tuple[int, int, int] = (0, 0, 0)
    channel: int = 0
    bytes: int | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def blocks(shape: tuple[int, ...], dim: int | None, limit: int) -> Iterator[Block]:
    """Cut a tensor of `shape` into contiguous blocks of at most `limit` elements, in order.

    Seen as (outer, channels, inner) around `dim` (None: no channels), each block holds whole slices, or whole channels
    of one slice, or a part of one channel.
    """
    if 0 in shape:
        return
    if dim is None:
        outer, channels, inner = 1, 1, math.prod(shape)
    else:
        outer, channels, inner = math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :])
    if channels * inner <= limit:
        step = limit // (channels * inner)
        for o in range(0, outer, step):
            yield Block(o * channels * inner, (min(step, outer - o), channels, inner))
        return
    step, inner_step = max(limit // inner, 1), min(inner, limit)
    for o in range(outer):
        for c in range(0, channels, step):
            for i in range(0, inner, inner_step):
                size = (1, min(step, channels - c), min(inner_step, inner - i))
                yield Block((o * channels + c) * inner + i, size, c)


class ShardReader:
    """A shard of a checkpoint, read through a page-aligned buffer of its own or a shared one.

    A new view invalidates the last one of that buffer. The file is opened when it is read, and may be closed between
    two reads: see `_OpenFiles`.
    """

    def __init__(self, checkpoint: Checkpoint, shard: str, buffer: mmap.mmap | None = None) -> None:
        self.path: Path = checkpoint.folder / shard
        self.status: tuple[int, ...] | None = None  # of the file as it was first opened
        self.ahead = 0
        self.buffer = buffer or mmap.mmap(-1, BLOCK_BYTES)

    def close(self) -> None:
        _open_files.close(self)

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(length)
        self.read_into(memoryview(data), offset)
        return bytes(data)

    def view(self, offset: int, length: int) -> memoryview:
        view = memoryview(self.buffer)[:length]
        self.read_into(view, offset)
        return view

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill a buffer from `offset` of the shard."""
        self.read_rows(view, offset, len(view), 0)

    def read_rows(self, view: memoryview, offset: int, length: int, stride: int) -> None:
        """Fill a buffer with stretches of `length` bytes, `stride` bytes from the start of one to the next one's."""
        end = offset + (len(view) // length - 1) * stride + length if length else offset
        try:
            with _open_files.lent(self) as fd:
                if end > self.ahead:  # the disk works while this block is looked at
                    os.posix_fadvise(fd, end, READ_AHEAD, os.POSIX_FADV_WILLNEED)
                    self.ahead = end + READ_AHEAD // 2
                for start in range(0, len(view), max(length, 1)):
                    self._fill(fd, view[start : start + length], offset)
                    offset += stride
        except OSError as error:
            raise CheckpointError(f"{self.path}: {error.strerror}") from error

    def _fill(self, fd: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            n = os.preadv(fd, [view[done:]], offset + done)
            if n == 0:
                raise CheckpointError(f"{self.path}: truncated while it was being read")
            done += n

    def open(self) -> int:
        """A new file descriptor. Raises CheckpointError where this is no longer the file that was read before."""
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(fd)
        status = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        if self.status not in (None, status):
            os.close(fd)
            raise CheckpointError(f"{self.path}: changed while it was being read")
        self.status = status
        return fd


class _OpenFiles:
    """File descriptors of shards: a checkpoint may have more shards than a process may open files.

    Of those that nobody is reading, the one that was read longest ago is closed first.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.lock = threading.Lock()
        self.idle: OrderedDict[ShardReader, int] = OrderedDict()

    @contextmanager
    def lent(self, reader: ShardReader) -> Iterator[int]:
        """The reader's file, which no other thread closes meanwhile. A reader belongs to one thread at a time."""
        with self.lock:
            fd = self.idle.pop(reader, None)
        if fd is None:
            fd = reader.open()
        try:
            yield fd
        finally:
            with self.lock:
                self.idle[reader] = fd
                spare = [self.idle.popitem(last=False)[1] for _ in range(len(self.idle) - self.most)]
            for each in spare:
                os.close(each)

    def close(self, reader: ShardReader) -> None:
        with self.lock:
            fd = self.idle.pop(reader, None)
        if fd is not None:
            os.close(fd)


_open_files = _OpenFiles(MOST_OPEN)
