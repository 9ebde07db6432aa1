"""What folds that were killed have left behind, in sentences for whoever meets it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from flashnorm_cli.checkpoint import disk
from flashnorm_cli.checkpoint.work import (
    JOURNAL,
    MARK_FILE,
    REPLACED,
    exists,
    marked,
    partial_folder,
    source_name,
    unlike_work_folder,
)
from flashnorm_cli.errors import FlashNormError


def leftover(target: Path) -> str | None:
    """A sentence about the work folder that an unfinished fold into `target` has left; None where there is none."""
    path = partial_folder(target)
    try:
        if unlike_work_folder(path):
            return None
        folder = disk.open_folder(path)
    except OSError:
        return None
    try:
        if not {MARK_FILE, JOURNAL} <= set(disk.names_in(folder)):
            return None
        size, source = disk.size_of(folder), marked(folder).get("source", "")
        if exists(REPLACED, folder) and not target.exists():
            return (
                f"{path / REPLACED} is the older {target.name}: a fold that was to replace it was killed; move it back"
            )
        journal = os.open(JOURNAL, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        try:
            fcntl.flock(journal, fcntl.LOCK_SH | fcntl.LOCK_NB)
            goes_on = os.fstat(journal).st_size > 0
        except BlockingIOError:
            return f"{path} ({size:,} bytes) is the work folder of a fold that runs right now"
        finally:
            os.close(journal)
    except OSError:
        return None
    finally:
        os.close(folder)
    of = f" of {source}" if source else ""
    on = "the same flashnorm fold, run again, goes on with it; or remove it" if goes_on else "remove it"
    return f"{path} ({size:,} bytes) is what an unfinished fold{of} has left: {on}: rm -r {path}"


def refuse_unfinished(target: Path) -> None:
    """Raise FlashNormError where a fold into `target` was begun, but not finished."""
    if not target.exists() and (line := leftover(target.absolute())):
        raise FlashNormError(f"{target}: its fold is not finished: {line}")


def leftovers(target: Path | None, source: str) -> list[str]:
    """Sentences about what unfinished folds have left: of one into `target`, and of those of `source`.

    The latter are looked for where a fold puts them: beside the source, and in the current folder.
    """
    places = {Path.cwd()} | ({Path(source).expanduser().absolute().parent} if Path(source).exists() else set())
    targets = [target.absolute()] if target is not None else []
    for place in sorted(places):
        with contextlib.suppress(OSError):
            for path in sorted(place.glob(".*.partial")):
                wanted = path.with_name(path.name[1:].removesuffix(".partial"))
                with contextlib.suppress(OSError):
                    folder = disk.open_folder(path)
                    try:
                        if marked(folder).get("source") == source_name(source):
                            targets.append(wanted)
                    finally:
                        os.close(folder)
    return [line for path in dict.fromkeys(targets) if (line := leftover(path))]
