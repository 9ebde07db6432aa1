"""Verify a folded checkpoint against its source: run the levels, and write down what they found."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from flashnorm_cli.adapters.files import CONFIG as ADAPTER
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, Progress, Source, read_json
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import CheckpointError, UsageError
from flashnorm_cli.proof.levels import DTYPES, Levels, environment
from flashnorm_cli.proof.pairing import pair
from flashnorm_cli.proof.recording import record_result
from flashnorm_cli.proof.result import (
    LEVELS,
    MAX_ALGEBRA_ERROR,
    MAX_NOISE_RATIO,
    Finding,
    LevelResult,
    Verification,
)
from flashnorm_cli.record.read import recorded_source

RUNTIMES = ("vllm", "gguf")


def verify(
    folded: str | Path,
    source: str | Path | None = None,
    *,
    levels: Collection[str] = (),
    runtimes: Sequence[str] = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    text: str | Path | None = None,
    token_ids: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_algebra: float = MAX_ALGEBRA_ERROR,
    max_ratio: float = MAX_NOISE_RATIO,
    insist: bool = False,
    adopt: bool = False,
    record: bool = True,
    revision: str | None = None,
    source_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    workers: int | None = None,
    command: str | None = None,
    on_progress: Progress | None = None,
) -> Verification:
    """Find out whether a folded checkpoint is the same model as its source.

    Args:
        folded: a local folder or a Hub id.
        source: the checkpoint that it was made from; by default the one that its record names.
        levels: some of "weights", "layers", "logits"; by default all of them, where they can run.
        runtimes: engines to run both checkpoints in: "vllm", "gguf" (llama.cpp).
        tasks, limit: tasks of lm-evaluation-harness to run on both, and how many items of each.
        text, token_ids: a text file, or a JSON file with lists of token ids, instead of the built-in prompts.
        device: for layers and logits; by default "cuda" where there is one, else "cpu".
        dtype: what the models run in; by default the one that they are stored in.
        max_algebra: largest relative error of the logits of a fold made in float32.
        max_ratio: largest ratio of the folded checkpoint's error to the noise floor, the source's own.
        insist: run level logits although the model may not fit into memory, or the files are not right.
        adopt: give a checkpoint that another tool has folded a record and flag, if it passes.
        record: write the result into flashnorm.json.
        revision, source_revision, token, cache_dir, local_files_only: as in huggingface_hub.
        trust_remote_code: let the source's own Python code define the architecture.
        workers: threads; by default the number of processors, 8 at most.
        command: how to reproduce this, for the record.
        on_progress: called with (done, all, what is going on).
    Raises:
        UsageError: the call contradicts itself or the file system.
        FlashNormError: the source is broken, folded itself, or cannot be planned.
    """
    _check_call(levels, runtimes, dtype, workers, max_algebra, max_ratio)
    device = _device(device)
    report = on_progress or (lambda done, total, what: None)
    where = Path(cache_dir) if cache_dir else None
    report(0, 0, "Reading headers")
    target = Source(str(folded), revision, token, where, local_files_only)
    folder = Path(str(folded)).expanduser()
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).exists():
        raise UsageError(
            f"{folded}: is an adapter; name the folded checkpoint (`flashnorm fold-adapter` checks what it writes)"
        )
    origin = _source_of(target, folder, source, source_revision, token, where, local_files_only)
    try:
        mine = open_checkpoint(target, on_progress=report)
        if (mine.folder / RECORD).exists():
            read_json(mine.folder / RECORD)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise  # a disk that does not answer says nothing of the files
        if not _was_checkpoint(folder):
            raise
        return _broken(str(folded), origin, error, environment(device, command))
    if origin is None:
        origin = _recorded_source(mine, token, where, local_files_only)
    theirs = open_checkpoint(origin, on_progress=report)
    if theirs.folder.resolve() == mine.folder.resolve():
        raise UsageError(f"{folded}: is the source itself; name a folded checkpoint and its source")
    report(0, 0, f"Tracing {', '.join(theirs.config.get('architectures') or ['the model'])}")
    both = pair(theirs, mine, trust_remote_code)

    run = Levels(both, report, workers or min(os.cpu_count() or 1, 8), device, max_algebra, max_ratio)
    run.trust_remote_code = trust_remote_code
    run.dtype = DTYPES[dtype] if dtype else None
    run.text = Path(text).expanduser() if text else None
    run.token_ids = Path(token_ids).expanduser() if token_ids else None
    run.insist = insist
    results = run.all(tuple(levels) or (() if runtimes or tasks else LEVELS), runtimes, tasks, limit)

    result = Verification(
        folded=str(folded),
        source=theirs.source.name,
        commit=theirs.commit,
        foreign=both.foreign,
        plan=both.plan,
        levels=tuple(results),
        thresholds={"max_algebra_error": max_algebra, "max_noise_ratio": max_ratio},
        environment=environment(device, command),
    )
    return record_result(both, result, run, adopt, record)


# ---- before the work -------------------------------------------------------------------------------------------------


def _check_call(
    levels: Collection[str],
    runtimes: Collection[str],
    dtype: str | None,
    workers: int | None,
    max_algebra: float,
    max_ratio: float,
) -> None:
    for given, known, what in ((levels, LEVELS, "level"), (runtimes, RUNTIMES, "runtime")):
        for each in given:
            if each not in known:
                raise UsageError(f"{what} is one of {', '.join(known)}, not {each!r}")
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"dtype is one of {', '.join(DTYPES)}, not {dtype!r}")
    if workers is not None and workers < 1:
        raise UsageError(f"workers has to be at least 1, not {workers}")
    if not max_algebra > 0 or not max_ratio > 0:
        raise UsageError("max_algebra and max_ratio have to be greater than 0")


def _device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError:
        raise UsageError(f"{device!r} is no device; try cpu, cuda or cuda:1") from None
    if kind.type not in ("cpu", "cuda"):
        raise UsageError(f"{device!r}: only cpu and cuda are supported")
    if kind.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"{device}: torch sees no CUDA device here")
    if kind.index is not None and kind.type == "cuda" and kind.index >= torch.cuda.device_count():
        raise UsageError(f"{device}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _was_checkpoint(folder: Path) -> bool:
    """Whether a folder that cannot be opened has been a checkpoint: then something of it is lost."""
    return folder.is_dir() and ((folder / RECORD).exists() or any(folder.glob("*.safetensors*")))


def _source_of(
    target: Source,
    folder: Path,
    source: str | Path | None,
    source_revision: str | None,
    token: str | bool | None,
    cache_dir: Path | None,
    local_files_only: bool,
) -> Source | None:
    """The source that the call or a local record names; None where the record is on the Hub still."""
    if source is not None:
        return Source(str(source), source_revision, token, cache_dir, local_files_only)
    if source_revision is not None:
        raise UsageError("--source-revision needs --source")
    if not folder.is_dir():
        return None
    if not (folder / RECORD).exists():
        if not (folder / CONFIG).exists() and not _was_checkpoint(folder):
            read_json(folder / CONFIG)  # says that this is no checkpoint
        raise UsageError(
            f"{target.name}: has no {RECORD} that names its source; add --source <the model it was made from>"
        )
    return recorded_source(read_json(folder / RECORD), target.name, folder, token, cache_dir, local_files_only)


def _recorded_source(
    checkpoint: Checkpoint, token: str | bool | None, cache_dir: Path | None, local_files_only: bool
) -> Source:
    name = checkpoint.source.name
    path = checkpoint.folder / RECORD
    if not path.exists():
        raise UsageError(f"{name}: has no {RECORD} that names its source; add --source <the model it was made from>")
    return recorded_source(read_json(path), name, checkpoint.folder, token, cache_dir, local_files_only)


# ---- the levels ------------------------------------------------------------------------------------------------------


def _broken(folded: str, source: Source | None, error: CheckpointError, environment: dict[str, str]) -> Verification:
    """The result for files that do not hold together: something of the checkpoint is lost or cut off."""
    finding = Finding("files", str(error))
    return Verification(
        folded=folded,
        source=source.name if source else "",
        commit=None,
        foreign=False,
        plan=None,
        levels=(LevelResult("weights", "failed", findings=(finding,)),),
        thresholds={},
        environment=environment,
    )


# ---- the record ------------------------------------------------------------------------------------------------------
