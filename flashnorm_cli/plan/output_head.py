"""The norm before the output head: folded into it, into a head of its own where that is tied, or kept."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan.traced import Traced, traced
from flashnorm_cli.plan.unseen import OVERRIDE

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Runtimes that tie head and embedding whatever the files say: llama.cpp drops the separate head of these without a
# word. A fact about runtimes, not about models: what can be folded is decided by the trace alone.
HARD_WIRED_TIES = ("gemma", "gemma2", "cohere", "cohere2")


@dataclass(frozen=True)
class Task:
    """What is planned, and `final_norm`: what to do with the norm before the head (`make_plan`).

    `strange_class` is a class that config.json names and transformers does not know: what it reads is not known either.
    """

    checkpoint: Checkpoint
    config: PretrainedConfig
    cls: Any
    final_norm: str
    strange_class: str | None


@dataclass(frozen=True)
class FinalNorm:
    """What becomes of the norm before the head.

    `state` is that of `lm_head` in the plan, `kept` has the reasons of gains that stay, `traced` is the model to go on
    with: one with a separate head where that is `untied`, which are the runtime names of head and embedding.
    """

    state: str
    traced: Traced
    kept: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    untied: tuple[str, str] | None = None


def decide(task: Task, tied_model: Traced, already_kept: Collection[str]) -> FinalNorm:
    """Fold the norm before the output head, or keep it.

    Args:
        tied_model: as the config has it.
        already_kept: gains that other reasons keep.
    Raises:
        PlanError: final_norm is "untie", and the head cannot be.
    """
    from flashnorm_cli.modeling import build

    trace = tied_model.trace
    gains = [g for g in tied_model.head_gains() if g not in already_kept]
    tied = bool(trace.tied_conflicts)
    kept = {
        gain: f"`{min(embeddings)}`, which reads it, is an embedding too"
        for gain, embeddings in trace.tied_conflicts.items()
        if gain not in gains  # a tie that is not the output head's: nothing to untie
    }
    if not gains:
        return FinalNorm("kept" if tied_model.head_gains() else "none", tied_model, kept)
    declared = build.tie_declared(task.config)
    why, notes = _stays(task, tied or declared)
    going_on, untied = tied_model, None
    if why is None and tied:
        why, going_on, untied = _untie(task, tied_model)
        if why and task.final_norm == "untie":
            raise PlanError(f"the output head cannot be untied: {why}")
    elif why is None and declared and (head := tied_model.head()) in tied_model.model.all_tied_weights_keys:
        # Its own tensor is on disk already: only the config has to say so.
        _, missing = build.build(task.checkpoint, task.config, task.cls, "eager", "eager", untied=True)
        if missing <= tied_model.missing:
            untied = (head or "", head or "")
            notes += (
                "config.json ties the output head to the embedding, and the files hold a head of its own: the fold "
                "uses that one, as transformers does where the two differ; other runtimes use the embedding",
            )
        else:
            lost = ", ".join(sorted(missing - tied_model.missing))
            why = f"the output head is tied to the embedding, and untying would leave {lost} without weights"
    if why is not None:
        return FinalNorm("kept", going_on, kept | dict.fromkeys(gains, why), notes)
    return FinalNorm("untied" if untied else "folded", going_on, kept, notes, untied)


def _stays(task: Task, tied: bool) -> tuple[str | None, tuple[str, ...]]:
    """Why the final norm is kept whether or not its head could be untied, or None; and what to note."""
    if task.final_norm == "keep":
        return '`final_norm="keep"`', ()
    if task.strange_class and task.final_norm != "untie":
        return (
            f"config.json names {task.strange_class}, which transformers does not know and which may read it; "
            f"{OVERRIDE}"
        ), ()
    text_type = task.config.get_text_config(decoder=True).model_type
    if not tied or text_type not in HARD_WIRED_TIES:
        return None, ()
    why = f"the output head is tied to the embedding, and runtimes tie it for {text_type} whatever the files say"
    if task.final_norm != "untie":
        return why, ()
    return None, (f"{why}: llama.cpp will drop the separate head and compute wrong logits",)


def _untie(task: Task, tied: Traced) -> tuple[str | None, Traced, tuple[str, str] | None]:
    """The model whose head is separate, with the names of head and embedding; or why it is not to be had."""
    apart = traced(task.checkpoint, task.config, task.cls, untied=True)
    new = {n for n, _ in apart.model.named_parameters()} - {n for n, _ in tied.model.named_parameters()}
    if apart.trace.tied_conflicts or not new:
        return "the output head is tied to the embedding in the model's code", tied, None
    if len(new) != 1 or apart.missing - tied.missing != new:
        lost = sorted(apart.missing - tied.missing - new) or sorted(new)
        return f"untying would leave {', '.join(lost)} without weights", tied, None
    if apart.trace.fingerprint != tied.trace.fingerprint:
        return "the model computes something else when its head is untied", tied, None
    return None, apart, (new.pop(), tied.head() or "")
