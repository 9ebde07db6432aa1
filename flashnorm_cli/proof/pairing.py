"""A source and a folded checkpoint side by side: which norms were folded, told from the files themselves.

What the folded checkpoint says of itself is a claim to check, never a premise: the plan is traced afresh from the
source, and a norm counts as folded if its tensor holds the identity or is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.choices import FinalNorm
from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan.model import Norm, Plan, Reader, claimed_rotation, rotation_from_json
from flashnorm_cli.plan.planner import plan_checkpoint
from flashnorm_cli.proof.result import Finding
from flashnorm_cli.record.read import FoldRecord

SCALED_AGAIN = (
    "AWQ and SmoothQuant put their scales there: such a checkpoint is not weightless any more, and an ordinary one "
    "without flashnorm and flashnorm_folded in its config"
)
IDENTITY, DROPPED, SOURCE, OTHER = "identity", "dropped", "source", "other"


@dataclass(frozen=True)
class Pair:
    """Source and folded checkpoint, the plan of the fold between them, and what each norm's tensor holds.

    `states` maps each norm's tensor to IDENTITY, DROPPED, SOURCE (kept), or OTHER. `record` is the content of
    flashnorm.json, None where the checkpoint was folded by something else. `gains` are those of the folded norms,
    of shape (elements,), float32 (float64 of an F64 norm).
    """

    source: Checkpoint
    folded: Checkpoint
    plan: Plan
    states: dict[str, str]
    record: FoldRecord | None
    gains: dict[str, torch.Tensor]
    findings: tuple[Finding, ...]

    @property
    def foreign(self) -> bool:
        """Whether another tool folded it: it may have rounded otherwise, and have left out files."""
        return self.record is None or self.record.adopted

    @cached_property
    def norms(self) -> dict[str, Norm]:
        return {norm.tensor: norm for norm in self.plan.norms}

    @cached_property
    def readers(self) -> dict[str, Reader]:
        """Readers that some folded norm scales; without an untied head, if the final norm was kept."""
        readers = {r.tensor: r for r in self.plan.readers if any(run.norm in self.gains for run in r.runs)}
        return {name: r for name, r in readers.items() if r.values_from is None or name in self.expected_added}

    @cached_property
    def expected_added(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {
            r.tensor: self.plan.added[r.tensor]
            for r in self.plan.readers
            if r.tensor in self.plan.added and any(run.norm in self.gains for run in r.runs)
        }

    @property
    def untied(self) -> bool:
        """Whether the output head has a tensor of its own in the fold: a new one, or one that was on disk already."""
        return self.plan.untie and bool(self.expected_added or not self.plan.added)

    @property
    def layout(self) -> str:
        found = {self.states[name] for name in self.gains}
        return "mixed" if {IDENTITY, DROPPED} <= found else "dropped" if DROPPED in found else "identity"

    def factor(self, reader: Reader) -> torch.Tensor:
        """What a reader's channels are multiplied by: float32 (float64 if a gain is) of shape (shape[reader.dim],)."""
        parts = []
        for run in reader.runs:
            gain = self.gains.get(run.norm or "")
            part = torch.ones(run.length) if gain is None else gain[run.start : run.start + run.length]
            parts.append(part.repeat(run.repeat))
        return torch.cat(parts)


def pair(source: Checkpoint, folded: Checkpoint, trust_remote_code: bool = False) -> Pair:
    """Put two checkpoints side by side.

    Raises FlashNormError if the source is folded itself, PlanError if its architecture cannot be planned.
    """
    record = FoldRecord.read(folded.folder / RECORD) if (folded.folder / RECORD).exists() else None
    chosen: FinalNorm = "auto"
    plan = plan_checkpoint(source, chosen, trust_remote_code).plan
    states = _states(source, folded, plan)
    # The files decide about the final norm. Keeping and untying were the user's choice, or another tool's.
    if any(states[n.tensor] in (IDENTITY, DROPPED) for n in plan.kept):
        plan, chosen = _replan_if_better(source, folded, plan, "untie", trust_remote_code)
    elif any(states[n.tensor] == SOURCE for n in plan.folded):
        plan, chosen = _replan_if_better(source, folded, plan, "keep", trust_remote_code)
    claimed = _claimed_rotation(folded, record)
    if claimed is not None:  # kind and seed are a claim to check; what lies in the stream is traced
        from flashnorm_cli.plan.rotation import make_rotated_plan

        plan = make_rotated_plan(source, chosen, trust_remote_code, *claimed)
    states = _states(source, folded, plan)
    findings = []
    gains = {}
    for norm in plan.norms:
        state = states[norm.tensor]
        if norm.folded and state != SOURCE:
            gains[norm.tensor] = gain_of(source, norm)
        if state == SOURCE and norm.folded and _claims(record, norm.tensor):
            findings.append(Finding(norm.tensor, "keeps its weight, but the record says that it is folded"))
        elif state == OTHER or (state != SOURCE and not norm.folded):
            findings.append(_wrong_norm(source, folded, norm, state))
    return Pair(source, folded, plan, states, record, gains, tuple(findings))


