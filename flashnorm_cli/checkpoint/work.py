"""The work folder of an output: `.<name>.partial` beside it, with the files that become the output.

    README       what this is, for whoever finds it, in words that only this tool writes
    journal      the fingerprint of the fold that it belongs to; locked while a process works here
    checkpoint/  what gets the output's name at the end

Only a folder of this user that holds these is ever cleared, and nothing in it that is a link is followed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from flashnorm_cli.checkpoint import disk
from flashnorm_cli.errors import FlashNormError, UsageError

JOURNAL, MARK_FILE, INSIDE = "journal", "README", "checkpoint"
# An older output while it is replaced, where two folders cannot change their names in one step.
REPLACED = "replaced"
MARK = "This is the work folder of an unfinished flashnorm fold.\n"
_PATIENCE = 0.3  # seconds, for a command that only looks whether the journal is locked


def partial_folder(target: Path) -> Path:
    """The work folder of an output."""
    return target.with_name(f".{target.name}.partial")


def unlike_work_folder(path: Path) -> str | None:
    """Why what has a work folder's name is none of this user's, None if it is one, or an empty folder."""
    try:
        status = path.lstat()
    except FileNotFoundError:  # another process has just removed it
        return None
    if not stat.S_ISDIR(status.st_mode):
        return f"is {disk.kind_of(status)}, not the work folder of a fold"
    if status.st_uid != os.geteuid():
        return "belongs to another user"
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return "cannot be written in"
    folder = disk.open_folder(path)
    try:
        return _unlike(folder)
    except FileNotFoundError:
        return None
    finally:
        os.close(folder)


def _unlike(folder: int) -> str | None:
    if os.fstat(folder).st_uid != os.geteuid():
        return "belongs to another user"
    names = set(disk.names_in(folder))
    for name in sorted(names & {JOURNAL, MARK_FILE}):
        if disk.own_file(name, folder) is None and exists(name, folder):
            return f"holds a {name} that is no plain file of yours alone, so it is not the work folder of a fold"
    if INSIDE in names:
        status = os.stat(INSIDE, dir_fd=folder, follow_symlinks=False)
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            return f"holds a {INSIDE} that is {disk.kind_of(status)}, so it is not the work folder of a fold"
    text = disk.read_small(MARK_FILE, folder) if MARK_FILE in names else b""
    if text.startswith(MARK.encode()):
        return None
    # Killed before the first line was written: then there is nothing in it yet.
    begun = names <= {JOURNAL, MARK_FILE} and MARK.encode().startswith(text)
    if begun and (JOURNAL not in names or os.stat(JOURNAL, dir_fd=folder).st_size == 0):
        return None
    return f"is not the work folder of a fold (no {MARK_FILE} of flashnorm's in it)"


def _write_mark(folder: int, source: str, output: str) -> None:
    text = MARK + (
        "The same command goes on from here when it is run again; or remove this folder.\n"
        f"source: {' '.join(source.split())}\noutput: {' '.join(output.split())}\n"
    )
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(MARK_FILE, flags, 0o666, dir_fd=folder)
    try:
        os.ftruncate(fd, 0)
        disk.write_all(fd, text.encode("utf-8", "surrogateescape"))
        os.fsync(fd)  # without it this folder is nobody's
    finally:
        os.close(fd)
    disk.sync_folder(folder)


def _locked(journal: int) -> bool:
    """Lock a journal, or wait for whoever holds it, a moment long; False if they still do."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)


