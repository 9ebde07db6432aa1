"""Fold from Hub to Hub with the disk of a few shards.

Each shard is a job of its own: downloaded, folded, uploaded, deleted. Two jobs overlap, so that one shard comes in
while the one before goes out. Uploads have no name on the Hub until the commit at the end, a single request: nobody
sees half a checkpoint. The sha256 and size of each upload go into a journal beside the work, and a run that died goes
on after them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.hub import listed_ids
from flashnorm_cli.checkpoint.hub_errors import hub_errors, with_retry
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, Progress, Source, read_json, refuse_folded
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.output import work_folder, write_text
from flashnorm_cli.checkpoint.tensors import read_tensors
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.folding.engine import Engine, Stopped, any_executor, dask_engine, overlapping, results
from flashnorm_cli.folding.fold import check_options, give_back_memory, plan_fingerprint, plan_fold, read_gains
from flashnorm_cli.folding.jobs import ShardEdits, shard_edits
from flashnorm_cli.hub.journal import SHA256, UPLOADED, Uploaded, read_journal, write_journal
from flashnorm_cli.hub.progress import quiet_hub
from flashnorm_cli.hub.push import NO_TOKEN, Push, PushResult, check_call, file_hashes
from flashnorm_cli.hub.shard_job import AT_ONCE, HubJob, RemoteTensor, do_hub_job
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.record import write as record

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


@dataclass(frozen=True)
class StreamResult:
    """What a fold from Hub to Hub did.

    `pushed` says what the repository holds now; `resumed` are shards that an earlier run had uploaded; `downloaded` and
    `uploaded` count the bytes of shards in this run; `seconds` are those of planning, of the shards, of the commit.
    """

    pushed: PushResult
    plan: Plan
    layout: str
    downloaded: int
    uploaded: int
    flushed: dict[str, int]
    resumed: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: tuple[float, float, float]


def fold_to_hub(
    model: str,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    final_norm: str = "auto",
    layout: str = "identity",
    workers: int | None = None,
    overwrite: bool = False,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    dask: str | None = None,
    executor: Executor | None = None,
    on_progress: Progress | None = None,
) -> StreamResult:
    """Fold a Hub repository into another one, with the disk of a few shards.

    Args:
        model: the Hub id of the source.
        repo_id: the Hub id of the result; made if it does not exist, `private` or not.
        revision, token, cache_dir: as in huggingface_hub; of the source, but the token has to be good for both.
        trust_remote_code, final_norm, layout: as in `fold`.
        workers: threads that fold a shard.
        overwrite: replace what the repository holds.
        commit_message, create_pr: as in huggingface_hub's `create_commit`.
        dask: address of a dask scheduler whose workers reach the Hub. They get the token.
        executor: any other concurrent.futures executor. Its workers get the token, too.
        on_progress: called with (bytes done, bytes in all, what is going on); bytes count coming in and going out.
    Raises:
        UsageError: the call contradicts itself.
        FlashNormError: as `fold`, or the Hub said no. After most of them the same call goes on where it was.
    """
    from huggingface_hub import HfApi, constants, get_token

    check_options(final_norm, layout, workers)
    check_call(model, repo_id, None, create_pr, workers)
    if dask is not None and executor is not None:
        raise UsageError("dask and executor exclude each other")
    if Path(model).expanduser().exists():
        raise UsageError(
            f"{model}: is no Hub id; a local checkpoint is published in steps: flashnorm fold, verify, push-to-hub"
        )
    report = on_progress or (lambda done, total, what: None)
    with contextlib.ExitStack() as stack:
        token = token or get_token()
        if not token:
            raise FlashNormError(NO_TOKEN)
        started = time.monotonic()
        if dask is not None:
            engine = stack.enter_context(dask_engine(dask, report))
        else:
            engine = any_executor(executor) if executor else overlapping(AT_ONCE)
        api = HfApi(token=token)
        report(0, 0, "Reading headers")
        source = Source(model, revision, token, Path(cache_dir) if cache_dir else None)
        checkpoint = open_checkpoint(source, weights=False)
        refuse_folded(checkpoint)
        ids = listed_ids(source, checkpoint.commit or "", list(checkpoint.shards))
        meant = {name: known[0] for name, known in ids.items() if SHA256.fullmatch(known[0])}
        checkpoint = dataclasses.replace(checkpoint, sha256=meant)
        plan = plan_fold(checkpoint, final_norm, trust_remote_code, report)
        give_back_memory()
        stack.enter_context(quiet_hub())  # after the plan: transformers switches the bars on again
        report(0, 0, "Reading norms")
        raw = read_tensors(checkpoint, [norm.tensor for norm in plan.folded])
        gains = read_gains(checkpoint, plan, raw)
        edits = shard_edits(checkpoint, plan, gains, layout)
        planned_at = time.monotonic()

        # A work folder beside nothing: what would be the output's name tells whose it is.
        place = Path.cwd() / repo_id.replace("/", "--")
        fingerprint = f"{plan_fingerprint(checkpoint, plan, gains, layout)} {constants.ENDPOINT} {repo_id} {create_pr}"
        fingerprint = hashlib.sha256(fingerprint.encode()).hexdigest()
        inside = stack.enter_context(work_folder(place, fingerprint, (), keep=UPLOADED))
        stack.enter_context(hub_errors(repo_id, writing=True))
        journal = inside.parent / UPLOADED
        uploads = read_journal(journal)

        report(0, 0, "Asking the Hub")
        push = _push_of(api, checkpoint, plan, edits, inside, repo_id, report)
        push.private, push.create_pr, push.overwrite = private, create_pr, overwrite
        push.message = commit_message or push.message
        _write_small_files(checkpoint, plan, layout, {}, push)
        push.prepare(None, _file_hashes(push, uploads), online=True)
        if not push.remote.exists:
            push.validate_card()
            push.create()
        uploads = _still_there(api, push.repo_id, uploads)
        resumed = tuple(edit.name for edit in edits if edit.name in uploads)

        read_before = {tensor: hashlib.sha256(data).hexdigest() for tensor, data in raw.items()}
        spans = _spans(checkpoint, {*raw, *(origin.tensor for edit in edits for origin in edit.origins.values())})
        jobs = {
            edit.name: HubJob(
                edits=edit,
                source=model,
                commit=checkpoint.commit or "",
                sizes=(checkpoint.shards[edit.name].file_size, push.checkpoint.shards[edit.name].file_size),
                ids=ids.get(edit.name, ()),
                spans=spans[edit.name],
                read_before={tensor: sha256 for tensor, sha256 in read_before.items() if tensor in spans[edit.name]},
                origins=_origins(checkpoint, edit),
                target=push.repo_id,
                create_pr=create_pr,
                endpoint=constants.ENDPOINT,
                token=token,
                cache_dir=source.cache_dir,
                scratch=inside.parent if engine.in_process else None,
                threads=workers or engine.threads,
            )
            for edit in edits
        }
        downloaded, uploaded = _transfer(engine, jobs, uploads, journal, report)
        transferred_at = time.monotonic()
        _check_copies(model, uploads, journal)
        # From here on the hashes of the bytes that were folded, not those that were listed.
        checkpoint = dataclasses.replace(checkpoint, sha256={name: uploads[name].source_sha256 for name in jobs})

        flushed = {tensor: n for name in jobs for tensor, n in uploads[name].flushed.items()}
        push.stored = {name: _uploaded_operation(name, upload) for name, upload in uploads.items()}
        _write_small_files(checkpoint, plan, layout, flushed, push)
        push.uploads = []
        push.contents(_file_hashes(push, uploads))
        try:
            result = push.run()
        except FlashNormError as error:
            if "LFS pointer" not in str(error):
                raise
            journal.unlink(missing_ok=True)
            raise FlashNormError(
                f"{repo_id}: the Hub has removed uploads of an earlier run; run the same command again to start over"
            ) from None
        seconds = (planned_at - started, transferred_at - planned_at, time.monotonic() - transferred_at)
    return StreamResult(
        pushed=result,
        plan=plan,
        layout=layout,
        downloaded=downloaded,
        uploaded=uploaded,
        flushed=flushed,
        resumed=resumed,
        left_out=checkpoint.left_out,
        seconds=seconds,
    )


def _push_of(
    api: HfApi,
    checkpoint: Checkpoint,
    plan: Plan,
    edits: list[ShardEdits],
    inside: Path,
    repo_id: str,
    report: Progress,
) -> Push:
    """What `push_to_hub` would do with the folder that is never there as a whole."""
    folded = Checkpoint(
        source=Source(repo_id),
        folder=inside,
        commit=None,
        config={},
        shards={edit.name: edit.target_header(checkpoint.shards[edit.name]) for edit in edits},
        index=checkpoint.index,
        others=checkpoint.others,
        left_out=checkpoint.left_out,
    )
    push = Push(api, folded, {}, checkpoint.source.name, repo_id, report, notes=[])
    push.doubt = f"it was folded from Hub to Hub; to verify it: `flashnorm verify {repo_id}`"
    return push


def _write_small_files(checkpoint: Checkpoint, plan: Plan, layout: str, flushed: dict[str, int], push: Push) -> None:
    """All files but the shards, into the work folder."""
    folder = push.checkpoint.folder
    for relative in checkpoint.others:
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / relative, folder / relative)
    for name, text in record.texts(checkpoint, plan, layout, flushed).items():
        write_text(folder / name, text)
    push.record = read_json(folder / RECORD)
    push.checkpoint = dataclasses.replace(push.checkpoint, config=read_json(folder / CONFIG))


def _file_hashes(push: Push, uploads: Mapping[str, Uploaded]) -> dict[str, tuple[str, str]]:
    """sha256 and git id of every file; empty for shards that are still to come."""
    shards = {name: (uploads[name].sha256 if name in uploads else "", "") for name in push.checkpoint.shards}
    return {**file_hashes(dataclasses.replace(push.checkpoint, shards={}), 1, lambda *_: None), **shards}


def _spans(checkpoint: Checkpoint, tensors: Collection[str]) -> dict[str, dict[str, tuple[int, int]]]:
    """Where tensors are in their shards, in bytes [start, end) of the file, by shard."""
    found: dict[str, dict[str, tuple[int, int]]] = {name: {} for name in checkpoint.shards}
    for tensor in sorted(tensors):
        shard, entry = checkpoint.shard_of[tensor], checkpoint.tensors[tensor]
        start = checkpoint.shards[shard].data_start
        found[shard][tensor] = (start + entry.start, start + entry.end)
    return found


def _check_copies(model: str, uploads: dict[str, Uploaded], journal: Path) -> None:
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


def _transfer(
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

    def arguments(job: HubJob) -> tuple[Callable[[int], None], ...]:
        def on_bytes(n: int) -> None:
            nonlocal done
            if stop.is_set():
                raise Stopped
            if n:
                with lock:
                    done += n
                    report(done, total, job.edits.name)

        return (on_bytes,) if engine.in_process else ()

    report(done, total, "Waiting for shards")
    waiting = [job for name, job in jobs.items() if name not in uploads]
    try:
        for job, result in results(engine, do_hub_job, waiting, arguments, stop.set):
            uploads[job.edits.name] = result
            write_journal(journal, uploads)
            downloaded, uploaded = downloaded + result.downloaded, uploaded + result.size
            if not engine.in_process:
                done += sum(job.sizes)
                report(done, total, job.edits.name)
    finally:
        stop.set()
    return downloaded, uploaded


def _still_there(api: HfApi, repo_id: str, uploads: dict[str, Uploaded]) -> dict[str, Uploaded]:
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


def _uploaded_operation(name: str, upload: Uploaded) -> CommitOperationAdd:
    """An addition as `preupload_lfs_files` leaves it: the commit needs nothing but hash and size."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(upload.size, b"", bytes.fromhex(upload.sha256))
    addition._upload_mode, addition._is_uploaded = "lfs", True
    return addition
