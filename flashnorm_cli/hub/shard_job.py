"""One shard from Hub to Hub: down, folded, up."""

from __future__ import annotations

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.header import build_header
from flashnorm_cli.checkpoint.hub import hub_reader, progress_bar
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.folding.engine import Stopped
from flashnorm_cli.folding.jobs import ShardEdits, check_version, fold_shard
from flashnorm_cli.hub.retry import persistently, quiet_hub, watched

# Per process: one shard may come in while another goes out, and only one is there twice, as source and as result.
AT_ONCE = 2


_slots, _folding = threading.BoundedSemaphore(AT_ONCE), threading.Lock()


_uploading = threading.Lock()  # hf_xet takes 250 MB for each upload


PIECE = 16 << 20


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
    check_version(job.version)
    with (
        _slots,
        quiet_hub(),
        _local_trouble(job),
        tempfile.TemporaryDirectory(prefix="flashnorm-", dir=_scratch(job)) as name,
    ):
        folder = Path(name)
        free = shutil.disk_usage(folder).free
        if free + _held_beside(folder) < sum(job.sizes):
            raise FlashNormError(
                f"{folder.parent}: a shard needs {sum(job.sizes):,} bytes there for a while, but only {free:,} are "
                "free; free some space and run the same command again"
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
        with _uploading:
            on_bytes(0)
            sha256 = _upload(job, target, on_bytes)
    return Uploaded(sha256, job.sizes[1], downloaded, {tensor: n for tensor, n in flushed.items() if n})


def _held_beside(folder: Path) -> int:
    """Bytes of the job that runs at the same time, which it gives back: three shards at most are there at once."""
    held = 0
    for path in folder.parent.glob("flashnorm-*/**/*"):
        with contextlib.suppress(OSError):  # deleted meanwhile
            held += path.stat().st_size
    return held


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

    path = Path(persistently(f"{job.source}/{name}", download))
    progress(job.sizes[0], job.sizes[0], "")  # what the bar did not tell
    return path, False


def _download_tensor(job: HubJob, remote: RemoteTensor, path: Path) -> Path:
    """A safetensors file that holds a single tensor of another shard."""
    read = hub_reader(job.source, job.commit, job.token, job.endpoint)
    what = f"{job.source}/{remote.shard}"
    with path.open("wb") as file:
        file.write(build_header([(remote.tensor, remote.dtype, remote.shape)], None).raw)
        for start in range(remote.start, remote.end, PIECE):
            end = min(start + PIECE, remote.end)

            def piece(start: int = start, end: int = end) -> bytes:
                data = read(remote.shard, start, end)
                if len(data) != end - start:
                    raise ConnectionError(f"{len(data)} of {end - start} bytes arrived")
                return data

            file.write(persistently(what, piece))
    return path


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

    sha256 = persistently(f"{job.target}/{name}", upload)
    progress(job.sizes[1])
    return sha256


@contextlib.contextmanager
def _local_trouble(job: HubJob) -> Iterator[None]:
    """Errors of the disk, with the machine that it belongs to."""
    try:
        yield
    except OSError as error:
        where = f" on {socket.gethostname()}" if job.scratch is None else ""
        raise FlashNormError(f"{job.edits.name}: {error.strerror or error}{where}") from error