class WorkFolder:
    """A work folder that this process holds; `path` it is, `inside` what gets filled, `notes` what a user should know.

    A context manager. Raises OSError throughout, and FlashNormError where somebody else is at work.
    """

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, partial_folder(target)
        self.inside = self.path / INSIDE
        self.notes: list[str] = []
        self.published = False
        self.fingerprint = ""
        self._folder = self._journal = self._inside = -1
        self._again = False  # whether the name is to be removed once more when all is closed
        target.parent.mkdir(parents=True, exist_ok=True)
        self._parent = disk.open_folder(target.parent, follow=True)

    def __enter__(self) -> WorkFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for fd in (self._inside, self._journal, self._folder):
            if fd >= 0:
                with contextlib.suppress(OSError):  # nothing is written by these that matters any more
                    os.close(fd)
        if self._again:  # a network file system keeps a file that was removed until it is closed
            with contextlib.suppress(OSError):
                os.rmdir(self.path.name, dir_fd=self._parent)
        with contextlib.suppress(OSError):
            os.close(self._parent)

    # ---- taking it ----

    def begin(self, fingerprint: str, finished: Collection[str], keep: str, source: str) -> None:
        """Make the folder, or take one over; what does not belong to this very fold is removed from it."""
        self._open()
        self._lock()
        if why := _unlike(self._folder):
            raise self._refused(why)
        self._put_back_replaced()
        before = os.pread(self._journal, 1 << 10, 0)
        same = before.decode(errors="replace") == fingerprint
        if MARK_FILE not in disk.names_in(self._folder) or not before:
            _write_mark(self._folder, source, self.target.name)
        with contextlib.suppress(FileExistsError):
            os.mkdir(INSIDE, dir_fd=self._folder)
        self._inside = disk.open_folder(INSIDE, self._folder)
        if disk.mount_of(self._inside) != disk.mount_of(self._folder):
            raise self._refused(f"has something mounted on its {INSIDE}")
        was = disk.size_of(self._folder) if before and not same else 0
        for name in disk.names_in(self._folder):
            stays = same and name == keep and disk.own_file(name, self._folder)
            if name not in (JOURNAL, MARK_FILE, INSIDE) and not stays:
                disk.remove(name, self._folder)
        for name in disk.names_in(self._inside):
            if not (same and name in finished and disk.own_file(name, self._inside)):
                disk.remove(name, self._inside)
        if was > 1 << 20:
            self.notes.append(
                f"an unfinished fold of other files or with other options was removed from {self.path} ({was:,} bytes)"
            )
        if not same:
            self._write_journal(fingerprint)
        self.fingerprint = fingerprint

    def _open(self) -> None:
        name = self.path.name
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, dir_fd=self._parent)
        try:
            status = os.stat(name, dir_fd=self._parent, follow_symlinks=False)
            if not stat.S_ISDIR(status.st_mode):
                raise self._refused(f"is {disk.kind_of(status)}, not the work folder of a fold")
            self._folder = disk.open_folder(name, self._parent)
            if why := _unlike(self._folder):  # before anything is made in it
                raise self._refused(why)
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            self._journal = os.open(JOURNAL, flags, 0o666, dir_fd=self._folder)
        except FileNotFoundError:  # its owner is removing it
            raise self._taken() from None

    def _refused(self, why: str) -> UsageError:
        return UsageError(f"{self.path}: {why}, and a fold into {self.target.name} would work there; move or remove it")

    def _lock(self) -> None:
        """Hold the journal, and make sure that it is still the one that another process would find."""
        if not _locked(self._journal):
            raise self._taken()
        held = os.fstat(self._journal)
        try:
            named = os.stat(JOURNAL, dir_fd=self._folder, follow_symlinks=False)
        except FileNotFoundError:
            raise self._taken() from None
        if (named.st_dev, named.st_ino) != (held.st_dev, held.st_ino) or not self._is_named():
            raise self._taken()

    def _taken(self) -> FlashNormError:
        return FlashNormError(f"{self.target}: another fold is writing it right now")

    def _is_named(self) -> bool:
        """Whether the work folder's path still leads to the folder that this process holds."""
        held = os.fstat(self._folder)
        try:
            named = self.path.lstat()
        except OSError:
            return False
        return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)

    def _write_journal(self, text: str) -> None:
        os.ftruncate(self._journal, 0)
        data = text.encode()
        while data:
            data = data[os.pwrite(self._journal, data, len(text.encode()) - len(data)) :]

    def distrust(self) -> None:
        """Let nothing in here count as finished for a later run."""
        with contextlib.suppress(OSError):
            os.ftruncate(self._journal, 0)
            return
        self.published = True  # then it is removed

    def _put_back_replaced(self) -> None:
        """An older output whose fold was killed between the two renames that replace it."""
        if REPLACED in disk.names_in(self._folder) and not exists(self.target.name, self._parent):
            os.rename(REPLACED, self.target.name, src_dir_fd=self._folder, dst_dir_fd=self._parent)

    # ---- while it is filled ----

    def check(self) -> None:
        """Raises FlashNormError if the folder's path leads elsewhere by now: files are written by their paths."""
        if not self._is_named():
            raise FlashNormError(f"{self.path}: was moved or replaced while a fold wrote into it")

    def has(self, finished: Collection[str], keep: str) -> bool:
        """Whether a later run could go on from what is here."""
        with contextlib.suppress(OSError):
            return exists(keep, self._folder) or any(exists(name, self._inside) for name in finished)
        return False

    def discard(self, name: str) -> None:
        """Remove something that was taken for finished."""
        disk.remove(name, self._inside)

    # ---- the end ----

    def publish(self, overwrite: bool, not_an_output: Callable[[int], str | None]) -> None:
        """Give the finished folder its name; what had that name is removed only then, with the work folder.

        `not_an_output` says of a folder's descriptor why it must not be replaced, or None. At any moment the name holds
        the older output or the new one. Raises FlashNormError if it holds something else by now.
        """
        self.check()
        name = self.target.name
        try:  # takes the place of nothing, or of an empty folder
            os.rename(INSIDE, name, src_dir_fd=self._folder, dst_dir_fd=self._parent)
            self.published = True
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not overwrite:
                raise FlashNormError(
                    f"{self.target}: exists already: it appeared while this fold was under way; move it away and run "
                    "the same command again"
                ) from None
            self._replace(not_an_output)
        try:
            disk.sync_folder(self._parent)
        except OSError as error:
            raise FlashNormError(
                f"{self.target}: is complete, but a power loss now could take its name away: {error.strerror}"
            ) from error

    def _replace(self, not_an_output: Callable[[int], str | None]) -> None:
        name = self.target.name
        try:
            old = disk.open_folder(name, self._parent)
        except OSError as error:
            raise FlashNormError(f"{self.target}: was replaced while this fold was under way, by no folder") from error
        try:
            why, status = not_an_output(old), os.fstat(old)
        finally:
            os.close(old)
        if why:
            raise FlashNormError(f"{self.target}: was replaced while this fold was under way: it {why}")
        os.ftruncate(self._journal, 0)  # the older output, once it is in here, is not to be taken for finished work
        try:
            changed = disk.exchange(INSIDE, self._folder, name, self._parent)
            if not changed:
                self._rename_twice()
            self.published = True
        except BaseException:  # Ctrl-C too: it may come between the exchange and the next line
            self.published = self._has_the_name()
            if not self.published:
                self._write_journal(self.fingerprint)
            raise
        where = INSIDE if changed else REPLACED
        if not os.path.samestat(os.stat(where, dir_fd=self._folder, follow_symlinks=False), status):
            disk.exchange(where, self._folder, name, self._parent)
            self.published = False
            raise FlashNormError(f"{self.target}: was replaced while this fold was under way; run it again")

    def _has_the_name(self) -> bool:
        """Whether what was filled in here has the output's name."""
        with contextlib.suppress(OSError):
            named = os.stat(self.target.name, dir_fd=self._parent, follow_symlinks=False)
            return os.path.samestat(named, os.fstat(self._inside))
        return False

    def _rename_twice(self) -> None:
        name = self.target.name
        os.rename(name, REPLACED, src_dir_fd=self._parent, dst_dir_fd=self._folder)
        try:
            os.rename(INSIDE, name, src_dir_fd=self._folder, dst_dir_fd=self._parent)
        except BaseException:
            if not exists(name, self._parent):
                os.rename(REPLACED, name, src_dir_fd=self._folder, dst_dir_fd=self._parent)
            raise

    def remove(self) -> str | None:
        """Remove the work folder, the journal last, so that nobody begins in it; returns what went wrong."""
        try:
            self._put_back_replaced()
            for name in disk.names_in(self._folder):
                if name not in (JOURNAL, MARK_FILE):
                    disk.remove(name, self._folder)
            os.ftruncate(self._journal, 0)  # from now on it looks like one that has just been made
            for name in (MARK_FILE, JOURNAL):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._folder)
            if self._is_named():
                os.rmdir(self.path.name, dir_fd=self._parent)
        except OSError as error:
            if error.errno == errno.ENOTEMPTY and not disk.names_in(self._folder):
                return None  # another process began in it as soon as it was free
            self._again = error.errno == errno.ENOTEMPTY
            return f"{self.path} could not be removed ({error.strerror}); remove it by hand"
        return None


def exists(name: str, folder: int) -> bool:
    try:
        os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def source_name(source: str) -> str:
    """How a work folder names its source: a folder by its absolute path."""
    path = Path(source).expanduser()
    return " ".join(str(path.resolve() if path.exists() else source).split())


def marked(folder: int) -> dict[str, str]:
    """What a work folder's README says: its lines `key: value`."""
    text = disk.read_small(MARK_FILE, folder).decode("utf-8", "surrogateescape")
    lines = (line.partition(": ") for line in text.splitlines()) if text.startswith(MARK) else ()
    return {key: value for key, _, value in lines if value}
