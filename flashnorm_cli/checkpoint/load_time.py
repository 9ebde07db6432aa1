"""What a config and the files beside it say is done to weights, or to what they read, after they left the disk.

A fold moves a gain into a matrix. That is right where the matrix on disk is the one that is multiplied, and where it
multiplies what the norm returns. Quantizing a matrix as it is loaded, rotating its input, or reading a norm by another
library's convention breaks one of the two, and no tensor need show it. So the rule is an allow-list: METHODS names
what is known, with the reason why float weights are safe beside it; everything else is refused by its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flashnorm_cli.checkpoint.model import CONFIG, Checkpoint, read_json
from flashnorm_cli.errors import PlanError

STORED = "stored"  # a quantized matrix is other tensors on disk; a float matrix with nothing beside it stays as it is
AT_LOAD = "at load"  # float matrices are quantized as they are loaded, all but the listed ones


@dataclass(frozen=True)
class Method:
    """A way to quantize: when it does, what it leaves alone where its config lists nothing, and what it does.

    `leaves` is None for "the output head" (`get_keys_to_not_convert` of transformers), else names of modules.
    """

    when: str
    what: str
    leaves: tuple[str, ...] | None = None


# By the names of quant_method, `_` written as `-`. Read in transformers 5.24 (quantizers/*.py: what
# `_process_model_before_weight_loading` replaces, what `param_needs_quantization` asks for) and vLLM 0.32.
METHODS: dict[str, Method] = {
    # The loader reads qweight, scales and so on; it puts its modules only where it finds them, or where its config says
    # so and a float matrix would lack its scale, which no runtime loads.
    **dict.fromkeys(
        ("gptq", "gptq-marlin", "marlin", "awq", "awq-marlin", "auto-round", "auto-gptq", "auto-awq"),
        Method(STORED, "packed integers with scales"),
    ),
    **dict.fromkeys(("aqlm", "vptq", "spqr"), Method(STORED, "codes with codebooks")),
    **dict.fromkeys(("fp8", "mxfp8", "fbgemm-fp8"), Method(STORED, "8-bit floats with scales")),
    **dict.fromkeys(
        ("modelopt", "modelopt-fp4", "modelopt-mixed", "modelopt-mxfp8", "nvidia-modelopt"),
        Method(STORED, "8- or 4-bit floats with scales"),
    ),
    "compressed-tensors": Method(STORED, "quantized as its config groups say"),
    "quark": Method(STORED, "quantized with scales"),
    "mxfp4": Method(STORED, "4-bit blocks with scales"),
    # A float matrix that is not on the list is quantized in the loader.
    "bitsandbytes": Method(AT_LOAD, "to 4 or 8 bits"),
    "bitnet": Method(AT_LOAD, "to -1, 0 and 1, and what it reads to 8 bits"),
    "torchao": Method(AT_LOAD, "by torchao"),
    "quanto": Method(AT_LOAD, "by quanto"),
    "eetq": Method(AT_LOAD, "to 8 bits"),
    "nvfp4": Method(AT_LOAD, "to 4-bit floats"),
    "metal": Method(AT_LOAD, "for Metal"),
    "sinq": Method(AT_LOAD, "by SINQ"),
    "gemma": Method(AT_LOAD, "by scales for weights and activations"),
    "hqq": Method(AT_LOAD, "by HQQ", ("lm_head",)),
    "higgs": Method(AT_LOAD, "after a Hadamard rotation", ("lm_head",)),
    "fp-quant": Method(AT_LOAD, "after a Hadamard rotation", ("lm_head",)),
    "fouroversix": Method(AT_LOAD, "to 4-bit floats", ("lm_head",)),
    # vLLM quantizes float checkpoints by these names.
    "experts-int8": Method(AT_LOAD, "to 8 bits"),
    "ptpc-fp8": Method(AT_LOAD, "to 8-bit floats"),
    "deepspeedfp": Method(AT_LOAD, "to 6 or 8 bits"),
    "tpu-int8": Method(AT_LOAD, "to 8 bits"),
    "rtn": Method(AT_LOAD, "by rounding"),
}
SKIP_KEYS = (
    "modules_to_not_convert", "llm_int8_skip_modules", "skip_modules", "ignore", "ignored_layers", "exclude",
    "exclude_modules", "disabled_modules",
)  # fmt: skip
CONFIG_KEYS = ("quantization_config", "compression_config", "quant_config", "quantize_config", "quantization")
# Files that vLLM and the tools themselves read beside config.json, and whose they are.
CONFIG_FILES = {"hf_quant_config.json": "modelopt", "quantize_config.json": "gptq", "quant_config.json": "awq"}
ROTATES = re.compile(r"transform_?config|rotat(?!ary)|hadamard|spin_?quant|quarot|quip|incoheren", re.I)
# Keys that a config's class does not know, and that speak of weights which are not used as they are.
CHANGES = re.compile(
    ROTATES.pattern + r"|quantiz|(^|_)quant(_|$)|(^|_)qat(_|$)|fake_?quant|sparsity|smooth_?quant|online_?quant"
    r"|(^|_)(w|a|weight|act|activation|num)_?bits?$|(activation|input|act)_?scales?$",
    re.I,
)
# Keys and values act behind their projections: the projections are the same.
HARMLESS = re.compile(r"^_pre_quantization_dtype$|^(kv|cache)_|kv_cache", re.I)
ROTATION_FILE = re.compile(r"(^|/)(R[1-4]?|[^/]*(rotation|hadamard)[^/]*)\.(bin|pt|pth|safetensors|npz|npy)$")
FLOAT_DTYPES = {"float32", "bfloat16", "float16", "float64", "float", "half", "double", "auto"}
SCALES = re.compile(
    r"(qweight|qzeros|_packed|scales?|scale_inv|scale_2|absmax|quant_map|SCB|_blocks|codes|codebooks?|Qidxs|qdata)$"
)


@dataclass(frozen=True)
class Quantization:
    """A quantization that a config or a file beside it declares; `where` is that place, for messages."""

    name: str
    where: str
    values: dict[str, Any]

    @property
    def method(self) -> Method | None:
        return METHODS.get(self.name)

    def skips(self) -> list[str] | None:
        """The modules that it leaves alone, None where it lists none."""
        found = [self.values[key] for key in SKIP_KEYS if isinstance(self.values.get(key), list)]
        return [name for names in found for name in names if isinstance(name, str)] if found else None

    def only_cache(self) -> bool:
        """Whether it speaks of cached keys and values alone, which are made behind their projections."""
        if self.name == "compressed-tensors":
            groups = self.values.get("config_groups", ...)
            return not groups and "kv_cache_scheme" in self.values
        if "kv_cache_quant_algo" in self.values:
            return not self.values.get("quant_algo")
        return False


def quantizations(checkpoint: Checkpoint) -> list[Quantization]:
    """Every quantization that config.json, at any depth, and the files beside it declare."""
    found = [
        _quantization(value, f"{CONFIG}: {path}", path.rsplit(".", 1)[-1])
        for path, value in _walk(checkpoint.config)
        if path.rsplit(".", 1)[-1] in CONFIG_KEYS and value and not _inside_quantization(path)
    ]
    for file, name in CONFIG_FILES.items():
        if file in checkpoint.others:
            found.append(_quantization(read_json(checkpoint.folder / file), file, name))
    return [each for each in found if each.values or each.name]


def _inside_quantization(path: str) -> bool:
    return any(part in CONFIG_KEYS for part in path.split(".")[:-1])


def _quantization(value: Any, where: str, key: str) -> Quantization:
    if isinstance(value, str):
        return Quantization(_plain(value), where, {})
    if not isinstance(value, dict):
        return Quantization(f"{value!r}", where, {})
    inner = value.get("quantization")  # modelopt's file
    values = {**value, **inner} if isinstance(inner, dict) else value
    name = values.get("quant_method")
    if values.get("load_in_4bit") or values.get("load_in_8bit"):
        name = "bitsandbytes"
    elif name is None and "quant_algo" in values:
        name = "modelopt"
    elif name is None and key == "compression_config":
        name = "compressed-tensors"
    elif name is None and key in CONFIG_FILES.values():
        name = key
    elif name is None and "group_size" in values and "bits" in values:
        name = "mlx"
    return Quantization(_plain(str(name)) if name is not None else "", where, values)


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").removeprefix("intel/")


def _walk(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of nested objects, as (dotted path, value)."""
    if isinstance(value, dict):
        for key, below in value.items():
            here = f"{path}.{key}" if path else str(key)
            yield here, below
            yield from _walk(below, here)
    elif isinstance(value, list):
        for below in value:
            yield from _walk(below, path)


