"""The files of a folder: found without following a link out of it, and copied as they were found."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from flashnorm_cli.checkpoint.disk import kind_of
from flashnorm_cli.checkpoint.files import Seen, open_file
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import FlashNormError, FolderError, UsageError, shown

# Of git and of huggingface_hub, about this copy of the repository: .git/config may hold a token.
NOT_OF_THE_CHECKPOINT = frozenset({".git", ".cache"})
# Behind links to folders, which can multiply a few files without end.
MOST_BEHIND_LINKS = 100_000
_BLOB = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a git id, or a sha256
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Found:
    """The plain files of a folder by relative path (with `/`), and links to folders that are not descended into."""

    files: dict[str, Seen]
    loops: tuple[str, ...]


# ---- where links may lead --------------------------------------------------------------------------------------------


def _admitted(root: str, real: str) -> bool:
    """Whether a link within the folder `root` may lead to `real`; both are real paths.

    Within the folder, or to a blob of the Hub cache that the folder is a snapshot of: `blobs/<hash>` of the
    repository, or the store that huggingface_hub shares between repositories, `blobs/<2 digits>/<hash>` of the cache.
    """
    if real == root or real.startswith(root.rstrip("/") + "/"):
        return not NOT_OF_THE_CHECKPOINT & set(os.path.relpath(real, root).split("/"))
    for place in [Path(root), *Path(root).parents]:
        if place.parent.name == "snapshots":
            repository, (folder, blob) = place.parent.parent, os.path.split(real)
            shared = str(repository.parent / "blobs" / blob[:2])
            return bool(_BLOB.fullmatch(blob)) and folder in (str(repository / "blobs"), shared)
    return False


def _check_link(path: str, root: str) -> None:
    real = os.path.realpath(path)
    if not _admitted(root, real):
        raise FolderError(
            f"{shown(path)}: is a link out of the folder, to {shown(real)}; remove it, or add "
            "`follow_links=True` to carry over what it leads to"
        )


# ---- finding ---------------------------------------------------------------------------------------------------------


def find_files(folder: Path, follow_links: bool = False) -> Found:
    """Every file below a folder but those of `.git` and `.cache`; nothing is opened.

    Args:
        folder: may be a link itself.
        follow_links: also through links that lead out of the folder.
    Raises:
        FolderError: names a link that leads out or nowhere, a pipe, socket or device, or a folder that cannot be
            listed.
    """
    root = os.path.realpath(folder)
    files: dict[str, Seen] = {}
    loops: list[str] = []
    behind_links = 0
    # Relative path, real path, the real folders on the way to it, and whether there is a link among them.
    waiting = [("", root, frozenset({root}), False)]
    while waiting:
        here, real_here, above, linked = waiting.pop()
        for name in _names(folder / here):
            relative = f"{here}/{name}" if here else name
            path = f"{folder}/{relative}"
            behind_links += linked
            if behind_links > MOST_BEHIND_LINKS:
                raise FolderError(f"{shown(path)}: more than {MOST_BEHIND_LINKS:,} files lie behind links here")
            status, is_link = _status(path, root, follow_links)
            if stat.S_ISREG(status.st_mode):
                files[relative] = Seen.of(status)
            elif not stat.S_ISDIR(status.st_mode):
                raise FolderError(f"{shown(path)}: is {kind_of(status)}, which cannot be carried over")
            else:
                real = os.path.realpath(path) if is_link else f"{real_here}/{name}"
                if real in above:
                    loops.append(relative)
                else:
                    waiting.append((relative, real, above | {real}, linked or is_link))
    return Found(dict(sorted(files.items())), tuple(sorted(loops)))


def _names(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir() if entry.name not in NOT_OF_THE_CHECKPOINT]
    except OSError as error:
        raise FolderError(f"{shown(folder)}: cannot be listed: {error.strerror}") from error


def _status(path: str, root: str, follow_links: bool) -> tuple[os.stat_result, bool]:
    """A path's status behind its links, and whether it is one."""
    try:
        status = os.lstat(path)
        if not stat.S_ISLNK(status.st_mode):
            return status, False
        if not follow_links:
            _check_link(path, root)
        return Path(path).stat(), True
    except FileNotFoundError:
        where = f", a link to {shown(Path(path).readlink())}, leads nowhere" if Path(path).is_symlink() else " vanished"
        raise FolderError(f"{shown(path)}:{where}") from None
    except OSError as error:
        raise FolderError(f"{shown(path)}: cannot be read: {error.strerror}") from error


