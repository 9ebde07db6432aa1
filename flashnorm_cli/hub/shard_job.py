"""One shard from Hub to Hub: down, folded, up."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.header import build_header
from flashnorm_cli.checkpoint.hub import content_id, hub_reader, progress_bar
from flashnorm_cli.checkpoint.hub_errors import TRANSFER_WAITS, hub_errors, with_retry
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.engine import Stopped
from flashnorm_cli.folding.jobs import ShardEdits, check_version, fold_shard
from flashnorm_cli.hub.journal import Uploaded
from flashnorm_cli.hub.progress import quiet_hub, watched

if TYPE_CHECKING:
    from flashnorm_cli.proof.shards import ShardPlan

# Per process: one shard may come in while another goes out, and only one is there twice, as source and as result.
AT_ONCE = 2


_slots, _folding = threading.BoundedSemaphore(AT_ONCE), threading.Lock()
_uploading = threading.Lock()  # hf_xet takes 250 MB for each upload
_folders: set[Path] = set()  # of the jobs that run in this process
_folders_lock = threading.Lock()


PIECE = 16 << 20


@dataclass(frozen=True)
class RemoteTensor:
    """The bytes [start, end) of a shard on the Hub, which are one tensor; `file_size` is the whole shard's."""

    tensor: str
    shard: str
    file_size: int
    start: int
    end: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HubJob:
    """A shard to be downloaded, folded and uploaded. The token is left out wherever a job is printed or logged.

    `sizes` are the bytes of its source and of its result; `scratch` is the folder for them (None: the worker's own).
    `ids` are what the Hub lists the source as: its sha256, or its id in git. `spans` are the bytes [start, end) of its
    tensors that are read by ranges as well; `read_before` are the sha256 of those that have been. `proof` says what the
    result must hold, if it is to be compared before it goes out.
    """

    edits: ShardEdits
    source: str
    commit: str
    sizes: tuple[int, int]
    ids: tuple[str, ...]
    spans: Mapping[str, tuple[int, int]]
    read_before: Mapping[str, str]
    origins: Mapping[str, RemoteTensor]
    proof: ShardPlan | None
    target: str
    create_pr: bool
    endpoint: str
    token: str = field(repr=False)
    cache_dir: Path | None
    scratch: Path | None
    threads: int
    version: str = __version__


def do_hub_job(job: HubJob, on_bytes: Callable[[int], None] = lambda n: None) -> Uploaded:
    """Download, fold and upload one shard.

    `on_bytes` is told how many bytes came in or went out since it was last called; what it raises ends the job.
    Raises FlashNormError where the shard is not the one that the Hub lists, or not the one that was planned with.
    """
    check_version(job.version)
    with _slots, quiet_hub(), _local_trouble(job), _own_folder(job) as folder:
        source, sha256, cached = _source(job, folder, on_bytes)
        downloaded = 0 if cached else job.sizes[0]
        seen = _check_spans(job, source)
        with _folding:
            origins, copied = {}, {}
            for number, (tensor, remote) in enumerate(job.origins.items()):
                origins[tensor] = source
                if remote.shard != job.edits.name:
                    origins[tensor] = folder / f"origin-{number}.safetensors"
                    copied[remote.tensor] = _download_tensor(job, remote, origins[tensor])
                    downloaded += remote.end - remote.start
            on_bytes(0)
            target = folder / "folded.safetensors"
            flushed = fold_shard(job.edits, source, target, origins, job.threads, lambda n: on_bytes(0), fsync=False)
            compared = _prove(job, source, target, origins)
            for path in {source, *origins.values()} if not cached else {*origins.values()} - {source}:
                path.unlink()
        with _uploading:
            on_bytes(0)
            uploaded = _upload(job, target, on_bytes)
    counts = {tensor: n for tensor, n in flushed.items() if n}
    return Uploaded(uploaded, job.sizes[1], sha256, downloaded, counts, seen, copied, compared, time.time())


def _prove(job: HubJob, source: Path, folded: Path, origins: Mapping[str, Path]) -> int:
    """Compare the folded shard with its source before it goes out; the number of tensors, 0 if nobody asked for it."""
    if job.proof is None:
        return 0
    from flashnorm_cli.proof.shards import check_shard

    compared, findings = check_shard(job.proof, source, folded, [path for path in origins.values() if path != source])
    if findings:
        first = findings[0]
        raise FlashNormError(
            f"{job.edits.name}: is not what it must be: {first.what} {first.message}; nothing was published"
        )
    return compared


