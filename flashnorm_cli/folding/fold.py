"""Fold a checkpoint: plan it, have its shards rewritten, publish the folder when all is done."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint import disk
from flashnorm_cli.checkpoint.carry import check_names
from flashnorm_cli.checkpoint.model import Checkpoint, LeftOut, Progress, Source, refuse_adapter, refuse_folded
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.output import check_output, flush, not_an_output, work_folder
from flashnorm_cli.checkpoint.progress import with_notebook_bar
from flashnorm_cli.checkpoint.work import source_name
from flashnorm_cli.choices import FinalNorm, Layout, Rotation
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError
from flashnorm_cli.folding.engine import Engine, any_executor, dask_engine, in_turn, processors
from flashnorm_cli.folding.finished import not_this_fold, older_fold
from flashnorm_cli.folding.jobs import shard_edits
from flashnorm_cli.folding.planning import Planning, caution, checked_seed, plan_for, with_grid
from flashnorm_cli.folding.writing import Writing
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.plan.planner import FINAL_NORM_CHOICES
from flashnorm_cli.record import write as record
from flashnorm_cli.record.read import FoldRecord

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, repr=False)
class FoldResult(Shown):
    """What a fold did.

    `flushed` counts, per tensor, products that became zero; `resumed` are shards that an earlier run had finished;
    `seconds` are those of planning, of writing, and of waiting until the disk has everything. `notes` say what else
    happened: what an earlier run had left, and what could not be removed. `already_done` says that an earlier run had
    finished this very fold, and that nothing was written. `caution` warns who may quantize the result.
    """

    output: Path
    plan: Plan
    layout: str
    bytes_written: int
    flushed: dict[str, int]
    resumed: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    seconds: tuple[float, float, float]
    notes: tuple[str, ...] = ()
    already_done: bool = False
    caution: str | None = None

    def _facts(self) -> dict[str, Any]:
        folded, kept = len(self.plan.folded), len(self.plan.kept)
        counts = {"norms_folded": folded, "norms_kept": kept, "readers": len(self.plan.readers)}
        return {"output": str(self.output), "layout": self.layout, **counts, "bytes_written": self.bytes_written}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, with the plan's summary instead of the plan."""
        summary = self.plan.summary()
        return {
            **summary,
            "output": str(self.output),
            "layout": self.layout,
            "already_done": self.already_done,
            "bytes_written": self.bytes_written,
            "flushed_to_zero": self.flushed,
            "resumed_shards": list(self.resumed),
            "left_out": [dataclasses.asdict(each) for each in self.left_out],
            "phases": dict(zip(("plan", "write", "flush"), (round(s, 3) for s in self.seconds), strict=True)),
            "notes": [*summary["notes"], *self.notes],
        }


