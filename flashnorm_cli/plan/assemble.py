"""The plan itself, from all that was decided: its norms, its readers, the flag and the bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.header import tensor_nbytes
from flashnorm_cli.plan import disk, unseen
from flashnorm_cli.plan.model import Norm, Plan, Reader, Run
from flashnorm_cli.plan.output_head import Task
from flashnorm_cli.plan.traced import Traced

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from flashnorm_cli.trace.result import Trace

# Readers of `flashnorm_folded` (vLLM #41431, transformers #45742) make these weightless by their names.
WEIGHTLESS_BY_FLAG = re.compile(
    r"(^|\.)layers\.\d+\.(input_layernorm|post_attention_layernorm)\.weight$|^(?!.*\.\d+\.)(.*\.)?norm\.weight$"
)


def assemble(
    task: Task,
    final: Traced,
    on_disk: disk.OnDisk,
    norm_tensors: Mapping[str, str],
    kept: Mapping[str, str],
    found: Sequence[tuple[str, int, torch.Tensor]],
    lm_head: str,
    notes: Sequence[str],
) -> Plan:
    """Put a plan together.

    Args:
        final: the model and the trace that the plan is of.
        norm_tensors: runtime gain -> its tensor on disk.
        kept: the reasons of gains that stay.
        found: the readers: tensor on disk, dimension, and the ids of the gains along it.
    """
    import transformers

    checkpoint, trace = task.checkpoint, final.trace
    readers, read_by = _readers(trace, on_disk, norm_tensors, kept, found)
    used = {reader.tensor for reader in readers}
    added = {name: what for name, what in on_disk.added.items() if name in used}
    order = {name: i for i, name in enumerate(checkpoint.tensors)}
    norms = [
        *_gains(trace, norm_tensors, kept, read_by),
        *(Norm(name, shape, 1.0, 0.0, (), why) for name, shape, why in unseen.other_norms(final.model, trace)),
    ]
    norms.sort(key=lambda n: order.get(n.tensor, len(order)))
    sizes = {name: entry.nbytes for name, entry in checkpoint.tensors.items()}
    changed = [r.tensor for r in readers if r.tensor in sizes] + [n.tensor for n in norms if n.folded]
    return Plan(
        source=checkpoint.source.name,
        commit=checkpoint.commit,
        architecture=task.cls.__name__,
        model_type=task.config.model_type,
        text_config=_path_to(task.config, task.config.get_text_config(decoder=True)) or (),
        transformers=transformers.__version__,
        norms=tuple(norms),
        readers=tuple(sorted(readers, key=lambda r: order.get(r.tensor, len(order)))),
        lm_head=lm_head,
        untie=lm_head == "untied",
        added=added,
        folded_flag=_flag(norms, kept, trace),
        not_traced=unseen.not_traced(final.model, trace, checkpoint),
        unread=tuple(on_disk.unread),
        notes=tuple(notes),
        bytes_total=sum(sizes.values()),
        bytes_changed=sum(sizes[name] for name in changed),
        bytes_added=sum(tensor_nbytes(dtype, shape) or 0 for dtype, shape in added.values()),
    )


def _readers(
    trace: Trace,
    on_disk: disk.OnDisk,
    norm_tensors: Mapping[str, str],
    kept: Mapping[str, str],
    found: Sequence[tuple[str, int, torch.Tensor]],
) -> tuple[list[Reader], dict[str, list[str]]]:
    """The tensors that are scaled; and those that read each gain, scaled or not."""
    gains = [(g.first_id, None if g.parameter in kept else norm_tensors[g.parameter]) for g in trace.gains.values()]
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
            readers.append(Reader(name, dim, runs_of[key], on_disk.values_from.get(name)))
    return readers, read_by


def _gains(
    trace: Trace, norm_tensors: Mapping[str, str], kept: Mapping[str, str], read_by: Mapping[str, list[str]]
) -> list[Norm]:
    return [
        Norm(
            norm_tensors.get(g.parameter, g.parameter),
            g.shape,
            g.scale,
            g.offset,
            tuple(read_by.get(g.parameter, ())),
            kept.get(g.parameter),
        )
        for g in trace.gains.values()
    ]


def _flag(norms: Sequence[Norm], kept: Mapping[str, str], trace: Trace) -> bool:
    """Whether no norm that feeds linear layers keeps its weight, nor one that readers of the flag make weightless."""
    fed_and_kept = any(gain in trace.fed for gain in kept)
    by_name = any(not n.folded and WEIGHTLESS_BY_FLAG.search(n.tensor) for n in norms)
    return any(n.folded for n in norms) and not fed_and_kept and not by_name


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