# ---- a folder for each job -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _own_folder(job: HubJob) -> Iterator[Path]:
    """A folder that no other job writes to or looks into, on a disk that has room for the shard."""
    with tempfile.TemporaryDirectory(prefix="flashnorm-", dir=_scratch(job), ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _folders_lock:
            beside = [*_folders]
            _folders.add(folder)
        try:
            free, needed = shutil.disk_usage(folder).free, sum(job.sizes)
            # The job that runs at the same time gives back what it holds: three shards at most are there at once.
            if free + sum(map(_bytes_in, beside)) < needed:
                raise FlashNormError(
                    f"{folder.parent}: a shard needs {needed:,} bytes there for a while, but only {free:,} are free; "
                    "free some space and run the same command again"
                )
            yield folder
        finally:
            with _folders_lock:
                _folders.discard(folder)


def _bytes_in(folder: Path) -> int:
    """Bytes of the files in a folder that its owner writes to, moves in and clears at the same time."""
    total = 0
    for where, _, names in os.walk(folder):  # which takes a folder that is gone meanwhile for an empty one
        for name in names:
            with contextlib.suppress(OSError):  # deleted meanwhile
                total += os.stat(os.path.join(where, name)).st_size  # noqa: PTH116, PTH118
    return total


def _scratch(job: HubJob) -> Path:
    if job.scratch is not None:
        return job.scratch
    with contextlib.suppress(ImportError, ValueError):  # ValueError: this is no dask worker
        from distributed import get_worker

        return Path(get_worker().local_directory)  # dask clears it when the worker is gone
    return Path(tempfile.gettempdir())


# ---- down ------------------------------------------------------------------------------------------------------------


def _source(job: HubJob, folder: Path, on_bytes: Callable[[int], None]) -> tuple[Path, str, bool]:
    """The source shard, its sha256 as computed over its bytes, and whether it was in the Hub cache, where it stays.

    A file that is not the one which the Hub lists is downloaded once more.
    """
    from huggingface_hub import try_to_load_from_cache

    name = job.edits.name
    cached = try_to_load_from_cache(job.source, name, cache_dir=job.cache_dir, revision=job.commit)
    if isinstance(cached, str):
        found = content_id(Path(cached))
        if found.is_one_of(job.ids):
            on_bytes(job.sizes[0])
            return Path(cached), found.sha256, True
    for again in (False, True):
        path = _download(job, folder, on_bytes if not again else lambda n: on_bytes(0), again)
        found = content_id(path)
        if found.is_one_of(job.ids):
            return path, found.sha256, False
    raise FlashNormError(
        f"{job.source}/{name}: what came is not the file that the Hub lists ({found.sha256} instead of "
        f"{' or '.join(job.ids)}): its bytes change on the way; run the same command again later, or over another line"
    )


def _download(job: HubJob, folder: Path, on_bytes: Callable[[int], None], force: bool) -> Path:
    from huggingface_hub import hf_hub_download

    name, came = job.edits.name, 0

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
            force_download=force,
            tqdm_class=progress_bar("", progress),
        )

    path = Path(_with_retry(f"{job.source}/{name}", download))
    progress(job.sizes[0], job.sizes[0], "")  # what the bar did not tell
    return path


def _check_spans(job: HubJob, source: Path) -> dict[str, str]:
    """sha256 of tensors that are read by ranges, from the shard itself; those read already have to be the same."""
    seen = {}
    with source.open("rb") as file:
        for tensor, (start, end) in job.spans.items():
            digest = hashlib.sha256()
            file.seek(start)
            for at in range(start, end, PIECE):
                digest.update(file.read(min(PIECE, end - at)))
            seen[tensor] = digest.hexdigest()
            if job.read_before.get(tensor, seen[tensor]) != seen[tensor]:
                raise FlashNormError(
                    f"{job.source}/{job.edits.name}: {tensor} is not what the Hub has sent of it before: bytes changed "
                    "on the way; nothing was published, run the same command again"
                )
    return seen


def _download_tensor(job: HubJob, remote: RemoteTensor, path: Path) -> str:
    """Write a safetensors file that holds a single tensor of another shard; returns the sha256 of the tensor."""
    sizes = {remote.shard: remote.file_size}
    read, digest = hub_reader(job.source, job.commit, job.token, sizes, job.endpoint), hashlib.sha256()
    with path.open("wb") as file:
        file.write(build_header([(remote.tensor, remote.dtype, remote.shape)], None).raw)
        for start in range(remote.start, remote.end, PIECE):
            end = min(start + PIECE, remote.end)
            with hub_errors(f"{job.source}/{remote.shard}", writing=True):
                data = read(remote.shard, start, end)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


# ---- up --------------------------------------------------------------------------------------------------------------


def _upload(job: HubJob, path: Path, on_bytes: Callable[[int], None]) -> str:
    """Store a file's content on the Hub, without a name as yet. Returns its sha256."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, name, went = HfApi(endpoint=job.endpoint, token=job.token), job.edits.name, 0

    def progress(done: int) -> None:
        nonlocal went
        step, went = done - went, done
        with contextlib.suppress(Stopped):  # an upload that has begun is worth finishing
            on_bytes(step)

    def upload() -> str:
        addition = CommitOperationAdd(name, path)
        with watched(path, job.sizes[1], progress):
            api.preupload_lfs_files(job.target, [addition], create_pr=job.create_pr)
        if not addition._is_uploaded:
            raise FlashNormError(f"{job.target}: its .gitattributes or .gitignore does not let {name} be a large file")
        return addition.upload_info.sha256.hex()

    sha256 = _with_retry(f"{job.target}/{name}", upload)
    progress(job.sizes[1])
    return sha256


def _with_retry(what: str, transfer: Callable[[], str]) -> str:
    """A transfer, tried again where the trouble may pass; errors of the disk go on as they are."""
    with hub_errors(what, writing=True, disk=False):
        return with_retry(transfer, TRANSFER_WAITS)


@contextlib.contextmanager
def _local_trouble(job: HubJob) -> Iterator[None]:
    """Errors of the disk, with the machine that it belongs to."""
    try:
        yield
    except OSError as error:
        where = f" on {socket.gethostname()}" if job.scratch is None else ""
        raise FlashNormError(f"{job.edits.name}: {error.strerror or error}{where}") from error
