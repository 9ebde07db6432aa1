"""The folded adapter's files."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli._version import __version__
from flashnorm_cli.adapters.base import FoldedModel
from flashnorm_cli.adapters.check import AdapterCheck, check_adapter
from flashnorm_cli.adapters.edits import apply
from flashnorm_cli.adapters.files import CARD, CONFIG, WEIGHTS, Adapter
from flashnorm_cli.adapters.plan import AdapterPlan
from flashnorm_cli.checkpoint.carry import copy_file
from flashnorm_cli.checkpoint.disk import write_text
from flashnorm_cli.checkpoint.header import build_header
from flashnorm_cli.checkpoint.model import RECORD, Checkpoint, Progress
from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.checkpoint.output import ADAPTER_CARD, flush, not_an_output, work_folder
from flashnorm_cli.checkpoint.work import source_name
from flashnorm_cli.plan.model import FORMAT
from flashnorm_cli.record import write as record


@dataclass(frozen=True)
class Written:
    """`flushed` counts products that became zero, by tensor; `check` compared what was written with the source."""

    flushed: dict[str, int]
    check: AdapterCheck
    bytes: int
    notes: tuple[str, ...] = ()


def write_adapter(
    adapter: Adapter,
    model: FoldedModel,
    plan: AdapterPlan,
    base_errors: Any,
    target: Path,
    names: Mapping[str, str | None],
    overwrite: bool,
    report: Progress,
) -> Written:
    """Write the folded adapter to `target`, which appears when all of it is there and has been checked.

    `base_errors` are what `check_base` found; `names` go into adapter_config.json.
    """
    # Nothing of it could be gone on with: no other run has this fingerprint.
    with work_folder(target, secrets.token_hex(16), (), source=source_name(adapter.source.name)) as work:
        flushed, size = _write_weights(adapter, plan, work.inside / WEIGHTS, report)
        report(0, 0, "Checking on random activations")
        check = check_adapter(model, plan, adapter.read, work.inside / WEIGHTS, base_errors)
        written = Written(flushed, check, size)
        _write_small_files(adapter, model, plan, written, work.inside, names)
        report(0, 0, "Waiting for the disk")
        flush(work, 1)
        work.publish(overwrite, lambda folder: not_an_output(folder, CONFIG, "an adapter"))
    return replace(written, notes=tuple(work.notes))


def _write_small_files(
    adapter: Adapter,
    model: FoldedModel,
    plan: AdapterPlan,
    written: Written,
    inside: Path,
    names: Mapping[str, str | None],
) -> None:
    root = None if adapter.source.follow_links else str(adapter.folder.resolve())
    for relative in adapter.others:
        (inside / relative).parent.mkdir(parents=True, exist_ok=True)
        if relative == CARD:
            card = (adapter.folder / CARD).read_text(encoding="utf-8", errors="surrogateescape")
            write_text(inside / CARD, _card(card, adapter, model.base))
        else:
            copy_file(str(adapter.folder / relative), inside / relative, adapter.seen[relative], root)
    facts = _adapter_record(adapter, model.base, model.source, plan, written)
    write_text(inside / RECORD, json.dumps(facts, indent=2) + "\n")
    original = (adapter.folder / CONFIG).read_text(encoding="utf-8")
    write_text(inside / CONFIG, record.dump_like({**adapter.config, **plan.config, **names}, original))


def _write_weights(adapter: Adapter, plan: AdapterPlan, path: Path, report: Progress) -> tuple[dict[str, int], int]:
    """Write the folded tensors in the order of the original, added ones at the end. Returns flushes and bytes."""
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
            report(file.tell(), header.file_size, "Folding the adapter")
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
    adapter: Adapter, base: Checkpoint, source: Checkpoint, plan: AdapterPlan, written: Written
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
        "changed": plan.kinds(),
        "patterns": [pattern for pattern, _ in grouped(edited)],
        "added": list(plan.added),
        "left_out": [asdict(each) for each in adapter.left_out],
        "flushed_to_zero": written.flushed,
        "check": written.check.to_json(),
    }