@with_notebook_bar
def fold(
    model: str | Path,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    final_norm: FinalNorm = "auto",
    layout: Layout = "identity",
    rotate: Rotation | None = None,
    seed: int = 0,
    target: str | None = None,
    leave_grid: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    follow_links: bool = False,
    dask: str | None = None,
    executor: Executor | None = None,
    on_progress: Progress | None = None,
) -> FoldResult:
    """Fold the norm gains of a checkpoint into the linear layers that read them, and write the result beside it.

    Shards are rewritten as streams, so that memory stays flat whatever the model's size. The output appears under
    its name only when it is complete; a fold that was interrupted goes on from its last finished shard. Where the
    work is done elsewhere, this process plans, names finished shards, and writes index, record and config last.

    Args:
        model: a local folder or a Hub id.
        output: the folder to write; by default `<name>-FlashNorm` in the current folder.
        revision, token, cache_dir, local_files_only: as in huggingface_hub.
        trust_remote_code: let the checkpoint's own Python code define the architecture.
        final_norm: "auto", "keep" or "untie"; see `make_plan`.
        layout: "identity" writes folded norms as the identity of their convention, "dropped" leaves them out.
        rotate: "hadamard" or "random": rotate the residual stream after the fold, by the matrix that this and `seed`
            stand for; see docs/rotation.md.
        target: the format that the result will be quantized to ("q4_k_m", "w8a8-int8", ...): fold, or fold and rotate,
            as was measured to be best for it (docs/quantization.md). Excludes `rotate`.
        leave_grid: fold also weights that lie on a quantizer's grid already (trained or made for few bits).
        workers: threads per shard; by default the number of processors, 8 at most, and one where several shards are
            folded at a time elsewhere.
        overwrite: replace an output folder that holds a folded checkpoint. Without it, a folder that holds this very
            fold already is left as it is.
        follow_links: carry over also what links of the source lead to that lead out of its folder.
        dask: address of a dask scheduler whose workers share source and output folder with this machine.
        executor: any other concurrent.futures executor; its workers share both folders, too.
        on_progress: called with (done, all, what is going on): bytes, or steps where that is a `Steps`. In a notebook a
            bar is shown where there is none.
    Returns:
        The folder, the plan, and what was written. `verify(result.output)` proves that it is the same model.
    Raises:
        UsageError: the call contradicts itself or the file system.
        FlashNormError: the checkpoint is broken, folded already, has nothing to fold, cannot be planned or rotated, is
            better left alone for `target`, or lies on a quantizer's grid.
    """
    check_options(final_norm, layout, workers)
    seed = checked_seed(rotate, seed, target)
    if dask is not None and executor is not None:
        raise UsageError("`dask` and `executor` exclude each other")
    report = on_progress or (lambda done, total, what: None)
    source = Source(str(model), revision, token, Path(cache_dir) if cache_dir else None, local_files_only, follow_links)

    with contextlib.ExitStack() as stack:
        if dask is not None:
            engine = stack.enter_context(dask_engine(dask, report))
        else:
            engine = any_executor(executor) if executor else in_turn()
        rotation = None if rotate is None else (rotate, seed)
        planning = Planning(final_norm, trust_remote_code, rotation, target, leave_grid, seed)
        return _fold(source, output, engine, planning, layout, workers, overwrite, report)


def _fold(
    source: Source,
    output: str | Path | None,
    engine: Engine,
    planning: Planning,
    layout: str,
    workers: int | None,
    overwrite: bool,
    report: Progress,
) -> FoldResult:
    started = time.monotonic()
    report(0, 0, "Reading headers")
    checkpoint = open_checkpoint(source, weights=False)
    refuse_folded(checkpoint)
    refuse_adapter(checkpoint)
    wanted = Path(output) if output else Path(f"{checkpoint.name}-FlashNorm")
    check_names(wanted, (*checkpoint.shards, *checkpoint.others))
    older = None if overwrite else older_fold(wanted)
    target = check_output(wanted, overwrite or older is not None, checkpoint.folder)
    plan, chosen = plan_for(checkpoint, planning, report)
    if older is not None:
        if why := not_this_fold(checkpoint, plan, layout, target, older):
            raise UsageError(f"{wanted}: exists already, and {why}; `overwrite=True` replaces it")
        return _already_done(target, plan, layout, older, checkpoint.left_out, time.monotonic() - started)
    if checkpoint.commit is not None:
        report(0, 0, f"Downloading {source.name}")
        headers, checkpoint = (
            checkpoint,
            open_checkpoint(dataclasses.replace(source, revision=checkpoint.commit), on_progress=report),
        )
        if {n: h.raw for n, h in headers.shards.items()} != {n: h.raw for n, h in checkpoint.shards.items()}:
            raise CheckpointError(f"{source.name}: its headers changed between plan and download; run it again")

    give_back_memory()
    planned_at = time.monotonic()
    files = _shard_facts(checkpoint)
    plan = with_grid(checkpoint, plan, planning.leave_grid)
    gains = read_gains(checkpoint, plan)
    edits = shard_edits(checkpoint, plan, gains, layout)
    fingerprint = _fingerprint(checkpoint, plan, gains, layout, files)
    with work_folder(target, fingerprint, checkpoint.shards, source=source_name(source.name)) as work:
        if target.exists() and not overwrite and any(target.iterdir()):
            raise FlashNormError(f"{target}: exists already: it appeared while this fold was being planned")
        written = Writing(checkpoint, plan, layout, edits, files, work, report)
        written.run(engine, workers)
        written_at = time.monotonic()
        report(0, 0, "Waiting for the disk")
        flush(work, workers or processors())
        if _shard_facts(checkpoint) != files:
            raise CheckpointError(f"{source.name}: its shards changed while they were folded; run it again")
        work.publish(overwrite, not_an_output)
    seconds = (planned_at - started, written_at - planned_at, time.monotonic() - written_at)
    return FoldResult(
        output=target,
        plan=plan,
        layout=layout,
        bytes_written=written.total,
        flushed=written.flushed,
        resumed=written.resumed,
        left_out=checkpoint.left_out,
        seconds=seconds,
        notes=(*chosen, *work.notes),
        caution=caution(planning, gains.values()),
    )


