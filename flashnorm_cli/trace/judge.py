"""After all forwards: which gains can be folded, and why the others cannot."""

from __future__ import annotations

import torch

from flashnorm_cli.trace.result import UNUSED, Reader, Trace
from flashnorm_cli.trace.state import State


def judge(state: State) -> Trace:
    """Every use of every reader has to come from the same gain; a gain with one that does not is kept."""
    trace = state.trace
    for name in state.uses:
        _judge_reader(state, name)
    for gain in trace.gains:
        if gain in state.other_uses:
            operation, where = state.other_uses[gain]
            trace.kept.setdefault(gain, f"its weight has another use (`{operation}` in `{where}`)")
        elif gain in trace.readers or gain in state.uses:
            trace.kept.setdefault(gain, "its weight is also used as a linear layer's")
        elif gain not in trace.fed:
            trace.kept.setdefault(gain, "nothing that can take the gain reads its output")
    for gain in trace.kept:
        trace.tied_conflicts.pop(gain, None)
    trace.fingerprint = state.digest.hexdigest()
    trace.asked = tuple(state.asked)
    return trace


def _judge_reader(state: State, name: str) -> None:
    trace = state.trace
    dim, merged, module, conflict = _merged_uses(state, name)
    fed = trace.gains_of(merged)
    trace.fed.update(fed, conflict)
    for gain in conflict:
        trace.kept.setdefault(gain, f"`{name}`, which reads it, also reads an input without this gain")
    if name in state.other_uses:
        operation, where = state.other_uses[name]
        why = f"`{name}`, which reads it, has another use (`{operation}` in `{where}`)"
        for gain in fed:
            if operation == "embedding" and gain not in trace.kept:
                trace.tied_conflicts.setdefault(gain, set()).add(name)
            else:
                trace.kept.setdefault(gain, why)
    if name in trace.gains:  # also multiplied element by element, elsewhere
        for gain in fed:
            trace.kept.setdefault(gain, f"`{name}`, which reads it, is a gain itself")
    if fed:
        trace.readers[name] = Reader(name, dim, merged, module)


def _merged_uses(state: State, name: str) -> tuple[int, torch.Tensor, str, list[str]]:
    """All uses of a reader as one: its dimension, its ids, where it was first seen, and gains that contradict."""
    trace, uses = state.trace, state.uses[name]
    dim, ids, module = uses[0]
    merged = ids.clone()
    conflict: list[str] = []
    for other_dim, other, _ in uses[1:]:
        if other_dim == dim and torch.equal(merged, other):  # the usual case: another forward saw the same
            continue
        if other_dim != dim:
            conflict += trace.gains_of(merged) + trace.gains_of(other)
            continue
        differ = (merged != other) & (merged != UNUSED) & (other != UNUSED)
        conflict += trace.gains_of(merged[differ]) + trace.gains_of(other[differ])
        merged = torch.where(merged == UNUSED, other, merged)
    return dim, merged, module, conflict
