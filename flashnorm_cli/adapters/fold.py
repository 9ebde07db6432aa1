"""Fold a PEFT adapter that was trained on a source, so that it fits the folded base.

`plan.py` decides what happens to each tensor and why that is exact; `write.py` writes it.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.adapters.files import CONFIG, Adapter, open_adapter, refuse_folded_adapter, same_model
from flashnorm_cli.adapters.kinds import refuse_unfoldable
from flashnorm_cli.checkpoint.carry import check_names
from flashnorm_cli.checkpoint.model import Checkpoint, LeftOut, Progress, Source, folder_name
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.output import check_output
from flashnorm_cli.checkpoint.progress import with_notebook_bar
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.record.read import FoldRecord, record_of_base, recorded_source

if TYPE_CHECKING:
    from flashnorm_cli.adapters.check import AdapterCheck


@dataclass(frozen=True, repr=False)
class AdapterResult(Shown):
    """What folding an adapter did.

    `changed` counts tensors by what was done: "gain" (the input dimension was scaled), "ratio" (a norm's own copy),
    "magnitude" (DoRA). `added` are new tensors, `flushed` counts products that became zero, by tensor. `commit` is the
    source's on the Hub. `check` is what the comparison on random activations found. `notes` are for the user.
    """

    output: Path
    adapter: str
    base: str
    source: str
    peft_type: str
    tensors: int
    changed: dict[str, int]
    added: tuple[str, ...]
    left_out: tuple[LeftOut, ...]
    flushed: dict[str, int]
    check: AdapterCheck
    notes: tuple[str, ...]
    bytes_written: int
    commit: str | None = None

    def _facts(self) -> dict[str, Any]:
        fields = {"output": str(self.output), "base": self.base, "peft_type": self.peft_type, "tensors": self.tensors}
        return {**fields, "changed": sum(self.changed.values()), "bytes_written": self.bytes_written}

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "output": str(self.output),
            "adapter": self.adapter,
            "base": self.base,
            "source": {"name": self.source, "commit": self.commit},
            "peft_type": self.peft_type,
            "counts": {"tensors": self.tensors, **self.changed},
            "tensors_added": list(self.added),
            "left_out": [asdict(each) for each in self.left_out],
            "flushed_to_zero": self.flushed,
            "check": self.check.to_json(),
            "notes": list(self.notes),
            "bytes_written": self.bytes_written,
        }


@with_notebook_bar
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
    follow_links: bool = False,
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
        follow_links: follow links of local folders also where they lead out of them.
        on_progress: called with (done, all, what is going on).
    Returns:
        The folder, what was changed, and what the comparison on random activations found.
    Raises:
        UsageError: the call contradicts itself or the file system.
        AdapterError: the adapter cannot be folded exactly; the message says why and what to do instead.
        FlashNormError: adapter, base or source is broken, or they do not belong together.
    """
    report = on_progress or (lambda done, total, what: None)
    where = Path(cache_dir) if cache_dir else None
    if source is None and source_revision is not None:
        raise UsageError("`source_revision` needs `source`")
    report(0, 0, "Reading headers")
    opened = open_adapter(Source(str(adapter), revision, token, where, local_files_only, follow_links))
    folded = open_checkpoint(
        Source(str(base), base_revision, token, where, local_files_only, follow_links), weights=False
    )
    base_record = record_of_base(folded)
    if "rotation" in base_record.content:
        raise UsageError(
            f"{folded.source.name}: its residual stream is rotated, and an adapter's is not; merge the adapter into "
            "the source, and fold and rotate that"
        )
    refuse_folded_adapter(opened, folded)
    refuse_unfoldable(opened.config)
    target = _output_folder(opened, folded, output, source, overwrite)
    if source is not None:
        origin = Source(str(source), source_revision, token, where, local_files_only)
    else:
        origin = recorded_source(base_record, folded.source.name, folded.folder, token, where, local_files_only)
    unfolded = open_checkpoint(replace(origin, follow_links=follow_links), weights=False)
    _check_source(unfolded, base_record)

    from flashnorm_cli.adapters.base import FoldedModel
    from flashnorm_cli.adapters.check import check_base
    from flashnorm_cli.adapters.plan import plan_adapter
    from flashnorm_cli.adapters.write import write_adapter

    report(0, 0, f"Tracing {', '.join(unfolded.config.get('architectures') or ['the model'])}")
    model = FoldedModel(unfolded, folded, base_record.plan, opened.config.get("task_type"), trust_remote_code)
    report(0, 0, "Comparing base and source")
    errors = check_base(model)
    plan = plan_adapter(opened.config, opened.header, model, opened.read, report)
    names = {"base_model_name_or_path": str(base), "revision": base_revision}
    written = write_adapter(opened, model, plan, errors, target, names, overwrite, report)
    return AdapterResult(
        output=target,
        adapter=str(adapter),
        base=str(base),
        source=unfolded.source.name,
        peft_type=str(opened.config["peft_type"]),
        tensors=len(opened.header.tensors) + len(plan.added),
        changed=plan.kinds(),
        added=tuple(plan.added),
        left_out=opened.left_out,
        flushed=written.flushed,
        check=written.check,
        notes=(*_about_names(opened, unfolded, folded), *plan.notes, *written.notes),
        bytes_written=written.bytes,
        commit=unfolded.commit,
    )


# ---- before the work -------------------------------------------------------------------------------------------------


def _output_folder(
    adapter: Adapter, base: Checkpoint, output: str | Path | None, source: str | Path | None, overwrite: bool
) -> Path:
    """Where the folded adapter goes. Raises UsageError where that could lose something."""
    name = adapter.source.name.rsplit("/", 1)[-1] if adapter.commit else folder_name(adapter.source.name)
    wanted = Path(output) if output else Path(f"{name}-FlashNorm")
    check_names(wanted, adapter.others)
    target = check_output(wanted, overwrite, adapter.folder, config=CONFIG, what="an adapter")
    for folder in (base.folder, Path(str(source)).expanduser() if source else base.folder):
        if folder.is_dir() and target.resolve() == folder.resolve():
            raise UsageError(f"{wanted}: is the base or its source; choose another output folder")
        # Beside the folded weights that it is made for, in a folder of its own, an adapter is in nobody's way.
        beside = folder is base.folder and target.resolve().is_relative_to(folder.resolve())
        if folder.is_dir() and not beside:
            check_output(wanted, overwrite, folder, config=CONFIG, what="an adapter")
    return target


def _check_source(source: Checkpoint, record: FoldRecord) -> None:
    """The source has to be the one that was folded, as far as its headers tell; its values are compared later."""
    for name, fact in (record.source_files or {}).items():
        header = source.shards.get(name)
        if header is None or "header_sha256" not in fact:
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
