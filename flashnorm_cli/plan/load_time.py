"""Which tensors on disk are not the matrices that the model multiplies with, though they look like them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.load_time import (
    AT_LOAD,
    CONFIG_KEYS,
    STORED,
    Quantization,
    quantizations,
    quantized_on_disk,
    refuse_changed_weights,
    refuse_keys,
)
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.names import grouped, layer_of, pattern_of
from flashnorm_cli.errors import PlanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Tensors of older checkpoints that a model makes by itself, and scales of cached keys and values: no norm is read.
NOT_A_READER = re.compile(
    r"(^|\.)(inv_freq|masked_bias|rotary_emb\.\w+|causal_mask|attn\.bias|attention\.bias|num_batches_tracked|"
    r"(k|v|q|kv|prob_output|k_cache|v_cache)_scale|(k|v)_zero_point|sinks?)$"
)

STORED_ROTATION = re.compile(r"(^|\.)(R[1-4]|\w*(rotation|hadamard)\w*|had_[KU]\w*|SU|SV)(\.weight|_weight)?$", re.I)
_SAFETENSORS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def refuse(checkpoint: Checkpoint, config: PretrainedConfig) -> None:
    """Raise PlanError, by name, for what is not known to leave float weights and what they read as they are."""
    refuse_changed_weights(checkpoint)
    _refuse_unknown_keys(checkpoint, config, checkpoint.config, "")


def _refuse_unknown_keys(checkpoint: Checkpoint, config: Any, values: dict[str, Any], path: str) -> None:
    known = set(vars(type(config))) | {n for c in type(config).__mro__ for n in getattr(c, "__annotations__", {})}
    init = getattr(type(config).__init__, "__code__", None)  # a config class of the checkpoint's own may have no fields
    known |= set(init.co_varnames[: init.co_argcount + init.co_kwonlyargcount]) if init else set()
    refuse_keys(checkpoint.source.name, path, values, known)
    for key, below in values.items():
        nested = vars(config).get(key) if isinstance(below, dict) and key not in CONFIG_KEYS else None
        if hasattr(nested, "to_dict"):
            _refuse_unknown_keys(checkpoint, nested, below, f"{path}{key}.")


def notes(checkpoint: Checkpoint, model: PreTrainedModel, missing: set[str], unread: list[str]) -> list[str]:
    """What is worth knowing of how the files are loaded, though no norm depends on it."""
    found = []
    if not quantized_on_disk(checkpoint):
        found = [
            f"{each.where} ({each.name}) makes runtimes quantize these float weights; remove the key and fold again if "
            "it is a leftover"
            for each in quantizations(checkpoint)
            if not each.only_cache()
        ]
    packed = {name.rpartition(".")[0] for name in unread} | {name for n in unread for name in _underscored(n)}
    lost = [n for n in missing if n.rpartition(".")[0] not in packed and n not in packed]
    if lost:
        names = ", ".join(f"`{name}`" for name, _ in grouped(sorted(lost))[:3])
        found.append(f"the files lack {names} ({len(lost)} tensors), which transformers makes up at random")
    asked = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    asked = _SAFETENSORS.get(str(asked).removeprefix("torch.")) if asked else None
    other = Counter(e.dtype for e in checkpoint.tensors.values() if e.dtype in {*_SAFETENSORS.values()} - {asked})
    if asked and other and sum(other.values()) * 2 > len(checkpoint.tensors):
        stored = other.most_common(1)[0][0]
        found.append(
            f"config.json asks for {asked}, and {other[stored]} of {len(checkpoint.tensors)} tensors are {stored}: the "
            f"products are rounded in {stored}, and once more where a runtime casts them"
        )
    return found


def refuse_rotations(checkpoint: Checkpoint, unread: Iterable[str]) -> None:
    """Raise PlanError where a rotation lies among the tensors that the model does not read."""
    for name in unread:
        if STORED_ROTATION.search(name):
            raise PlanError(
                f"{checkpoint.source.name}: {name} looks like a rotation that a runtime applies to activations: a gain "
                "cannot be moved past it; fold the model that it was made for, and rotate that"
            )


def beside_gain(tensor: str, unread: Iterable[str]) -> str | None:
    """A tensor beside a norm's weight that the model does not read and that may change it: a scale, a bias."""
    stem = tensor.removesuffix("weight")
    found = next((n for n in unread if n.startswith((f"{tensor}_", stem)) and stem.endswith(".")), None)
    return f"`{pattern_of(found)}`, which the model does not read, lies beside its weight" if found else None


