"""Fold from Hub to Hub with the disk of a few shards.

Each shard is a job of its own: downloaded, folded, uploaded, deleted. Two jobs overlap, so that one shard comes in
while the one before goes out. Uploads have no name on the Hub until the commit at the end, a single request: nobody
sees half a checkpoint. The sha256 and size of each upload go into a journal beside the work, and a run that died goes
on after them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.carry import carry_over
from flashnorm_cli.checkpoint.disk import write_text
from flashnorm_cli.checkpoint.hub_errors import hub_errors
from flashnorm_cli.checkpoint.hub_ids import hub_id, repository_id
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, LeftOut, Progress, Source, read_json
from flashnorm_cli.checkpoint.output import work_folder
from flashnorm_cli.checkpoint.progress import with_notebook_bar
from flashnorm_cli.choices import FinalNorm, Layout
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.folding.engine import any_executor, dask_engine, overlapping
from flashnorm_cli.folding.fold import check_options
from flashnorm_cli.folding.planning import Planning, check_streamed
from flashnorm_cli.hub.base import base_info
from flashnorm_cli.hub.contents import Contents, Fold, file_hashes, make_contents
from flashnorm_cli.hub.journal import UPLOADED, Uploaded, read_journal
from flashnorm_cli.hub.planned import Planned, plan_from_hub
from flashnorm_cli.hub.progress import quiet_hub
from flashnorm_cli.hub.publish import (
    MESSAGE,
    Options,
    PushResult,
    check_card,
    create,
    deletions,
    publish,
    push_result,
)
from flashnorm_cli.hub.published import Base
from flashnorm_cli.hub.push import NO_TOKEN, check_call, check_private, full_name
from flashnorm_cli.hub.repository import Repository, State
from flashnorm_cli.hub.shard_job import AT_ONCE
from flashnorm_cli.hub.standing import NOT_VERIFIED, Standing, standing_of
from flashnorm_cli.hub.transfer import check_copies, hub_jobs, still_there, transfer, uploaded_operation
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.record import write as record

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo


@dataclass(frozen=True, repr=False)
class StreamResult(Shown):
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
    left_out: tuple[LeftOut, ...]
    seconds: tuple[float, float, float]
    notes: tuple[str, ...] = ()
    caution: str | None = None

    def _facts(self) -> dict[str, Any]:
        moved = {"downloaded": self.downloaded, "uploaded": self.uploaded}
        return {"repo_id": self.pushed.repo_id, "url": self.pushed.url, "verdict": self.pushed.verdict, **moved}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the plan's summary instead of the plan."""
        summary = self.plan.summary()
        return {
            **summary,
            "published": self.pushed.published(),
            "verdict": self.pushed.verdict,
            "layout": self.layout,
            "bytes_downloaded": self.downloaded,
            "bytes_uploaded": self.uploaded,
            "flushed_to_zero": self.flushed,
            "resumed_shards": list(self.resumed),
            "left_out": [dataclasses.asdict(each) for each in self.left_out],
            "phases": dict(zip(("plan", "shards", "commit"), (round(s, 3) for s in self.seconds), strict=True)),
            "notes": [*summary["notes"], *self.notes, *self.pushed.notes],
        }


