"""Fold a PEFT adapter that was trained on a source, so that it fits the folded base.

`adapter_plan.py` decides what happens to each tensor and why that is exact; here are the files around it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli._version import __version__
from flashnorm_cli.adapters.files import CARD, CONFIG, WEIGHTS, Adapter, open_adapter, refuse_folded_adapter, same_model
from flashnorm_cli.checkpoint.header import build_header
from flashnorm_cli.checkpoint.model import RECORD, Checkpoint, Progress, Source
from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.output import ADAPTER_CARD
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.plan.model import FORMAT
from flashnorm_cli.record import write as record
from flashnorm_cli.record.read import config_record_of, recorded_source

if TYPE_CHECKING:
    import torch

    from flashnorm_cli.adapters.check import AdapterCheck
    from flashnorm_cli.adapters.plan import AdapterPlan


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
    said = config_record_of(folded)
    refuse_folded_adapter(mine, folded)

    from flashnorm_cli.adapters.base import FoldedModel
    from flashnorm_cli.adapters.check import check_adapter, check_base
    from flashnorm_cli.adapters.kinds import refuse_unfoldable
    from flashnorm_cli.adapters.plan import plan_adapter
    from flashnorm_cli.checkpoint.disk import copy_file, write_text
    from flashnorm_cli.checkpoint.output import check_output, flush, not_an_output, work_folder
    from flashnorm_cli.checkpoint.work import source_name

    refuse_unfoldable(mine.config)
    name = mine.source.name.rsplit("/", 1)[-1] if mine.commit else mine.folder.resolve().name
    wanted = Path(output) if output else Path(f"{name}-FlashNorm")
    target = check_output(wanted, overwrite, mine.folder, config=CONFIG, what="an adapter")
    for folder in (folded.folder, Path(str(source)).expanduser() if source else folded.folder):
        if folder.is_dir() and target.resolve() == folder.resolve():
            raise UsageError(f"{wanted}: is the base or its source; choose another output folder")
        if folder.is_dir():
            check_output(wanted, overwrite, folder, config=CONFIG, what="an adapter")

    if source is not None:
        origin = Source(str(source), source_revision, token, where, local_files_only)
    elif source_revision is not None:
        raise UsageError("--source-revision needs --source")
    else:
        origin = recorded_source(said, folded.source.name, folded.folder, token, where, local_files_only)
    theirs = open_checkpoint(origin, weights=False)
    _check_source(theirs, said)
    report(0, 0, f"Tracing {', '.join(theirs.config.get('architectures') or ['the model'])}")
    model = FoldedModel(theirs, folded, said, mine.config.get("task_type"), trust_remote_code)
    report(0, 0, "Comparing base and source")
    errors = check_base(model)
    plan = plan_adapter(mine.config, mine.header, model, mine.read, report)

    # Nothing of it could be gone on with: the fingerprint is nobody else's.
    with work_folder(target, secrets.token_hex(16), (), source=source_name(mine.source.name)) as work:
        inside = work.inside
        flushed, written = _write_weights(mine, plan, inside / WEIGHTS, report)
        report(0, 0, "Checking on random activations")
        check = check_adapter(model, plan, mine.read, inside / WEIGHTS, errors)
        for relative in mine.others:
            (inside / relative).parent.mkdir(parents=True, exist_ok=True)
            if relative == CARD:
                card = (mine.folder / CARD).read_text(encoding="utf-8", errors="surrogateescape")
                write_text(inside / CARD, _card(card, mine, folded))
            else:
                copy_file(mine.folder / relative, inside / relative)
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
        write_text(inside / RECORD, json.dumps(_adapter_record(mine, folded, theirs, plan, result), indent=2) + "\n")
        config = {**mine.config, **plan.config, "base_model_name_or_path": str(base), "revision": base_revision}
        original = (mine.folder / CONFIG).read_text(encoding="utf-8")
        write_text(inside / CONFIG, record.dump_like(config, original))
        report(0, 0, "Waiting for the disk")
        flush(work, 1)
        work.publish(overwrite, lambda folder: not_an_output(folder, CONFIG, "an adapter"))
    return dataclasses.replace(result, notes=(*result.notes, *work.notes))


# ---- before the work -------------------------------------------------------------------------------------------------


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
    if not isinstance(made_for, str) or not made_for or same_model(made_for, source):
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
    from flashnorm_cli.adapters.edits import apply

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
        f"> {ADAPTER_CARD} {adapter.source.name} for the folded checkpoint "
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
