"""Models whose folded norms run without their weights: `weightless` for one that is loaded, `from_pretrained` for both.

A norm is swapped where it stands, by giving the instance a subclass of its own class (norms/modules.py). Nothing else
in the process changes: not the classes of transformers, not another model.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import nn

from flashnorm_cli.adapters.files import adapter_warnings
from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.checkpoint.model import RECORD
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError, one_line
from flashnorm_cli.modeling import build, disk_names
from flashnorm_cli.modeling.quiet import transformers_alone
from flashnorm_cli.norms.detect import PlainNorm, norm_reader, own_forward
from flashnorm_cli.record.read import identities, record_of
from flashnorm_cli.runtimes.transformers.deferred import defer, states_of, undefer
from flashnorm_cli.runtimes.transformers.swap import is_weightless, make_weighted, make_weightless, weightless_ways

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AnyModel = TypeVar("AnyModel", bound=nn.Module)

logger = logging.getLogger(__name__)
# What AutoConfig and the look-up of remote code understand of the arguments of `from_pretrained`.
HUB_ARGUMENTS = "cache_dir force_download proxies token revision local_files_only subfolder code_revision".split()


def weightless(model: AnyModel, deferred: bool = False) -> AnyModel:
    """Let the folded norms of a model run without their weights, in place.

    The norms are those that the record in `model.config` names (docs/checkpoint.md), found by their names on disk. Each
    is checked to hold its identity, then runs on `flashnorm_cli.norms.rms_norm`: this project's kernel on a GPU where
    CuPy is there, `F.rms_norm(x, weight=None)` elsewhere and under `torch.compile`. Parameters stay in place, so
    `state_dict` and `save_pretrained` are what they were; those of swapped norms are frozen, because they get no
    gradient any more. Norms that compute more than a plain RMSNorm (gated and grouped ones, LayerNorm) keep their own
    forward, and multiply by the identity: `weightless_norms(model)` names them. A second call changes nothing;
    `weighted(model)` is the way back. An adapter that was made for another base is warned of (docs/adapters.md).

    Results are those of the folded model before: bit for bit on a CPU (the norms of transformers compute in float32 and
    round once, and so does this), within one rounding per norm on a GPU and under `torch.compile`, where the squares
    are added up in another order.

    Args:
        model: a transformers model that was loaded from a folded checkpoint, or folded by `fold_model_`; it may be
            quantized, spread over devices (`device_map`), or the base of a PEFT model, which may be passed itself.
        deferred: run the linears behind each weightless norm together with it, as `flashnorm_cli.norms.norm_linear`:
            q, k and v as one product, gate and up as one with their activation, residual adds in the product before.
            Their weights become views of one matrix; names, `state_dict` and bytes in memory stay what they were. One
            forward over three tokens shows what fits; the rest keeps the plain path, and `deferred_modules(model)`
            says why. For inference: where a weight wants a gradient, and in train mode, the plain path runs. On a GPU
            the first call measures which kernels to use (up to a minute; kept on disk). Results differ from the plain
            path by rounding.
    Returns:
        The model.
    Raises:
        UsageError: it is no transformers model.
        FlashNormError: the config has no record, a norm that the record names does not hold the identity (somebody has
            trained or edited it) or is not in memory. Nothing is swapped then.
    """
    base = _base(model)
    found = [each for each in _recorded(base) if not is_weightless(each.module)]
    for warning in adapter_warnings(model):
        warnings.warn(one_line(warning), stacklevel=2)
    for each in found:
        _check_identity(each)
    for each in found:
        if each.norm is not None and each.ways is not None:
            make_weightless(each.module, each.norm, each.ways)
    states = weightless_norms(base).values()
    left = sum(why is not None for why in states)
    logger.info("%d norms of %s run without weights, %d keep them", len(states) - left, type(base).__name__, left)
    if deferred:
        defer(base)
    return model


def deferred_modules(model: nn.Module) -> dict[str, str | None]:
    """What `weightless(model, deferred=True)` found: each folded norm, gated MLP and decoder layer by module name.

    Returns:
        None for modules that run merged, or why they keep the plain path; empty before that call. A norm runs with its
        readers, an MLP with gate and up as one, a layer with its residual adds in its products.
    """
    return states_of(_base(model))


def weighted(model: AnyModel) -> AnyModel:
    """Undo `weightless`: every norm is of its own class again, and reads its weight, which is trained if it was.

    Args:
        model: the model that was passed to `weightless`, or that `from_pretrained` returned; any other stays as it is.
    Returns:
        The model.
    """
    undefer(model)
    undefer(getattr(model, "_orig_mod", model))
    for module in list(model.modules()):
        if is_weightless(module):
            make_weighted(module)
    return model


def weightless_norms(model: nn.Module) -> dict[str, str | None]:
    """The norms that the model's record names, by parameter: None for those that run without weights, or why not.

    Raises UsageError and FlashNormError as `weightless` does for a model without a record.
    """
    return {each.name: None if is_weightless(each.module) else _why_not(each) for each in _recorded(_base(model))}


def _why_not(recorded: _Recorded) -> str:
    _, _, module, norm, ways = recorded
    if norm is None and not own_forward(module):
        return "something else has replaced its forward"
    if norm is None:
        return f"{type(module).__name__} computes more than a plain RMSNorm, and multiplies by the identity itself"
    if ways is None:
        return f"{type(module).__name__} rounds otherwise than rms_norm in this dtype"
    return "weightless() has not been called"


# ---- what the record says --------------------------------------------------------------------------------------------


def _base(model: nn.Module) -> PreTrainedModel:
    """The transformers model in a compiled or PEFT model."""
    from transformers import PreTrainedModel

    inner: Any = getattr(model, "_orig_mod", model)
    if not isinstance(inner, PreTrainedModel) and callable(getattr(inner, "get_base_model", None)):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is not a transformers model; pass the model inside (a PreTrainedModel)"
        )
    return inner


class _Recorded(NamedTuple):
    """A norm that the record names: its parameter and the name of that on disk; what it is, and how it is swapped.

    No ways: it cannot be.
    """

    name: str
    disk: str
    module: nn.Module
    norm: PlainNorm | None
    ways: Any


def _recorded(model: PreTrainedModel) -> Iterator[_Recorded]:
    named = disk_names.parameters_named(model, sorted(record_of(model.config).folded))
    if not named:
        raise FlashNormError(
            f"{type(model).__name__} has none of the norms that its record names; was it loaded as another class?"
        )
    owners: dict[int, str] = {id(model.get_parameter(name)): disk for name, disk in named.items()}
    read, known = norm_reader(), dict[Any, Any]()
    for path, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in owners:
                continue
            norm: PlainNorm | None = vars(module)["_plain_norm"] if is_weightless(module) else read(module)
            ways = None
            if norm is not None and not is_weightless(module):
                kind = type(module), norm, parameter.shape
                if kind not in known:
                    known[kind] = weightless_ways(module, norm)
                ways = known[kind] if (parameter.dtype, parameter.dtype) in known[kind] else None
            yield _Recorded(f"{path}.{key}" if path else key, owners[id(parameter)], module, norm, ways)


def _check_identity(recorded: _Recorded) -> None:
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    name, disk, module, norm, _ = recorded
    with align_module_device(module):  # for weights that are offloaded
        weight = module.get_parameter(name.rpartition(".")[2]).detach()
        if weight.is_meta:
            raise FlashNormError(f"{name} is not in memory; load the weights before weightless()")
        # Of what is no plain norm the convention is not known here; training moves elements apart.
        if not bool((weight == (weight.flatten()[0] if norm is None else 1 - norm.offset)).all()):
            raise FlashNormError(
                f"{disk} was folded, but does not hold the identity any more: a quantizer has put its scales there "
                "(AWQ, SmoothQuant), or it was trained or edited; load it with transformers, or fold again from the "
                "source"
            )


# ---- both steps ------------------------------------------------------------------------------------------------------


def from_pretrained(name: str | Path, *, deferred: bool = False, **arguments: Any) -> Any:
    """Load a folded checkpoint and make it weightless.

    The class is the one that config.json names, as `AutoModelForCausalLM` and its kin would choose. Both layouts load
    without a report of missing weights: norms that were left out, and that the record names, get their identity.

    Args:
        name: a local folder or a Hub id.
        arguments: those of transformers' `from_pretrained`: dtype, device_map, revision, attn_implementation, ...
            `use_kernels` takes effect last, on the layers that are left.
        deferred: as for `weightless`.
    Returns:
        The model in eval mode, or (model, loading info) with `output_loading_info=True`.
    Raises:
        FlashNormError: the checkpoint is not folded, is no transformers checkpoint, or is not to be had; what
            `weightless` raises. Other errors are those of transformers.
    """
    path = Path(name).expanduser()
    where, revision = (str(path), None) if path.is_dir() else hub_id(str(name), arguments.get("revision"))
    arguments |= {"revision": revision} if revision else {}
    trust = bool(arguments.get("trust_remote_code"))
    hub = {key: arguments[key] for key in HUB_ARGUMENTS if key in arguments}
    config = build.load_config(where, trust, **hub)
    try:
        record = record_of(config)
    except FlashNormError as error:
        raise type(error)(f"{name}: {error}") from error
    cls = build.model_class(config, where, trust, **hub)
    filled: dict[str, float] = {}
    if record.layout == "dropped":
        cls = _filling(cls, sorted(record.folded), identities(where, hub), filled)
    late = {} if "kernel_config" in arguments else {k: arguments.pop(k) for k in ("use_kernels",) if k in arguments}
    with transformers_alone:
        loaded = cls.from_pretrained(where, **arguments)
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    if record.layout == "dropped":
        model.__class__ = cls.__mro__[1]
        for key, value in filled.items():
            _offload(model, key, value)
        for each in (model.config, model.config.get_text_config(decoder=True)):
            if hasattr(each, "flashnorm"):  # in memory they are all there, and save_pretrained will write them
                each.flashnorm = {**each.flashnorm, "layout": "identity"}
    weightless(model, deferred)
    if late:
        model.set_use_kernels(**late)
    return loaded


def _filling(
    cls: type[PreTrainedModel], patterns: list[str], identities: dict[str, float], filled: dict[str, float]
) -> type[PreTrainedModel]:
    """A class that loads like `cls` and fills in the folded norms, for the time of loading; `filled` says which."""

    def fill(self: Any, info: Any) -> None:
        cls._adjust_missing_and_unexpected_keys(self, info)
        read = norm_reader()
        for name, disk in disk_names.parameters_named(self, patterns).items():
            if name in info.missing_keys:
                norm = read(self.get_submodule(name.rpartition(".")[0]))
                value = identities.get(disk, 1 - norm.offset if norm is not None else None)
                if value is None:
                    raise CheckpointError(
                        f"{disk} was left out, and without {RECORD} nobody knows its identity; add that file"
                    )
                with torch.no_grad():
                    self.get_parameter(name).fill_(value)
                info.missing_keys.discard(name)
                filled[name] = value

    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "_adjust_missing_and_unexpected_keys": fill})


def _offload(model: PreTrainedModel, name: str, value: float) -> None:
    """Where the module of a filled parameter is offloaded, accelerate looks for it in the files, and it is in none."""
    module, key = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
    weights: Any = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if weights is not None and key not in weights:
        parameter = module.get_parameter(key)
        weights.dataset.state_dict[f"{weights.prefix}{key}"] = torch.full(
            parameter.shape, value, dtype=parameter.dtype, device="cpu"
        )
