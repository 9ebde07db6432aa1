"""Files and folders handled so that nobody's links, pipes or races lead anywhere else.

Everything goes by the descriptor of a folder that was opened once: what happens to its path meanwhile does not matter.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from pathlib import Path

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_EXCHANGE = 2  # RENAME_EXCHANGE of linux/fs.h
# What a kernel or a file system says that does not have an operation.
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY}
MAX_DEPTH = 200  # of folders in folders; each costs a descriptor while it is removed
PIECE = 1 << 20


def open_folder(path: str | Path, folder: int | None = None, *, follow: bool = False) -> int:
    """A descriptor of a folder; of a link to one only with `follow`. `path` is relative to the descriptor `folder`."""
    return os.open(path, _FOLDER if follow else _FOLDER | os.O_NOFOLLOW, dir_fd=folder)


def names_in(folder: int) -> list[str]:
    return os.listdir(folder)


def kind_of(status: os.stat_result) -> str:
    """What a path is, for messages."""
    mode = status.st_mode
    for test, name in (
        (stat.S_ISLNK, "a symbolic link"),
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISREG, "a file"),
        (stat.S_ISFIFO, "a named pipe"),
        (stat.S_ISSOCK, "a socket"),
    ):
        if test(mode):
            return name
    return "a device"


def own_file(name: str, folder: int) -> os.stat_result | None:
    """The status of a regular file of this user's that has no other name, None for anything else."""
    with contextlib.suppress(OSError):
        status = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid():
            return status
    return None


def read_small(name: str, folder: int, limit: int = 1 << 16) -> bytes:
    """The first `limit` bytes of a regular file. Raises OSError for anything else, and never waits for a pipe."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", name)
        found = b""
        while len(found) < limit and (more := os.pread(fd, limit - len(found), len(found))):
            found += more
        return found
    finally:
        os.close(fd)


def write_all(fd: int, data: bytes) -> None:
    """Write everything at the descriptor's place: a write may be short."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a small file so that it is there as a whole or not at all; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"), sync=sync)


def write_bytes(path: Path, data: bytes, *, sync: bool = True) -> None:
    """Write a small file so that it is there as a whole or not at all; with `sync` also after a power loss.

    It is made under a name that nobody can guess, where nothing is, and then gets its own: what had that before is
    replaced, a link itself and not what it leads to. The mode is that of the file that it replaces, else what the umask
    gives. Raises OSError, also where the name is that of something else than a file.
    """
    folder = open_folder(path.parent, follow=True)
    try:
        mode = _replaceable(path, folder)
        name = f".{path.name[:60]}.{secrets.token_hex(8)}.part"
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666, dir_fd=folder)
        try:
            try:
                if mode is not None:
                    os.fchmod(fd, mode)
                write_all(fd, data)
                if sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(name, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder)
            raise
        if sync:
            sync_folder(folder)
    finally:
        os.close(folder)


def _replaceable(path: Path, folder: int) -> int | None:
    """The permissions of the file at a path, None where there is none. Raises OSError where it must not be replaced."""
    try:
        status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
        is_link = stat.S_ISLNK(status.st_mode)
        if is_link:  # one to a device, say /dev/stdout, is no place for a file either
            status = os.stat(path.name, dir_fd=folder)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, f"is {kind_of(status)}, not a file", str(path))
    return None if is_link else stat.S_IMODE(status.st_mode) & 0o777


def facts(status: os.stat_result) -> tuple[int, ...]:
    """What tells a file from another one, and from itself after a change: size first, then time, then the rest.

    The first two hold on every machine that sees the file; the others (time of the last change of any kind, inode,
    device) on this one only.
    """
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev


def sync_folder(folder: int) -> None:
    """Have a folder's names on the disk, where its file system can do that."""
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def mount_of(fd: int) -> str:
    """What differs between two descriptors of different mounts: a bind mount has the device of what it shows."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{fd}") as file:  # noqa: PTH123 (no path of a user's)
        for line in file:
            if line.startswith("mnt_id:"):
                return line
    return str(os.fstat(fd).st_dev)


def remove(name: str, folder: int, depth: int = 0) -> None:
    """Remove a file, a link (not what it leads to), or a folder with all that is in it.

    Raises OSError, also for a folder on which something is mounted: that is not this folder's content.
    """
    status = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if not stat.S_ISDIR(status.st_mode):
        os.unlink(name, dir_fd=folder)
        return
    if depth > MAX_DEPTH:
        raise OSError(errno.ELOOP, "is nested too deeply", name)
    fd = open_folder(name, folder)
    try:
        if mount_of(fd) != mount_of(folder):
            raise OSError(errno.EBUSY, "something is mounted on it", name)
        for inner in names_in(fd):
            remove(inner, fd, depth + 1)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=folder)


def size_of(folder: int, depth: int = 0) -> int:
    """Bytes of the files below a folder; links are not followed, and what cannot be read does not count."""
    total = 0
    for name in names_in(folder):
        with contextlib.suppress(OSError):
            status = os.stat(name, dir_fd=folder, follow_symlinks=False)
            if stat.S_ISREG(status.st_mode):
                total += status.st_size
            elif stat.S_ISDIR(status.st_mode) and depth < MAX_DEPTH:
                inner = open_folder(name, folder)
                try:
                    total += size_of(inner, depth + 1)
                finally:
                    os.close(inner)
    return total


def exchange(a: str, a_folder: int, b: str, b_folder: int) -> bool:
    """Let two names change places in one step; False where kernel or file system cannot. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if renameat2(a_folder, os.fsencode(a), b_folder, os.fsencode(b), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), b)
