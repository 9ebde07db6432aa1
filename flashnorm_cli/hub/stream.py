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
import json
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flashnorm_cli import __version__, record
from flashnorm_cli.checkpoint import (
    Checkpoint,
    Progress,
    Source,
    hub_reader,
    open_checkpoint,
    progress_bar,
)
from flashnorm_cli.engine import Engine, Stopped, any_executor, dask_engine, overlapping, results
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.folding import (
    check_options,
    give_back_memory,
    partial_folder,
    plan_fingerprint,
    plan_fold,
    read_gains,
    work_folder,
    write_text,
)
from flashnorm_cli.plan import Plan, refuse_folded
from flashnorm_cli.safetensors_file import build_header
from flashnorm_cli.shards import ShardEdits, check_version, fold_shard, shard_edits

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

T = TypeVar("T")

# In the work folder: what has been uploaded.
UPLOADED = "uploaded.json"
# The Hub removes uploads that no commit names, after a day or so; huggingface_hub trusts them for as long, too.
TRUSTED = 20 * 3600
# Per process: one shard may come in while another goes out, and only one is there twice, as source and as result.
AT_ONCE = 2
_slots, _folding = threading.BoundedSemaphore(AT_ONCE), threading.Lock()
# Seconds before a transfer is tried again, after huggingface_hub has given up on it.
WAITS = (2.0, 8.0)
PIECE = 16 << 20


