"""Names on disk and names at run time: transformers' own conversions, followed both ways."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flashnorm_cli.errors import PlanError
from flashnorm_cli.modeling.quiet import quiet_transformers
from flashnorm_cli.trace.companions import count_nonzero, small, varying_dims
from flashnorm_cli.trace.result import Trace
from flashnorm_cli.trace.words import model_words


class _KeepSmall(TorchFunctionMode):
    """Run a conversion on expanded (stride-0) tensors without ever writing them out.

    A stack of experts has gigabytes of positions and one varying dimension. Making it contiguous is skipped, and
    parts that are joined along a dimension in which they are constant and equal are expanded, not copied.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.contiguous:
            return args[0]
        if func is torch.cat:
            parts, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
            first = parts[0].narrow(dim, 0, 1)
            if all(
                p.shape[dim] and dim % p.ndim not in varying_dims(p) and _same(p.narrow(dim, 0, 1), first)
                for p in parts
            ):
                shape = list(parts[0].shape)
                shape[dim] = sum(p.shape[dim] for p in parts)
                return first.expand(shape)
        return func(*args, **kwargs)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(small(a), small(b))


def _reverted(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict as `save_pretrained` would lay them out on disk. Raises PlanError where it fails."""
    from transformers.core_model_loading import revert_weight_conversion

    try:
        with quiet_transformers(), _KeepSmall():
            reverted = revert_weight_conversion(model, state)
    except Exception as error:  # a conversion is code of the model's own
        why = model_words(error) or "a conversion of its own needs values"
        raise PlanError(f"transformers cannot say how {type(model).__name__} lies on disk: {why}") from error
    return {name: t[0] if isinstance(t, list) else t for name, t in reverted.items()}


def ids_on_disk(model: PreTrainedModel, trace: Trace) -> dict[str, torch.Tensor]:
    """The ids of every gain and reader in the layout of the disk.

    Returns, per canonical disk name, an int64 tensor of the disk tensor's shape (expanded, not written out): at
    each position, the id of the gain element that scales it, or 0. A gain's own tensor holds minus its own ids.
    """
    first_names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_names.get(id(tensor), name)
        ids = torch.zeros((), dtype=torch.int64)
        if first in trace.gains:
            gain = trace.gains[first]
            ids = -torch.arange(gain.first_id, gain.first_id + gain.size).view(gain.shape)
        elif first in trace.readers:
            reader = trace.readers[first]
            ids = reader.ids.clamp(min=0).view([-1 if d == reader.dim else 1 for d in range(tensor.ndim)])
        state[name] = ids.expand(tensor.shape)
    return _reverted(model, state)


def channels_on_disk(model: PreTrainedModel, dims: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The channels of parameters, counted from 1 along one dimension of each, in the layout of the disk.

    Args:
        dims: dimension by runtime name (the first one of a shared parameter).
    Returns:
        Per canonical disk name an int64 tensor of the disk tensor's shape (expanded, not written out), 0 where
        something else lies.
    Raises:
        PlanError: the conversion fails, or maps two parameters to one tensor.
    """
    first_names = {id(p): name for name, p in model.named_parameters()}
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = first_names.get(id(tensor), name)
        ids = torch.zeros((), dtype=torch.int64)
        if first in dims:
            dim = dims[first]
            ids = torch.arange(1, tensor.shape[dim] + 1).view([-1 if d == dim else 1 for d in range(tensor.ndim)])
        state[name] = ids.expand(tensor.shape)
    expected = sum(map(count_nonzero, state.values()))
    found = _reverted(model, state)
    if sum(map(count_nonzero, found.values())) != expected:
        raise PlanError(f"transformers maps two parameters of {type(model).__name__} to the same tensor on disk")
    return {name: ids for name, ids in found.items() if count_nonzero(ids)}


def saved_names(model: PreTrainedModel, parameters: list[str]) -> dict[str, str]:
    """The names under which `save_pretrained` would write parameters that the checkpoint does not hold yet.

    The model remembers only the conversions that its loading needed; all that it has are asked here. Parameters that
    are merged with others, or split, are left out.
    """
    marks = {name: torch.full((), n) for n, name in enumerate(parameters, 1)}
    state = {
        name: marks.get(name, torch.zeros((), dtype=torch.int64)).expand(tensor.shape)
        for name, tensor in model.state_dict().items()
    }
    used = vars(model).pop("_weight_conversions", None)
    try:
        reverted = _reverted(model, state)
    finally:
        if used is not None:
            model._weight_conversions = used
    found: dict[str, str] = {}
    for name, tensor in reverted.items():
        values = small(tensor)
        if values.numel() == 1 and values.item():
            found.setdefault(parameters[int(values.item()) - 1], name)
    return found


def save_as(model: PreTrainedModel, parameter: str, name: str) -> None:
    """Let `save_pretrained` write a new parameter of a loaded model under the name that the file fold gives it.

    The model remembers only the conversions that its loading needed, and its loading knew nothing of this parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import revert_weight_conversion

    used = getattr(model, "_weight_conversions", None)
    if used is None:
        return
    value = model.get_parameter(parameter)
    choices = [used, *([one, *used] for one in get_model_conversion_mapping(model, add_legacy=False))]
    for choice in choices:
        model._weight_conversions = choice
        if name in revert_weight_conversion(model, {parameter: value}):
            return
    model._weight_conversions = used


def loader_names(model: PreTrainedModel, disk_names: list[str]) -> dict[str, tuple[str, str | None]]:
    """What the loader makes of each disk name: the parameter that it goes into, and the pattern that says how."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    conversions = getattr(model, "_weight_conversions", None) or []
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    state = model.state_dict()
    return {name: rename_source_key(name, renamings, converters, model.base_model_prefix, state) for name in disk_names}


def tensors_on_disk(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What `save_pretrained` would write for a model: names with tensors of that shape and dtype, values left out.

    Of parameters that are declared as tied, one is written. Raises PlanError where transformers cannot say.
    """
    state = model.state_dict(keep_vars=True)
    tied, ignored = model.all_tied_weights_keys, model._keys_to_ignore_on_save or ()
    written = {id(tensor) for name, tensor in state.items() if name not in tied}
    empty: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        is_alias = name in tied and id(tensor) in written
        written.add(id(tensor))
        if not is_alias and name not in ignored and isinstance(tensor, torch.Tensor):
            empty[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return _reverted(model, empty)


def parameters_named(model: PreTrainedModel, patterns: Iterable[str]) -> dict[str, str]:
    """The parameters that patterns of names on disk stand for, as runtime name -> name on disk.

    Numbers are tried as the model's own parameters have them, and each name is followed through the conversions that
    loaded the model; what is left then is asked for the name under which it would be saved.
    """
    from flashnorm_cli.checkpoint.names import pattern_of

    parameters = dict(model.named_parameters(remove_duplicate=False))
    numbers = {(), *(tuple(re.findall(r"(?:^|(?<=\.))\d+(?=\.|$)", name)) for name in parameters)}
    candidates: dict[str, str] = {}
    for pattern in patterns:
        parts = re.split(r"(?:^|(?<=\.))\*(?=\.|$)", pattern)
        for filling in numbers:
            if len(filling) == len(parts) - 1:
                candidates["".join(a + b for a, b in zip(parts, (*filling, ""), strict=True))] = pattern
    loads = loader_names(model, list(candidates))
    found = {loads[name][0]: name for name in candidates if loads[name][0] in parameters}
    left = set(patterns) - {candidates[name] for name in found.values()}
    if left:
        others = [name for name, p in parameters.items() if p.ndim < 3 and name not in found]
        saved = saved_names(model, others).items()
        found.update({name: disk for name, disk in saved if disk in left or pattern_of(disk) in left})
    return found
