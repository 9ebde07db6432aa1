"""Have the shards of a fold written into its work folder, then index, record and config."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from flashnorm_cli.checkpoint import disk
from flashnorm_cli.checkpoint.carry import carry_over
from flashnorm_cli.checkpoint.model import Checkpoint, Progress
from flashnorm_cli.checkpoint.output import FLUSHED
from flashnorm_cli.checkpoint.progress import shard_of
from flashnorm_cli.checkpoint.work import WorkFolder
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.engine import Engine, results
from flashnorm_cli.folding.finished import is_shard
from flashnorm_cli.folding.jobs import FolderJob, ShardEdits, do_folder_job
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.record import write as record

SEEN_AFTER = 30.0  # seconds that a finished shard may take to be seen by this machine


class Writing:
    """The shards, then everything else, into the work folder.

    Afterwards `total` are the bytes of the shards, `flushed` counts products that became zero, by tensor, and `resumed`
    are the shards that an earlier run had finished.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        layout: str,
        edits: list[ShardEdits],
        files: Mapping[str, tuple[int, ...]],
        work: WorkFolder,
        report: Progress,
    ) -> None:
        self.checkpoint, self.plan, self.layout, self.edits = checkpoint, plan, layout, edits
        self.files, self.work, self.report = files, work, report
        self.headers = {edit.name: edit.target_header(checkpoint.shards[edit.name]) for edit in edits}
        self.total, self.done = sum(header.file_size for header in self.headers.values()), 0
        self.flushed: dict[str, int] = {}
        self.resumed: tuple[str, ...] = ()

    def run(self, engine: Engine, workers: int | None) -> None:
        finished = self._finished()
        self.resumed = tuple(edit.name for edit in self.edits if edit.name in finished)
        self.done = sum(self.headers[name].file_size for name in self.resumed)
        free = shutil.disk_usage(self.work.path).free
        if self.total - self.done > free:
            raise FlashNormError(
                f"{self.work.path.parent}: {self.total - self.done:,} bytes are to be written, but only {free:,} are "
                "free there"
            )
        self.report(self.done, self.total, "Folding shards")
        jobs = [self._job(edit, engine, workers) for edit in self.edits if edit.name not in finished]
        for job, written in results(engine, do_folder_job, jobs, self._arguments(engine)):
            name = job.edits.name
            part = _arrived(self.work.path / written.part, written.size)
            self.work.check()
            finished[name] = written.flushed
            # Not synced: after a restart of the machine nothing counts as finished.
            disk.write_text(self.work.path / FLUSHED, json.dumps(finished), sync=False)
            part.rename(self.work.inside / name)  # from now on the shard counts as finished
            for left in self.work.path.glob(f"{name}.*.part"):  # of a worker that died
                left.unlink(missing_ok=True)
            if not engine.in_process:
                self.done += self.headers[name].file_size
                self.report(self.done, self.total, f"Folding shards, {len(finished)} of {len(self.edits)} done")
        self.flushed = {tensor: n for name in self.headers for tensor, n in finished[name].items()}
        self._small_files()

    def _finished(self) -> dict[str, dict[str, int]]:
        """Shards that an earlier run has finished, with what was flushed in them.

        A name is no proof: size and header are compared with what would be written, and what has no entry in the list
        of finished shards, or is no plain file, is done again.
        """
        listed = _read_finished(self.work.path / FLUSHED)
        finished = {}
        for name, header in self.headers.items():
            path = self.work.inside / name
            if not path.is_symlink() and path.exists():
                if name in listed and is_shard(path, header):
                    finished[name] = listed[name]
                else:
                    self.work.discard(name)
        return finished

    def _job(self, edit: ShardEdits, engine: Engine, workers: int | None) -> FolderJob:
        names = {edit.name, *(origin.shard for origin in edit.origins.values())}
        # Elsewhere a file has the same size and time, but inode and device may be other ones; and what another machine
        # has in its memory cannot be flushed from here.
        files = {name: self.files[name] if engine.in_process else self.files[name][:2] for name in names}
        folder, fingerprint = self.checkpoint.folder.absolute(), self.work.fingerprint
        threads, fsync = workers or engine.threads, not engine.in_process
        return FolderJob(edit, folder, files, self.work.path, fingerprint, threads, fsync)

    def _arguments(self, engine: Engine) -> Callable[[FolderJob], tuple[Callable[[int], None], ...]]:
        names = list(self.headers)

        def arguments(job: FolderJob) -> tuple[Callable[[int], None], ...]:
            what = shard_of(names.index(job.edits.name), len(names), "Folding")

            def on_bytes(n: int) -> None:
                self.done += n
                self.report(self.done, self.total, what)

            return (on_bytes,) if engine.in_process else ()

        return arguments

    def _small_files(self) -> None:
        self.report(self.total, self.total, "Writing config and record")
        self.work.check()
        carry_over(self.checkpoint, self.work.inside)
        for name, text in record.texts(self.checkpoint, self.plan, self.layout, self.flushed).items():
            disk.write_text(self.work.inside / name, text, sync=False)  # all is flushed at the end


def _read_finished(path: Path) -> dict[str, dict[str, int]]:
    """What a run before this one wrote about its finished shards; nothing where that cannot be read."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(value, dict):
        return {}
    return {
        name: flushed
        for name, flushed in value.items()
        if isinstance(flushed, dict) and all(type(n) is int and n >= 0 for n in flushed.values())
    }


def _arrived(part: Path, size: int) -> Path:
    """A file that a worker has written, once it can be seen here as a whole: network file systems take a moment."""
    deadline = time.monotonic() + SEEN_AFTER
    while True:
        with contextlib.suppress(OSError):
            list(part.parent.iterdir())  # asks the server anew, where a look at the name would not
            if part.stat().st_size == size:
                return part
        if time.monotonic() > deadline:
            raise FlashNormError(f"{part}: a worker says that it is written, but it cannot be seen here")
        time.sleep(0.2)
