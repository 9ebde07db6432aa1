"""Output folders: written beside their name, and there as a whole or not at all.

What is there already is touched only if it shows that it is this tool's: an older output by its record, a work folder
by the mark in it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashnorm_cli.checkpoint import disk
from flashnorm_cli.checkpoint.disk import write_bytes, write_text
from flashnorm_cli.checkpoint.model import CONFIG, RECORD
from flashnorm_cli.checkpoint.work import WorkFolder, partial_folder, unlike_work_folder
from flashnorm_cli.errors import CheckpointError, FlashNormError, GainOverflowError, GainUnderflowError, UsageError

__all__ = [
    "FLUSHED",
    "check_output",
    "disk_errors",
    "flush",
    "partial_folder",
    "work_folder",
    "write_bytes",
    "write_text",
]

# Beside the folder that is being filled, with the journal that says what for: finished shards and what was flushed.
FLUSHED = "flushed.json"
# What a folded adapter's card says.
ADAPTER_CARD = "`flashnorm fold-adapter` made this from"


# ---- before the work -------------------------------------------------------------------------------------------------


def check_output(
    output: Path,
    overwrite: bool,
    *sources: Path,
    config: str = CONFIG,
    what: str = "a checkpoint",
) -> Path:
    """The output's absolute path, which may be written. Raises UsageError where that could lose something.

    `sources` are folders that neither it nor its work folder may overlap with; `config` is the file that an older
    output of this kind has, `what` it is called.
    """
    target = _named(output)
    try:
        _check_names(output, target, sources)
        if target.exists() and any(target.iterdir()):
            if not overwrite:
                raise UsageError(f"{output}: exists already; add `overwrite=True` to replace it")
            folder = disk.open_folder(target)
            try:
                why = not_an_output(folder, config, what)
            finally:
                os.close(folder)
            if why:
                raise UsageError(f"{output}: {why}, so it will not be overwritten")
            if not os.access(target, os.W_OK | os.X_OK):
                raise UsageError(f"{output}: cannot be replaced: its files are not yours to remove")
    except OSError as error:
        raise UsageError(f"{output}: {error.strerror or error}") from error
    return target


def _named(output: Path) -> Path:
    """The absolute path whose last part is the folder's own name, not `..` nor nothing."""
    try:
        target = output.expanduser().absolute()
    except RuntimeError as error:  # ~somebody
        raise UsageError(f"{output}: {error}") from error
    if ".." in target.parts:
        target = target.resolve() if target.name == ".." else target.parent.resolve() / target.name
    if not target.name:
        raise UsageError(f"{output}: cannot be an output folder; name one inside it")
    return target


def _check_names(output: Path, target: Path, sources: Collection[Path]) -> None:
    """Everything that will be made or replaced, against what is there. Raises UsageError and OSError."""
    if target.is_symlink():
        raise UsageError(f"{output}: is a symbolic link; name the folder itself")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{output}: exists and is not a folder")
    if target.is_dir() and os.path.ismount(target):
        raise UsageError(f"{output}: is where a file system is mounted, and keeps its name; name a folder inside it")
    for part in target.parents:
        if re.fullmatch(r"\..+\.partial", part.name):
            raise UsageError(f"{output}: lies in {part.name}, the work folder of another output")
    partial = partial_folder(target)
    for source in sources:
        for path, name in ((target, output), (partial, partial)):
            if _overlap(path, source):
                raise UsageError(f"{name}: overlaps with the source {source}; choose another output folder")
    parent = target.parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{output}: cannot write in {parent}")
    if os.path.lexists(partial) and (why := unlike_work_folder(partial)):
        raise UsageError(f"{partial}: {why}, and a fold into {target.name} would work there; move or remove it")


def _overlap(path: Path, source: Path) -> bool:
    """Whether two folders are one, or one is in the other, by whatever name; or the source's files lie in `path`."""
    above_path, above_source = _chain(path.resolve()), _chain(source.resolve())
    if path.exists() and above_path[0] in above_source:
        return True
    if source.exists() and above_source[0] in above_path:
        return True
    real = path.resolve()
    for folder, folders, names in os.walk(source):
        for name in (*folders, *names):
            inner = Path(folder, name)
            if inner.is_symlink() and real in inner.resolve().parents:
                return True
    return False


