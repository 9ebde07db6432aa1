"""The folded base that an adapter is to fit."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from transformers import PretrainedConfig

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, read_tensor
from flashnorm_cli.errors import PlanError
from flashnorm_cli.modeling import build, disk_names
from flashnorm_cli.plan.model import REMEDY, Plan, Reader
from flashnorm_cli.plan.traced import traced

TASK_HEADS = {
    "SEQ_CLS": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "TOKEN_CLS": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "QUESTION_ANS": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "FEATURE_EXTRACTION": "MODEL_MAPPING",
}


@dataclass(frozen=True)
class FoldedNorm:
    """A norm that the base has folded: its gain `scale * weight + offset` in the source, float32, of its shape."""

    gain: torch.Tensor
    scale: float
    offset: float


@dataclass(frozen=True)
class Target:
    """A weight that an adapter speaks of.

    `factor` (float32, 1-D) is what the fold multiplied it by along `dim`, None for nothing; `norm` is set for a folded
    norm. `disk` are its tensors in source and base, where there is one of the same shape.
    """

    name: str
    shape: tuple[int, ...]
    dim: int = 0
    factor: torch.Tensor | None = None
    norm: FoldedNorm | None = None
    disk: tuple[str, str] | None = None


class FoldedModel:
    """The source's model on the meta device, and what folding the norms of the base's record did to each parameter.

    Args:
        source, base: opened with or without their weights; of the source only norms are read.
        plan: that of the fold, from the base's flashnorm.json.
        task: `task_type` of the adapter's config; heads for classification read the final norm, too.
    Raises:
        PlanError: the model cannot be traced, or the trace does not allow what the record says was folded.
    """

    def __init__(
        self,
        source: Checkpoint,
        base: Checkpoint,
        plan: Plan,
        task: str | None,
        trust_remote_code: bool = False,
    ) -> None:
        self.source, self.base, self.plan = source, base, plan
        self.untied = plan.untie
        config = build.load_config(source.folder, trust_remote_code)
        cls = _class_for(task, config, source, trust_remote_code)
        has_head = task not in TASK_HEADS
        if not has_head:  # to classify more than one text at a time
            for each in (config, config.get_text_config(decoder=True)):
                each.pad_token_id = 0 if each.pad_token_id is None else each.pad_token_id
        self.model, _, self.trace = traced(source, config, cls, untied=self.untied and has_head)
        self.first: dict[str, str] = {}
        first_name: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            self.first[name] = first_name.setdefault(id(parameter), name)
        self.parameters = dict(self.model.named_parameters())
        self.modules = dict(self.model.named_modules())
        names = list(dict.fromkeys([*source.tensors, *base.tensors]))
        self.loads = disk_names.loader_names(self.model, names)
        self._read_norms()

    def _read_norms(self) -> None:
        """Gains of the folded norms, from the source; and one table from the trace's ids to factors."""
        folded = self.plan.folded
        for norm in folded:
            name = norm.tensor
            entry = self.source.tensors.get(name)
            if entry is None or entry.dtype not in TORCH_DTYPE or entry.shape != norm.shape:
                raise PlanError(f"{name}: the base's record says that it is folded, but the source has no such norm")
        with ThreadPoolExecutor(8) as pool:
            weights = list(pool.map(lambda norm: read_tensor(self.source, norm.tensor), folded))
        self.norms: dict[str, FoldedNorm] = {}
        self.by_tensor: dict[str, torch.Tensor] = {}
        last = max((g.first_id + g.size for g in self.trace.gains.values()), default=1)
        table = torch.ones(last)
        for norm, weight in zip(folded, weights, strict=True):
            name = norm.tensor
            parameter = self.first.get(self.loads[name][0], "")
            gain = self.trace.gains.get(parameter)
            if gain is None or (gain.scale, gain.offset) != (norm.scale, norm.offset):
                raise PlanError(
                    f"{name}: is folded in the base, but the forward of {type(self.model).__name__} does not show "
                    "it as a norm's weight"
                )
            if parameter in self.trace.kept:
                raise PlanError(
                    f"{name}: is folded in the base, but {type(self.model).__name__} uses it in another way: "
                    f"{self.trace.kept[parameter]}"
                )
            values = weight.float() * gain.scale + gain.offset
            self.norms[parameter] = FoldedNorm(values, gain.scale, gain.offset)
            self.by_tensor[name] = values.flatten()
            table[gain.first_id : gain.first_id + gain.size] = values.flatten()
        self._table = table

    @cached_property
    def _disk_of(self) -> dict[str, list[str]]:
        """Tensors of the base that are loaded into each parameter as they are."""
        found: dict[str, list[str]] = {}
        for name, (target, pattern) in self.loads.items():
            if pattern is None and target in self.first and name in self.base.tensors:
                found.setdefault(self.first[target], []).append(name)
        return found

    @cached_property
    def _readers_on_disk(self) -> dict[str, Reader]:
        return {reader.tensor: reader for reader in self.plan.readers}

    @cached_property
    def head(self) -> str | None:
        """The module of the output head."""
        return self._path_of(self.model.get_output_embeddings())

    @cached_property
    def embedding(self) -> str | None:
        """The module of the input embedding."""
        return self._path_of(self.model.get_input_embeddings())

    def _path_of(self, wanted: Any) -> str | None:
        return next((path for path, module in self.modules.items() if wanted is not None and module is wanted), None)

    def is_untouched(self, module: str) -> bool:
        """Whether the fold changed no parameter in a module of the model."""
        inside = [name for name in self.first if name.startswith(f"{module}.")]
        targets = [self._parameter(name) for name in inside]
        return module in self.modules and all(t.factor is None and t.norm is None for t in targets)

    def target(self, name: str) -> Target | None:
        """The weight that a name means: of the model, or on disk as older versions of transformers name it."""
        if name in self.first:
            return self._parameter(name)
        loads, pattern = self.loads.get(name) or disk_names.loader_names(self.model, [name])[name]
        if loads in self.first and pattern is None:
            return self._parameter(loads)
        if name in self.base.tensors:
            entry = self.base.tensors[name]
            reader = self._readers_on_disk.get(name)
            factor = self.factor_on_disk(reader) if reader is not None else None
            return Target(name, entry.shape, reader.dim if reader else 0, factor, disk=(name, name))
        return None

    def factor_on_disk(self, reader: Reader) -> torch.Tensor:
        """What the fold multiplied a reader of the record by: float32 of shape (shape[dim],).

        Raises PlanError where the record speaks of another shape than the base's tensor has.
        """
        shape = self.base.tensors[reader.tensor].shape
        channels = sum(run.length * run.repeat for run in reader.runs)
        if reader.dim >= len(shape) or shape[reader.dim] != channels:
            raise PlanError(
                f"{reader.tensor}: the base's record scales {channels} channels along dimension {reader.dim}, and its "
                f"shape is {list(shape)}; {REMEDY}"
            )
        parts = []
        for run in reader.runs:
            gain = self.by_tensor.get(run.norm) if run.norm else None
            part = torch.ones(run.length) if gain is None else gain[run.start : run.start + run.length]
            parts.append(part.repeat(run.repeat))
        return torch.cat(parts)

    def _parameter(self, name: str) -> Target:
        first = self.first[name]
        shape = tuple(self.parameters[first].shape)
        reader = self.trace.readers.get(first)
        dim, factor = 0, None
        if reader is not None:
            dim, factor = reader.dim, self._table[reader.ids.clamp(min=0)]
            if bool((factor == 1).all()):
                factor = None
        disk = None
        candidates = self._disk_of.get(first, [])
        if len(candidates) == 1 and self.base.tensors[candidates[0]].shape == shape:
            known = self._readers_on_disk.get(candidates[0])
            values_from = known.values_from if known and known.values_from in self.source.tensors else None
            disk = (values_from or candidates[0], candidates[0])
        return Target(first, shape, dim, factor, self.norms.get(first), disk)


def _class_for(task: str | None, config: PretrainedConfig, source: Checkpoint, trust_remote_code: bool) -> Any:
    import transformers

    if task not in TASK_HEADS:
        return build.model_class(config, source.folder, trust_remote_code)
    mapping = getattr(transformers, TASK_HEADS[task])
    if type(config) not in mapping:
        raise PlanError(f"the adapter's task_type is {task}, and transformers has no such {config.model_type}")
    return mapping[type(config)]