def quantized_on_disk(checkpoint: Checkpoint) -> bool:
    """Whether any tensor is quantized: packed, of few bits, or a scale of another."""
    return any(
        entry.dtype.startswith(("F8", "F4", "F6"))
        or (len(entry.shape) > 1 and entry.dtype in ("U8", "I8", "I32", "U32", "I16", "U16"))
        or SCALES.search(name)
        for name, entry in checkpoint.tensors.items()
    )


# ---- what is refused -------------------------------------------------------------------------------------------------


def refuse_changed_weights(checkpoint: Checkpoint) -> None:
    """Raise PlanError where the weights on disk are not what is multiplied, or not by transformers' conventions."""
    where = checkpoint.source.name
    for shard, header in checkpoint.shards.items():
        _refuse_metadata(f"{where}: {shard}" if len(checkpoint.shards) > 1 else where, header.metadata or {})
    for each in quantizations(checkpoint):
        _refuse_quantization(where, each)
    for path, value in _walk(checkpoint.config):
        is_dtype = path.rsplit(".", 1)[-1] in ("dtype", "torch_dtype") and not _inside_quantization(path)
        if is_dtype and isinstance(value, str) and value.removeprefix("torch.") not in FLOAT_DTYPES:
            raise PlanError(
                f"{where}: {CONFIG} has {path} {value!r}: the weights are cast to it as they are loaded, and what "
                "that makes of W * g is not what it makes of W; fold, then cast"
            )
    for name in (*checkpoint.others, *(each.name for each in checkpoint.left_out)):
        if ROTATION_FILE.search(name):
            raise PlanError(
                f"{where}: {name} looks like a rotation of the model's activations: a gain cannot be moved past it; "
                "fold the model that it was made for, and rotate that"
            )


