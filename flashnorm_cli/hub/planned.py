"""A fold that is planned from headers and norms alone, before a shard of it is here."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.header import Header
from flashnorm_cli.checkpoint.hub import listed_ids
from flashnorm_cli.checkpoint.model import Checkpoint, Progress, Source, refuse_adapter, refuse_folded
from flashnorm_cli.checkpoint.open import fetch_others, open_checkpoint
from flashnorm_cli.checkpoint.tensors import read_tensors
from flashnorm_cli.folding.fold import give_back_memory, plan_fingerprint, read_gains
from flashnorm_cli.folding.jobs import ShardEdits, shard_edits
from flashnorm_cli.folding.planning import Planning, caution, plan_for, with_grid
from flashnorm_cli.hub.journal import SHA256, Uploaded
from flashnorm_cli.plan.model import Plan

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Planned:
    """`ids` are what the Hub lists each shard as; `raw` are the folded norms' tensors, as ranges gave them."""

    checkpoint: Checkpoint
    ids: Mapping[str, tuple[str, ...]]
    plan: Plan
    layout: str
    raw: Mapping[str, bytearray]
    gains: Mapping[str, np.ndarray]
    edits: tuple[ShardEdits, ...]
    notes: tuple[str, ...]
    caution: str | None

    @cached_property
    def folded_shards(self) -> dict[str, Header]:
        """The headers of the shards that will be written."""
        return {edit.name: edit.target_header(self.checkpoint.shards[edit.name]) for edit in self.edits}

    def fingerprint(self, repo_id: str, create_pr: bool) -> str:
        """Equal for two runs whose uploads can be put into one commit."""
        from huggingface_hub import constants

        fold = plan_fingerprint(self.checkpoint, self.plan, self.gains, self.layout)
        return hashlib.sha256(f"{fold} {constants.ENDPOINT} {repo_id} {create_pr}".encode()).hexdigest()

    def as_read(self, uploads: Mapping[str, Uploaded]) -> Planned:
        """The same with the hashes of the bytes that were folded, instead of those that were listed."""
        sha256 = {name: uploads[name].source_sha256 for name in self.checkpoint.shards}
        return dataclasses.replace(self, checkpoint=dataclasses.replace(self.checkpoint, sha256=sha256))


def plan_from_hub(source: Source, planning: Planning, layout: str, report: Progress) -> Planned:
    """Plan the fold of a repository. Raises what `open_checkpoint`, `plan_for` and `read_gains` raise."""
    report(0, 0, "Reading headers")
    checkpoint = open_checkpoint(source, weights=False)
    refuse_folded(checkpoint)
    refuse_adapter(checkpoint)
    checkpoint = fetch_others(checkpoint, report)
    ids = listed_ids(source, checkpoint.commit or "", list(checkpoint.shards))
    expected = {name: known[0] for name, known in ids.items() if SHA256.fullmatch(known[0])}
    checkpoint = dataclasses.replace(checkpoint, sha256=expected)
    plan, chosen = plan_for(checkpoint, planning, report)
    give_back_memory()
    report(0, 0, "Reading norms")
    if not planning.leave_grid:
        plan = with_grid(checkpoint, plan, leave=False)
    raw = read_tensors(checkpoint, [norm.tensor for norm in plan.folded])
    gains = read_gains(checkpoint, plan, raw)
    edits = tuple(shard_edits(checkpoint, plan, gains, layout))
    return Planned(checkpoint, ids, plan, layout, raw, gains, edits, tuple(chosen), caution(planning, gains.values()))
