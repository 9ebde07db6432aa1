"""Files opened so that nothing waits, and nothing but a plain file is read: no pipe, no socket, no device."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flashnorm_cli.checkpoint.disk import kind_of
from flashnorm_cli.errors import FolderError, shown


class Seen(NamedTuple):
    """A file as it was found, told from any other that takes its place: device, inode, bytes, nanoseconds."""

    device: int
    inode: int
    size: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Seen:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_file(path: Path | str) -> BinaryIO:
    """Open a plain file for reading; a link is followed.

    Raises FolderError for pipes, sockets and devices, without opening them: a pipe would wait, a device may act on it.
    OSError as from open, also for a folder.
    """
    _refuse_special(path, Path(path).stat())
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_special(path, os.fstat(fd))  # it may have become another one in between
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def read_text(path: Path | str) -> str:
    """The text of a plain file in UTF-8. Raises FolderError as `open_file`, OSError, UnicodeDecodeError."""
    with open_file(path) as file:
        return file.read().decode("utf-8")


def _refuse_special(path: Path | str, status: os.stat_result) -> None:
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise FolderError(f"{shown(path)}: is {kind_of(status)}, not a file")
