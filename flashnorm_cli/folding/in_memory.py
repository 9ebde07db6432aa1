"""Fold a model that is loaded: the same plan as for a checkpoint, made from the model's own config and parameters."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from flashnorm_cli.checkpoint.folded import flags_of
from flashnorm_cli.checkpoint.header import Header, TensorEntry
from flashnorm_cli.checkpoint.model import Checkpoint, Source
from flashnorm_cli.checkpoint.names import layer_of, pattern_of
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, float32_products
from flashnorm_cli.choices import FinalNorm
from flashnorm_cli.choices import Rotation as Kind
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.folding.parameters import Change
from flashnorm_cli.folding.planning import LEAVE_GRID, checked_seed
from flashnorm_cli.folding.rotation import Rotation, rotation
from flashnorm_cli.modeling import build, disk_names
from flashnorm_cli.plan.grid import KINDS, on_grid, rows_along
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.plan.planner import FINAL_NORM_CHOICES, TracedPlan, trace_plan
from flashnorm_cli.plan.rotation import rotatable, with_rotation
from flashnorm_cli.record import write as record

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")


def fold_model_(
    model: Model,
    final_norm: FinalNorm = "auto",
    leave_grid: bool = False,
    *,
    rotate: Kind | None = None,
    seed: int = 0,
) -> Model:
    """Fold the norm gains of a loaded model into the linear layers that read them, in place.

    What `fold` does to a checkpoint, for a model that is in memory: the same plan, the same products (float32, rounded
    once to the parameter's dtype; float64 where parameter or gain are), the same refusals. The folded norms hold their
    identity afterwards, and `model.config` the record of docs/checkpoint.md, so `save_pretrained` writes a folded
    checkpoint, and `weightless(model)` makes it run without the weights. The config is a copy: another model that was
    made from the same config object is not called folded. All checks come before the first change.

    Args:
        model: a transformers model, its parameters in memory (any device), not quantized, without adapters.
        final_norm: "auto", "keep" or "untie"; see `make_plan`. An untied head is a new parameter.
        leave_grid: fold also weights that lie on a quantizer's grid already (trained or made for few bits).
        rotate: "hadamard" or "random": rotate the residual stream after the fold, by the matrix that this and `seed`
            stand for; see docs/rotation.md. All hidden states come out rotated.
    Returns:
        The model.
    Raises:
        UsageError: it is no transformers model, final_norm is none of the three, or there is no such rotation.
        FlashNormError: the model is folded already, has nothing to fold, cannot be changed in place, or lies on a
            quantizer's grid.
        GainOverflowError: a weight times its gain, or rotated, is beyond what the parameter's dtype can hold.
        GainUnderflowError: too many weights times their gain, or rotated, are too small for it.
        PlanError: the architecture cannot be planned, the residual stream cannot be rotated, or the model is not what
            its config says.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is not a transformers model; pass the model inside (a PreTrainedModel)"
        )
    if final_norm not in FINAL_NORM_CHOICES:
        raise UsageError(f"`final_norm` is one of {', '.join(FINAL_NORM_CHOICES)}, not {final_norm!r}")
    seed = checked_seed(rotate, seed)
    _refuse(model)
    checkpoint = _as_checkpoint(model)
    traced = trace_plan(checkpoint, model.config, type(model), final_norm)
    plan, turns = _rotated(checkpoint, traced, rotate, seed)
    if not plan.folded:
        reasons = "; ".join(dict.fromkeys(n.reason or "" for n in plan.kept)) or "it has no norm with a weight"
        raise FlashNormError(f"there is nothing to fold: {reasons}")
    parameters = _same_parameters(model, traced)
    _refuse_replaced(model, traced, {*traced.trace.gains, *traced.trace.readers, *turns})
    if rotate is not None:
        _refuse_patched(model)
    with torch.no_grad(), float32_products():
        gains = _gains(traced, parameters)
        scales = _scales(traced, gains, parameters)
        _refuse_grid(parameters, {} if leave_grid else scales)
        changes = {**scales, **{name: scales.get(name, Change()).rotated(*turn) for name, turn in turns.items()}}
        head, embedding = traced.untied or ("", "")
        for name, change in changes.items():
            change.refuse(name, parameters[name if name in parameters else embedding])
        untied = None
        if plan.untie and head != embedding:
            tied = parameters[embedding]
            untied = nn.Parameter(torch.empty_like(tied), tied.requires_grad)
            changes.pop(head).apply(tied, out=untied)
        for name, change in changes.items():
            change.apply(parameters[name], out=parameters[name])
        for name in gains:
            gain = traced.trace.gains[name]
            parameters[name].fill_((1.0 - gain.offset) / gain.scale)
        if untied is not None:
            model.get_submodule(head.rpartition(".")[0]).register_parameter(head.rpartition(".")[2], untied)
    _mark(model, plan, head)
    return model