def _claimed_rotation(folded: Checkpoint, record: FoldRecord | None) -> tuple[str, int] | None:
    """Kind and seed; of a model that was folded in memory, which has no flashnorm.json, from config.json."""
    if record is not None:
        found = rotation_from_json(record.content, record.where)
        return None if found is None else (found.kind, found.seed)
    return claimed_rotation(folded.config.get("flashnorm"), f"{folded.source.name}/{CONFIG}: flashnorm")


def _claims(record: FoldRecord | None, tensor: str) -> bool:
    """Whether the record says that a norm is folded. One without a readable list claims what the plan folds."""
    if record is None:
        return False
    norms = record.entries("norms")
    return norms is None or norms.get(tensor, {}).get("folded") is True


def values(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A small tensor's values, in its own dtype and shape. Raises PlanError for a dtype that is no float."""
    shard = checkpoint.shard_of[name]
    entry = checkpoint.tensors[name]
    if entry.dtype not in TORCH_DTYPE:
        raise PlanError(f"{name} is stored as {entry.dtype}")
    if not entry.nbytes:
        return torch.empty(entry.shape, dtype=TORCH_DTYPE[entry.dtype])
    with (checkpoint.folder / shard).open("rb") as file:
        file.seek(checkpoint.shards[shard].data_start + entry.start)
        raw = bytearray(file.read(entry.nbytes))
    return torch.frombuffer(raw, dtype=TORCH_DTYPE[entry.dtype]).view(entry.shape)


def gain_of(source: Checkpoint, norm: Norm) -> torch.Tensor:
    """The gain of a norm, `scale * weight + offset`, of shape (elements,): float32, float64 where it is stored so."""
    stored = values(source, norm.tensor).flatten()
    return ((stored if stored.dtype == torch.float64 else stored.float()) * norm.scale) + norm.offset


def _states(source: Checkpoint, folded: Checkpoint, plan: Plan) -> dict[str, str]:
    return {norm.tensor: _state(source, folded, norm) for norm in plan.norms}


def _state(source: Checkpoint, folded: Checkpoint, norm: Norm) -> str:
    if norm.tensor not in source.tensors:
        return SOURCE
    if norm.tensor not in folded.tensors:
        return DROPPED
    if source.tensors[norm.tensor].dtype not in TORCH_DTYPE:
        return SOURCE
    if folded.tensors[norm.tensor].dtype not in TORCH_DTYPE:
        return OTHER
    before, after = values(source, norm.tensor), values(folded, norm.tensor)
    if before.shape != after.shape:
        return OTHER
    if norm.folded and bool((after == norm.identity).all()):
        return IDENTITY
    if torch.equal(before.double(), after.double()):
        return SOURCE
    return IDENTITY if bool((after == norm.identity).all()) else OTHER


def _replan_if_better(
    source: Checkpoint, folded: Checkpoint, plan: Plan, final_norm: FinalNorm, trust_remote_code: bool
) -> tuple[Plan, FinalNorm]:
    """The plan with another decision about the final norm, if it explains more norms of the files; and the decision."""
    try:
        other = plan_checkpoint(source, final_norm, trust_remote_code).plan
    except PlanError:
        return plan, "auto"

    def unexplained(candidate: Plan) -> int:
        states = _states(source, folded, candidate)
        return sum((states[n.tensor] == SOURCE) == n.folded for n in candidate.norms)

    return (other, final_norm) if unexplained(other) < unexplained(plan) else (plan, "auto")


def _wrong_norm(source: Checkpoint, folded: Checkpoint, norm: Norm, state: str) -> Finding:
    """Say what is wrong with a norm that is neither kept nor properly folded."""
    name = norm.tensor
    if state == DROPPED:
        return Finding(name, f"is left out, but has to be kept: {norm.reason}")
    if state == IDENTITY:
        return Finding(name, f"holds the identity, but has to be kept: {norm.reason}")
    before, after = source.tensors[name], folded.tensors[name]
    if before.shape != after.shape or after.dtype not in TORCH_DTYPE:
        return Finding(
            name, f"is {after.dtype} {list(after.shape)}, but the source has {before.dtype} {list(before.shape)}"
        )
    found, was = values(folded, name).double().flatten(), values(source, name).double().flatten()
    if norm.offset and bool((found == 1).all()):
        scale = norm.scale + norm.offset
        return Finding(
            name,
            f"holds ones, but this norm computes {norm.offset:g} + w: its identity is {norm.identity:g}, and ones make "
            f"it scale by {scale:g}. A tool that takes w itself for the gain folds this architecture wrongly",
            1.0,
        )
    wrong = int((found != norm.identity).sum()), int((found != was).sum())
    wanted = f"the identity ({norm.identity:g})" if norm.folded else "the source's weight"
    where = int((found != (norm.identity if norm.folded else was)).nonzero()[0])
    error = ((found - was).norm() / was.norm().clamp(min=torch.finfo(torch.float64).tiny)).item()
    if norm.folded and bool((found == found[0]).all()):
        return Finding(name, f"holds {found[0]:g} everywhere instead of {wanted}", error)
    hint = f"; {SCALED_AGAIN}" if norm.folded and bool((found * norm.scale + norm.offset > 0).all()) else ""
    return Finding(
        name,
        f"does not hold {wanted}: {wrong[0] if norm.folded else wrong[1]} of {len(found)} values differ, the first is "
        f"element {where}: {found[where]:g}{hint}",
        error,
    )
