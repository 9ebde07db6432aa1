"""The plan of a fold: which norms are folded into which tensors on disk, which are kept, and why.

`make_plan` goes by a config and headers. A `Plan` is plain data: other code can use it, print it,
or check it, without transformers or torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flashnorm_cli.checkpoint.model import Checkpoint, Source, refuse_folded
from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.checkpoint.users import User, announced_users
from flashnorm_cli.choices import FinalNorm
from flashnorm_cli.errors import UsageError
from flashnorm_cli.plan import disk, load_time, output_head, readers, unseen
from flashnorm_cli.plan.assemble import assemble
from flashnorm_cli.plan.grid import with_grid_note
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.plan.traced import traced

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from flashnorm_cli.trace.result import Trace

FINAL_NORM_CHOICES = get_args(FinalNorm)
# What the trace cannot know: who reads the final norm's output without a sign of it in the files.
HIDDEN_STATES = (
    "logits stay as they are, but last_hidden_state and hidden_states[-1] come out without the final norm's gain; "
    'where something else reads them (embeddings, probes, a draft model of another repository): `final_norm="keep"`'
)


@dataclass(frozen=True)
class TracedPlan:
    """A plan, and what it says about the model's own parameters, by runtime names.

    `kept` are the gains that stay, `untied` the head that gets a tensor of its own and the embedding whose values it
    starts from (twice the same name where the head has its tensor already). `model` is on the meta device. `on_disk`
    says which tensor on disk holds what `save_pretrained` would write under a name, None where another name of a shared
    parameter does. `users` read more of the model than its logits.
    """

    plan: Plan
    model: PreTrainedModel
    trace: Trace
    kept: dict[str, str]
    untied: tuple[str, str] | None
    on_disk: dict[str, str | None]
    users: tuple[User, ...]


def make_plan(
    model: str | Path | Source | Checkpoint,
    final_norm: FinalNorm = "auto",
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    follow_links: bool = False,
) -> Plan:
    """Derive the plan of a fold from the model's own forward, on the meta device, where headers stand for weights.

    Of the weights, a few kB are looked at where they are on this disk: a note says if they lie on a quantizer's grid.

    Args:
        model: a local folder or a Hub id, or a checkpoint from `open_checkpoint`, with or without its weights.
        final_norm: what to do with the norm before the output head. "auto" folds it, and unties a tied head where
            the runtimes allow; "keep" keeps it; "untie" folds it in any case.
        trust_remote_code: whether the checkpoint's own Python code may run.
        revision, token, cache_dir, local_files_only: as in huggingface_hub, of a Hub id.
        follow_links: follow links of a local folder also where they lead out of it.
    Returns:
        The plan: plain data, which `to_json` gives as flashnorm.json holds it.
    Raises:
        UsageError: `model` is neither a folder nor a Hub id, or `final_norm` none of the three.
        FlashNormError: the checkpoint is folded already.
        PlanError: the architecture cannot be built, traced, or matched with the tensors on disk.
    """
    if isinstance(model, (str, Path)):
        where = Path(cache_dir) if cache_dir else None
        model = Source(str(model), revision, token, where, local_files_only, follow_links)
    checkpoint = open_checkpoint(model, weights=False) if isinstance(model, Source) else model
    return with_grid_note(checkpoint, plan_checkpoint(checkpoint, final_norm, trust_remote_code).plan)


def plan_checkpoint(
    checkpoint: Checkpoint, final_norm: FinalNorm = "auto", trust_remote_code: bool = False
) -> TracedPlan:
    """As `make_plan`, with what was traced, and no weights looked at."""
    if final_norm not in FINAL_NORM_CHOICES:
        raise UsageError(f"`final_norm` is one of {', '.join(FINAL_NORM_CHOICES)}, not {final_norm!r}")
    refuse_folded(checkpoint)  # before the seconds that the imports take
    from flashnorm_cli.modeling import build

    config = build.load_config(checkpoint.folder, trust_remote_code)
    cls = build.model_class(config, checkpoint.folder, trust_remote_code)
    users = announced_users(checkpoint, own_code=cls.__module__.startswith("transformers_modules"))
    return trace_plan(checkpoint, config, cls, final_norm, users)


def trace_plan(
    checkpoint: Checkpoint, config: PretrainedConfig, cls: Any, final_norm: FinalNorm, users: tuple[User, ...] = ()
) -> TracedPlan:
    """`make_plan` for a config and a class that are at hand, with what a fold in memory needs beside the plan.

    `users` are those that the files announce; a model in memory has none.
    """
    from flashnorm_cli.modeling import disk_names

    load_time.refuse(checkpoint, config)
    named, notes = _assumed_class(config, cls)
    reasons = _Reasons(final_norm, notes)
    tied = traced(checkpoint, config, cls)
    reasons.kept.update(tied.trace.kept)
    if tied.trace.asked:
        where = ", ".join(f"`{name}`" for name, _ in grouped(tied.trace.asked))
        notes.append(f"what the model computes depends on its data in {where}; both ways were followed")
    every_user = [*readers.code_users(tied.model, tied.trace), *users]
    reasons.keep(unseen.kept_for_users(every_user, tied.trace, tied.head_gains()), asked=True)
    task = output_head.Task(checkpoint, config, cls, final_norm, named)
    head = output_head.decide(task, tied, reasons.kept.keys())
    reasons.keep(head.kept)
    notes += head.notes
    model, trace, head_gains = head.traced.model, head.traced.trace, head.traced.head_gains()

    reasons.keep(unseen.kept_beside_unreached(model, trace))
    canonical = disk_names.ids_on_disk(model, trace)
    on_disk = disk.match_tensors(model, trace, checkpoint, canonical, head.untied)
    load_time.refuse_rotations(checkpoint, on_disk.unread)
    norm_tensors, not_found = disk.gain_tensors(trace, on_disk, checkpoint, reasons.kept)
    reasons.keep(not_found)
    notes += load_time.notes(checkpoint, model, tied.missing, on_disk.unread)
    reasons.keep(unseen.kept_for_modules(every_user, trace, on_disk.ids, norm_tensors), asked=True)
    within, last = unseen.kept_for_unread(
        on_disk.unread, checkpoint.tensors, [*on_disk.all_ids], norm_tensors, head_gains, cls.__name__
    )
    reasons.keep(within)
    reasons.forget_announced(last)
    reasons.keep(last, asked=True)
    found, cannot = disk.reader_tensors(model, trace, on_disk, checkpoint, head.traced.head(), head_gains, reasons.kept)
    reasons.keep(cannot)
    lm_head = "kept" if any(g in reasons.kept for g in head_gains) else head.state
    if lm_head in ("folded", "untied"):
        notes.append(HIDDEN_STATES)
    plan = assemble(task, head.traced, on_disk, norm_tensors, reasons.kept, found, lm_head, notes)
    return TracedPlan(plan, model, trace, reasons.kept, head.untied, on_disk.places, tuple(every_user))


class _Reasons:
    """Why gains are kept, by runtime parameter: the first reason of each. `notes` get what is folded all the same."""

    def __init__(self, final_norm: str, notes: list[str]) -> None:
        self.final_norm, self.notes = final_norm, notes
        self.kept: dict[str, str] = {}

    def keep(self, reasons: Mapping[str, str], asked: bool = False) -> None:
        """Keep gains; where `asked`, final_norm="untie" folds them, and a note says so."""
        for gain, why in reasons.items():
            if asked and self.final_norm == "untie":
                note = f'folded as `final_norm="untie"` asks, though {why.removesuffix(f"; {unseen.OVERRIDE}")}'
                if gain not in self.kept and note not in self.notes:
                    self.notes.append(note)
            else:
                self.kept.setdefault(gain, why)

    def forget_announced(self, gains: Iterable[str]) -> None:
        """Make way for a better reason: tensors tell more than what announces them."""
        for gain in gains:
            if self.kept.get(gain, "").endswith(unseen.OVERRIDE):
                del self.kept[gain]


def _assumed_class(config: PretrainedConfig, cls: Any) -> tuple[str | None, list[str]]:
    """The class that config.json names and whose reading is not known, and a note where another one is taken for it."""
    from flashnorm_cli.modeling.classes import unknown_name

    named = unknown_name(config)
    if named is None:
        return None, []
    note = (
        f"transformers does not know {named[0]}, which config.json names; {cls.__name__} is what its auto "
        f"classes take for model_type {config.model_type}"
    )
    return named[0] if named[1] else None, [note]
