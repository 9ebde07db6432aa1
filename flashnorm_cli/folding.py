"""Fold a checkpoint: plan it, rewrite its shards one after the other, publish the folder when all is done."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli import __version__, record
from flashnorm_cli.checkpoint import CONFIG, INDEX, RECORD, Checkpoint, Progress, Source, open_checkpoint
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError
from flashnorm_cli.plan import FINAL_NORM_CHOICES, Plan, make_plan, refuse_folded
from flashnorm_cli.rewrite import TORCH_DTYPE, Edit, Fill, GainOverflowError, Scale, ShardJob, rewrite_shard

# Beside the folder that is being filled: what it is for (locked while it is), and counts of finished shards.
JOURNAL, FLUSHED = "journal", "flushed.json"


@dataclass(frozen=True)
class FoldResult:
    """What a fold did.

    `flushed` counts, per tensor, products that became zero; `resumed` are shards that an earlier run had finished;
    `seconds` are those of planning, of writing, and of waiting until the disk has everything.
    """

    output: Path
    plan: Plan
    layout: str
    bytes_written: int
    flushed: dict[str, int]
    resumed: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: tuple[float, float, float]


def fold(
    model: str | Path,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    final_norm: str = "auto",
    layout: str = "identity",
    workers: int | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> FoldResult:
    """Fold the norm gains of a checkpoint into the linear layers that read them, and write the result beside it.

    Shards are rewritten as streams, so that memory stays flat whatever the model's size. The output appears under
    its name only when it is complete; a fold that was interrupted goes on from its last finished shard.

    Args:
        model: a local folder or a Hub id.
        output: the folder to write; by default `<name>-FlashNorm` in the current folder.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        trust_remote_code: let the checkpoint's own Python code define the architecture.
        final_norm: "auto", "keep" or "untie"; see `make_plan`.
        layout: "identity" writes folded norms as the identity of their convention, "dropped" leaves them out.
        workers: threads; by default the number of processors, 8 at most.
        overwrite: replace an output folder that holds a checkpoint.
        on_progress: called with (bytes done, bytes in all, what is going on).
    Raises:
        UsageError: the call contradicts itself or the file system.
        FlashNormError: the checkpoint is broken, folded already, has nothing to fold, or cannot be planned.
    """
    if final_norm not in FINAL_NORM_CHOICES:
        raise UsageError(f"final_norm is one of {', '.join(FINAL_NORM_CHOICES)}, not {final_norm!r}")
    if layout not in record.LAYOUTS:
        raise UsageError(f"layout is one of {', '.join(record.LAYOUTS)}, not {layout!r}")
    if workers is not None and workers < 1:
        raise UsageError(f"workers has to be at least 1, not {workers}")
    workers = workers or min(os.cpu_count() or 1, 8)
    report = on_progress or (lambda done, total, what: None)
    source = Source(str(model), revision, token, Path(cache_dir) if cache_dir else None, local_files_only)

    started = time.monotonic()
    report(0, 0, "Reading headers")
    checkpoint = open_checkpoint(source, weights=False)
    refuse_folded(checkpoint)
    wanted = Path(output) if output else Path(f"{checkpoint.name}-FlashNorm")
    try:
        target = _check_output(checkpoint, wanted, overwrite)
    except OSError as error:
        raise UsageError(f"{wanted}: {error.strerror}") from error
    report(0, 0, f"Tracing {', '.join(checkpoint.config.get('architectures') or ['the model'])}")
    plan = make_plan(checkpoint, final_norm, trust_remote_code)
    if not plan.folded:
        reasons = "; ".join(dict.fromkeys(n.reason or "" for n in plan.kept)) or "it has no norm with a weight"
        raise FlashNormError(f"{model}: there is nothing to fold: {reasons}")
    if checkpoint.commit is not None:
        report(0, 0, f"Downloading {source.name}")
        headers, checkpoint = (
            checkpoint,
            open_checkpoint(dataclasses.replace(source, revision=checkpoint.commit), on_progress=report),
        )
        if {n: h.raw for n, h in headers.shards.items()} != {n: h.raw for n, h in checkpoint.shards.items()}:
            raise CheckpointError(f"{model}: its headers changed between plan and download; run it again")

    _give_back_memory()
    planned_at = time.monotonic()
    gains = _read_gains(checkpoint, plan)
    jobs = _jobs(checkpoint, plan, gains, layout)
    with _work_folder(target, _fingerprint(checkpoint, plan, gains, layout), checkpoint.shards) as work:
        result = _write(checkpoint, plan, layout, jobs, work, workers, report)
        written_at = time.monotonic()
        report(0, 0, "Waiting for the disk")
        _flush(work, workers)
        _publish(work, target)
    seconds = (planned_at - started, written_at - planned_at, time.monotonic() - written_at)
    return dataclasses.replace(result, output=target, seconds=seconds)


def _give_back_memory() -> None:
    """Return what the trace has used to the system, where the C library can: it would stay beside the buffers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ---- before the first write ------------------------------------------------------------------------------------------


