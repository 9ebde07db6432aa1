"""Verify a folded checkpoint against its source: run the levels, and write down what they found."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

import torch

from flashnorm_cli._version import __version__
from flashnorm_cli.adapters.files import CONFIG as ADAPTER
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, Progress, Source, read_json
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.progress import with_notebook_bar
from flashnorm_cli.choices import Dtype, Level, Runtime
from flashnorm_cli.errors import CheckpointError, FolderError, UsageError
from flashnorm_cli.proof.levels import run_levels, threads
from flashnorm_cli.proof.options import Access, VerifyOptions
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
from flashnorm_cli.record.read import ADD_SOURCE, FoldRecord, recorded_source

Word = TypeVar("Word", bound=str)


@with_notebook_bar
def verify(
    folded: str | Path,
    source: str | Path | None = None,
    *,
    levels: Level | Iterable[Level] = (),
    runtimes: Runtime | Iterable[Runtime] = (),
    tasks: str | Iterable[str] = (),
    limit: int | None = None,
    text: str | Path | None = None,
    token_ids: str | Path | None = None,
    device: str | None = None,
    dtype: Dtype | None = None,
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
    follow_links: bool = False,
    trust_remote_code: bool = False,
    workers: int | None = None,
    command: str | None = None,
    on_progress: Progress | None = None,
) -> Verification:
    """Find out whether a folded checkpoint is the same model as its source.

    Args:
        folded: a local folder or a Hub id.
        source: the checkpoint that it was made from; by default the one that its record names.
        levels: some of "weights", "layers", "logits"; by default all of them.
        runtimes: engines to run both checkpoints in as well: "vllm", "gguf" (llama.cpp).
        tasks, limit: tasks of lm-evaluation-harness to run on both, and how many items of each.
        text, token_ids: a text file, or a JSON file with lists of token ids, instead of the built-in prompts.
        device: for layers and logits; by default "cuda" where there is one, else "cpu".
        dtype: what the models run in; by default the one they are stored in.
        max_algebra: largest relative error of the logits of a fold made in float32.
        max_ratio: largest ratio of the folded checkpoint's error to the noise floor, the source's own.
        insist: run level logits although the weights are not right.
        trust_remote_code: let the source's own Python code define the architecture.
        workers: threads; by default the number of processors, 8 at most.
        adopt: give a checkpoint that another tool has folded a record and flag, if it passes.
        record: write the result into flashnorm.json.
        revision, source_revision, token, cache_dir, local_files_only: as in huggingface_hub.
        follow_links: follow links of both folders also where they lead out of them.
        command: how to reproduce this, for the record.
        on_progress: called with (done, all, what is going on).
    Returns:
        The verdict with what each level found; true where it is "equivalent", and `raise_for_failure` raises elsewhere.
    Raises:
        UsageError: the call contradicts itself or the file system.
        FlashNormError: the source is broken, folded itself, or cannot be planned.
    """
    chosen = {"device": device} if device is not None else {}
    options = VerifyOptions(
        levels=_words(levels) or LEVELS,
        runtimes=_words(runtimes),
        tasks=_words(tasks),
        limit=limit,
        text=Path(text).expanduser() if text else None,
        token_ids=Path(token_ids).expanduser() if token_ids else None,
        dtype=dtype,
        max_algebra=max_algebra,
        max_ratio=max_ratio,
        insist=insist,
        trust_remote_code=trust_remote_code,
        workers=workers,
        **chosen,
    )
    access = Access(token, Path(cache_dir) if cache_dir else None, local_files_only, follow_links)
    target = access.source(str(folded), revision)
    origin = None if source is None else access.source(str(source), source_revision)
    if origin is None and source_revision is not None:
        raise UsageError("`source_revision` needs `source`")
    return verify_pair(target, origin, options, access, adopt, record, command, on_progress)


def verify_pair(
    target: Source,
    origin: Source | None,
    options: VerifyOptions,
    access: Access,
    adopt: bool = False,
    record: bool = True,
    command: str | None = None,
    on_progress: Progress | None = None,
) -> Verification:
    """As `verify`, for checkpoints that are named already; without `origin`, the one that the record names."""
    report = on_progress or (lambda done, total, what: None)
    report(0, 0, "Reading headers")
    name, folder = target.name, Path(target.name).expanduser()
    if (folder / ADAPTER).is_file() and not (folder / CONFIG).exists():
        raise UsageError(
            f"{name}: is an adapter; name the folded checkpoint (`flashnorm fold-adapter` checks what it writes)"
        )
    if origin is None and folder.is_dir():
        origin = _source_beside(name, folder, access)
    where = environment(options.device, command)
    try:
        folded = open_checkpoint(target, on_progress=report)
        if (folded.folder / RECORD).exists():
            FoldRecord.read(folded.folder / RECORD)
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise  # a disk that does not answer says nothing of the files
        if isinstance(error, FolderError) or not _was_checkpoint(folder):
            raise
        return _broken(name, origin, error, where)
    if origin is None:
        origin = _recorded_source(folded, access)
    source = open_checkpoint(replace(origin, follow_links=access.follow_links), on_progress=report)
    if source.folder.resolve() == folded.folder.resolve():
        raise UsageError(f"{name}: is the source itself; name a folded checkpoint and its source")
    report(0, 0, f"Tracing {', '.join(source.config.get('architectures') or ['the model'])}")
    both = pair(source, folded, options.trust_remote_code)
    run = run_levels(both, options, report)
    result = Verification(
        folded=name,
        source=source.source.name,
        commit=source.commit,
        foreign=both.foreign,
        plan=both.plan,
        levels=run.results,
        thresholds={"max_algebra_error": options.max_algebra, "max_noise_ratio": options.max_ratio},
        environment=where,
    )
    return record_result(both, result, run.hashes, threads(options), report, adopt, record)


# ---- before the work -------------------------------------------------------------------------------------------------


def _words(words: Word | Iterable[Word]) -> tuple[Word, ...]:
    """Several words; one that stands alone is one, not its letters."""
    return cast("tuple[Word, ...]", (words,)) if isinstance(words, str) else tuple(words)


def _was_checkpoint(folder: Path) -> bool:
    """Whether a folder that cannot be opened has been a checkpoint: then something of it is lost."""
    return folder.is_dir() and ((folder / RECORD).exists() or any(folder.glob("*.safetensors*")))


def _source_beside(name: str, folder: Path, access: Access) -> Source:
    """The source that the record of a local folder names."""
    if not (folder / RECORD).exists():
        if not (folder / CONFIG).exists() and not _was_checkpoint(folder):
            read_json(folder / CONFIG)  # says that this is no checkpoint
        raise UsageError(f"{name}: has no {RECORD} that names its source; {ADD_SOURCE}")
    record = FoldRecord.read(folder / RECORD)
    return recorded_source(record, name, folder, access.token, access.cache_dir, access.local_files_only)


def _recorded_source(checkpoint: Checkpoint, access: Access) -> Source:
    name = checkpoint.source.name
    path = checkpoint.folder / RECORD
    if not path.exists():
        raise UsageError(f"{name}: has no {RECORD} that names its source; {ADD_SOURCE}")
    record = FoldRecord.read(path)
    return recorded_source(record, name, checkpoint.folder, access.token, access.cache_dir, access.local_files_only)


def _broken(folded: str, source: Source | None, error: CheckpointError, where: dict[str, str]) -> Verification:
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
        environment=where,
    )


def environment(device: str, command: str | None) -> dict[str, str]:
    """Versions, device, date (ISO 8601, UTC) and command, as the record keeps them."""
    import platform

    import transformers

    name = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else platform.machine()
    return {
        "flashnorm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command or "",
    }
