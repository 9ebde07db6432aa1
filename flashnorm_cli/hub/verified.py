"""Verify a fold where it is published, and put the result on its page."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from flashnorm_cli.checkpoint.model import RECORD, Progress, Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.progress import with_notebook_bar
from flashnorm_cli.errors import UsageError
from flashnorm_cli.hub.contents import README
from flashnorm_cli.hub.publish import PushResult
from flashnorm_cli.hub.push import push_to_hub
from flashnorm_cli.proof.result import Verification

MESSAGE = "Update the verification"


@with_notebook_bar
def verify_on_hub(
    target: Source,
    check: Callable[[Path], Verification],
    *,
    create_pr: bool = False,
    commit_message: str | None = None,
    on_progress: Progress | None = None,
) -> tuple[Verification, PushResult | None]:
    """Verify a repository's fold, and commit card, record and report anew; no weight is sent.

    Args:
        target: the repository. Its files come to the Hub cache.
        check: verifies the folder that it is given, and records the result there, as `verify` does.
        create_pr: open a pull request instead of committing to main.
        commit_message: the first line of the commit.
        on_progress: called with (bytes done, bytes in all, what is going on).
    Returns:
        What was found, and what was published: None where the fold is not equivalent, or nothing could be recorded.
    Raises:
        UsageError: the target is a folder, or not its repository's newest state.
        FlashNormError: as `verify` and `push_to_hub`.
    """
    if Path(target.name).expanduser().exists():
        raise UsageError(
            f"{target.name}: is a folder; `publish=True` is for a fold on the Hub, and `push_to_hub` for folders"
        )
    if target.revision not in (None, "main"):
        raise UsageError("`publish=True` updates the main branch, so it excludes `revision`")
    with _copy(target, on_progress) as folder:
        found = check(folder)
        ran = {level.status for level in found.levels}
        pushed = None
        if found.recorded and "failed" not in ran and "passed" in ran:
            pushed = push_to_hub(
                folder,
                target.name,
                create_pr=create_pr,
                commit_message=commit_message or MESSAGE,
                token=target.token if isinstance(target.token, str) else None,
                unverified=True,  # the verdict is on the page, whichever of the two it is
                on_progress=on_progress,
            )
    return dataclasses.replace(found, folded=target.name, recorded=pushed.url if pushed else None), pushed


@contextlib.contextmanager
def _copy(target: Source, report: Progress | None) -> Iterator[Path]:
    """The repository as a folder that may be written to: large files by hard links, so that none is there twice."""
    checkpoint = open_checkpoint(target, on_progress=report)
    if not (checkpoint.folder / RECORD).exists():
        raise UsageError(f"{target.name}: has no {RECORD}, so there is no record to update; is it a fold of flashnorm?")
    beside = checkpoint.folder.parents[1]  # the same file system as the cache's blobs
    with tempfile.TemporaryDirectory(prefix="flashnorm-", dir=beside) as name:
        folder = Path(name) / checkpoint.name
        for path in checkpoint.folder.rglob("*"):
            if path.is_file():
                copy = folder / path.relative_to(checkpoint.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                _link(path.resolve(), copy, may_change=path.name in (RECORD, README))
        yield folder


def _link(path: Path, copy: Path, may_change: bool) -> None:
    if not may_change:
        with contextlib.suppress(OSError):  # not on every file system
            os.link(path, copy)
            return
    shutil.copyfile(path, copy)
