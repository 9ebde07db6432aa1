"""The modules that a fold and a rotation change, by the names that `named_modules()` of the loaded model has for them.

Other tools change modules, not tensors: a linear's bias with its weight, a norm's weight by its attribute. What has no
such words is refused here, what one tool has no words for in that tool's own file.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.errors import PlanError
from flashnorm_cli.plan.planner import TracedPlan
from flashnorm_cli.plan.rotation import rotatable
from flashnorm_cli.trace.stream import Stream

_IN_A_LIST = re.compile(r"(.+?)\.\d+\.")


@dataclass(frozen=True)
class Fusion:
    """A norm module whose whole gain `weight + offset` scales the inputs of `linears`, and of nothing else."""

    norm: str
    class_name: str
    offset: float
    linears: tuple[str, ...]


@dataclass(frozen=True)
class Modules:
    """What a tool is told of a model.

    `writers` put their output into the residual stream of `size` channels, `readers` take their input from it, both in
    the order of the forward. `fusions` are its norms, in that order, and `before` says how many of them have run before
    a writer. `smoothings` are all norms that can be smoothed: those, and others whose whole gain was folded.
    """

    tool: str
    model: PreTrainedModel
    stream: Stream
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    fusions: tuple[Fusion, ...]
    before: dict[str, int]
    smoothings: tuple[Fusion, ...]

    @property
    def size(self) -> int:
        return self.stream.size

    @property
    def layers(self) -> str:
        """The list of layers that the norms stand in. Raises PlanError where there is not exactly one."""
        found = {match[1] for fusion in self.fusions if (match := _IN_A_LIST.match(fusion.norm))}
        if len(found) != 1:
            raise self.refusal(f"its norms stand in {len(found)} lists of layers, and the tool takes one")
        return found.pop()

    def refusal(self, why: str) -> PlanError:
        return refusal(self.tool, why)

    def kind(self, name: str) -> type[nn.Module]:
        return type(self.model.get_submodule(name))


def refusal(tool: str, why: str) -> PlanError:
    return PlanError(f"{tool} has no words for this model: {why}")


def modules_of(tool: str, checkpoint: Checkpoint, traced: TracedPlan) -> Modules:
    """The modules of a model's plan and stream.

    Raises PlanError where the stream cannot be rotated, or a parameter in it is no weight or bias of a linear or an
    embedding, or one of several modules.
    """
    stream = rotatable(checkpoint, traced)
    model = traced.model
    _refuse_shared(tool, model, [step.name for step in stream.steps])
    writers: dict[str, None] = {}
    readers: dict[str, None] = {}
    before: dict[str, int] = {}
    norms: list[str] = []
    writing = set(stream.parameters("write"))
    for step in stream.steps:
        name, _, leaf = step.name.rpartition(".")
        if step.kind == "norm":
            norms.append(step.name)
        elif step.kind == "read":
            _refuse_module(tool, model, name, leaf, (nn.Linear,), step.dim == 1)
            readers[name] = None
        else:
            module = model.get_submodule(name)
            dim = 1 if isinstance(module, nn.Embedding) else 0
            _refuse_module(tool, model, name, leaf, (nn.Linear, nn.Embedding), step.dim == dim)
            if getattr(module, "bias", None) is not None and f"{name}.bias" not in writing:
                raise refusal(tool, f"`{pattern_of(name)}.bias` is not what its module adds to the residual stream")
            if leaf == "weight":
                writers[name] = None
                before[name] = len(norms)
    strange = [n for n in writing if n.endswith(".bias") and n.rpartition(".")[0] not in writers]
    if strange:
        raise refusal(tool, f"`{pattern_of(strange[0])}` writes into the residual stream and its weight does not")
    fusions = tuple(_fusion(tool, traced, gain) for gain in norms)
    smoothings = tuple(f for gain in traced.trace.gains if (f := _smoothing(tool, traced, gain)) is not None)
    return Modules(tool, model, stream, tuple(writers), tuple(readers), fusions, before, smoothings)


def _refuse_shared(tool: str, model: nn.Module, names: Sequence[str]) -> None:
    holders = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    for name in names:
        if holders[id(model.get_parameter(name))] > 1:
            raise refusal(tool, f"`{pattern_of(name)}` is the parameter of several modules")


def _refuse_module(
    tool: str, model: nn.Module, name: str, leaf: str, kinds: tuple[type[nn.Module], ...], along: bool
) -> None:
    module = model.get_submodule(name)
    allowed = leaf == "weight" or (leaf == "bias" and isinstance(module, nn.Linear))
    if not isinstance(module, kinds) or not allowed or not along:
        words = " and ".join(f"torch.nn.{kind.__name__}" for kind in kinds)
        raise refusal(
            tool,
            f"`{pattern_of(f'{name}.{leaf}')}`, which lies in the residual stream, is of a {type(module).__name__}; "
            f"the tool changes weights of {words}",
        )


def _fusion(tool: str, traced: TracedPlan, gain: str) -> Fusion:
    """What fuses a norm's gain into linears; PlanError where more than that would be needed."""
    found = traced.trace.gains[gain]
    norm, _, leaf = gain.rpartition(".")
    if leaf != "weight" or found.scale != 1.0 or len(found.shape) != 1:
        raise refusal(tool, f"`{pattern_of(gain)}` is not a plain weight of a norm")
    linears = []
    whole = torch.arange(found.first_id, found.first_id + found.size)
    for name, reader in traced.trace.readers.items():
        if gain not in traced.trace.gains_of(reader.ids):
            continue
        module, _, weight = name.rpartition(".")
        _refuse_module(tool, traced.model, module, weight, (nn.Linear,), reader.dim == 1 and weight == "weight")
        if not torch.equal(reader.ids, whole):
            raise refusal(tool, f"`{pattern_of(name)}` does not read `{pattern_of(norm)}` channel by channel")
        linears.append(module)
    return Fusion(norm, type(traced.model.get_submodule(norm)).__name__, found.offset, tuple(linears))


def _smoothing(tool: str, traced: TracedPlan, gain: str) -> Fusion | None:
    """The same of any folded norm, None where it cannot be said.

    A tied head is left out: the plan unties it, and who smooths does not, so that the embedding would be scaled, too.
    """
    if gain in traced.kept:
        return None
    try:
        found = _fusion(tool, traced, gain)
    except PlanError:
        return None
    head = traced.untied[0].rpartition(".")[0] if traced.untied else None
    return None if head in found.linears else found
