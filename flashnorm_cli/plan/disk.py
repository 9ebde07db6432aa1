"""From runtime parameters to tensors on disk: which tensor holds each gain, and which ones read it."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.names import layer_numbers, pattern_of
from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan import load_time
from flashnorm_cli.plan.model import Run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from flashnorm_cli.trace.result import Trace

FOLDABLE_DTYPES = ("BF16", "F16", "F32", "F64")


@dataclass(frozen=True)
class OnDisk:
    """Where the tensors of a model lie.

    `ids` are, by tensor, what `modeling.disk_names.ids_on_disk` says of it, and `lost` those of tensors that are not
    there. `unread` are tensors that the model does not read. `added` are (dtype, shape) of tensors that a fold makes,
    `values_from` the tensors whose values they start from. `places` maps canonical names to tensors, None where another
    name of a shared parameter is on disk.
    """

    ids: dict[str, torch.Tensor]
    lost: dict[str, torch.Tensor]
    unread: list[str]
    places: dict[str, str | None]
    added: dict[str, tuple[str, tuple[int, ...]]]
    values_from: dict[str, str]

    @property
    def all_ids(self) -> dict[str, torch.Tensor]:
        return {**self.ids, **self.lost}


def match_tensors(
    model: PreTrainedModel,
    trace: Trace,
    checkpoint: Checkpoint,
    canonical: dict[str, torch.Tensor],
    untied: tuple[str, str] | None,
) -> OnDisk:
    """Find each canonical name among the tensors on disk, which may have been saved under older names.

    `untied` are the runtime names of a head that gets a tensor of its own, and of the embedding.
    """
    from flashnorm_cli.modeling import disk_names

    _refuse_merged(model, trace, canonical)
    tensors = checkpoint.tensors
    on_disk = {name: ids for name, ids in canonical.items() if name in tensors}
    lost = {name: ids for name, ids in canonical.items() if name not in tensors}
    places: dict[str, str | None] = {name: name for name in on_disk}
    left = [name for name in tensors if name not in on_disk]
    loads = disk_names.loader_names(model, [*lost, *left])
    if left:
        _refuse_doubles(model, on_disk, left)
    by_target: dict[Any, list[str]] = {}
    for name in left:
        by_target.setdefault((loads[name], layer_numbers(name)), []).append(name)
    for name in list(lost):
        candidates = by_target.get((loads[name], layer_numbers(name)), [])
        if len(candidates) == 1:
            on_disk[candidates[0]] = lost.pop(name)
            places[name] = candidates[0]
    state = model.state_dict()
    unread = [n for n in left if n not in on_disk and loads[n][0] not in state]

    # A shared parameter needs only one of its names on disk. An untied head has none yet: it is added.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    there = disk_names.loader_names(model, list(on_disk)) if lost else {}
    holds = {id(parameters[target]): name for name, (target, _) in there.items() if target in parameters}
    added: dict[str, tuple[str, tuple[int, ...]]] = {}
    values_from: dict[str, str] = {}
    for name in list(lost):
        target = loads[name][0]
        if target in parameters and id(parameters[target]) in holds:
            del lost[name]
            places[name] = None
        elif untied and target == untied[0]:
            embedding = holds[id(parameters[untied[1]])]
            entry = tensors[embedding]
            ids = lost.pop(name)
            saved = disk_names.saved_names(model, [target]).get(target, name)
            places[name] = saved
            lost[saved] = ids
            added[saved] = (entry.dtype, entry.shape)
            values_from[saved] = embedding
    return OnDisk(on_disk, lost, unread, places, added, values_from)


def _refuse_merged(model: PreTrainedModel, trace: Trace, canonical: Mapping[str, torch.Tensor]) -> None:
    """Raise PlanError where two parameters lie in one tensor: one's ids would hide the other's."""
    from flashnorm_cli.trace.companions import count_nonzero

    copies = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    expected = 0
    for name, parameter in model.named_parameters():
        if name in trace.gains:
            expected += copies[id(parameter)] * parameter.numel()
        elif name in trace.readers:
            reader = trace.readers[name]
            rows = parameter.numel() // parameter.shape[reader.dim]
            expected += copies[id(parameter)] * rows * int((reader.ids > 0).sum())
    if sum(count_nonzero(ids) for ids in canonical.values()) != expected:
        raise PlanError(f"transformers maps two parameters of {type(model).__name__} to the same tensor on disk")


def _refuse_doubles(model: PreTrainedModel, on_disk: Mapping[str, Any], left: list[str]) -> None:
    """Two tensors for one parameter: which one counts, the loader decides by its order, and we must not guess."""
    from flashnorm_cli.modeling import disk_names

    loads = disk_names.loader_names(model, [*on_disk, *left])
    plain = {loads[name][0]: name for name in on_disk if loads[name][1] is None}
    for name in left:
        target, pattern = loads[name]
        if pattern is None and plain.get(target, name) != name:
            raise PlanError(f"{plain[target]} and {name} are both loaded into {target}: remove one of them")


def gain_tensors(
    trace: Trace, disk: OnDisk, checkpoint: Checkpoint, kept: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """The tensor on disk of each gain, which holds its elements in their order; and gains to keep, with the reason.

    Raises PlanError where a gain that is not in `kept` has no tensor.
    """
    import torch

    from flashnorm_cli.trace.companions import count_nonzero, small

    reasons: dict[str, str] = {}
    own = {name: small(ids) for name, ids in disk.ids.items() if count_nonzero(ids) and small(ids).max() < 0}
    by_first: dict[int, tuple[str, torch.Tensor]] = {}
    for name, ids in own.items():
        if by_first.setdefault(-int(ids.max()), (name, ids))[0] != name:
            twin = by_first[-int(ids.max())][0]
            parameter = next(g.parameter for g in trace.gains.values() if g.first_id == -int(ids.max()))
            reasons.setdefault(parameter, f"its weight is on disk twice, as `{twin}` and as `{name}`")
    found = {}
    for gain in trace.gains.values():
        if gain.first_id not in by_first:
            if gain.parameter not in kept and gain.parameter not in reasons:
                raise PlanError(
                    f"{gain.parameter} is not in the checkpoint; where norms were left out, it was folded already"
                )
            continue
        name, ids = by_first[gain.first_id]
        found[gain.parameter] = name
        entry = checkpoint.tensors[name]
        identity = (1.0 - gain.offset) / gain.scale
        in_order = torch.arange(gain.first_id, gain.first_id + gain.size)
        shape = tuple(disk.ids[name].shape)
        if entry.shape != shape:
            raise PlanError(f"{name} has shape {list(entry.shape)} on disk, but the config asks for {list(shape)}")
        if beside := load_time.beside_gain(name, disk.unread):
            reasons.setdefault(gain.parameter, beside)
        if entry.dtype not in FOLDABLE_DTYPES:
            reasons.setdefault(gain.parameter, f"its weight is stored as {entry.dtype}")
        elif not torch.equal(-ids.flatten(), in_order):
            reasons.setdefault(gain.parameter, "its weight lies on disk in another order")
        elif identity != float(int(identity)) or abs(identity) > 256:
            reasons.setdefault(gain.parameter, "no weight makes it exactly one")
    return found, reasons


def reader_tensors(
    model: PreTrainedModel,
    trace: Trace,
    disk: OnDisk,
    checkpoint: Checkpoint,
    head: str | None,
    head_gains: list[str],
    kept: Mapping[str, str],
) -> tuple[list[tuple[str, int, torch.Tensor]], dict[str, str]]:
    """Readers as (tensor on disk, dim, ids along dim); and gains to keep, because a tensor of theirs cannot take them.

    `head` is the runtime name of the output head's weight, `head_gains` those that it reads.
    """
    from flashnorm_cli.modeling import disk_names
    from flashnorm_cli.trace.companions import profile, small, varying_dims

    holders = model.named_parameters(remove_duplicate=False) if head else ()
    heads = {name.rpartition(".")[0] for name, p in holders if p is model.get_parameter(head or "")}
    on_load = load_time.LoadTime(checkpoint, model, disk.unread, [*disk.all_ids], heads)
    loads = disk_names.loader_names(model, [*disk.all_ids])
    readers = []
    reasons: dict[str, str] = {}
    gains_of: dict[bytes, list[str]] = {}  # thousands of experts share few patterns
    for name, ids in disk.all_ids.items():
        key = small(ids).contiguous().numpy().tobytes()
        gains = gains_of[key] = gains_of[key] if key in gains_of else trace.gains_of(ids)
        if not gains:
            continue
        dims = varying_dims(ids)
        why = None
        if name not in disk.added:
            is_kept, reads_head = gains[0] in kept or gains[0] in reasons, gains[0] in head_gains
            why = _cannot_take(checkpoint, disk, name, tuple(ids.shape), dims, gains[0], is_kept, reads_head)
        why = why or on_load.changes(name, loads[name][0])
        if why is None:
            dim = dims[0] if dims else ids.ndim - 1
            readers.append((name, dim, profile(ids, dim)))
        else:
            for gain in gains:
                reasons.setdefault(gain, f"`{pattern_of(name)}`, which reads it, {why}")
    return readers, reasons


def _cannot_take(
    checkpoint: Checkpoint,
    disk: OnDisk,
    name: str,
    shape: tuple[int, ...],
    dims: list[int],
    gain: str,
    is_kept: bool,
    reads_head: bool,
) -> str | None:
    tensors = checkpoint.tensors
    stem = name.removesuffix("weight")
    scale = next((n for n in disk.unread if n.startswith((name + "_", stem))), None)
    if name not in tensors:
        if scale is None and is_kept:
            return "is not in the checkpoint"
        if scale is None:
            way = '; `final_norm="keep"` folds the other norms of a model that is used without its head'
            raise PlanError(f"{name}, which reads {gain}, is not in the checkpoint{way if reads_head else ''}")
        return f"is packed or quantized on disk (`{pattern_of(scale)}`)"
    entry = tensors[name]
    if entry.dtype not in FOLDABLE_DTYPES or scale is not None:
        beside = f", beside `{pattern_of(scale)}`" if scale else ""
        return f"is quantized on disk ({entry.dtype}{beside})"
    if entry.shape != shape:
        if "quantization_config" in checkpoint.config:
            return f"is packed on disk (shape {list(entry.shape)})"
        raise PlanError(f"{name} has shape {list(entry.shape)} on disk, but the config asks for {list(shape)}")
    if len(dims) > 1:
        return "is joined on disk with weights that read something else"
    return None


def runs_of(ids: torch.Tensor, gains: list[tuple[int, str | None]]) -> tuple[Run, ...]:
    """Compress the ids along a dimension: consecutive elements make a run, equal runs that follow a repetition.

    `gains` are (first id, tensor on disk or None where the gain is kept), by rising id.
    """
    import torch

    firsts = torch.tensor([0, *(first for first, _ in gains)])
    tensors = [None, *(tensor for _, tensor in gains)]
    which = torch.bucketize(ids.clamp(min=0), firsts, right=True) - 1
    folded = torch.tensor([tensor is not None for tensor in tensors])[which]
    element = torch.where(folded, ids - firsts[which], 0)
    which = torch.where(folded, which, 0)
    step = torch.where(folded[1:], 1, 0)
    ends = ((which[1:] != which[:-1]) | (element[1:] - element[:-1] != step)).nonzero().flatten() + 1
    borders = [0, *ends.tolist(), len(ids)]
    runs: list[Run] = []
    for start, end in pairwise(borders):
        run = Run(tensors[int(which[start])], int(element[start]), end - start)
        last = runs[-1] if runs else None
        if last and (last.norm, last.start, last.length) == (run.norm, run.start, run.length):
            runs[-1] = dataclasses.replace(last, repeat=last.repeat + 1)
        else:
            runs.append(run)
    return tuple(runs)
