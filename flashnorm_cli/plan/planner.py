"""The plan of a fold: which norms are folded into which tensors on disk, which are kept, and why.

`make_plan` goes by a config and headers. A `Plan` is plain data: other code can use it, print it,
or check it, without transformers or torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.header import tensor_nbytes
from flashnorm_cli.checkpoint.model import Checkpoint, refuse_folded
from flashnorm_cli.checkpoint.names import grouped
from flashnorm_cli.checkpoint.users import User, announced_users
from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan import disk, load_time, readers, unseen
from flashnorm_cli.plan.grid import grid_notes
from flashnorm_cli.plan.model import Norm, Plan, Reader, Run
from flashnorm_cli.plan.unseen import norm_modules

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from flashnorm_cli.trace.result import Trace

FINAL_NORM_CHOICES = ("auto", "keep", "untie")
# Runtimes that tie head and embedding whatever the files say: llama.cpp drops the separate head of these without a
# word. A fact about runtimes, not about models: what can be folded is decided by the trace alone.
HARD_WIRED_TIES = ("gemma", "gemma2", "cohere", "cohere2")
# What the trace cannot know: who reads the final norm's output without a sign of it in the files.
HIDDEN_STATES = (
    "logits stay as they are, but last_hidden_state and hidden_states[-1] come out without the final norm's gain; "
    "where something else reads them (embeddings, probes, a draft model of another repository): --final-norm keep"
)
# Readers of `flashnorm_folded` (vLLM #41431, transformers #45742) make these weightless by their names.
WEIGHTLESS_BY_FLAG = re.compile(
    r"(^|\.)layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight$|^(?!.*\.\d+\.)(.*\.)?norm\.weight$"
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


def make_plan(checkpoint: Checkpoint, final_norm: str = "auto", trust_remote_code: bool = False) -> Plan:
    """Derive the plan from the model's own forward, on the meta device.

    Of the weights, a few kB are looked at where they are on this disk: a note says if they lie on a quantizer's grid.

    Args:
        checkpoint: from `open_checkpoint`, with or without its weights.
        final_norm: what to do with the norm before the output head. "auto" folds it, and unties a tied head where
            the runtimes allow; "keep" keeps it; "untie" folds it in any case.
        trust_remote_code: whether the checkpoint's own Python code may run.
    Raises:
        FlashNormError: the checkpoint is folded already.
        PlanError: the architecture cannot be built, traced, or matched with the tensors on disk.
    """
    return plan_checkpoint(checkpoint, final_norm, trust_remote_code).plan


def plan_checkpoint(checkpoint: Checkpoint, final_norm: str = "auto", trust_remote_code: bool = False) -> TracedPlan:
    """As `make_plan`, with what was traced."""
    from flashnorm_cli.modeling import build

    refuse_folded(checkpoint)
    config = build.load_config(checkpoint.folder, trust_remote_code)
    cls = build.model_class(config, checkpoint.folder, trust_remote_code)
    users = announced_users(checkpoint, own_code=cls.__module__.startswith("transformers_modules"))
    return trace_plan(checkpoint, config, cls, final_norm, users)


def trace_plan(
    checkpoint: Checkpoint, config: PretrainedConfig, cls: Any, final_norm: str, users: tuple[User, ...] = ()
) -> TracedPlan:
    """`make_plan` for a config and a class that are at hand, with what a fold in memory needs beside the plan.

    `users` are those that the files announce; a model in memory has none.
    """
    import transformers

    return _Planner(checkpoint, config, cls, final_norm, transformers.__version__, users).plan()


def traced(
    checkpoint: Checkpoint, config: PretrainedConfig, cls: Any, untied: bool = False
) -> tuple[PreTrainedModel, set[str], Trace]:
    """The model on the meta device, its parameters that the files lack, and the trace of its forward.

    Attention and experts have several implementations; the plainest that runs is the one to follow.
    """
    from flashnorm_cli.modeling import build
    from flashnorm_cli.trace.forward import trace_forward

    first_error = None
    for attention, experts in (("eager", "batched_mm"), ("eager", "eager"), ("sdpa", "eager")):
        try:
            model, missing = build.build(checkpoint, config, cls, attention, experts, untied)
            return model, missing, trace_forward(model)
        except PlanError as error:
            first_error = first_error or error
    raise first_error or PlanError("no implementation of attention to trace")


class _Planner:
    """The steps of `make_plan`; `kept` collects the reasons, by runtime parameter, as they are found."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: PretrainedConfig,
        cls: Any,
        final_norm: str,
        version: str,
        users: tuple[User, ...],
    ) -> None:
        self.checkpoint, self.config, self.cls, self.final_norm = checkpoint, config, cls, final_norm
        self.version, self.users = version, users
        self.notes: list[str] = []
        self.kept: dict[str, str] = {}
        self.norm_tensors: dict[str, str] = {}  # runtime gain -> its tensor on disk
        self.untied: tuple[str, str] | None = None  # runtime names of the head and of the embedding
        self.strange_class: str | None = None  # named by the config, and not known: what it reads is not known either

    def plan(self) -> TracedPlan:
        from flashnorm_cli.modeling import disk_names

        load_time.refuse(self.checkpoint, self.config)
        self._assumed_class()
        self.model, missing, self.trace = self._traced()
        self.kept.update(self.trace.kept)
        if self.trace.asked:
            where = ", ".join(f"`{name}`" for name, _ in grouped(self.trace.asked))
            self.notes.append(f"what the model computes depends on its data in {where}; both ways were followed")
        users = [*readers.code_users(self.model, self.trace), *self.users]
        self._keep(unseen.kept_for_users(users, self.trace, self._head_gains()), asked=True)
        lm_head = self._final_norm(missing)
        self._keep(unseen.kept_beside_unreached(self.model, self.trace))
        canonical = disk_names.ids_on_disk(self.model, self.trace)
        self.disk = disk.match_tensors(self.model, self.trace, self.checkpoint, canonical, self.untied)
        load_time.refuse_rotations(self.checkpoint, self.disk.unread)
        self.norm_tensors, reasons = disk.gain_tensors(self.trace, self.disk, self.checkpoint, self.kept)
        self._keep(reasons)
        self.notes += load_time.notes(self.checkpoint, self.model, missing, self.disk.unread)
        self._keep(unseen.kept_for_modules(users, self.trace, self.disk.ids, self.norm_tensors), asked=True)
        within, last = unseen.kept_for_unread(
            self.disk.unread,
            self.checkpoint.tensors,
            [*self.disk.all_ids],
            self.norm_tensors,
            self._head_gains(),
            self.cls.__name__,
        )
        self._keep(within)
        for gain in last:  # tensors tell more than what announces them
            if self.kept.get(gain, "").endswith(unseen.OVERRIDE):
                del self.kept[gain]
        self._keep(last, asked=True)
        found, reasons = disk.reader_tensors(
            self.model, self.trace, self.disk, self.checkpoint, self._head(), self._head_gains(), self.kept
        )
        self._keep(reasons)
        if any(g in self.kept for g in self._head_gains()):
            lm_head = "kept"
        if lm_head in ("folded", "untied"):
            self.notes.append(HIDDEN_STATES)
        folded = [(n, dim) for n, dim, ids in found if any(g not in self.kept for g in self.trace.gains_of(ids))]
        self.notes += grid_notes(self.checkpoint, folded)
        plan = self._assemble(found, lm_head)
        return TracedPlan(plan, self.model, self.trace, self.kept, self.untied, self.disk.places, tuple(users))

    def _assumed_class(self) -> None:
        """Say so where the class is what the auto classes take, and not what config.json names."""
        from flashnorm_cli.modeling.classes import unknown_name

        named = unknown_name(self.config)
        if named is None:
            return
        self.notes.append(
            f"transformers does not know {named[0]}, which config.json names; {self.cls.__name__} is what its auto "
            f"classes take for model_type {self.config.model_type}"
        )
        if named[1]:
            self.strange_class = named[0]

    def _keep(self, reasons: Mapping[str, str], asked: bool = False) -> None:
        """Keep gains, the first reason of each; where `asked`, --final-norm untie folds them and the plan says so."""
        for gain, why in reasons.items():
            if asked and self.final_norm == "untie":
                note = f"folded as --final-norm untie asks, though {why.removesuffix(f'; {unseen.OVERRIDE}')}"
                if gain not in self.kept and note not in self.notes:
                    self.notes.append(note)
            else:
                self.kept.setdefault(gain, why)

    def _traced(self, untied: bool = False) -> tuple[PreTrainedModel, set[str], Trace]:
        return traced(self.checkpoint, self.config, self.cls, untied)

    # ---- the output head ----------------------------------------------------------------------------------------

    def _head(self) -> str | None:
        """Runtime name of the output head's weight."""
        head = self.model.get_output_embeddings()
        weight = getattr(head, "weight", None)
        return next((name for name, p in self.model.named_parameters() if p is weight), None)

    def _head_gains(self) -> list[str]:
        head = self.trace.readers.get(self._head() or "")
        return self.trace.gains_of(head.ids) if head else []

    def _final_norm(self, missing: set[str]) -> str:
        """Decide about the norm before the head; returns the state of `lm_head`."""
        from flashnorm_cli.modeling import build

        gains = [g for g in self._head_gains() if g not in self.kept]
        tied = bool(self.trace.tied_conflicts)
        for gain, embeddings in self.trace.tied_conflicts.items():
            if gain not in gains:  # a tie that is not the output head's: nothing to untie
                self.kept.setdefault(gain, f"`{min(embeddings)}`, which reads it, is an embedding too")
        if not gains:
            return "kept" if self._head_gains() else "none"
        declared = build.tie_declared(self.config)
        text_type = self.config.get_text_config(decoder=True).model_type
        why = None
        if self.final_norm == "keep":
            why = "--final-norm keep"
        elif self.strange_class and self.final_norm != "untie":
            why = (
                f"config.json names {self.strange_class}, which transformers does not know and which may read it; "
                "--final-norm untie folds it all the same"
            )
        elif (tied or declared) and text_type in HARD_WIRED_TIES:
            why = (
                f"the output head is tied to the embedding, and runtimes tie it for {text_type} whatever the files say"
            )
            if self.final_norm == "untie":
                self.notes.append(f"{why}: llama.cpp will drop the separate head and compute wrong logits")
                why = None
        if why is None and tied:
            why = self._untie(missing)
            if why and self.final_norm == "untie":
                raise PlanError(f"the output head cannot be untied: {why}")
        elif why is None and declared and self._head() in self.model.all_tied_weights_keys:
            # Its own tensor is on disk already: only the config has to say so.
            _, missing_untied = build.build(self.checkpoint, self.config, self.cls, "eager", "eager", untied=True)
            if missing_untied <= missing:
                self.untied = (self._head() or "", self._head() or "")
                self.notes.append(
                    "config.json ties the output head to the embedding, and the files hold a head of its own: the fold "
                    "uses that one, as transformers does where the two differ; other runtimes use the embedding"
                )
            else:
                lost = ", ".join(sorted(missing_untied - missing))
                why = f"the output head is tied to the embedding, and untying would leave {lost} without weights"
        if why is not None:
            for gain in gains:
                self.kept[gain] = why
            return "kept"
        return "untied" if self.untied else "folded"

    def _untie(self, missing: set[str]) -> str | None:
        """Go on with the model whose head is separate, or say why not."""
        embedding = self._head() or ""
        model, missing_untied, trace = self._traced(untied=True)
        new = {n for n, _ in model.named_parameters()} - {n for n, _ in self.model.named_parameters()}
        if trace.tied_conflicts or not new:
            return "the output head is tied to the embedding in the model's code"
        if len(new) != 1 or missing_untied - missing != new:
            lost = sorted(missing_untied - missing - new) or sorted(new)
            return f"untying would leave {', '.join(lost)} without weights"
        if trace.fingerprint != self.trace.fingerprint:
            return "the model computes something else when its head is untied"
        self.model, self.trace = model, trace
        self.untied = (new.pop(), embedding)
        return None

    # ---- the result ---------------------------------------------------------------------------------------------

    def _assemble(self, found: list[tuple[str, int, torch.Tensor]], lm_head: str) -> Plan:
        checkpoint, trace = self.checkpoint, self.trace
        gains = [
            (g.first_id, None if g.parameter in self.kept else self.norm_tensors[g.parameter])
            for g in trace.gains.values()
        ]
        runs_of: dict[bytes, tuple[Run, ...]] = {}  # thousands of experts share few patterns
        gains_of: dict[bytes, list[str]] = {}
        readers = []
        read_by: dict[str, list[str]] = {}
        for name, dim, ids in found:
            key = ids.numpy().tobytes()
            if key not in runs_of:
                runs_of[key], gains_of[key] = disk.runs_of(ids, gains), trace.gains_of(ids)
            for gain_name in gains_of[key]:
                read_by.setdefault(gain_name, []).append(name)
            if any(run.norm for run in runs_of[key]):
                readers.append(Reader(name, dim, runs_of[key], self.disk.values_from.get(name)))
        used = {reader.tensor for reader in readers}
        added = {name: what for name, what in self.disk.added.items() if name in used}
        norms_found = [
            Norm(
                self.norm_tensors.get(g.parameter, g.parameter),
                g.shape,
                g.scale,
                g.offset,
                tuple(read_by.get(g.parameter, ())),
                self.kept.get(g.parameter),
            )
            for g in trace.gains.values()
        ]
        norms_found += [Norm(name, shape, 1.0, 0.0, (), why) for name, shape, why in _other_norms(self.model, trace)]
        order = {name: i for i, name in enumerate(checkpoint.tensors)}
        norms_found.sort(key=lambda n: order.get(n.tensor, len(order)))
        fed_and_kept = [g for g in self.kept if g in trace.fed]
        by_name = [n.tensor for n in norms_found if not n.folded and WEIGHTLESS_BY_FLAG.search(n.tensor)]
        folded = [n for n in norms_found if n.folded]
        sizes = {name: entry.nbytes for name, entry in checkpoint.tensors.items()}
        changed = [r.tensor for r in readers if r.tensor in sizes] + [n.tensor for n in folded]
        return Plan(
            source=checkpoint.source.name,
            commit=checkpoint.commit,
            architecture=self.cls.__name__,
            model_type=self.config.model_type,
            text_config=_path_to(self.config, self.config.get_text_config(decoder=True)) or (),
            transformers=self.version,
            norms=tuple(norms_found),
            readers=tuple(sorted(readers, key=lambda r: order.get(r.tensor, len(order)))),
            lm_head=lm_head,
            untie=lm_head == "untied",
            added=added,
            folded_flag=bool(folded) and not fed_and_kept and not by_name,
            not_traced=_not_traced(self.model, trace, checkpoint),
            unread=tuple(self.disk.unread),
            notes=tuple(self.notes),
            bytes_total=sum(sizes.values()),
            bytes_changed=sum(sizes[name] for name in changed),
            bytes_added=sum(tensor_nbytes(dtype, shape) or 0 for dtype, shape in added.values()),
        )