def _already_done(
    target: Path, plan: Plan, layout: str, older: FoldRecord, left_out: tuple[LeftOut, ...], seconds: float
) -> FoldResult:
    flushed = older.content.get("flushed_to_zero")
    return FoldResult(
        output=target,
        plan=plan,
        layout=layout,
        bytes_written=0,
        flushed=flushed if isinstance(flushed, dict) else {},
        resumed=(),
        left_out=left_out,
        seconds=(seconds, 0.0, 0.0),
        already_done=True,
    )


def check_options(final_norm: str, layout: str, workers: int | None) -> None:
    """Raises UsageError."""
    if final_norm not in FINAL_NORM_CHOICES:
        raise UsageError(f"`final_norm` is one of {', '.join(FINAL_NORM_CHOICES)}, not {final_norm!r}")
    if layout not in record.LAYOUTS:
        raise UsageError(f"`layout` is one of {', '.join(record.LAYOUTS)}, not {layout!r}")
    if workers is not None and workers < 1:
        raise UsageError(f"`workers` has to be at least 1, not {workers}")


def give_back_memory() -> None:
    """Return what the trace has used to the system, where the C library can: it would stay beside the buffers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# ---- before the first write ------------------------------------------------------------------------------------------


def _shard_facts(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """What tells the shards from other files, and from themselves after a change. Raises CheckpointError."""
    found = {}
    for name in checkpoint.shards:
        try:
            found[name] = disk.facts((checkpoint.folder / name).stat())
        except OSError as error:
            raise CheckpointError(f"{checkpoint.folder / name}: {error.strerror}") from error
    return found


def read_gains(checkpoint: Checkpoint, plan: Plan, raw: Mapping[str, bytearray] | None = None) -> dict[str, np.ndarray]:
    """Gains of the folded norms, by tensor: float32 of shape (elements,), float64 where the norm is stored so.

    `raw` are the bytes of the norms' tensors, if they have been read.
    """
    import torch

    from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, read_tensors

    gains = {}
    raw = raw if raw is not None else read_tensors(checkpoint, [norm.tensor for norm in plan.folded])
    for norm in plan.folded:
        stored = torch.frombuffer(raw[norm.tensor], dtype=TORCH_DTYPE[checkpoint.tensors[norm.tensor].dtype])
        weight = stored if stored.dtype == torch.float64 else stored.float()
        gain = weight if norm.scale == 1.0 else weight * norm.scale
        gain = gain if norm.offset == 0.0 else gain + norm.offset
        if not bool(gain.isfinite().all()):
            raise FlashNormError(f"{norm.tensor}: holds inf or NaN; this checkpoint is broken")
        gains[norm.tensor] = gain.numpy()
    if all(bool((g == 1.0).all()) for g in gains.values()):
        raise FlashNormError(
            f"{checkpoint.source.name}: there is nothing to fold: every norm that could be holds the identity already"
        )
    return gains


def plan_fingerprint(checkpoint: Checkpoint, plan: Plan, gains: Mapping[str, np.ndarray], layout: str) -> str:
    """Equal for two folds that write the same bytes from shards with the same bytes."""
    digest = hashlib.sha256(json.dumps([__version__, layout, plan.to_json()], sort_keys=True).encode())
    for name, header in checkpoint.shards.items():
        digest.update(name.encode() + header.raw)
    for gain in gains.values():
        digest.update(gain.tobytes())
    return digest.hexdigest()


def _fingerprint(
    checkpoint: Checkpoint,
    plan: Plan,
    gains: Mapping[str, np.ndarray],
    layout: str,
    files: Mapping[str, tuple[int, ...]],
) -> str:
    """Equal for two runs that would write the same bytes: a later run may go on only with such shards.

    Finished shards may still be in memory only, so a run before the machine's last start does not count.
    """
    boot = Path("/proc/sys/kernel/random/boot_id")
    start = boot.read_text() if boot.exists() else ""
    digest = hashlib.sha256((start + plan_fingerprint(checkpoint, plan, gains, layout)).encode())
    digest.update(repr(sorted(files.items())).encode())
    return digest.hexdigest()
