"""The rotation of a checkpoint's residual stream: which tensors on disk lie in it, along which dimensions.

What a rotation is, and when it is exact, is said in `trace/stream.py`. Here the parameters that the trace has found are
followed to the disk, and everything is refused that may touch the stream where no trace sees it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import torch

from flashnorm_cli.checkpoint.load_time import quantizations
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.choices import FinalNorm
from flashnorm_cli.errors import PlanError
from flashnorm_cli.modeling import disk_names
from flashnorm_cli.plan.disk import FOLDABLE_DTYPES
from flashnorm_cli.plan.load_time import NOT_A_READER
from flashnorm_cli.plan.model import Plan, PlannedRotation
from flashnorm_cli.plan.planner import HIDDEN_STATES, TracedPlan, plan_checkpoint
from flashnorm_cli.trace.companions import profile, varying_dims
from flashnorm_cli.trace.stream import Stream
from flashnorm_cli.trace.stream_rules import trace_stream

ROTATED_STATES = "all hidden states come out rotated: only the logits are the source's"
REFUSED = "the residual stream cannot be rotated: "


def make_rotated_plan(
    checkpoint: Checkpoint, final_norm: FinalNorm, trust_remote_code: bool, kind: str, seed: int
) -> Plan:
    """`make_plan`, with the residual stream rotated after the fold by the matrix that `kind` and `seed` stand for.

    Raises:
        FlashNormError, PlanError: as `make_plan`, and PlanError where the stream cannot be rotated, with the reason.
    """
    traced = plan_checkpoint(checkpoint, final_norm, trust_remote_code)
    return with_rotation(checkpoint, traced, rotatable(checkpoint, traced), kind, seed)


def with_rotation(checkpoint: Checkpoint, traced: TracedPlan, stream: Stream, kind: str, seed: int) -> Plan:
    """The plan of what was traced, and the rotation of its stream. Raises PlanError where the disk forbids it."""
    tensors = lying_in(checkpoint, traced, stream.size, stream.members)
    changed = {*tensors, *(r.tensor for r in traced.plan.readers), *(n.tensor for n in traced.plan.folded)}
    return dataclasses.replace(
        traced.plan,
        notes=(*(note for note in traced.plan.notes if note != HIDDEN_STATES), ROTATED_STATES),
        rotation=PlannedRotation(kind, stream.size, seed, tensors),
        bytes_changed=sum(e.nbytes for name, e in checkpoint.tensors.items() if name in changed),
    )


def stream_json(checkpoint: Checkpoint, traced: TracedPlan) -> dict[str, Any]:
    """The residual stream as plain JSON values: who writes it and who reads it on disk, or why it cannot be rotated."""
    try:
        stream = rotatable(checkpoint, traced)
        writers, readers = (lying_in(checkpoint, traced, stream.size, stream.parameters(k)) for k in ("write", "read"))
    except PlanError as error:
        why = str(error).removeprefix(REFUSED)
        return {"size": None, "refused": why, "tensors": {}, "writers": [], "readers": []}
    norms = {(r.tensor, r.dim): next((run.norm for run in r.runs if run.norm), None) for r in traced.plan.readers}
    tensors = _in_order(
        checkpoint, traced.plan, {n: {*writers.get(n, ()), *readers.get(n, ())} for n in (*writers, *readers)}
    )
    return {
        "size": stream.size,
        "refused": None,
        "tensors": {name: list(dims) for name, dims in tensors.items()},
        "writers": [{"tensor": name, "dim": dim} for name, dims in writers.items() for dim in dims],
        "readers": [
            {"tensor": name, "dim": dim, "norm": norms.get((name, dim))}
            for name, dims in readers.items()
            for dim in dims
        ],
    }


def rotatable(checkpoint: Checkpoint, traced: TracedPlan) -> Stream:
    """The residual stream of a model whose plan is carried out. Raises PlanError where it cannot be rotated."""
    plan = traced.plan
    if traced.users:
        raise PlanError(f"{REFUSED}its channels are read outside of the model: {traced.users[0].line}")
    unread = [name for name in plan.unread if not NOT_A_READER.search(name)]
    if unread:
        raise PlanError(
            f"{REFUSED}`{pattern_of(unread[0])}` is on disk and not read by the model; its user may read the stream"
        )
    quantized = next((each for each in quantizations(checkpoint) if not each.only_cache()), None)
    if quantized is not None:
        raise PlanError(
            f"{REFUSED}{quantized.where} says that weights are quantized ({quantized.name}); rotate before that"
        )
    stream = trace_stream(traced.model, [g for g in traced.trace.gains if g not in traced.kept], traced.kept)
    if stream.pinned is not None:
        raise PlanError(f"{REFUSED}{stream.pinned}")
    if plan.not_traced:
        raise PlanError(f"{REFUSED}`{pattern_of(plan.not_traced[0])}` was not reached by the forward")
    return stream


def lying_in(
    checkpoint: Checkpoint, traced: TracedPlan, size: int, parameters: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The tensors on disk that hold parameters of a stream, with their dimensions of its channels, in the disk's order.

    Raises PlanError where a tensor holds other things along such a dimension, or another order, or no floats.
    """
    found: dict[str, set[int]] = {}
    for turn in range(max(map(len, parameters.values()))):
        members = {name: dims[turn] for name, dims in parameters.items() if len(dims) > turn}
        for canonical, ids in disk_names.channels_on_disk(traced.model, members).items():
            name = traced.on_disk.get(canonical, canonical)
            if name is None:  # another name of a shared parameter, which is on disk once
                continue
            shape = tuple(ids.shape)
            _refuse_tensor(checkpoint, traced.plan, name, shape)
            dims = varying_dims(ids)
            in_order = torch.arange(1, size + 1)
            if len(dims) != 1 or not torch.equal(profile(ids, dims[0]), in_order):
                raise PlanError(
                    f"{REFUSED}`{pattern_of(name)}` holds its channels on disk in another order, or others too"
                )
            found.setdefault(name, set()).add(dims[0])
    return _in_order(checkpoint, traced.plan, found)


def _in_order(checkpoint: Checkpoint, plan: Plan, found: Mapping[str, Collection[int]]) -> dict[str, tuple[int, ...]]:
    order = {name: i for i, name in enumerate((*checkpoint.tensors, *plan.added))}
    return {name: tuple(sorted(found[name])) for name in sorted(found, key=order.__getitem__)}


def _refuse_tensor(checkpoint: Checkpoint, plan: Plan, name: str, shape: tuple[int, ...]) -> None:
    if name in plan.added:
        dtype, there = plan.added[name]
    elif name in checkpoint.tensors:
        dtype, there = checkpoint.tensors[name].dtype, checkpoint.tensors[name].shape
    else:
        raise PlanError(f"{REFUSED}`{name}`, which lies in it, is not in the checkpoint")
    if dtype not in FOLDABLE_DTYPES:
        raise PlanError(f"{REFUSED}`{pattern_of(name)}`, which lies in it, is stored as {dtype}")
    if tuple(there) != shape:
        raise PlanError(f"{name} has shape {list(there)} on disk, but the config asks for {list(shape)}")