def _other_norms(model: PreTrainedModel, trace: Trace) -> list[tuple[str, tuple[int, ...], str]]:
    """Norm modules that ran, but whose weight the trace did not see scaling a normalised activation."""
    return [
        (name, tuple(parameter.shape), "its weight does not act as a gain of a normalised activation")
        for name, parameter in norm_modules(model)
        if name in trace.reached and name not in trace.gains
    ]


def _not_traced(model: PreTrainedModel, trace: Trace, checkpoint: Checkpoint) -> tuple[str, ...]:
    """Norms that no forward reached, by their names on disk."""
    from flashnorm_cli.modeling import disk_names

    names = [name for name, _ in norm_modules(model) if name not in trace.reached]
    if not names:
        return ()
    loads = disk_names.loader_names(model, list(checkpoint.tensors))
    on_disk = {target: found for found, (target, _) in loads.items()}
    return tuple(on_disk.get(name, name) for name in names)


def _path_to(config: PretrainedConfig, nested: PretrainedConfig) -> tuple[str, ...] | None:
    """The keys that lead from a config to one of its nested configs; () for the config itself."""
    if config is nested:
        return ()
    for key in getattr(config, "sub_configs", {}):
        below = getattr(config, key, None)
        path = _path_to(below, nested) if below is not None else None
        if path is not None:
            return (key, *path)
    return None