def _check_output(checkpoint: Checkpoint, output: Path, overwrite: bool) -> Path:
    return check_output(output, overwrite, checkpoint.folder)


def check_output(output: Path, overwrite: bool, source: Path, config: str = CONFIG, what: str = "a checkpoint") -> Path:
    """The output's absolute path, which may be written. Raises UsageError where that could lose something.

    `source` is a folder that it must not overlap with; `config` the file that shows `what` an older output is.
    """
    target = output.expanduser().absolute()
    if target.is_symlink():
        raise UsageError(f"{output}: is a symbolic link; name the folder itself")
    if target.exists() and not target.is_dir():
        raise UsageError(f"{output}: exists and is not a folder")
    real, theirs = target.resolve(), source.resolve()
    if real == theirs or theirs in real.parents or real in theirs.parents:
        raise UsageError(f"{output}: overlaps with the source {source}; choose another output folder")
    if target.exists() and any(target.iterdir()):
        if not overwrite:
            raise UsageError(f"{output}: exists already; add --overwrite to replace it")
        if not (target / config).exists():
            raise UsageError(f"{output}: is not {what} (no {config}), so it will not be overwritten")
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{output}: cannot write in {parent}")
    return target


def _read_gains(checkpoint: Checkpoint, plan: Plan) -> dict[str, torch.Tensor]:
    """Gains of the folded norms, by tensor: float32 of shape (elements,)."""
    gains = {}
    for norm in plan.folded:
        shard = checkpoint.shard_of[norm.tensor]
        entry = checkpoint.tensors[norm.tensor]
        with (checkpoint.folder / shard).open("rb") as file:
            file.seek(checkpoint.shards[shard].data_start + entry.start)
            raw = bytearray(file.read(entry.nbytes))
        weight = torch.frombuffer(raw, dtype=TORCH_DTYPE[entry.dtype]).float()
        gain = weight if norm.scale == 1.0 else weight * norm.scale
        gains[norm.tensor] = gain if norm.offset == 0.0 else gain + norm.offset
        if not bool(gains[norm.tensor].isfinite().all()):
            raise FlashNormError(f"{norm.tensor}: holds inf or NaN; this checkpoint is broken")
    if all(bool((g == 1.0).all()) for g in gains.values()):
        raise FlashNormError(
            f"{checkpoint.source.name}: there is nothing to fold: every norm that could be holds the identity already"
        )
    return gains


def _jobs(checkpoint: Checkpoint, plan: Plan, gains: dict[str, torch.Tensor], layout: str) -> list[ShardJob]:
    """One job per shard; tensors that the source does not have go to the end of the last one."""

    def scale(reader: Any) -> Scale:
        parts = []
        for run in reader.runs:
            part = gains[run.norm][run.start : run.start + run.length] if run.norm else torch.ones(run.length)
            parts.append(part.repeat(run.repeat))
        if reader.values_from is None:
            return Scale(reader.dim, torch.cat(parts))
        shard = checkpoint.shard_of[reader.values_from]
        return Scale(
            reader.dim,
            torch.cat(parts),
            (checkpoint.folder / shard, checkpoint.shards[shard], reader.values_from),
        )

    edits: dict[str, Edit] = {r.tensor: scale(r) for r in plan.readers}
    dropped = frozenset(n.tensor for n in plan.folded) if layout == "dropped" else frozenset()
    edits.update({n.tensor: Fill(n.identity) for n in plan.folded if n.tensor not in dropped})
    last = list(checkpoint.shards)[-1]
    jobs = []
    for name, header in checkpoint.shards.items():
        mine = {tensor: edit for tensor, edit in edits.items() if tensor in header.tensors}
        add = {}
        if name == last:
            for tensor, (dtype, shape) in plan.added.items():
                edit = edits[tensor]
                if isinstance(edit, Scale):
                    add[tensor] = (dtype, shape, edit)
        jobs.append(ShardJob(checkpoint.folder / name, Path(name), header, mine, dropped & set(header.tensors), add))
    return jobs