def _chain(path: Path) -> list[tuple[int, int] | None]:
    """Device and inode of a path and of the folders that it is in, from itself up; None for what is not there."""
    found: list[tuple[int, int] | None] = []
    for part in (path, *path.parents):
        try:
            status = part.stat()
            found.append((status.st_dev, status.st_ino))
        except (FileNotFoundError, NotADirectoryError):
            found.append(None)
    return found


def not_an_output(folder: int, config: str = CONFIG, what: str = "a checkpoint") -> str | None:
    """Why the folder of a descriptor is not what a fold has written, None if it is.

    A fold's config.json says so itself; an adapter's, where peft would warn, has flashnorm.json beside it, or its card.
    """
    content = _json(folder, config)
    if content is None:
        return f"is not {what} (no {config})" if not _is_there(folder, config) else f"its {config} cannot be read"
    record = _json(folder, RECORD) or {}
    if config == CONFIG:
        folded = any(content.get(key) for key in ("flashnorm", "flashnorm_folded", "flash_norm"))
        folded = folded or ("source_files" in record and "layout" in record)
    else:
        folded = record.get("kind") == "adapter" or ADAPTER_CARD in _text(folder, "README.md")
    return None if folded else f"is {what}, but not one that flashnorm has folded"


def _text(folder: int, name: str) -> str:
    try:
        return disk.read_small(name, folder).decode(errors="replace")
    except OSError:
        return ""


def _is_there(folder: int, name: str) -> bool:
    try:
        os.stat(name, dir_fd=folder)
    except OSError:
        return False
    return True


def _json(folder: int, name: str) -> dict[str, object] | None:
    try:
        value = json.loads(disk.read_small(name, folder, 1 << 30))
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


# ---- the work --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def work_folder(
    target: Path, fingerprint: str, finished: Collection[str], keep: str = FLUSHED, *, source: str = ""
) -> Iterator[WorkFolder]:
    """A folder beside the output, `.<name>.partial`, held by this process alone.

    What an earlier run of the same fold left there under the names in `finished` stays, and so does the file `keep`
    beside it; everything else in it is removed. After an error the whole is removed, unless running the same command
    again could go on from something that is finished. `source` is written into it, for who finds it.

    Raises UsageError if what has that name is not this tool's work folder, FlashNormError if another process holds it.
    """
    with disk_errors(target), WorkFolder(target) as work:
        work.begin(fingerprint, finished, keep, source)
        try:
            yield work
        except BaseException as error:
            hopeless = isinstance(error, (GainOverflowError, GainUnderflowError, CheckpointError))
            over = hopeless or work.published or not work.has(finished, keep)
            why = work.remove() if over else None
            if why and isinstance(error, FlashNormError):
                raise type(error)(f"{error}; {why}") from error
            raise
        if why := work.remove():
            work.notes.append(why)


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Errors of the disk in the words of the output; what the rewriting has worded already keeps its file's name."""
    try:
        yield
    except OSError as error:
        raise FlashNormError(f"{target}: {error.strerror or error}{_hint(error)}") from error
    except FlashNormError as error:
        if (hint := _hint(error.__cause__)) and hint not in str(error):
            raise type(error)(f"{error}{hint}") from error
        raise


def _hint(error: BaseException | None) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space and run the same command again" if full else ""


def flush(work: WorkFolder, workers: int) -> None:
    """Return when everything in the work folder is on the disk.

    After an error nothing in it counts as finished any more: what the system could not write it has forgotten.
    """

    def fsync(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            if not path.is_dir():
                raise
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
        finally:
            os.close(fd)

    try:
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(fsync, [p for p in work.inside.rglob("*") if not p.is_symlink()]):
                pass
        fsync(work.inside)
    except OSError:
        work.distrust()
        raise