@dataclass(frozen=True)
class StreamResult:
    """What a fold from Hub to Hub did.

    `resumed` are shards that an earlier run had uploaded; `downloaded` and `uploaded` count the bytes of shards in
    this run; `seconds` are those of planning, of the shards, and of the commit.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    plan: Plan
    layout: str
    downloaded: int
    uploaded: int
    flushed: dict[str, int]
    resumed: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: tuple[float, float, float]


# ---- one shard -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RemoteTensor:
    """The bytes [start, end) of a shard on the Hub, which are one tensor."""

    tensor: str
    shard: str
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HubJob:
    """A shard to be downloaded, folded and uploaded. The token is left out wherever a job is printed or logged.

    `sizes` are the bytes of its source and of its result; `scratch` is the folder for them (None: the worker's own).
    """

    edits: ShardEdits
    source: str
    commit: str
    sizes: tuple[int, int]
    origins: Mapping[str, RemoteTensor]
    target: str
    create_pr: bool
    endpoint: str
    token: str = field(repr=False)
    cache_dir: Path | None
    scratch: Path | None
    threads: int
    version: str = __version__


@dataclass(frozen=True)
class Uploaded:
    """A finished shard, as the commit will name it; `downloaded` counts bytes, `flushed` products by tensor."""

    sha256: str
    size: int
    downloaded: int
    flushed: dict[str, int]


def do_hub_job(job: HubJob, on_bytes: Callable[[int], None] = lambda n: None) -> Uploaded:
    """Download, fold and upload one shard.

    `on_bytes` is told how many bytes came in or went out since it was last called; what it raises ends the job.
    """
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    check_version(job.version)
    disable_progress_bars()
    with _slots, _local_trouble(job), tempfile.TemporaryDirectory(prefix="flashnorm-", dir=_scratch(job)) as name:
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free < sum(job.sizes):
            raise FlashNormError(
                f"{folder.parent}: a shard needs {sum(job.sizes):,} bytes there for a while, but only {free:,} are free"
            )
        source, cached = _download(job, folder, on_bytes)
        downloaded = 0 if cached else job.sizes[0]
        with _folding:
            origins = {}
            for tensor, remote in job.origins.items():
                origins[tensor] = source
                if remote.shard != job.edits.name:
                    origins[tensor] = _download_tensor(job, remote, folder / "origin.safetensors")
                    downloaded += remote.end - remote.start
            on_bytes(0)
            target = folder / "folded.safetensors"
            flushed = fold_shard(job.edits, source, target, origins, job.threads, lambda n: on_bytes(0), fsync=False)
            for path in {source, *origins.values()} if not cached else {*origins.values()} - {source}:
                path.unlink()
        on_bytes(0)
        upload = _upload(job, target)
        on_bytes(job.sizes[1])
        size = target.stat().st_size
    return Uploaded(upload, size, downloaded, {tensor: n for tensor, n in flushed.items() if n})


def _scratch(job: HubJob) -> Path:
    if job.scratch is not None:
        return job.scratch
    with contextlib.suppress(ImportError, ValueError):  # ValueError: this is no dask worker
        from distributed import get_worker

        return Path(get_worker().local_directory)  # dask clears it when the worker is gone
    return Path(tempfile.gettempdir())


def _download(job: HubJob, folder: Path, on_bytes: Callable[[int], None]) -> tuple[Path, bool]:
    """The source shard, and whether it was in the Hub cache, where it stays."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    name, came = job.edits.name, 0
    cached = try_to_load_from_cache(job.source, name, cache_dir=job.cache_dir, revision=job.commit)
    if isinstance(cached, str):
        on_bytes(job.sizes[0])
        return Path(cached), True

    def progress(done: int, total: int, what: str) -> None:
        nonlocal came
        step, came = done - came, done
        on_bytes(step)

    def download() -> str:
        return hf_hub_download(
            job.source,
            name,
            revision=job.commit,
            endpoint=job.endpoint,
            token=job.token,
            cache_dir=job.cache_dir,
            local_dir=folder,
            tqdm_class=progress_bar("", progress),
        )

    path = Path(_persistently(f"{job.source}/{name}: could not be downloaded", download))
    progress(job.sizes[0], job.sizes[0], "")  # what the bar did not tell
    return path, False


def _download_tensor(job: HubJob, remote: RemoteTensor, path: Path) -> Path:
    """A safetensors file that holds a single tensor of another shard."""
    read = hub_reader(job.source, job.commit, job.token, job.endpoint)
    what = f"{job.source}/{remote.shard}: could not be read"
    with path.open("wb") as file:
        file.write(build_header([(remote.tensor, remote.dtype, remote.shape)], None).raw)
        for start in range(remote.start, remote.end, PIECE):
            end = min(start + PIECE, remote.end)

            def piece(start: int = start, end: int = end) -> bytes:
                data = read(remote.shard, start, end)
                if len(data) != end - start:
                    raise ConnectionError(f"{len(data)} of {end - start} bytes arrived")
                return data

            file.write(_persistently(what, piece))
    return path


def _upload(job: HubJob, path: Path) -> str:
    """Store a file's content on the Hub, without a name as yet. Returns its sha256."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, name = HfApi(endpoint=job.endpoint, token=job.token), job.edits.name

    def upload() -> str:
        addition = CommitOperationAdd(name, path)
        api.preupload_lfs_files(job.target, [addition], create_pr=job.create_pr)
        if not addition._is_uploaded:
            raise FlashNormError(f"{job.target}: its .gitattributes or .gitignore does not let {name} be a large file")
        return addition.upload_info.sha256.hex()

    return _persistently(f"{job.target}: {name} could not be uploaded", upload)


# ---- trouble ---------------------------------------------------------------------------------------------------------


def _persistently(what: str, transfer: Callable[[], T]) -> T:
    """Do it, and again if the trouble may pass. Raises FlashNormError that begins with `what`."""
    for wait in (*WAITS, None):
        try:
            return transfer()
        except (FlashNormError, Stopped):
            raise
        except Exception as error:
            reason, passing = _reason(error)
            if reason is None:
                raise
            if wait is None or not passing:
                raise FlashNormError(f"{what}: {reason}") from error
            time.sleep(wait)
    raise RuntimeError("unreachable")


def _reason(error: BaseException) -> tuple[str | None, bool]:
    """What happened between here and the Hub (None: it is none of that), and whether it may pass by itself."""
    from huggingface_hub.errors import HfHubHTTPError

    again = "; run the same command again to go on"
    links = list(_chain(error))
    for link in links:
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            passing = status in (408, 429) or status >= 500
            if status == 401:
                return "the Hub does not accept the token", False
            said = (link.server_message or link.response.reason_phrase).splitlines()[0]
            return f"the Hub answered {status}: {said}{again if passing else ''}", passing
    for link in links:
        if isinstance(link, OSError) and link.errno is not None and not isinstance(link, ConnectionError):
            return None, False  # of the disk
    for link in links:
        module = type(link).__module__.partition(".")[0]
        closed = isinstance(link, RuntimeError) and "client has been closed" in str(link)  # by another thread's error
        if isinstance(link, OSError) or module in ("httpx", "httpx2", "httpcore", "httpcore2", "hf_xet") or closed:
            words = (str(link).splitlines() or [""])[0] or type(link).__name__
            return f"{words}{again}", True
    return None, False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextlib.contextmanager
def _local_trouble(job: HubJob) -> Iterator[None]:
    """Errors of the disk, with the machine that it belongs to."""
    try:
        yield
    except OSError as error:
        where = f" on {socket.gethostname()}" if job.scratch is None else ""
        raise FlashNormError(f"{job.edits.name}: {error.strerror or error}{where}") from error


# ---- the whole -------------------------------------------------------------------------------------------------------


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
    if dask is not None and executor is not None:
        raise UsageError("dask and executor exclude each other")
    if Path(model).expanduser().exists():
        raise UsageError(f"{model}: only a Hub id can be folded from Hub to Hub; fold a folder, then push the result")
    report = on_progress or (lambda done, total, what: None)
    token = token or get_token()
    if not token:
        raise FlashNormError(f"{repo_id}: publishing needs a token: pass --token, or log in with: hf auth login")
    api = HfApi(token=token)
    # A work folder beside nothing: what would be the output's name tells whose it is.
    place = Path.cwd() / repo_id.replace("/", "--")
    source = Source(model, revision, token, Path(cache_dir) if cache_dir else None)
    with contextlib.ExitStack() as stack:
        started = time.monotonic()
        if dask is not None:
            engine = stack.enter_context(dask_engine(dask, report))
        else:
            engine = any_executor(executor) if executor else overlapping(AT_ONCE)
        report(0, 0, "Looking at the repository")
        target = look_at(api, repo_id)
        if target.files and not overwrite:
            _refuse_other_content(target, partial_folder(place) / UPLOADED)
        report(0, 0, "Reading headers")
        checkpoint = open_checkpoint(source, weights=False)
        refuse_folded(checkpoint)
        checkpoint = dataclasses.replace(checkpoint, sha256=_hashes(api, checkpoint))
        plan = plan_fold(checkpoint, final_norm, trust_remote_code, report)
        give_back_memory()
        report(0, 0, "Reading norms")
        gains = read_gains(checkpoint, plan)
        edits = shard_edits(checkpoint, plan, gains, layout)
        fingerprint = hashlib.sha256(
            f"{plan_fingerprint(checkpoint, plan, gains, layout)} {constants.ENDPOINT} {repo_id} {create_pr}".encode()
        ).hexdigest()
        planned_at = time.monotonic()
        inside = stack.enter_context(work_folder(place, fingerprint, (), keep=UPLOADED))
        if target.head is None:
            report(0, 0, "Creating the repository")
            _persistently(
                f"{repo_id}: could not be created",
                lambda: api.create_repo(repo_id, private=private, exist_ok=True),
            )
            target = look_at(api, repo_id)
        jobs = {
            edit.name: HubJob(
                edits=edit,
                source=model,
                commit=checkpoint.commit or "",
                sizes=_sizes(checkpoint, edit),
                origins=_origins(checkpoint, edit),
                target=repo_id,
                create_pr=create_pr,
                endpoint=constants.ENDPOINT,
                token=token,
                cache_dir=source.cache_dir,
                scratch=inside.parent if engine.in_process else None,
                threads=workers or engine.threads,
            )
            for edit in edits
        }
        journal = inside.parent / UPLOADED
        uploads = _still_there(api, repo_id, json.loads(journal.read_text()) if journal.exists() else {})
        resumed = tuple(name for name in jobs if name in uploads)
        downloaded, uploaded = _transfer(engine, jobs, uploads, journal, report)
        flushed: dict[str, int] = {}
        for name in jobs:
            flushed.update(uploads[name]["flushed"])
        transferred_at = time.monotonic()
        report(0, 0, "Publishing")
        files = {name: checkpoint.folder / name for name in checkpoint.others}
        for name, text in record.texts(checkpoint, plan, layout, flushed).items():
            write_text(inside / name, text)
            files[name] = inside / name
        message = commit_message or f"{checkpoint.name}, folded by flashnorm"
        info = _publish(api, target, uploads, files, journal, message, create_pr)
        seconds = (planned_at - started, transferred_at - planned_at, time.monotonic() - transferred_at)
    return StreamResult(
        repo_id=repo_id,
        url=f"{constants.ENDPOINT}/{repo_id}",
        commit=info.oid,
        pull_request=info.pr_url,
        plan=plan,
        layout=layout,
        downloaded=downloaded,
        uploaded=uploaded,
        flushed=flushed,
        resumed=resumed,
        left_out=checkpoint.left_out,
        seconds=seconds,
    )


def _hashes(api: HfApi, checkpoint: Checkpoint) -> dict[str, str]:
    """The sha256 of the source's shards."""
    from huggingface_hub.hf_api import RepoFile

    names, found = list(checkpoint.shards), {}
    for start in range(0, len(names), 500):  # the Hub answers for 1,000 at most

        def ask(batch: list[str] = names[start : start + 500]) -> list[Any]:
            return api.get_paths_info(checkpoint.source.name, batch, revision=checkpoint.commit)

        for file in _persistently(f"{checkpoint.source.name}: could not be asked for its shards", ask):
            if isinstance(file, RepoFile) and file.lfs:
                found[file.path] = file.lfs.sha256
    return found


def _sizes(checkpoint: Checkpoint, edits: ShardEdits) -> tuple[int, int]:
    header = checkpoint.shards[edits.name]
    return header.file_size, edits.target_header(header).file_size


def _origins(checkpoint: Checkpoint, edits: ShardEdits) -> dict[str, RemoteTensor]:
    found = {}
    for tensor, origin in edits.origins.items():
        entry, start = checkpoint.tensors[origin.tensor], checkpoint.shards[origin.shard].data_start
        span = (start + entry.start, start + entry.end)
        found[tensor] = RemoteTensor(origin.tensor, origin.shard, *span, entry.dtype, entry.shape)
    return found


def _transfer(
    engine: Engine,
    jobs: Mapping[str, HubJob],
    uploads: dict[str, dict[str, Any]],
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
            uploads[job.edits.name] = {
                "sha256": result.sha256,
                "size": result.size,
                "flushed": result.flushed,
                "at": time.time(),
            }
            write_text(journal, json.dumps(uploads, indent=1))
            downloaded, uploaded = downloaded + result.downloaded, uploaded + result.size
            if not engine.in_process:
                done += sum(job.sizes)
                report(done, total, job.edits.name)
    finally:
        stop.set()
    return downloaded, uploaded


def _still_there(api: HfApi, repo_id: str, uploads: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Those uploads of an earlier run that a commit can still name.

    The Hub can be asked for LFS objects. What went by Xet it does not tell, so that counts for as long as
    huggingface_hub would count it; a commit that is refused for it after all empties the journal.
    """
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]
    from huggingface_hub.utils._runtime import is_xet_available

    uploads = {name: upload for name, upload in uploads.items() if time.time() - upload["at"] < TRUSTED}
    if not uploads or is_xet_available():
        return uploads
    infos = [UploadInfo(u["size"], b"", bytes.fromhex(u["sha256"])) for u in uploads.values()]
    headers = build_hf_headers(token=api.token)
    actions, _, _ = _persistently(
        f"{repo_id}: could not be asked for uploads",
        lambda: post_lfs_batch_info(infos, None, "model", repo_id, endpoint=api.endpoint, headers=headers),
    )
    there = {action["oid"] for action in actions if not action.get("actions")}
    return {name: upload for name, upload in uploads.items() if upload["sha256"] in there}


# ---- the repository --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A repository as it is: its last commit (None: there is no such repository) and its files, but .gitattributes.

    Files are known by the sha256 of their content if they are large, by their id in git if not.
    """

    repo_id: str
    head: str | None
    files: Mapping[str, str]


def look_at(api: HfApi, repo_id: str) -> Target:
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    def look() -> Target:
        try:
            head = api.model_info(repo_id).sha
        except RepositoryNotFoundError:
            return Target(repo_id, None, {})
        tree = api.list_repo_tree(repo_id, recursive=True, revision=head)
        files = [file for file in tree if isinstance(file, RepoFile) and file.path != ".gitattributes"]
        return Target(repo_id, head, {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files})

    try:
        return _persistently(f"{repo_id}: could not be looked at", look)
    except HFValidationError as error:
        raise UsageError(f"{repo_id}: is no name for a repository: {error}") from None


def _refuse_other_content(target: Target, journal: Path) -> None:
    """Raises UsageError unless all of the repository's shards are what an earlier run of ours has put there."""
    shards = {name: content for name, content in target.files.items() if name.endswith(".safetensors")}
    try:
        ours = {name: upload["sha256"] for name, upload in json.loads(journal.read_text()).items()}
    except (OSError, ValueError):
        ours = {}
    if not ours or shards != ours:
        raise UsageError(f"{target.repo_id}: holds files already; add --overwrite to replace them")


def _publish(
    api: HfApi,
    target: Target,
    uploads: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, Path],
    journal: Path,
    message: str,
    create_pr: bool,
) -> CommitInfo:
    """One commit of the shards and of all other files; what else the repository held goes away."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo_id = target.repo_id
    operations: list[Any] = [
        _uploaded_operation(name, upload)
        for name, upload in uploads.items()
        if target.files.get(name) != upload["sha256"]
    ]
    operations += [CommitOperationAdd(name, path) for name, path in files.items()]
    operations += [CommitOperationDelete(name) for name in target.files if name not in uploads and name not in files]
    try:
        return api.create_commit(
            repo_id, operations, commit_message=message, create_pr=create_pr, parent_commit=target.head
        )
    except Exception as error:
        reason, _ = _reason(error)
        if reason is None:
            raise
        if "412" in reason:
            reason = "somebody else has changed it meanwhile; run the same command again to go on"
        if "LFS pointer" in reason:
            journal.unlink(missing_ok=True)
            reason = "the Hub has removed uploads of an earlier run; run the same command again to start over"
        raise FlashNormError(f"{repo_id}: could not be published: {reason}") from error


def _uploaded_operation(name: str, upload: Mapping[str, Any]) -> CommitOperationAdd:
    """An addition as `preupload_lfs_files` leaves it: the commit needs nothing but hash and size."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(name, b"")
    addition.upload_info = UploadInfo(upload["size"], b"", bytes.fromhex(upload["sha256"]))
    addition._upload_mode, addition._is_uploaded = "lfs", True
    return addition
