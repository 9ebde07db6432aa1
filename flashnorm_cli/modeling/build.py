"""The checkpoint's model on the meta device, and the way between its parameters and the tensors on disk.

transformers renames, merges and splits tensors while it loads them. Its own loader is run here on meta tensors of
the shapes that the headers give, so that the model remembers which conversions this very checkpoint needed; its
own reverse conversion (the one behind `save_pretrained`) then carries the gains' ids to the disk's layout.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.errors import PlanError
from flashnorm_cli.modeling.classes import auto_class
from flashnorm_cli.modeling.loaded import refuse_other_shapes, refuse_wrapped_names
from flashnorm_cli.modeling.quiet import first_line, quiet_transformers
from flashnorm_cli.trace.words import model_words

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


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
                f"{folder}: needs its own Python code to run; read it, then add `trust_remote_code=True`"
            ) from error
        raise PlanError(f"{folder}: transformers cannot read config.json: {first_line(error)}") from error


def model_class(config: PretrainedConfig, folder: Path | str, trust_remote_code: bool, **hub: Any) -> Any:
    """The class that config.json names, from transformers or from the checkpoint's own code.

    A name that neither knows is what the auto classes make of the config, as for AutoModelForCausalLM's users.
    Raises PlanError where there is none.
    """
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
        raise PlanError(
            f"{names[0]} needs the checkpoint's own Python code; read it, then add `trust_remote_code=True`"
        )
    return auto_class(config)


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
        what = model_words(error) or "torch cannot make its parameters; check the sizes in it"
        if "conversion of the weights" in str(error):  # its report is not shown: there is nobody to read it
            gap = _missing_member(list(checkpoint.tensors))
            what = f"{gap} is not in the checkpoint" if gap else "tensors that it merges into one differ in shape"
        raise PlanError(f"{cls.__name__} cannot be built from config.json: {what}") from error
    missing = set(info["missing_keys"])
    refuse_wrapped_names(checkpoint, model, missing)
    refuse_other_shapes(checkpoint, model, info["mismatched_keys"])
    return model.eval(), missing


def _missing_member(names: list[str]) -> str | None:
    """A tensor that one member of a list within a layer (an expert) lacks, and others have."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if found := re.match(r"(.*\.\d+\..*\.)(\d+)(\..*)$", name):
            numbers.setdefault((found[1], found[3]), set()).add(int(found[2]))
    all_numbers: dict[str, set[int]] = {}
    for (prefix, _), present in numbers.items():
        all_numbers.setdefault(prefix, set()).update(present)
    for (prefix, suffix), present in numbers.items():
        if missing := all_numbers[prefix] - present:
            return f"{prefix}{min(missing)}{suffix}"
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
