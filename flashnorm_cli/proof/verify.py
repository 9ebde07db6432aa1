"""Verify a folded checkpoint against its source: run the levels, and write down what they found."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli._version import __version__
from flashnorm_cli.adapters.fold import CONFIG as ADAPTER
from flashnorm_cli.checkpoint.open import CONFIG, RECORD, Checkpoint, Progress, Source, open_checkpoint, read_json
from flashnorm_cli.errors import CheckpointError, UsageError
from flashnorm_cli.folding.fold import write_text
from flashnorm_cli.plan.planner import Plan
from flashnorm_cli.proof.contract import json_equal
from flashnorm_cli.proof.files import changed_files, hashed_files
from flashnorm_cli.proof.pairing import DROPPED, Pair, pair
from flashnorm_cli.proof.result import (
    LEVELS,
    MAX_ALGEBRA_ERROR,
    MAX_NOISE_RATIO,
    Finding,
    LevelResult,
    Verification,
    level_json,
)
from flashnorm_cli.record import write as records

RUNTIMES = ("vllm", "gguf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        if not _was_checkpoint(folder):
            raise
        return _broken(str(folded), origin, error, _environment(device, command))
    if origin is None:
        origin = _recorded_source(mine, token, where, local_files_only)
    theirs = open_checkpoint(origin, on_progress=report)
    if theirs.folder.resolve() == mine.folder.resolve():
        raise UsageError(f"{folded}: is the source itself; name a folded checkpoint and its source")
    report(0, 0, f"Tracing {', '.join(theirs.config.get('architectures') or ['the model'])}")
    both = pair(theirs, mine, trust_remote_code)

    run = _Levels(both, report, workers or min(os.cpu_count() or 1, 8), device, max_algebra, max_ratio)
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
        environment=_environment(device, command),
    )
    return _record(both, result, run, adopt, record)


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
    return records.recorded_source(read_json(folder / RECORD), target.name, folder, token, cache_dir, local_files_only)


def _recorded_source(
    checkpoint: Checkpoint, token: str | bool | None, cache_dir: Path | None, local_files_only: bool
) -> Source:
    name = checkpoint.source.name
    path = checkpoint.folder / RECORD
    if not path.exists():
        raise UsageError(f"{name}: has no {RECORD} that names its source; add --source <the model it was made from>")
    return records.recorded_source(read_json(path), name, checkpoint.folder, token, cache_dir, local_files_only)


# ---- the levels ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Levels:
    """Runs levels; `hashes` holds the sha256 of each folded shard once one has read it."""

    pair: Pair
    report: Progress
    workers: int
    device: str
    max_algebra: float
    max_ratio: float
    trust_remote_code: bool = False
    dtype: torch.dtype | None = None
    text: Path | None = None
    token_ids: Path | None = None
    insist: bool = False
    hashes: dict[str, str] = dataclasses.field(default_factory=dict)

    def all(
        self, levels: Collection[str], runtimes: Sequence[str], tasks: Sequence[str], limit: int | None
    ) -> list[LevelResult]:
        results: list[LevelResult] = []
        for level in LEVELS:
            if level not in levels:
                continue
            if level == "logits" and not self.insist and any(r.status == "failed" for r in results):
                reason = "the files are not right; --level logits runs it all the same"
                results.append(LevelResult(level, "skipped", reason=reason))
                continue
            results.append(self._timed(level, getattr(self, f"_{level}")))
        if "logits" in levels and self.device.startswith("cuda"):
            results.append(self._timed("kernels", self._kernels))
        results += [self._timed(f"runtime:{name}", partial(self._runtime, name)) for name in runtimes]
        if tasks:
            results.append(self._timed("eval", partial(self._eval, tasks, limit)))
        return results

    def _timed(self, level: str, run: Callable[[], LevelResult]) -> LevelResult:
        started = time.monotonic()
        result = run()
        return dataclasses.replace(result, level=level, seconds=round(time.monotonic() - started, 2))

    def _weights(self) -> LevelResult:
        from flashnorm_cli.proof.weights import check_weights

        result, self.hashes = check_weights(self.pair, self.workers, self.report)
        return result

    def _layers(self) -> LevelResult:
        from flashnorm_cli.proof.layers import check_layers

        return check_layers(self.pair, self.max_ratio, self.device, self.report)

    def _logits(self) -> LevelResult:
        from flashnorm_cli.proof.logits import check_logits, own_dtype, read_prompts

        return check_logits(
            self.pair,
            read_prompts(self.pair.source, self.text, self.token_ids, self.trust_remote_code),
            dtype=self.dtype or own_dtype(self.pair.source),
            device=self.device,
            max_algebra=self.max_algebra,
            max_ratio=self.max_ratio,
            trust_remote_code=self.trust_remote_code,
            insist=self.insist,
            report=self.report,
        )

    def _kernels(self) -> LevelResult:
        from flashnorm_cli.proof.kernels import check_kernels
        from flashnorm_cli.proof.logits import own_dtype

        return check_kernels(self.pair, self.dtype or own_dtype(self.pair.source), self.device)

    def _runtime(self, name: str) -> LevelResult:
        from flashnorm_cli.proof.engines import compare_runtime
        from flashnorm_cli.proof.logits import read_prompts

        prompts = read_prompts(self.pair.source, self.text, self.token_ids, self.trust_remote_code)
        return compare_runtime(
            name,
            self.pair.source.folder,
            self.pair.folded.folder,
            [list(prompt) for prompt in prompts.ids],
            self._own_dtype(),
            self.report,
            self.trust_remote_code,
        )

    def _own_dtype(self) -> str:
        from flashnorm_cli.proof.logits import own_dtype

        return str(self.dtype or own_dtype(self.pair.source)).removeprefix("torch.")

    def _eval(self, tasks: Sequence[str], limit: int | None) -> LevelResult:
        from flashnorm_cli.proof.evaluate import compare_eval

        folders = self.pair.source.folder, self.pair.folded.folder
        return compare_eval(list(tasks), *folders, self._own_dtype(), self.device, limit, self.report)


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


def _environment(device: str, command: str | None) -> dict[str, str]:
    import platform

    import transformers

    name = torch.cuda.get_device_name(torch.device(device)) if device.startswith("cuda") else platform.machine()
    return {
        "flashnorm": __version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device} ({name})",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command or "",
    }


# ---- the record ------------------------------------------------------------------------------------------------------


def _record(both: Pair, result: Verification, run: _Levels, adopt: bool, wanted: bool) -> Verification:
    """Write the result into the folded checkpoint, where it has a record or gets one now."""
    notes = []
    said = both.record
    hashes = _hashes(both.folded, run)
    before = (said or {}).get("verify")
    if isinstance(before, dict) and (changed := changed_files(before, hashes)):
        environment = before.get("environment")
        when = environment.get("date") if isinstance(environment, dict) else "an earlier day"
        notes.append(f"the verification of {when} is void: {', '.join(changed[:3])} changed since")
    weights = result.level("weights")
    if adopt and said is not None:
        notes.append("nothing to adopt: it has a record already")
    elif adopt and (weights is None or weights.status != "passed" or not result.equivalent):
        notes.append("not adopted: only a checkpoint that passes level weights gets a record")
    elif adopt and not both.gains:
        notes.append("not adopted: no norm of it is folded")
    elif adopt:
        said = _adopt(both)
        hashes[CONFIG] = _sha256(both.folded.folder / CONFIG)
        notes.append(f"adopted: wrote {RECORD}, and the flag into {CONFIG}")
    recorded = None
    if said is not None and both.folded.commit is None and (wanted or adopt):
        entry = _entry(both, result, hashes, said.get("verify"))
        try:
            write_text(both.folded.folder / RECORD, json.dumps({**said, "verify": entry}, indent=2) + "\n")
            recorded = str(both.folded.folder / RECORD)
        except OSError as error:
            notes.append(f"not recorded: {both.folded.folder / RECORD}: {error.strerror}")
    return dataclasses.replace(result, notes=tuple(notes), recorded=recorded)


def _entry(both: Pair, result: Verification, hashes: dict[str, str], before: Any) -> dict[str, Any]:
    """What flashnorm.json keeps: this result, and levels of an earlier one if the files are still the same."""
    levels = {level.level: level_json(level) for level in result.levels}
    for entry in levels.values():
        entry["date"] = result.environment["date"]
    if isinstance(before, dict) and before.get("files") == hashes and isinstance(before.get("levels"), dict):
        levels = {**before["levels"], **levels}
    statuses = {level["status"] for level in levels.values()}
    headers = {name: header.raw for name, header in both.source.shards.items()}
    return {
        "equivalent": "passed" in statuses and "failed" not in statuses,
        "levels": levels,
        "thresholds": result.thresholds,
        "environment": result.environment,
        "source": {
            "name": result.source,
            "commit": result.commit,
            "files": {
                name: records.file_facts(both.source.folder / name, headers.get(name))
                for name in (CONFIG, *both.source.shards)
            },
        },
        "files": hashes,
    }


def _hashes(folded: Checkpoint, run: _Levels) -> dict[str, str]:
    """sha256 of every file that a verification speaks of; shards are only read if no level has."""
    names = hashed_files(folded)
    missing = [name for name in names if name not in run.hashes]
    done = 0
    total = sum((folded.folder / name).stat().st_size for name in missing)
    with ThreadPoolExecutor(run.workers) as pool:
        for name, digest in zip(missing, pool.map(lambda n: _sha256(folded.folder / n), missing), strict=True):
            run.hashes[name] = digest
            done += (folded.folder / name).stat().st_size
            run.report(done, total, "Hashing")
    return {name: run.hashes[name] for name in names}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _adopt(both: Pair) -> dict[str, Any]:
    """Give a checkpoint of another tool the flags and the record that its files deserve."""
    folded = both.folded
    why = "the tool that folded this checkpoint kept it"
    norms = tuple(
        dataclasses.replace(norm, reason=why) if norm.folded and norm.tensor not in both.gains else norm
        for norm in both.plan.norms
    )
    left = [norm for norm in both.plan.norms if norm.folded and norm.tensor not in both.gains]
    plan: Plan = dataclasses.replace(
        both.plan,
        norms=norms,
        readers=tuple(both.readers.values()),
        added=both.expected_added,
        untie=both.plan.untie and bool(both.expected_added),
        folded_flag=both.plan.folded_flag and not left,
    )
    layout = "dropped" if any(both.states[name] == DROPPED for name in both.gains) else "identity"
    path = folded.folder / CONFIG
    config = records.folded_config(folded.config, plan, layout)
    if not json_equal(config, folded.config):
        write_text(path, records.dump_like(config, path.read_text(encoding="utf-8")))
    return {**records.full_record(both.source, plan, layout, {}), "adopted": True}