class LoadTime:
    """What happens to the tensors of a checkpoint as they are loaded, by their names on disk.

    Args:
        unread: tensors on disk that the model does not read.
        read: names of tensors on disk that it does read, or would if they were there.
        heads: the modules that hold the output head's weight.
    """

    def __init__(
        self, checkpoint: Checkpoint, model: PreTrainedModel, unread: list[str], read: Iterable[str], heads: set[str]
    ) -> None:
        self.declared = [q for q in quantizations(checkpoint) if not q.only_cache()]
        self.stored = quantized_on_disk(checkpoint)
        self.model, self.heads = model, heads
        self.holders: dict[int, list[str]] = {}  # a parameter's modules
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.holders.setdefault(id(parameter), []).append(name.rpartition(".")[0])
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.beside = self._unread_in_modules(unread, set(read))

    def changes(self, tensor: str, parameter: str) -> str | None:
        """Why a gain cannot be moved into this reader, as the end of a sentence, or None.

        Args:
            tensor: its name on disk.
            parameter: the parameter that it is loaded into.
        """
        modules = {tensor.rpartition(".")[0], parameter.rpartition(".")[0]}
        if parameter in self.parameters:
            modules |= set(self.holders[id(self.parameters[parameter])])
        for each in self.declared:
            if why := self._quantized(each, modules):
                return why
        path = tensor.rpartition(".")[0]
        while layer_of(f"{path}."):  # the layer's own module is the last
            if path in self.beside:
                return f"lies beside `{pattern_of(self.beside[path])}`, which is on disk but not read by the model"
            path = path.rpartition(".")[0]
        return None

    def _quantized(self, form: Quantization, modules: set[str]) -> str | None:
        method = form.method
        if method is None:
            return None
        if form.name == "compressed-tensors" and (groups := _groups(form)):
            if _ignored(modules, form.skips() or []) or not _targeted(modules, groups, self._kinds(modules)):
                return None
            return f"is quantized or reads quantized values at run time ({form.where}: {form.name})"
        if method.when == STORED and self.stored:
            return None  # the tensors on disk tell
        listed = form.skips()
        if listed is None:
            left = bool(modules & self.heads) if method.leaves is None else _matches(modules, method.leaves)
        else:
            left = _matches(modules, listed)
        if left and not form.values.get("include_input_output_embeddings"):
            return None
        if method.when == AT_LOAD:
            return f"is quantized as a whole while it is loaded, {method.what} ({form.where}: {form.name})"
        return (
            f"is a plain float on disk, while {form.where} says {form.name}: runtimes quantize it or refuse it "
            "(remove the key if it is a leftover)"
        )

    def _kinds(self, modules: set[str]) -> set[str]:
        """Class names of modules; what is no embedding counts as Linear, as runtimes take a stack of experts."""
        found = {type(m).__name__ for name, m in self.model.named_modules() if name in modules}
        return found | ({"Linear"} if not any("Embedding" in name for name in found) or len(found) > 1 else set())

    def _unread_in_modules(self, unread: list[str], read: set[str]) -> dict[str, str]:
        """By module on disk, a tensor of it within a layer that the model does not read and that may change others.

        One that lies beside a single tensor (`q_proj.weight_scale`) is that tensor's own business.
        """
        ignored = [re.compile(p) for p in getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()]
        modules = {name[: m.start()] for name in read for m in re.finditer(r"\.", name)}
        found: dict[str, str] = {}
        for name in unread:
            if not layer_of(name) or NOT_A_READER.search(name) or any(p.search(name) for p in ignored):
                continue
            parts = name.split(".")
            stems = {".".join(parts[:i]) + ".weight" for i in range(1, len(parts))}
            if (stems | _underscored(name)) & read:
                continue
            path = name.rpartition(".")[0]
            while path and path not in modules:
                path = path.rpartition(".")[0]
            if layer_of(f"{path}."):
                found.setdefault(path, name)
        return found


def _underscored(name: str) -> set[str]:
    """The beginnings of a name that end before an underscore: `a.b_proj_scale` begins with `a.b_proj`."""
    return {name[: m.start()] for m in re.finditer("_", name)}


def _groups(form: Quantization) -> list[str]:
    """The targets of compressed-tensors' config groups."""
    groups = form.values.get("config_groups")
    found = groups.values() if isinstance(groups, dict) else ()
    return [t for g in found if isinstance(g, dict) for t in g.get("targets") or () if isinstance(t, str)]


def _targeted(modules: set[str], targets: Iterable[str], kinds: set[str]) -> bool:
    """Whether compressed-tensors' targets may name one of the modules, or its class. In doubt, yes."""
    for target in targets:
        text = target.removeprefix("re:")
        if text in kinds or any(m == text or m.startswith(f"{text}.") or m.endswith(f".{text}") for m in modules):
            return True
        if target != text and any(_is_at_start(text, module) for module in modules):
            return True
    return False


def _ignored(modules: set[str], patterns: Iterable[str]) -> bool:
    """Whether compressed-tensors' ignore list surely names one of the modules. In doubt, no."""
    for pattern in patterns:
        text = pattern.removeprefix("re:")
        if text in modules or (text != pattern and any(_is_at_start(f"(?:{text})$", m) for m in modules)):
            return True
    return False


def _matches(modules: set[str], patterns: Iterable[str]) -> bool:
    """Whether one of the patterns names one of the modules: whole, as a beginning, as an end, or as an expression.

    Patterns end at a dot, as in transformers' `should_convert_module`: `mlp.gate` is not `mlp.gate_proj`.
    """
    for text in patterns:
        for module in modules:
            if module == text or module.startswith(f"{text}.") or module.endswith(f".{text}"):
                return True
            if _is_at_start(rf"(?:{text})(?:(?<=\.)|(?=\.|$))", module):
                return True
    return False


def _is_at_start(expression: str, module: str) -> bool:
    try:
        return re.match(expression, module) is not None
    except re.error:
        return False
