"""Reading and writing shards by file descriptor."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashnorm_cli.checkpoint.disk import facts
from flashnorm_cli.checkpoint.header import Header
from flashnorm_cli.errors import CheckpointError, FlashNormError


@dataclass(frozen=True)
class SourceFile:
    path: Path
    fd: int
    status: os.stat_result
    header: Header


class SourceFiles:
    """Source files, each opened and compared with its header once, closed with `stack`.

    `expected` are what `checkpoint.disk.facts` said of some of them when their headers and gains were read.
    """

    def __init__(self, stack: ExitStack, expected: Mapping[Path, tuple[int, ...]] | None = None) -> None:
        self._stack = stack
        self._expected = expected or {}
        self._files: dict[Path, SourceFile] = {}

    def open(self, path: Path, header: Header) -> SourceFile:
        if path in self._files:
            return self._files[path]
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from error
        self._stack.callback(os.close, fd)
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file")
        source = SourceFile(path, fd, status, header)
        expected = self._expected.get(path, ())
        same = status.st_size == header.file_size and facts(status)[: len(expected)] == expected
        if not same or not _has_header(source):
            raise CheckpointError(f"{path}: changed since its header was read")
        self._files[path] = source
        return source

    def check_unchanged(self) -> None:
        """Raises CheckpointError for a file that is not what it was, or whose name is another file's by now."""
        for source in self._files.values():
            try:
                named = source.path.stat()
            except OSError as error:
                raise CheckpointError(f"{source.path}: changed while it was folded: {error.strerror}") from error
            before = facts(source.status)
            if facts(os.fstat(source.fd)) != before or facts(named) != before or not _has_header(source):
                raise CheckpointError(f"{source.path}: changed while it was folded")


def _has_header(source: SourceFile) -> bool:
    raw = bytearray(source.header.data_start)
    read_into(source, 0, memoryview(raw))
    return raw == source.header.raw


@contextmanager
def new_file(path: Path, size: int, mode: int = 0o666) -> Iterator[int]:
    """A new file of `size` bytes, removed again on any error. Never follows or replaces what is there.

    `mode` are its permissions, less the umask.
    """
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except OSError as error:
        raise FlashNormError(f"{path}: {error.strerror}") from error
    try:
        try:
            _reserve(fd, size)
            yield fd
        finally:
            os.close(fd)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the work folder's end says what could not be removed
            path.unlink()
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


def read_into(source: SourceFile, offset: int, buffer: memoryview) -> None:
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


def write_at(fd: int, offset: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
