"""The checkpoint's model on the meta device, and the way between its parameters and the tensors on disk.

transformers renames, merges and splits tensors while it loads them. Its own loader is run here on meta tensors of
the shapes that the headers give, so that the model remembers which conversions this very checkpoint needed; its
own reverse conversion (the one behind `save_pretrained`) then carries the gains' ids to the disk's layout.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from flashnorm_cli.checkpoint.open import Checkpoint
from flashnorm_cli.errors import PlanError
from flashnorm_cli.folding.rewrite import TORCH_DTYPE
from flashnorm_cli.trace.companions import small, varying_dims
from flashnorm_cli.trace.tracer import Trace

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, no load reports: there is nothing to load."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def load_config(folder: Path | str, trust_remote_code: bool, **hub: Any) -> PretrainedConfig:
    """The config as transformers reads it, from a folder or, with what `hub` says, from the Hub.

    Raises PlanError for an architecture that it does not know.
    """
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **hub)
    except Exception as error:  # a config class may raise anything, remote code included
        if "trust_remote_code" in str(error):
            raise PlanError(
                f"{folder}: needs its own Python code to run; read it, then add --trust-remote-code"
            ) from error
        raise PlanError(f"{folder}: transformers cannot read config.json: {first_line(error)}") from error


def model_class(config: PretrainedConfig, folder: Path | str, trust_remote_code: bool, **hub: Any) -> Any:
    """The class that config.json names, from transformers or from the checkpoint's own code."""
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    names = config.architectures or []
    auto_map = getattr(config, "auto_map", None) or {}
    if trust_remote_code:
        for auto, reference in auto_map.items():
            if auto.startswith("AutoModel") and reference.rsplit(".", 1)[-1] in names:
                return get_class_from_dynamic_module(reference, folder, **hub)
    for name in names:
        found = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    if names and any(str(v).rsplit(".", 1)[-1] in names for v in auto_map.values()):
        raise PlanError(f"{names[0]} needs the checkpoint's own Python code; read it, then add --trust-remote-code")
    if names:
        raise PlanError(f"transformers {transformers.__version__} has no model class {names[0]}; a newer one may")
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in mapping:
        return mapping[type(config)]
    raise PlanError("config.json names no architecture, and its model_type has no language model")


def build(
    checkpoint: Checkpoint,
    config: PretrainedConfig,
    cls: Any,
    attention: str,
    experts: str,
    untied: bool = False,
) -> tuple[PreTrainedModel, set[str]]:
    """The checkpoint's model on the meta device, "loaded" from the headers.

    Args:
        attention, experts: implementations, by their names in transformers.
        untied: with the output head separate from the embedding, whatever the config says.
    Returns:
        The model, and the runtime names of the parameters that the files do not hold.
    Raises:
        PlanError: the architecture cannot be built from this config.
    """
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # plain linears: which of them are packed on disk, the headers tell
    if untied:
        set_tie(config, False)
    tensors = {
        name: torch.empty(entry.shape, dtype=TORCH_DTYPE.get(entry.dtype, torch.uint8), device="meta")
        for name, entry in checkpoint.tensors.items()
    }
    try:
        with quiet_transformers(), _on_meta():
            model, info = cls.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map={"": "meta"},
                dtype=torch.float32,
                attn_implementation=attention,
                experts_implementation=experts,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:  # a model's own code may raise anything
        what = first_line(error)
        if "conversion of the weights" in what:  # its report is not shown: there is nobody to read it
            gap = _missing_member(list(checkpoint.tensors))
            what = f"{gap} is not in the checkpoint" if gap else "tensors that it merges into one differ in shape"
        raise PlanError(f"{cls.__name__} cannot be built from config.json: {what}") from error
    return model.eval(), set(info["missing_keys"])


def _missing_member(names: list[str]) -> str | None:
    """A tensor that one member of a list within a layer (an expert) lacks, and others have."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if found := re.match(r"(.*\.\d+\..*\.)(\d+)(\..*)$", name):
            numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))
    for (prefix, suffix), mine in numbers.items():
        everybody = set().union(*(n for (p, _), n in numbers.items() if p == prefix))
        if everybody - mine:
            return f"{prefix}{min(everybody - mine)}{suffix}"
    return None


class _StayOnMeta(TorchFunctionMode):
    """Some conversions ask for the CPU, because their tensors are large; a meta tensor has nothing to move."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.to and args[0].device.type == "meta":
            args = tuple(a for a in args if not isinstance(a, (str, torch.device)))
            kwargs = {k: v for k, v in (kwargs or {}).items() if k != "device"}
            if len(args) == 1 and not kwargs:
                return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def _on_meta() -> Iterator[None]:
    """Load in this thread, which the mode above belongs to, instead of transformers' pool."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with _StayOnMeta():
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def tie_declared(config: PretrainedConfig) -> bool:
    """Whether the config ties the output head to the embedding, at its top or for its text model."""
    text = config.get_text_config(decoder=True)
    return bool(getattr(config, "tie_word_embeddings", False) or getattr(text, "tie_word_embeddings", False))


def set_tie(config: PretrainedConfig, value: bool) -> None:
    """Set `tie_word_embeddings` at the top and in every nested config that has it."""
    for each in [config, *(getattr(config, key, None) for key in getattr(config, "sub_configs", {}))]:
        if each is not None and hasattr(each, "tie_word_embeddings"):
            each.tie_word_embeddings = value


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
        raise PlanError(
            f"transformers cannot say how {type(model).__name__} lies on disk: {first_line(error)}"
        ) from error
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
        again = name in tied and id(tensor) in written
        written.add(id(tensor))
        if not again and name not in ignored and isinstance(tensor, torch.Tensor):
            empty[name] = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
    return _reverted(model, empty)


def parameters_named(model: PreTrainedModel, patterns: Iterable[str]) -> dict[str, str]:
    """The parameters that patterns of names on disk stand for, as runtime name -> name on disk.

    Numbers are tried as the model's own parameters have them, and each name is followed through the conversions that
    loaded the model; what is left then is asked for the name under which it would be saved.
    """
    from flashnorm_cli.plan.planner import pattern_of

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


def first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):
        return " ".join(lines[:2])
    return lines[0] if lines else type(error).__name__
