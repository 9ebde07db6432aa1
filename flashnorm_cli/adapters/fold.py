"""Fold a PEFT adapter that was trained on a source, so that it fits the folded base.

`adapter_plan.py` decides what happens to each tensor and why that is exact; here are the files around it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.header import Header, build_header, read_header
from flashnorm_cli.checkpoint.open import (
    OTHER_WEIGHTS,
    RECORD,
    Checkpoint,
    Progress,
    Source,
    hub_errors,
    open_checkpoint,
    read_json,
)
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError
from flashnorm_cli.plan.planner import FORMAT, grouped
from flashnorm_cli.record import write as record

if TYPE_CHECKING:
    import torch

    from flashnorm_cli.adapters.check import AdapterCheck
    from flashnorm_cli.adapters.plan import AdapterPlan

# These read no norm, or commute with its gain: they run on source and folded base alike (adapter_plan.py).
FITTING_TYPES = ("IA3", "PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING")
CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter on this disk. `others` are files to carry over, `left_out` those that would be unfolded copies."""

    source: Source
    folder: Path
    commit: str | None
    config: dict[str, Any]
    header: Header
    others: tuple[str, ...]
    left_out: tuple[str, ...]

    @cached_property
    def _tensors(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.folder / WEIGHTS, framework="pt")

    def read(self, name: str) -> torch.Tensor:
        """A tensor in its own dtype and shape."""
        return self._tensors.get_tensor(name)


@dataclass(frozen=True)
class AdapterResult:
    """What folding an adapter did.

    `changed` counts tensors by what was done: "gain" (the input dimension was scaled), "ratio" (a norm's own copy),
    "magnitude" (DoRA). `added` are new tensors, `flushed` counts products that became zero, by tensor. `check` is what
    the comparison on random activations found. `notes` are for the user.
    """

    output: Path
    adapter: str
    base: str
    source: str
    peft_type: str
    tensors: int
    changed: dict[str, int]
    added: tuple[str, ...]
    left_out: tuple[str, ...]
    flushed: dict[str, int]
    check: AdapterCheck
    notes: tuple[str, ...]
    bytes_written: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "output": str(self.output),
            "adapter": self.adapter,
            "base": self.base,
            "source": self.source,
            "peft_type": self.peft_type,
            "tensors": self.tensors,
            "changed": self.changed,
            "added": list(self.added),
            "left_out": list(self.left_out),
            "flushed_to_zero": self.flushed,
            "check": self.check.to_json(),
            "notes": list(self.notes),
            "bytes_written": self.bytes_written,
        }


