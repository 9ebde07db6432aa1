"""One shard of a fold as a job that any process on any machine can do: what to change, in a form that pickles small.

torch is imported when a job is done, not before: the scheduler of a cluster unpickles jobs, too.
"""

from __future__ import annotations

import dataclasses
import hashlib
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.disk import facts
from flashnorm_cli.checkpoint.header import Header, read_header
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.work import JOURNAL
from flashnorm_cli.errors import CheckpointError, FlashNormError
from flashnorm_cli.plan.model import Plan, PlannedRotation, Reader, Run

if TYPE_CHECKING:
    import numpy as np
    import torch

    from flashnorm_cli.folding.edits import Edit, Rotate, Scale


# The share of a tensor's values that may become zero; docs/reliability.md says why so many.
FLUSH_LIMIT = 0.01


@dataclass(frozen=True)
class Origin:
    """Where the values of an added tensor come from: the tensor, its shard, and the sha256 of that shard's header."""

    tensor: str
    shard: str
    header_sha256: str


@dataclass(frozen=True)
class ShardEdits:
    """What a fold changes in one shard.

    Attributes:
        name: the shard's file name.
        header_sha256: of its header, so that whoever does it knows the right file.
        readers: those in this shard, and those that are added to it.
        gains: float32 (float64 of an F64 norm) of shape (elements,), of the norms that `readers` name.
        identities: what to fill folded norms with.
        drop: tensors to leave out.
        add: (dtype, shape) of tensors to put at the end.
        origins: where the values of added tensors come from, by their names.
        rotation: what is rotated in this shard, and in what is added to it.
    """

    name: str
    header_sha256: str
    readers: tuple[Reader, ...] = field(repr=False)
    gains: Mapping[str, np.ndarray] = field(repr=False)
    identities: Mapping[str, float] = field(repr=False)
    drop: frozenset[str] = frozenset()
    add: Mapping[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    origins: Mapping[str, Origin] = field(default_factory=dict)
    rotation: PlannedRotation | None = field(default=None, repr=False)

    def target_header(self, header: Header) -> Header:
        """The header of the folded shard, from that of its source."""
        from flashnorm_cli.folding.rewrite import changed_header

        return changed_header(header, self.drop, self.add)


def header_sha256(header: Header) -> str:
    return hashlib.sha256(header.raw).hexdigest()


def shard_edits(checkpoint: Checkpoint, plan: Plan, gains: Mapping[str, np.ndarray], layout: str) -> list[ShardEdits]:
    """What to do to each shard; tensors that the source does not have go to the end of the last one."""
    last = list(checkpoint.shards)[-1]
    readers: dict[str, list[Reader]] = {name: [] for name in checkpoint.shards}
    for reader in plan.readers:
        readers[checkpoint.shard_of.get(reader.tensor, last)].append(reader)
    folded: dict[str, dict[str, float]] = {name: {} for name in checkpoint.shards}
    for norm in plan.folded:
        folded[checkpoint.shard_of[norm.tensor]][norm.tensor] = norm.identity

    def origin(tensor: str) -> Origin:
        shard = checkpoint.shard_of[tensor]
        return Origin(tensor, shard, header_sha256(checkpoint.shards[shard]))

    return [
        ShardEdits(
            name,
            header_sha256(header),
            tuple(readers[name]),
            {run.norm: gains[run.norm] for reader in readers[name] for run in reader.runs if run.norm},
            {} if layout == "dropped" else folded[name],
            frozenset(folded[name]) if layout == "dropped" else frozenset(),
            plan.added if name == last else {},
            {r.tensor: origin(r.values_from) for r in readers[name] if r.values_from},
            _rotation_in(plan, {*header.tensors, *(plan.added if name == last else ())}),
        )
        for name, header in checkpoint.shards.items()
    ]


def _rotation_in(plan: Plan, tensors: set[str]) -> PlannedRotation | None:
    if plan.rotation is None:
        return None
    mine = {name: dims for name, dims in plan.rotation.tensors.items() if name in tensors}
    return dataclasses.replace(plan.rotation, tensors=mine)


def fold_shard(
    edits: ShardEdits,
    source: Path,
    target: Path,
    origins: Mapping[str, Path],
    threads: int,
    on_bytes: Callable[[int], None] | None = None,
    *,
    fsync: bool,
    files: Mapping[Path, tuple[int, ...]] | None = None,
) -> dict[str, int]:
    """Write the folded shard `target` from `source`; `origins` are the files of the tensors in `edits.origins`.

    `files` are what `checkpoint.disk.facts` said of these files when the fold was planned, where that is known.

    Returns how many values of each tensor were flushed to zero. Raises what `rewrite_shard` raises, and
    CheckpointError if a file is not the one that the fold was planned with.
    """
    from flashnorm_cli.folding.edits import Fill
    from flashnorm_cli.folding.rewrite import ShardJob, rewrite_shard

    header = _checked_header(source, edits.header_sha256)
    made = _products(edits, origins)
    changes: dict[str, Edit] = {tensor: edit for tensor, edit in made.items() if tensor not in edits.add}
    changes.update({tensor: Fill(value) for tensor, value in edits.identities.items()})
    add = {tensor: (dtype, shape, made[tensor]) for tensor, (dtype, shape) in edits.add.items()}
    job = ShardJob(source, target, header, changes, edits.drop, add, files or {}, FLUSH_LIMIT)
    return rewrite_shard(job, threads, on_bytes, fsync=fsync)


def _checked_header(path: Path, sha256: str | None) -> Header:
    header = read_header(path)
    if sha256 is not None and header_sha256(header) != sha256:
        raise CheckpointError(f"{path}: changed since its header was read")
    return header


def _products(edits: ShardEdits, origins: Mapping[str, Path]) -> dict[str, Scale | Rotate]:
    """What is multiplied: by a gain, by a rotation, by both."""
    from flashnorm_cli.folding.edits import Rotate
    from flashnorm_cli.folding.rotation import rotation

    scales = _scales(edits, origins)
    made: dict[str, Scale | Rotate] = dict(scales)
    if edits.rotation is not None:
        q = rotation(edits.rotation.kind, edits.rotation.size, edits.rotation.seed)
        made.update({name: Rotate(q, dims, scales.get(name)) for name, dims in edits.rotation.tensors.items()})
    return made


def _scales(edits: ShardEdits, origins: Mapping[str, Path]) -> dict[str, Scale]:
    """The gain of each reader; readers of the same norm (the experts of a layer) share one."""
    import torch

    from flashnorm_cli.folding.edits import Scale

    made: dict[tuple[Run, ...], torch.Tensor] = {}
    scales = {}
    for reader in edits.readers:
        if reader.runs not in made:
            made[reader.runs] = torch.cat([_gain(run, edits.gains) for run in reader.runs])
        values = None
        if reader.tensor in edits.origins:
            path = origins[reader.tensor]
            values = (path, read_header(path), edits.origins[reader.tensor].tensor)
        scales[reader.tensor] = Scale(reader.dim, made[reader.runs], values)
    return scales


def _gain(run: Run, gains: Mapping[str, np.ndarray]) -> torch.Tensor:
    import torch

    part = torch.from_numpy(gains[run.norm][run.start : run.start + run.length].copy()) if run.norm else None
    return (torch.ones(run.length) if part is None else part).repeat(run.repeat)


# ---- a shard from folder to folder -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class FolderJob:
    """A shard whose source and work folder are on a file system that coordinator and worker share.

    `files` are what `checkpoint.disk.facts` says of the source files that are read, or as much of it as holds where
    the job is done; `fingerprint` is what the journal in the work folder holds.
    """

    edits: ShardEdits
    folder: Path
    files: Mapping[str, tuple[int, ...]]
    work: Path
    fingerprint: str = field(repr=False)
    threads: int
    fsync: bool
    version: str = __version__


@dataclass(frozen=True)
class Written:
    """A finished shard: its file in the work folder, its size, and how many products were flushed, by tensor."""

    part: str
    size: int
    flushed: dict[str, int]


def do_folder_job(job: FolderJob, on_bytes: Callable[[int], None] | None = None) -> Written:
    """Fold a shard into a file of the work folder that nobody else writes to.

    It gets its final name from the coordinator: what a worker left behind that was killed, or that was only thought
    to be dead, can never be taken for a finished shard.
    """
    check_version(job.version)
    here = f"the worker on {socket.gethostname()}"
    try:
        same = (job.work / JOURNAL).read_text(errors="replace") == job.fingerprint
    except (FileNotFoundError, NotADirectoryError):
        same = False
    except OSError as error:
        raise FlashNormError(f"{job.work / JOURNAL}: {here} cannot read it: {error.strerror}") from error
    if not same:
        raise FlashNormError(
            f"{job.work}: {here} does not see the folder that is being written: it has to be on a file system "
            "that all workers share"
        )
    for name, expected in job.files.items():
        try:
            status = (job.folder / name).stat()
        except OSError as error:
            raise FlashNormError(
                f"{job.folder / name}: {here} cannot read it ({error.strerror}): the source has to be on a file system "
                "that all workers share"
            ) from error
        if facts(status)[: len(expected)] != tuple(expected):
            raise CheckpointError(f"{job.folder / name}: {here} sees another file, or it changed since the plan")
    part = job.work / f"{job.edits.name}.{uuid.uuid4().hex[:12]}.part"
    origins = {tensor: job.folder / origin.shard for tensor, origin in job.edits.origins.items()}
    for tensor, origin in job.edits.origins.items():
        _checked_header(origins[tensor], origin.header_sha256)
    source = job.folder / job.edits.name
    files = {job.folder / name: tuple(expected) for name, expected in job.files.items()}
    flushed = fold_shard(job.edits, source, part, origins, job.threads, on_bytes, fsync=job.fsync, files=files)
    return Written(part.name, part.stat().st_size, {tensor: n for tensor, n in flushed.items() if n})


def check_version(version: str) -> None:
    """Refuse a job of another version: its fold might not give the same bytes."""
    if version != __version__:
        raise FlashNormError(
            f"the worker on {socket.gethostname()} has flashnorm-cli {__version__}, not {version}: install the same "
            "version everywhere"
        )