def _fingerprint(checkpoint: Checkpoint, plan: Plan, gains: dict[str, torch.Tensor], layout: str) -> str:
    """Equal for two runs that would write the same bytes: a later run may go on only with such shards.

    Finished shards may still be in memory only, so a run before the machine's last start does not count.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    start = boot.read_text() if boot.exists() else ""
    digest = hashlib.sha256(json.dumps([__version__, start, layout, plan.to_json()], sort_keys=True).encode())
    for name, header in checkpoint.shards.items():
        stat = (checkpoint.folder / name).stat()
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode() + header.raw)
    for gain in gains.values():
        digest.update(gain.numpy().tobytes())
    return digest.hexdigest()


# ---- writing ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _work_folder(target: Path, fingerprint: str, shards: Iterable[str]) -> Iterator[Path]:
    """A folder beside the output, `.<name>.partial`, held by this process alone; yields the folder to fill in it.

    Shards that an earlier run of the same fold finished stay, everything else in it is removed. After an error the
    whole is removed, unless running the same command again could go on from a finished shard.
    """
    work = target.with_name(f".{target.name}.partial")
    inside = work / "checkpoint"
    with _disk_errors(target):
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / JOURNAL, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _lock(lock, work / JOURNAL, target)
        with _disk_errors(target):
            same = os.pread(lock, 1 << 10, 0).decode(errors="replace") == fingerprint
            for path in [*work.iterdir(), *(inside.iterdir() if inside.exists() else ())]:
                is_shard = same and path.parent == inside and path.name in shards
                if not is_shard and path not in (inside, work / JOURNAL) and not (same and path.name == FLUSHED):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            inside.mkdir(exist_ok=True)
            os.ftruncate(lock, 0)
            os.pwrite(lock, fingerprint.encode(), 0)
            try:
                yield inside
            except BaseException as error:
                hopeless = isinstance(error, (GainOverflowError, CheckpointError))
                if hopeless or not any((inside / name).exists() for name in shards):
                    shutil.rmtree(work)
                raise
            shutil.rmtree(work)  # still locked: nobody else may begin in it
    finally:
        os.close(lock)


def _lock(lock: int, journal: Path, target: Path) -> None:
    """Hold the journal, and make sure that it is still the one that a second process would find."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.fstat(lock).st_ino == journal.stat().st_ino
    except OSError:
        mine = False
    if not mine:
        raise FlashNormError(f"{target}: another fold is writing it right now")


@contextlib.contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Errors of the disk in the words of the output; what the rewriting has worded already keeps its file's name."""
    try:
        yield
    except OSError as error:
        raise FlashNormError(f"{target}: {error.strerror or error}{_hint(error)}") from error
    except FlashNormError as error:
        if hint := _hint(error.__cause__):
            raise FlashNormError(f"{error}{hint}") from error
        raise


def _hint(error: BaseException | None) -> str:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "; free some space and run the same command again" if full else ""


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    layout: str,
    jobs: list[ShardJob],
    work: Path,
    workers: int,
    report: Progress,
) -> FoldResult:
    flushed_file = work.parent / FLUSHED
    flushed: dict[str, int] = json.loads(flushed_file.read_text()) if flushed_file.exists() else {}
    resumed = tuple(job.target.name for job in jobs if (work / job.target).exists())
    sizes = {job.target.name: job.target_header().file_size for job in jobs}
    total, done = sum(sizes.values()), sum(sizes[name] for name in resumed)
    free = shutil.disk_usage(work).free
    if total - done > free:
        raise FlashNormError(
            f"{work.parent.parent}: {total - done:,} bytes are to be written, but only {free:,} are free there"
        )
    for job in jobs:
        name = job.target.name
        if name in resumed:
            continue
        part = work / f"{name}.part"
        part.unlink(missing_ok=True)

        def on_bytes(n: int, name: str = name) -> None:
            nonlocal done
            done += n
            report(done, total, name)

        counts = rewrite_shard(dataclasses.replace(job, target=part), workers, on_bytes, fsync=False)
        flushed.update({tensor: n for tensor, n in counts.items() if n})
        write_text(flushed_file, json.dumps(flushed))
        part.rename(work / name)  # from now on the shard counts as finished

    report(total, total, "Writing config and record")
    for relative in checkpoint.others:
        (work / relative).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint.folder / relative, work / relative)
    if checkpoint.index is not None:
        dropped = frozenset().union(*(job.drop for job in jobs))
        original = (checkpoint.folder / INDEX).read_text(encoding="utf-8")
        if dropped or plan.added:
            index = record.folded_index(checkpoint.index, plan, dropped, jobs[-1].target.name, checkpoint)
            original = record.dump_like(index, original)
        write_text(work / INDEX, original)
    write_text(work / RECORD, json.dumps(record.full_record(checkpoint, plan, layout, flushed), indent=2) + "\n")
    original = (checkpoint.folder / CONFIG).read_text(encoding="utf-8")
    config = record.folded_config(checkpoint.config, plan, layout)
    write_text(work / CONFIG, record.dump_like(config, original))
    return FoldResult(work, plan, layout, total, flushed, resumed, checkpoint.left_out, (0.0, 0.0, 0.0))


def write_text(path: Path, text: str) -> None:
    """Write a small file so that it is there as a whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def _flush(folder: Path, workers: int) -> None:
    """Return when everything below a folder is on the disk."""

    def fsync(path: Path) -> None:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    with ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(fsync, [p for p in folder.rglob("*") if not p.is_symlink()]):
            pass
    fsync(folder)


def _publish(work: Path, target: Path) -> None:
    """Give the finished folder its name; an older output is removed only then."""
    old = target.with_name(f".{target.name}.old")
    if target.exists() and any(target.iterdir()):
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    elif target.exists():
        target.rmdir()
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)  # also that of a run which was killed just before this line
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