@with_notebook_bar
def fold_to_hub(
    model: str,
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    trust_remote_code: bool = False,
    final_norm: FinalNorm = "auto",
    layout: Layout = "identity",
    target: str | None = None,
    leave_grid: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    private: bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    verify: bool = False,
    dask: str | None = None,
    executor: Executor | None = None,
    on_progress: Progress | None = None,
) -> StreamResult:
    """Fold a Hub repository into another one, with the disk of a few shards.

    Args:
        model: the Hub id of the source.
        repo_id: the Hub id of the result; made if it does not exist, `private` or not.
        revision, token, cache_dir: as in huggingface_hub; of the source, but the token has to be good for both.
        trust_remote_code, final_norm, layout, leave_grid: as in `fold`.
        target: as in `fold`; one that is best rotated is refused.
        workers: threads that fold a shard.
        overwrite: replace what the repository holds.
        commit_message, create_pr: as in huggingface_hub's `create_commit`.
        verify: compare every folded shard with its source, bit for bit, before it goes out. Neither model is run, which
            `verify_on_hub` does; card and record say so.
        dask: address of a dask scheduler whose workers reach the Hub. They get the token.
        executor: any other concurrent.futures executor. Its workers get the token, too.
        on_progress: called with (bytes done, bytes in all, what is going on); bytes count coming in and going out.
    Returns:
        What the repository holds now, the plan, and how many bytes came in and went out.
    Raises:
        UsageError: the call contradicts itself.
        FlashNormError: as `fold`, or the Hub said no. After most of them the same call goes on where it was.
    """
    from huggingface_hub import HfApi, get_token

    check_options(final_norm, layout, workers)
    check_streamed(target)
    (model, revision), repo_id = hub_id(model, revision), repository_id(repo_id)
    check_call(model, repo_id, None, create_pr, workers)
    if dask is not None and executor is not None:
        raise UsageError("`dask` and `executor` exclude each other")
    if Path(model).expanduser().exists():
        raise UsageError(
            f"{model}: is no Hub id; a local checkpoint is published in steps: `fold`, `verify`, `push_to_hub`"
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
        source = Source(model, revision, token, Path(cache_dir) if cache_dir else None)
        planning = Planning(final_norm, trust_remote_code, target=target, leave_grid=leave_grid)
        planned = plan_from_hub(source, planning, layout, report)
        stack.enter_context(quiet_hub())  # after the plan: transformers switches the bars on again
        planned_at = time.monotonic()

        # A work folder beside nothing: what would be the output's name tells whose it is.
        place = Path.cwd() / repo_id.replace("/", "--")
        fingerprint = planned.fingerprint(repo_id, create_pr)
        work = stack.enter_context(work_folder(place, fingerprint, (), keep=UPLOADED, source=model))
        stack.enter_context(hub_errors(repo_id, writing=True))
        inside, journal = work.inside, work.path / UPLOADED
        report(0, 0, "Asking the Hub")
        api = HfApi(token=token)
        options = Options(private, create_pr, commit_message or MESSAGE, overwrite)
        before = {n: u for n, u in read_journal(journal).items() if u.compared or not verify}
        goal = _target(api, repo_id, planned, inside, before, options, verify)
        uploads = still_there(api, goal.repository.repo_id, before)
        resumed = tuple(edit.name for edit in planned.edits if edit.name in uploads)
        jobs = hub_jobs(planned, goal.repository.repo_id, create_pr, engine, inside.parent, workers, verify)
        downloaded, uploaded = transfer(engine, jobs, uploads, journal, report)
        transferred_at = time.monotonic()
        check_copies(model, uploads, journal)
        pushed = _publish(planned.as_read(uploads), goal, inside, uploads, journal, verify, report)
        seconds = (planned_at - started, transferred_at - planned_at, time.monotonic() - transferred_at)
    return StreamResult(
        pushed=pushed,
        plan=planned.plan,
        layout=layout,
        downloaded=downloaded,
        uploaded=uploaded,
        flushed=_flushed(uploads),
        resumed=resumed,
        left_out=planned.checkpoint.left_out,
        seconds=seconds,
        notes=(*planned.notes, *work.notes),
        caution=planned.caution,
    )


@dataclass(frozen=True)
class _Target:
    """The repository that will hold the fold, as it was found or has just been made; `held` is its flashnorm.json."""

    repository: Repository
    state: State
    held: Any
    base: Base
    info: ModelInfo | None
    options: Options
    notes: tuple[str, ...] = ()
    created: bool = False


def _target(
    api: HfApi,
    repo_id: str,
    planned: Planned,
    inside: Path,
    uploads: Mapping[str, Uploaded],
    options: Options,
    verify: bool,
) -> _Target:
    """Everything that can be refused is refused here, before gigabytes move; then the repository is there."""
    repository = Repository(api, full_name(api, repo_id))
    state = repository.state()
    base = Base(planned.checkpoint.source.name, planned.checkpoint.commit or "")
    info = base_info(api, base)
    check_private(info, options)
    target = _Target(repository, state, repository.read_json(RECORD, state), base, info, options)
    contents = _contents(planned, target, inside, uploads, verify=False)  # what is not known yet refuses nothing
    if state.exists:
        deletions(repository, state, target.held, contents, options.overwrite, will_be_proven=verify)
        return target
    check_card(repository, contents.card, planned.checkpoint.source.name)
    made = create(repository, options.private, contents.gate)
    return dataclasses.replace(target, repository=made.repository, state=made.state, notes=made.notes, created=True)


def _contents(
    planned: Planned, target: _Target, inside: Path, uploads: Mapping[str, Uploaded], verify: bool
) -> Contents:
    """What `push_to_hub` would publish of the folder that is never there as a whole; `verify`: with its comparison."""
    checkpoint, repo_id = planned.checkpoint, target.repository.repo_id
    carry_over(checkpoint, inside)
    for name, text in record.texts(checkpoint, planned.plan, planned.layout, _flushed(uploads)).items():
        write_text(inside / name, text)
    folded = Checkpoint(
        source=Source(repo_id),
        folder=inside,
        commit=None,
        config=read_json(inside / CONFIG),
        shards=planned.folded_shards,
        index=checkpoint.index,
        others=checkpoint.others,
        left_out=checkpoint.left_out,
        index_name=checkpoint.index_name,
    )
    small = file_hashes(dataclasses.replace(folded, shards={}), 1, lambda *_: None)
    hashes = {**small, **{name: (uploads[name].sha256 if name in uploads else "", "") for name in folded.shards}}
    content = read_json(inside / RECORD)
    standing = Standing(NOT_VERIFIED, f"it was folded from Hub to Hub; to verify it: `flashnorm verify {repo_id}`")
    if verify:
        from flashnorm_cli.hub.shard_proof import shard_entry

        command = ("flashnorm", "verify", repo_id)
        content = {
            **content,
            "verify": shard_entry(content, target.held, planned.plan, folded, hashes, uploads, command),
        }
        standing = standing_of(content, hashes)
    fold = Fold(folded, content, checkpoint.source.name, standing)
    return make_contents(fold, repo_id, target.base, target.info, hashes)


def _publish(
    planned: Planned,
    target: _Target,
    inside: Path,
    uploads: Mapping[str, Uploaded],
    journal: Path,
    verify: bool,
    report: Progress,
) -> PushResult:
    """The commit, when every shard is on the Hub."""
    contents = _contents(planned, target, inside, uploads, verify)
    repository, state, options = target.repository, target.state, target.options
    deleted = deletions(repository, state, target.held, contents, options.overwrite) if state.exists else ()
    stored = {name: uploaded_operation(name, upload) for name, upload in uploads.items()}
    try:
        done = publish(repository, state, contents, deleted, options, report, stored, planned.checkpoint.source.name)
    except Exception as error:  # only to look for the one answer that has a way out; all others go on as they are
        if "LFS pointer" not in str(error):
            raise
        journal.unlink(missing_ok=True)
        raise FlashNormError(
            f"{repository.repo_id}: the Hub has removed uploads of an earlier run; run the same command again to start "
            "over"
        ) from None
    done = dataclasses.replace(done, created=done.created or target.created)
    notes = (
        () if target.info else (f"the source {target.base.repo_id} is not on the Hub any more, or not for this token",)
    )
    return push_result(contents, done, options.private, (*notes, *target.notes))


def _flushed(uploads: Mapping[str, Uploaded]) -> dict[str, int]:
    return {tensor: n for upload in uploads.values() for tensor, n in upload.flushed.items()}