def fold_adapter(
    adapter: str | Path,
    base: str | Path,
    output: str | Path | None = None,
    *,
    source: str | Path | None = None,
    revision: str | None = None,
    base_revision: str | None = None,
    source_revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> AdapterResult:
    """Write an adapter that does to a folded base what the given one does to the base's source.

    Folded base plus folded adapter compute what source plus adapter compute. Base and source are read in parts only:
    headers, norms, and a few rows of the layers that read them to see that the two belong together (whole layers for
    DoRA). Nothing is written if anything cannot be folded exactly.

    Args:
        adapter: a PEFT adapter, a folder or a Hub id, trained on the source.
        base: the folded checkpoint, a folder or a Hub id.
        output: the folder to write; by default `<name>-FlashNorm` in the current folder.
        source: what the base was folded from; by default what its record names.
        revision, base_revision, source_revision: branch, tag or commit of each Hub repository.
        token, cache_dir, local_files_only: as in huggingface_hub.
        trust_remote_code: let the source's own Python code define the architecture.
        overwrite: replace an output folder that holds an adapter.
        on_progress: called with (done, all, what is going on).
    Raises:
        UsageError: the call contradicts itself or the file system.
        AdapterError: the adapter cannot be folded exactly; the message says why and what to do instead.
        FlashNormError: adapter, base or source is broken, or they do not belong together.
    """
    report = on_progress or (lambda done, total, what: None)
    where = Path(cache_dir) if cache_dir else None
    report(0, 0, "Reading headers")
    mine = open_adapter(Source(str(adapter), revision, token, where, local_files_only))
    folded = open_checkpoint(Source(str(base), base_revision, token, where, local_files_only), weights=False)
    said = _record_of(folded)
    _refuse_folded(mine, folded)

    from flashnorm_cli.adapters.check import check_adapter, check_base
    from flashnorm_cli.adapters.plan import FoldedModel, plan_adapter, refuse_unfoldable
    from flashnorm_cli.folding.fold import check_output, disk_errors, flush, publish, write_text

    refuse_unfoldable(mine.config)
    name = mine.source.name.rsplit("/", 1)[-1] if mine.commit else mine.folder.resolve().name
    wanted = Path(output) if output else Path(f"{name}-FlashNorm")
    target = check_output(wanted, overwrite, mine.folder, CONFIG, "an adapter")
    for folder in (folded.folder, Path(str(source)).expanduser() if source else folded.folder):
        if folder.is_dir() and target.resolve() == folder.resolve():
            raise UsageError(f"{wanted}: is the base or its source; choose another output folder")

    if source is not None:
        origin = Source(str(source), source_revision, token, where, local_files_only)
    elif source_revision is not None:
        raise UsageError("--source-revision needs --source")
    else:
        origin = record.recorded_source(said, folded.source.name, folded.folder, token, where, local_files_only)
    theirs = open_checkpoint(origin, weights=False)
    _check_source(theirs, said)
    report(0, 0, f"Tracing {', '.join(theirs.config.get('architectures') or ['the model'])}")
    model = FoldedModel(theirs, folded, said, mine.config.get("task_type"), trust_remote_code)
    report(0, 0, "Comparing base and source")
    errors = check_base(model)
    plan = plan_adapter(mine.config, mine.header, model, mine.read, report)

    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(target):
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        with disk_errors(target):
            inside = work / "adapter"
            inside.mkdir()
            flushed, written = _write_weights(mine, plan, inside / WEIGHTS, report)
            report(0, 0, "Checking on random activations")
            check = check_adapter(model, plan, mine.read, inside / WEIGHTS, errors)
            for relative in mine.others:
                (inside / relative).parent.mkdir(parents=True, exist_ok=True)
                if relative == CARD:
                    card = (mine.folder / CARD).read_text(encoding="utf-8", errors="surrogateescape")
                    write_text(inside / CARD, _card(card, mine, folded))
                else:
                    shutil.copyfile(mine.folder / relative, inside / relative)
            result = AdapterResult(
                output=target,
                adapter=str(adapter),
                base=str(base),
                source=theirs.source.name,
                peft_type=str(mine.config["peft_type"]),
                tensors=len(mine.header.tensors) + len(plan.added),
                changed=plan.kinds(),
                added=tuple(plan.added),
                left_out=mine.left_out,
                flushed=flushed,
                check=check,
                notes=(*_about_names(mine, theirs, folded), *plan.notes),
                bytes_written=written,
            )
            write_text(
                inside / RECORD, json.dumps(_adapter_record(mine, folded, theirs, plan, result), indent=2) + "\n"
            )
            config = {**mine.config, **plan.config, "base_model_name_or_path": str(base), "revision": base_revision}
            original = (mine.folder / CONFIG).read_text(encoding="utf-8")
            write_text(inside / CONFIG, record.dump_like(config, original))
            report(0, 0, "Waiting for the disk")
            flush(inside, 1)
            publish(inside, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return result


# ---- before the work -------------------------------------------------------------------------------------------------


def open_adapter(source: Source) -> Adapter:
    """Find an adapter and check its files. A Hub repository is downloaded, without weights in other formats.

    Raises UsageError where the name is neither a folder nor a Hub id, CheckpointError where the files are no adapter.
    """
    folder = Path(source.name).expanduser()
    commit = None
    if not folder.is_dir():
        if folder.exists():
            raise UsageError(f"{source.name}: is a file; name the folder that holds {CONFIG}")
        if source.name.startswith((".", "/", "~")) or source.name.count("/") != 1:
            raise UsageError(f"{source.name}: no such folder")
        folder = _download(source)
        commit = folder.name
    if not (folder / CONFIG).is_file():
        inner = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
        hint = f"; it holds adapters in {', '.join(inner)}: name one of them" if inner else ": is this a PEFT adapter?"
        raise CheckpointError(f"{source.name}: there is no {CONFIG}{hint}")
    config = read_json(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        old = folder / "adapter_model.bin"
        if old.is_file() or commit is not None:
            raise CheckpointError(
                f"{source.name}: holds no {WEIGHTS}; a .bin file may run code when it is loaded, so convert it "
                'yourself: python -c "import torch, safetensors.torch as s; s.save_file({k: v.contiguous().clone() '
                f"for k, v in torch.load('{old}', weights_only=True).items()}}, '{folder / WEIGHTS}', "
                "{'format': 'pt'})\""
            )
        raise CheckpointError(f"{source.name}: there is no {WEIGHTS}")
    others, left_out = [], []
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        parts = [folder / Path(*relative.parts[:i]) for i in range(1, len(relative.parts))]
        if {".git", ".cache"} & set(relative.parts) or relative.as_posix() in (CONFIG, WEIGHTS, RECORD):
            continue
        inner_adapter = any((part / CONFIG).exists() for part in parts)  # a checkpoint of the training, say
        if path.is_dir() and not path.is_symlink():
            if (path / CONFIG).exists() and not inner_adapter:
                left_out.append(f"{relative.as_posix()}/")
        elif inner_adapter:
            continue
        elif path.name.endswith(tuple(OTHER_WEIGHTS)) or path.is_dir():
            left_out.append(relative.as_posix())
        elif path.is_file() and os.access(path, os.R_OK):
            others.append(relative.as_posix())
        else:
            raise CheckpointError(f"{path}: cannot be read, so it cannot be carried over")
    return Adapter(source, folder, commit, config, read_header(folder / WEIGHTS), tuple(others), tuple(left_out))


def _download(source: Source) -> Path:
    from huggingface_hub import snapshot_download

    unwanted = [f"*{suffix}" for suffix in OTHER_WEIGHTS if suffix != ".safetensors"]
    with hub_errors(source.name):
        return Path(
            snapshot_download(
                source.name,
                revision=source.revision,
                token=source.token,
                cache_dir=source.cache_dir,
                local_files_only=source.local_files_only,
                ignore_patterns=[*unwanted, "checkpoint-*/*"],
            )
        )


def _record_of(base: Checkpoint) -> dict[str, Any]:
    """The base's record. Raises UsageError where it is not folded, or not by this tool."""
    name = base.source.name
    if not (base.folder / RECORD).is_file():
        if base.config.get("flashnorm_folded"):
            raise UsageError(
                f"{name}: is folded, but has no {RECORD} that says how; `flashnorm verify {name} --source <its source> "
                "--adopt` writes one"
            )
        raise UsageError(f"{name}: is not a folded checkpoint (no {RECORD}); fold it with `flashnorm fold` first")
    said = read_json(base.folder / RECORD)
    if said.get("format") != FORMAT:
        raise FlashNormError(f"{name}: its {RECORD} has format {said.get('format')!r}; a newer flashnorm may read it")
    wanted = {"norms": {"tensor", "shape", "scale", "offset", "folded"}, "readers": {"tensor", "dim", "runs"}}
    for what, keys in wanted.items():
        entries = said.get(what)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in entries):
            raise CheckpointError(f"{name}: its {RECORD} holds no plan")
    return said


def _refuse_folded(adapter: Adapter, base: Checkpoint) -> None:
    """An adapter of the folded base itself fits already, and folding twice would break it."""
    name = adapter.source.name
    if (adapter.folder / RECORD).exists():
        raise FlashNormError(f"{name}: is folded already ({RECORD} says so); fold the adapter that it was made from")
    made_for = adapter.config.get("base_model_name_or_path")
    if isinstance(made_for, str) and made_for and _same_model(made_for, base):
        raise FlashNormError(
            f"{name}: its {CONFIG} says that it was made for {made_for}, which is the folded base itself: it fits as "
            "it is. If that is wrong, write its true base there"
        )


def _same_model(name: str, checkpoint: Checkpoint) -> bool:
    return _same_place(name, checkpoint.source.name) or _same_place(name, str(checkpoint.folder))


def _check_source(source: Checkpoint, said: dict[str, Any]) -> None:
    """The source has to be the one that was folded, as far as its headers tell; its values are compared later."""
    facts = said.get("source_files")
    for name, fact in (facts if isinstance(facts, dict) else {}).items():
        header = source.shards.get(name)
        if header is None or not isinstance(fact, dict) or "header_sha256" not in fact:
            continue
        if hashlib.sha256(header.raw).hexdigest() != fact["header_sha256"]:
            raise FlashNormError(f"{source.source.name}: the base was folded from another {name} than this one")


def _about_names(adapter: Adapter, source: Checkpoint, base: Checkpoint) -> list[str]:
    """Names that do not match need not be wrong (a quantized twin, a copy), but the user should know."""
    made_for = adapter.config.get("base_model_name_or_path")
    if not isinstance(made_for, str) or not made_for or _same_model(made_for, source):
        return []
    if Path(made_for).name == Path(source.source.name).name:
        return []
    return [
        f"the adapter says that it was trained on {made_for}, while the base was folded from {source.source.name}; "
        "right if the two hold the same weights"
    ]


# ---- writing ---------------------------------------------------------------------------------------------------------


def _write_weights(adapter: Adapter, plan: AdapterPlan, path: Path, report: Progress) -> tuple[dict[str, int], int]:
    """Write the folded tensors in the order of the original, added ones at the end. Returns flushes and bytes."""
    from flashnorm_cli.adapters.plan import apply

    entries = [(e.name, e.dtype, e.shape) for e in adapter.header.tensors.values()]
    tensors = adapter.header.tensors
    entries += [(name, tensors[o].dtype, tensors[o].shape) for name, (o, _) in plan.added.items()]
    header = build_header(entries, adapter.header.metadata)
    flushed = {}
    edits = {**plan.edits, **{name: edit for name, (_, edit) in plan.added.items() if edit is not None}}
    origins = {name: origin for name, (origin, _) in plan.added.items()}
    with (adapter.folder / WEIGHTS).open("rb") as source, path.open("xb") as file:
        file.write(header.raw)
        for name, _, _ in sorted(entries, key=lambda entry: header.tensors[entry[0]].start):
            origin = origins.get(name, name)
            if name in edits:
                result, zeros = apply(name, adapter.read(origin), edits[name])
                file.write(_bytes_of(result))
                if zeros:
                    flushed[name] = zeros
            else:
                source.seek(adapter.header.data_start + tensors[origin].start)
                file.write(source.read(tensors[origin].nbytes))
            report(file.tell(), header.file_size, path.name)
    return flushed, header.file_size


def _card(text: str, adapter: Adapter, base: Checkpoint) -> str:
    """The model card with the base that the adapter is for now, and a sentence that says so.

    The Hub reads `base_model` as the model to load it on: with the old one it would be silently wrong there.
    """
    sentence = (
        f"> `flashnorm fold-adapter` made this from {adapter.source.name} for the folded checkpoint "
        f"{base.source.name} ([FlashNorm](https://arxiv.org/abs/2407.09577)). On any other base it is wrong.\n\n"
    )
    matter = re.match(r"---\r?\n(.*?)^---[ \t]*\r?\n", text, re.DOTALL | re.MULTILINE)
    if matter is None:
        return sentence + text
    base_model = r"^base_model:[ \t]*(\S[^\r\n]*|(\r?\n[ \t]*-[^\r\n]*)*)"
    head = re.sub(base_model, lambda _: f"base_model: {json.dumps(base.source.name)}", matter[0], flags=re.MULTILINE)
    return f"{head}\n{sentence}{text[matter.end() :].lstrip()}"


def _bytes_of(tensor: torch.Tensor) -> bytes:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _adapter_record(
    adapter: Adapter, base: Checkpoint, source: Checkpoint, plan: AdapterPlan, result: AdapterResult
) -> dict[str, Any]:
    """The content of the adapter's flashnorm.json. It stands beside adapter_config.json because peft warns of keys
    there that it does not know."""
    edited = [*plan.edits, *(name for name, (_, edit) in plan.added.items() if edit is not None)]
    return {
        "format": FORMAT,
        "tool": f"flashnorm-cli {__version__}",
        "kind": "adapter",
        "adapter": adapter.source.name,
        "commit": adapter.commit,
        "adapter_files": {name: record.file_facts(adapter.folder / name) for name in (CONFIG, WEIGHTS)},
        "base": {"name": base.source.name, "commit": base.commit},
        "source": {"name": source.source.name, "commit": source.commit},
        "changed": result.changed,
        "patterns": [pattern for pattern, _ in grouped(edited)],
        "added": list(plan.added),
        "left_out": list(adapter.left_out),
        "flushed_to_zero": result.flushed,
        "check": result.check.to_json(),
    }


# ---- in memory -------------------------------------------------------------------------------------------------------


def adapter_warnings(model: Any) -> list[str]:
    """What is wrong with the adapters of a loaded folded model: one sentence for each that was made for another base.

    `model` is a PeftModel, or a transformers model with adapters. An adapter fits if its config names the folded model
    as its base, because it was trained on it or folded for it, or if its kind reads no norm.
    """
    inner = model.get_base_model() if callable(getattr(model, "get_base_model", None)) else model
    mine = str(getattr(inner, "name_or_path", "") or "")
    configs = getattr(model, "peft_config", None) or getattr(inner, "peft_config", None)
    found = []
    for name, config in configs.items() if isinstance(configs, dict) else ():
        made_for = getattr(config, "base_model_name_or_path", None)
        kind = getattr(config, "peft_type", "")
        kind = str(getattr(kind, "value", kind))
        if not made_for or not mine or kind in FITTING_TYPES or _same_place(str(made_for), mine):
            continue
        found.append(
            f"adapter {name!r} was made for {made_for}, and this model is {mine}, a folded checkpoint: what it learned "
            f"reads norm weights that are gone from here. Unless the two are one model under two names, run: flashnorm "
            f"fold-adapter <the adapter> --base {mine}"
        )
    return found


def _same_place(one: str, other: str) -> bool:
    if one == other:
        return True
    first, second = Path(one).expanduser(), Path(other).expanduser()
    return first.is_dir() and second.is_dir() and first.resolve() == second.resolve()
