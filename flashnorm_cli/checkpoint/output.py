"""Output folders: written beside their name, and there as a whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flashnorm_cli.checkpoint.model import CONFIG
from flashnorm_cli.errors import CheckpointError, FlashNormError, GainOverflowError, UsageError

# In a work folder: the fingerprint of the fold that it belongs to.
JOURNAL = "journal"
# Beside the folder that is being filled, with the journal that says what for: the counts of finished shards.
FLUSHED = "flushed.json"


def check_output(output: Path, overwrite: bool, source: Path, config: str = CONFIG, what: str = "a checkpoint") -> Path:
    """The output's absolute path, which may be written. Raises UsageError where that could lose something.

    `source` is a folder that it must not overlap with; `config` the file that shows `what` an older output is.
    """
    target = output.expanduser().absolute()
    if target.is_symlink():
        raise UsageError(f"{output}: is a symbolic link; name the folder itself")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{output}: exists and is not a folder")
    real, theirs = target.resolve(), source.resolve()
    if real == theirs or theirs in real.parents or real in theirs.parents:
        raise UsageError(f"{output}: overlaps with the source {source}; choose another output folder")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise UsageError(f"{output}: exists already; add --overwrite to replace it")
        if not (target / config).exists():
            raise UsageError(f"{output}: is not {what} (no {config}), so it will not be overwritten")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{output}: cannot write in {parent}")
    return target


def partial_folder(target: Path) -> Path:
    """The work folder of an output."""
    return target.with_name(f".{target.name}.partial")


@contextlib.contextmanager
def work_folder(target: Path, fingerprint: str, finished: Collection[str], keep: str = FLUSHED) -> Iterator[Path]:
    """A folder beside the output, `.<name>.partial`, held by this process alone; yields the folder to fill in it.

    What an earlier run of the same fold left there under the names in `finished` stays, and so does the file `keep`
    beside it; everything else is removed. After an error the whole is removed, unless running the same command again
    could go on from something that is finished.
    """
    work = partial_folder(target)
    inside = work / "checkpoint"
    with disk_errors(target):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / JOURNAL, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(lock, work / JOURNAL, target)
        with disk_errors(target):
            same = os.pread(lock, 1 << 10, 0).decode(errors="replace") == fingerprint
            for path in [*work.iterdir(), *(inside.iterdir() if inside.exists() else ())]:
                stays = same and (path.name in finished if path.parent == inside else path.name == keep)
                if not stays and path not in (inside, work / JOURNAL):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            inside.mkdir(exist_ok=True)
            os.ftruncate(lock, 0)
            os.pwrite(lock, fingerprint.encode(), 0)
            try:
                yield inside
            except BaseException as error:
                hopeless = isinstance(error, (GainOverflowError, CheckpointError))
                if hopeless or not ((work / keep).exists() or any((inside / name).exists() for name in finished)):
                    shutil.rmtree(work, ignore_errors=True)
                raise
            shutil.rmtree(work, ignore_errors=True)  # still locked: nobody else may begin in it
    finally:
        os.close(lock)


def _lock(lock: int, journal: Path, target: Path) -> None:
    """Hold the journal, and make sure that it is still the one that a second process would find."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(lock).st_ino == journal.stat().st_ino
    except OSError:
        mine = False
    if not mine:
        raise FlashNormError(f"{target}: another fold is writing it right now")


@contextlib.contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Errors of the disk in the words of the output; what the rewriting has worded already keeps its file's name."""
    try:
        yield
    except OSError as error:
        raise FlashNormError(f"{target}: {error.strerror or error}{_hint(error)}") from error
    except FlashNormError as error:
        if hint := _hint(error.__cause__):
            raise FlashNormError(f"{error}{hint}") from error
        raise


def _hint(error: BaseException | None) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space and run the same command again" if full else ""


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def flush(folder: Path, workers: int) -> None:
    """Return when everything below a folder is on the disk."""

    def fsync(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(fsync, [p for p in folder.rglob("*") if not p.is_symlink()]):
            pass
    fsync(folder)


def publish(work: Path, target: Path) -> None:
    """Give the finished folder its name; an older output is removed only then."""
    old = target.with_name(f".{target.name}.old")
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    elif target.exists():
        target.rmdir()
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)  # also that of a run which was killed just before this line
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
