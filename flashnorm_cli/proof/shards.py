"""Level weights for one shard at a time: where a checkpoint is never on this disk as a whole.

The arithmetic is that of level weights, apart from that of the fold.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.checkpoint.model import Checkpoint, Source
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof.pairing import DROPPED, IDENTITY, SOURCE, Pair
from flashnorm_cli.proof.result import Finding
from flashnorm_cli.proof.shard_stream import ShardStream
from flashnorm_cli.proof.weights import describe, expected_tensors, other_shape
from flashnorm_cli.record.read import FoldRecord


@dataclass(frozen=True)
class ShardPlan:
    """What a folded shard must hold: the part of the plan that speaks of it, in a form that pickles small.

    `gains` are the bytes and the dtype of the norms' tensors that the plan speaks of, as the source stores them.
    """

    plan: Plan
    gains: Mapping[str, tuple[bytes, str]]
    dropped: bool


def shard_plan(
    plan: Plan, tensors: Collection[str], last: bool, gains: Mapping[str, tuple[bytes, str]], dropped: bool
) -> ShardPlan:
    """The part of a plan that speaks of a shard with these tensors; `last` is the one that added tensors go to."""
    names = {*tensors, *(plan.added if last else ())}
    readers = tuple(reader for reader in plan.readers if reader.tensor in names)
    needed = {run.norm for reader in readers for run in reader.runs} | names
    norms = tuple(norm for norm in plan.norms if norm.tensor in needed)
    part = replace(plan, norms=norms, readers=readers, added=plan.added if last else {}, not_traced=(), notes=())
    return ShardPlan(part, {name: gain for name, gain in gains.items() if name in needed}, dropped)


def check_shard(
    wanted: ShardPlan, source: Path, folded: Path, origins: Collection[Path]
) -> tuple[int, tuple[Finding, ...]]:
    """Compare a folded shard with what its source and the plan say, bit for bit.

    Args:
        wanted: what it must hold.
        source, folded: the two files.
        origins: further files that hold the values of added tensors.
    Returns:
        The number of tensors that were compared, and what is wrong with them.
    """
    both = _pair(wanted, source, folded, origins)
    names = {*both.source.shards[_name(source)].tensors, *wanted.plan.added}
    expected = {tensor: want for tensor, want in expected_tensors(both).items() if tensor in names}
    findings, comparable = list[Finding](), {}
    for tensor, want in expected.items():
        entry = both.folded.tensors.get(tensor)
        problem = "is missing" if entry is None else other_shape(both, entry, want)
        if problem:
            findings.append(Finding(tensor, problem))
        else:
            comparable[tensor] = want
    strange = [tensor for tensor in both.folded.tensors if tensor not in expected]
    findings += [Finding(tensor, "is not in the source, and no fold adds it") for tensor in strange]
    with ShardStream(both, _name(folded), comparable, lambda folded, source: None) as stream:
        differences, _ = stream.run()
    for tensor, difference in differences.items():
        findings.append(Finding(tensor, describe(both.folded.tensors[tensor], difference, ""), difference.error))
    return len(expected), tuple(findings)


def _name(path: Path) -> str:
    """A file as a shard of a checkpoint whose folder is the root: what is compared may be in several folders."""
    return str(path.absolute())


def _pair(wanted: ShardPlan, source: Path, folded: Path, origins: Collection[Path]) -> Pair:
    shards = {_name(path): read_header(path) for path in dict.fromkeys((source, *origins))}
    gains = {}
    for norm in wanted.plan.folded:
        raw, dtype = wanted.gains[norm.tensor]
        stored = torch.frombuffer(bytearray(raw), dtype=TORCH_DTYPE[dtype])
        values = stored if stored.dtype == torch.float64 else stored.float()
        gains[norm.tensor] = values * norm.scale + norm.offset
    made = DROPPED if wanted.dropped else IDENTITY
    states = {norm.tensor: made if norm.folded else SOURCE for norm in wanted.plan.norms}
    root = Path(source.absolute().anchor)
    source_file = Checkpoint(Source(str(source)), root, None, {}, shards, None)
    folded_file = Checkpoint(Source(str(folded)), root, None, {}, {_name(folded): read_header(folded)}, None)
    return Pair(source_file, folded_file, wanted.plan, states, FoldRecord("a fold of this run", {}), gains, ())