def _refuse_grid(parameters: dict[str, nn.Parameter], scales: Mapping[str, Change]) -> None:
    kinds = {pattern_of(name): name for name in scales if layer_of(name) and name in parameters}
    samples = ((name, rows_along(parameters[name], scales[name].dim)) for name in list(kinds.values())[:KINDS])
    found = on_grid((name, rows) for name, rows in samples if rows is not None)
    if found is not None and found.all_few:
        raise FlashNormError(f"{found.line}; {LEAVE_GRID}")


# ---- before the first change -----------------------------------------------------------------------------------------


def _rotated(
    checkpoint: Checkpoint, traced: TracedPlan, kind: str | None, seed: int
) -> tuple[Plan, dict[str, tuple[Rotation, tuple[int, ...]]]]:
    """The plan with its rotation, and what is rotated along which dimensions, by runtime name; nothing for no kind."""
    if kind is None:
        return traced.plan, {}
    stream = rotatable(checkpoint, traced)
    plan = with_rotation(checkpoint, traced, stream, kind, seed)
    matrix = rotation(kind, stream.size, seed)
    return plan, {name: (matrix, dims) for name, dims in stream.members.items()}


def _refuse(model: PreTrainedModel) -> None:
    config = model.config
    if flags_of(config.to_dict()):
        raise FlashNormError("this model is folded already (its config says so); folding twice would do nothing good")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None):
        raise FlashNormError("this model is quantized: packed weights cannot take a gain; fold first, then quantize")
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None):
        raise FlashNormError("this model carries adapters, which read the same gains; merge or unload them first")
    _refuse_memory(model)


def _refuse_memory(model: PreTrainedModel) -> None:
    """Parameters that cannot be written to, or not without changing others."""
    ends: list[tuple[str, int, int, str]] = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise FlashNormError(
                f"{name} is not in memory (offloaded, or never loaded); fold the checkpoint instead: `fold`"
            )
        if type(parameter.data) is not Tensor:
            raise FlashNormError(f"{name} is a {type(parameter.data).__name__}; fold before sharding or quantizing")
        if parameter.is_inference() and not torch.is_inference_mode_enabled():
            raise FlashNormError(f"{name} was made in `torch.inference_mode()`, and cannot be changed outside of it")
        if any(stride == 0 and size > 1 for stride, size in zip(parameter.stride(), parameter.shape, strict=True)):
            raise FlashNormError(f"{name} is expanded: its elements are one in memory; make it `contiguous()` first")
        if parameter.numel():
            reach = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            whole = reach + 1 == parameter.numel()  # of a strided one, what lies in between may be another's
            start, size = parameter.data_ptr(), parameter.element_size()
            ends.append((str(parameter.device), start, start + size * (reach + 1 if whole else 1), name))
    for one, other in pairwise(sorted(ends)):
        if one[0] == other[0] and other[1] < one[2]:
            raise FlashNormError(f"{one[3]} and {other[3]} are two parameters in one place of memory")


def _as_checkpoint(model: PreTrainedModel) -> Checkpoint:
    """The checkpoint that `save_pretrained` would write, as headers say it."""
    names = {dtype: name for name, dtype in TORCH_DTYPE.items()}
    entries: dict[str, TensorEntry] = {}
    end = 0
    for name, tensor in disk_names.tensors_on_disk(model).items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = TensorEntry(name, names.get(tensor.dtype, "U8"), tuple(tensor.shape), start, end)
    name = str(getattr(model, "name_or_path", "") or type(model).__name__)
    config = model.config.to_dict()
    return Checkpoint(Source(name), Path(), None, config, {"memory": Header(b"", entries, None)}, None)


def _same_parameters(model: PreTrainedModel, traced: TracedPlan) -> dict[str, nn.Parameter]:
    """The model's parameters by all of their names. Raises FlashNormError if they are not those that were traced."""
    mine = dict(model.named_parameters(remove_duplicate=False))
    theirs = dict(traced.model.named_parameters(remove_duplicate=False))
    head, embedding = traced.untied or ("", "")
    for name in dict.fromkeys([*mine, *theirs]):
        a, b = mine.get(name), theirs.get(name)
        if a is None or b is None or a.shape != b.shape:
            there = f"{list(a.shape)}" if a is not None else "missing"
            wanted = f"{list(b.shape)}" if b is not None else "nothing of that name"
            raise FlashNormError(
                f"{name} is {there}, but the config of {type(model).__name__} makes {wanted}: this model was changed "
                "after it was built, and cannot be planned from its config"
            )
    if head != embedding:
        theirs[head] = theirs[embedding]  # as it was before the head became a parameter of its own
    for name, other in _twins(mine) ^ _twins(theirs):
        raise FlashNormError(
            f"{other} and {name} are tied in the model or in its config, but not in both; set tie_word_embeddings"
        )
    if head != embedding:
        del mine[head]
    return mine