def _refuse_metadata(where: str, metadata: dict[str, str]) -> None:
    written_by = metadata.get("format", "pt")
    if written_by == "mlx":
        raise PlanError(
            f"{where}: was written by MLX (format mlx), whose conversions hold some norms as 1 + w and transpose "
            "convolutions: transformers and MLX would not compute the same of it. Fold the original transformers "
            "checkpoint, then convert that"
        )
    if written_by != "pt":
        raise PlanError(
            f"{where}: its tensors have format {written_by!r}, and only PyTorch's layout (pt) is known; load it in "
            "transformers and save it again"
        )
    for key in metadata:
        if ROTATES.search(key) or "quantiz" in key.lower():
            raise PlanError(f"{where}: its safetensors metadata names {key!r}: its weights are not used as they lie")


def _refuse_quantization(where: str, form: Quantization) -> None:
    if form.name == "mlx":
        raise PlanError(
            f"{where}: {form.where} is MLX's ({form.values['bits']} bits, groups of {form.values['group_size']}): its "
            "matrices are packed; fold the original checkpoint, then convert that with mlx_lm.convert"
        )
    if form.method is None:
        named = f"the method {form.name!r}" if form.name else "no quant_method"
        raise PlanError(
            f"{where}: {form.where} names {named}, which is not known to leave float weights as they are. If they are "
            f"meant to be used as they lie, remove the key and fold then; if not, fold first and quantize then"
        )
    for path, value in _walk(form.values):
        key = path.rsplit(".", 1)[-1]
        text = value if key == "name" and isinstance(value, str) else key
        if _says_something(value) and ROTATES.search(text):
            if form.method.when == AT_LOAD and key.startswith("hadamard"):
                continue  # its own, within the matrices that it quantizes: their norms are kept
            raise PlanError(
                f"{where}: {form.where}.{path} rotates what linear layers read at run time: a gain cannot be moved "
                "past a rotation. Fold first, then quantize"
            )


def _says_something(value: Any) -> bool:
    """Whether a value is more than "no": empty groups (`{"config_groups": {}}`) count as no."""
    if isinstance(value, dict):
        return any(_says_something(below) for below in value.values())
    return bool(value) and not (isinstance(value, str) and value.lower() in ("none", "false"))


def refuse_keys(where: str, path: str, values: dict[str, Any], known: set[str]) -> None:
    """Raise PlanError for a key that the config's class does not know, and that may change what weights do."""
    for key, value in values.items():
        if key in known or key in CONFIG_KEYS or HARMLESS.search(key) or not CHANGES.search(key):
            continue
        if _says_something(value):
            raise PlanError(
                f"{where}: {CONFIG} has {path}{key}, which transformers does not know and which may change weights or "
                "activations at run time. Remove the key if the weights are meant to be used as they lie"
            )
