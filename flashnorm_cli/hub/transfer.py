"""Have every folded shard on the Hub: the jobs, what they need, and what is known of their uploads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.hub_errors import with_retry
from flashnorm_cli.checkpoint.model import Checkpoint, Progress
from flashnorm_cli.checkpoint.progress import shard_of
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.engine import Engine, Stopped, results
from flashnorm_cli.folding.jobs import ShardEdits
from flashnorm_cli.hub.journal import Uploaded, write_journal
from flashnorm_cli.hub.planned import Planned
from flashnorm_cli.hub.shard_job import HubJob, RemoteTensor, do_hub_job

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

    from flashnorm_cli.proof.shards import ShardPlan


def hub_jobs(
    planned: Planned,
    target: str,
    create_pr: bool,
    engine: Engine,
    scratch: Path,
    workers: int | None,
    verify: bool,
) -> dict[str, HubJob]:
    """A job for each shard, to be uploaded to the repository `target`; `verify`: and compared before."""
    from huggingface_hub import constants

    checkpoint, source = planned.checkpoint, planned.checkpoint.source
    read_before = {tensor: hashlib.sha256(data).hexdigest() for tensor, data in planned.raw.items()}
    copied = {origin.tensor for edit in planned.edits for origin in edit.origins.values()}
    spans = _spans(checkpoint, {*planned.raw, *copied})
    return {
        edit.name: HubJob(
            edits=edit,
            source=source.name,
            commit=checkpoint.commit or "",
            sizes=(checkpoint.shards[edit.name].file_size, planned.folded_shards[edit.name].file_size),
            ids=planned.ids.get(edit.name, ()),
            spans=spans[edit.name],
            read_before={tensor: sha256 for tensor, sha256 in read_before.items() if tensor in spans[edit.name]},
            origins=_origins(checkpoint, edit),
            proof=_shard_plan(planned, edit) if verify else None,
            target=target,
            create_pr=create_pr,
            endpoint=constants.ENDPOINT,
            token=str(source.token),
            cache_dir=source.cache_dir,
            scratch=scratch if engine.in_process else None,
            threads=workers or engine.threads,
        )
        for edit in planned.edits
    }


def _shard_plan(planned: Planned, edit: ShardEdits) -> ShardPlan:
    from flashnorm_cli.proof.shards import shard_plan

    checkpoint = planned.checkpoint
    gains = {name: (bytes(data), checkpoint.tensors[name].dtype) for name, data in planned.raw.items()}
    last = edit.name == list(checkpoint.shards)[-1]
    return shard_plan(planned.plan, checkpoint.shards[edit.name].tensors, last, gains, planned.layout == "dropped")


def _spans(checkpoint: Checkpoint, tensors: Collection[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Where tensors are in their shards, in bytes [start, end) of the file, by shard."""
    found: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in checkpoint.shards}
    for tensor in sorted(tensors):
        shard, entry = checkpoint.shard_of[tensor], checkpoint.tensors[tensor]
        start = checkpoint.shards[shard].data_start
        found[shard][tensor] = (start + entry.start, start + entry.end)
    return found


def check_copies(model: str, uploads: dict[str, Uploaded], journal: Path) -> None:
    """Raise FlashNormError where a tensor came otherwise by ranges than in its own shard; both are done again then."""
    seen = {tensor: sha256 for upload in uploads.values() for tensor, sha256 in upload.seen.items()}
    for name, upload in list(uploads.items()):
        wrong = [tensor for tensor, sha256 in upload.copied.items() if seen.get(tensor) != sha256]
        if wrong:
            del uploads[name]
            write_journal(journal, uploads)
            raise FlashNormError(
                f"{model}: {wrong[0]} came with other bytes by ranges than in its shard: bytes changed on the way; "
                "nothing was published, run the same command again"
            )


def _origins(checkpoint: Checkpoint, edits: ShardEdits) -> dict[str, RemoteTensor]:
    found = {}
    for tensor, origin in edits.origins.items():
        entry, start = checkpoint.tensors[origin.tensor], checkpoint.shards[origin.shard].data_start
        found[tensor] = RemoteTensor(
            origin.tensor,
            origin.shard,
            checkpoint.shards[origin.shard].file_size,
            start + entry.start,
            start + entry.end,
            entry.dtype,
            entry.shape,
        )
    return found


def transfer(
    engine: Engine,
    jobs: Mapping[str, HubJob],
    uploads: dict[str, Uploaded],
    journal: Path,
    report: Progress,
) -> tuple[int, int]:
    """Have every shard on the Hub, and in `uploads` and the journal; returns bytes that came in and went out."""
    total = sum(sum(job.sizes) for job in jobs.values())
    done = sum(sum(job.sizes) for name, job in jobs.items() if name in uploads)
    downloaded = uploaded = 0
    stop, lock = threading.Event(), threading.Lock()

    names = list(jobs)

    def arguments(job: HubJob) -> tuple[Callable[[int], None], ...]:
        what = shard_of(names.index(job.edits.name), len(names), "Folding")

        def on_bytes(n: int) -> None:
            nonlocal done
            if stop.is_set():
                raise Stopped
            if n:
                with lock:
                    done += n
                    report(done, total, what)

        return (on_bytes,) if engine.in_process else ()

    report(done, total, "Folding shards")
    waiting = [job for name, job in jobs.items() if name not in uploads]
    try:
        for job, result in results(engine, do_hub_job, waiting, arguments, stop.set):
            uploads[job.edits.name] = result
            write_journal(journal, uploads)
            downloaded, uploaded = downloaded + result.downloaded, uploaded + result.size
            if not engine.in_process:
                done += sum(job.sizes)
                report(done, total, f"Folding shards, {len(uploads)} of {len(jobs)} done")
    finally:
        stop.set()
    return downloaded, uploaded


def still_there(api: HfApi, repo_id: str, uploads: dict[str, Uploaded]) -> dict[str, Uploaded]:
    """Those uploads of an earlier run that a commit can still name.

    The Hub can be asked for LFS objects. What went by Xet it does not tell, so that counts for as long as
    huggingface_hub would count it; a commit that is refused for it after all empties the journal.
    """
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    from huggingface_hub.utils._runtime import is_xet_available

    if not uploads or is_xet_available():
        return uploads
    infos = [UploadInfo(u.size, b"", bytes.fromhex(u.sha256)) for u in uploads.values()]
    headers = build_hf_headers(token=api.token)
    actions, _, _ = with_retry(
        lambda: post_lfs_batch_info(infos, None, "model", repo_id, endpoint=api.endpoint, headers=headers)
    )
    there = {action["oid"] for action in actions if not action.get("actions")}
    return {name: upload for name, upload in uploads.items() if upload.sha256 in there}


def uploaded_operation(name: str, upload: Uploaded) -> CommitOperationAdd:
    """An addition as `preupload_lfs_files` leaves it: the commit needs nothing but hash and size."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(upload.size, b"", bytes.fromhex(upload.sha256))
    addition._upload_mode, addition._is_uploaded = "lfs", True
    return addition