def _refuse_replaced(model: PreTrainedModel, traced: TracedPlan, used: Collection[str]) -> None:
    """A LayerNorm has the weight of an RMSNorm, and a norm by `w` that of one by `1 + w`."""
    for name in sorted({parameter.rpartition(".")[0] for parameter in used}):
        module, made = model.get_submodule(name), traced.model.get_submodule(name)
        if type(module) is not type(made):
            raise FlashNormError(
                f"{name} is a {type(module).__name__}, but the config of {type(model).__name__} makes a "
                f"{type(made).__name__}: this model was changed after it was built, and cannot be planned from that"
            )


def _refuse_patched(model: PreTrainedModel) -> None:
    """What somebody has hung into a module reads and changes hidden states as they were before a rotation.

    Hooks of transformers collect outputs; accelerate's move tensors between devices.
    """
    for name, module in model.named_modules():
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        strange = [
            h for h in hooks if not str(getattr(h, "__module__", "")).startswith(("transformers.", "accelerate."))
        ]
        if strange or ("forward" in vars(module) and not hasattr(module, "_hf_hook")):
            what = "a hook" if strange else "a forward of its own"
            raise FlashNormError(
                f"{name or type(model).__name__} has {what}, which a rotation cannot follow; remove it first"
            )


def _twins(parameters: dict[str, nn.Parameter]) -> set[tuple[str, str]]:
    """Names of shared parameters, each with the first name."""
    first: dict[int, str] = {}
    return {
        (name, first[id(parameter)])
        for name, parameter in parameters.items()
        if first.setdefault(id(parameter), name) != name
    }


def _gains(traced: TracedPlan, parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Gains of the norms to fold, by runtime name: of shape (elements,), float32 (float64 of float64), on the CPU."""
    gains = {}
    for name, gain in traced.trace.gains.items():
        if name in traced.kept:
            continue
        weight = parameters[name].detach().flatten().cpu()
        weight = weight if weight.dtype == torch.float64 else weight.float()
        scaled = weight if gain.scale == 1.0 else weight * gain.scale
        gains[name] = scaled if gain.offset == 0.0 else scaled + gain.offset
        if not bool(gains[name].isfinite().all()):
            raise FlashNormError(f"{name}: holds inf or NaN; this model is broken")
    if all(bool((g == 1.0).all()) for g in gains.values()):
        raise FlashNormError("there is nothing to fold: every norm that could be holds the identity already")
    return gains


def _scales(traced: TracedPlan, gains: dict[str, Tensor], parameters: dict[str, nn.Parameter]) -> dict[str, Change]:
    """What each reader is multiplied by, by runtime name."""
    trace = traced.trace
    by_id = [torch.ones(1)]  # id 0 and kept gains: unscaled
    by_id += [gains.get(name, torch.ones(gain.size)) for name, gain in trace.gains.items()]
    table = torch.cat(by_id)
    double = torch.cat([torch.full(part.shape, part.dtype == torch.float64) for part in by_id])
    scales = {}
    for name, reader in trace.readers.items():
        ids = reader.ids.clamp(min=0)
        factor = table[ids] if bool(double[ids].any()) else table[ids].float()
        new = traced.plan.untie and name not in parameters  # a head, which is made in any case
        if new or not bool((factor == 1.0).all()):
            scales[name] = Change(factor, reader.dim)
    return scales


# ---- changes ---------------------------------------------------------------------------------------------------------


def _mark(model: PreTrainedModel, plan: Plan, head: str) -> None:
    """Write the record into a config of the model's own; `head` is the parameter that was untied, if one was."""
    _own_config(model)
    if plan.untie:
        _untie(model, head)
        for name in plan.added:
            disk_names.save_as(model, head, name)
    for config in _levels(model.config, plan.text_config):
        for key, value in record.config_keys(plan, "identity", in_memory=True).items():
            setattr(config, key, value)


def _own_config(model: PreTrainedModel) -> None:
    """Give the model and its modules a copy of its config, and of the configs in it."""
    from transformers import PretrainedConfig

    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        for key, value in vars(module).items():
            if isinstance(value, PretrainedConfig) and id(value) in copies:
                vars(module)[key] = copies[id(value)]


def _untie(model: PreTrainedModel, head: str) -> None:
    """Make the tie undeclared, so that neither `tie_weights` nor `save_pretrained` restores it."""
    build.set_tie(model.config, False)
    for path, module in model.named_modules():
        tied = getattr(module, "all_tied_weights_keys", None)
        if tied is not None:
            tied.pop(head.removeprefix(f"{path}." if path else ""), None)


def _levels(config: PretrainedConfig, path: tuple[str, ...]) -> list[PretrainedConfig]:
    """A config and the nested one that `path` leads to."""
    nested = config
    for key in path:
        nested = getattr(nested, key)
    return [config] if nested is config else [config, nested]