# ---- before the work -------------------------------------------------------------------------------------------------


def check_names(output: Path, inside: Iterable[str]) -> None:
    """Raise UsageError where a name is too long for the file system that `output` will be on.

    Args:
        output: the folder as the user named it; while it is written, another lies beside it.
        inside: relative paths of the files that it will hold.
    """
    target = output.expanduser().absolute()
    work = f".{target.name}.partial"
    place = target.parent
    try:
        while not os.path.lexists(place):
            place = place.parent
        name_max, path_max = os.pathconf(place, "PC_NAME_MAX"), os.pathconf(place, "PC_PATH_MAX")
    except OSError as error:
        raise UsageError(f"{shown(output)}: {error.strerror}") from error
    if (long := len(os.fsencode(work)) - name_max) > 0:
        raise UsageError(
            f"{shown(output)}: the name of the output is too long by {long} bytes: while it is written, {work[:10]}..."
            f".partial lies beside it, and names have {name_max} bytes here; give the output a shorter name"
        )
    room = path_max - len(os.fsencode(target.parent)) - len(os.fsencode(work)) - len("//checkpoint/") - 32
    if room <= 0:
        raise UsageError(
            f"{shown(target)[:100]}...: the path of the output is too long; {path_max} bytes are allowed here"
        )
    for name in inside:
        part = max(name.split("/"), key=lambda each: len(os.fsencode(each)))
        if len(os.fsencode(part)) > name_max:
            raise UsageError(f"{shown(output)}: {shown(part)} is too long a name for a file there ({name_max} bytes)")
        if len(os.fsencode(name)) > room:
            raise UsageError(f"{shown(output)}: {shown(name)} would be too long a path there; choose a shorter output")


# ---- copying ---------------------------------------------------------------------------------------------------------


def carry_over(checkpoint: Checkpoint, target: Path) -> None:
    """Copy the files that travel with a checkpoint into the folder `target`.

    Raises FolderError where one is not the file any more that was looked at, FlashNormError where it cannot be read
    whole.
    """
    root = None if checkpoint.source.follow_links else os.path.realpath(checkpoint.folder)
    for name in checkpoint.others:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy_file(f"{checkpoint.folder}/{name}", target / name, checkpoint.seen[name], root)


def copy_file(path: str, target: Path, seen: Seen, root: str | None) -> None:
    """Copy one file. The permissions are the source's less the umask, as cp gives them; `root` bounds its links."""
    try:
        file = open_file(path)
    except OSError as error:
        raise FolderError(f"{shown(path)}: cannot be read, so it cannot be carried over: {error.strerror}") from None
    with file:
        status = os.fstat(file.fileno())
        # What is open is what was found, and what was found lay where links may lead: no name is trusted twice.
        if Seen.of(status) != seen or (root is not None and not _lies_where_it_may(path, status, root)):
            raise FolderError(f"{shown(path)}: was changed while this ran; run it again")
        target.unlink(missing_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        out = os.open(target, flags, stat.S_IMODE(status.st_mode) & 0o777)
        try:
            copied = _copy_bytes(file.fileno(), out, status.st_size)
        finally:
            os.close(out)
        if copied != status.st_size:
            raise FlashNormError(f"{shown(path)}: only {copied:,} of its {status.st_size:,} bytes could be read")
        if Seen.of(os.fstat(file.fileno())) != seen or os.read(file.fileno(), 1):  # /proc says 0 bytes, and has more
            raise FolderError(f"{shown(path)}: was changed while it was copied; run it again")


def _lies_where_it_may(path: str, status: os.stat_result, root: str) -> bool:
    """Whether the open file is the one at its real path, and that path is within `root` or a blob of its cache."""
    real = os.path.realpath(path)
    try:
        there = os.lstat(real)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (status.st_dev, status.st_ino) and _admitted(root, real)


def _copy_bytes(source: int, target: int, size: int) -> int:
    """Copy `size` bytes between two open files; returns how many there were."""
    done, in_kernel = 0, True
    while done < size:
        if in_kernel:
            try:
                n = os.copy_file_range(source, target, min(size - done, 1 << 30))
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                    raise
                n = 0
            in_kernel = n > 0  # some file systems answer 0 where a read finds more
        else:
            block = os.read(source, min(_BLOCK, size - done))
            if not block:
                break
            n = 0
            while n < len(block):
                n += os.write(target, block[n:])
        done += n
    return done
