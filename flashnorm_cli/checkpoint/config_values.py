"""config.json against the headers, before a model is made from it: what could never be, or never end, is refused.

transformers checks most types itself, and names the field. Left are keys that its code uses unchecked, and numbers that
would have it build ten million layers or fill memory with a table, though no tensor on disk is that large.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.json_files import is_text
from flashnorm_cli.errors import CheckpointError, quoted

PACKED = 16  # values that quantization puts into one element of a tensor, at most
# Below these nothing takes long, whatever the files hold.
FEW_CHANNELS, FEW_LAYERS, FEW_EXPERTS, MOST_LABELS = 1 << 16, 1000, 4096, 1_000_000

_CHANNELS = re.compile(
    r"(\w+_)?((hidden|intermediate|embedding|vocab|state)_size|dim|rank|heads|width)|[dn]_(model|ff|embd|head)"
)
_LAYERS = re.compile(r"(\w+_)?(layers|depth)|n_layer")
_EXPERTS = re.compile(r"(n|num)_(\w+_)?experts?")
_POSITIVE = ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads")
_OBJECTS = ("text_config", "vision_config", "audio_config", "quantization_config", "id2label", "label2id", "auto_map")


def check_config(config: dict[str, Any], tensors: Iterable[TensorEntry], where: str) -> None:
    """Raise CheckpointError, with the key and the file `where`, for a config that no model of `tensors` can have."""
    entries = list(tensors)
    largest = max((n for entry in entries for n in entry.shape), default=0)
    limits = (
        (_CHANNELS, max(PACKED * largest, FEW_CHANNELS), f"no tensor is longer than {largest}"),
        (_LAYERS, max(len(entries), FEW_LAYERS), f"there are {len(entries)} tensors"),
        (_EXPERTS, max(len(entries), largest, FEW_EXPERTS), f"there are {len(entries)} tensors"),
        (re.compile("num_labels"), MOST_LABELS, "that many labels are not read"),
    )
    _check_level(config, limits, where, "")


def _check_level(config: dict[str, Any], limits: tuple[Any, ...], where: str, at: str) -> None:
    def refuse(key: str, wanted: str) -> CheckpointError:
        return CheckpointError(f"{where}: {at}{key} is {quoted(config[key])}, and has to be {wanted}; correct it there")

    for key, value in config.items():
        if key in _OBJECTS and not isinstance(value, (dict, type(None))):
            raise refuse(key, "an object")
        if key == "model_type" and not is_text(value):
            raise refuse(key, "the name of an architecture")
        if key == "layer_types" and not (value is None or (isinstance(value, list) and all(map(is_text, value)))):
            raise refuse(key, "a list of names")
        if key == "auto_map" and value is not None and not all(map(_is_reference, value.values())):
            raise refuse(key, "an object of class names")
        if isinstance(value, dict):
            _check_level(value, limits, where, f"{at}{key}.")
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        if numbers and (wanted := _out_of_range(key, numbers, limits, single=numbers[0] is value)):
            raise refuse(key, wanted)


def _out_of_range(key: str, numbers: list[int], limits: tuple[Any, ...], single: bool) -> str | None:
    """What the numbers of a key have to be and are not; None if they are."""
    if single and key in _POSITIVE and numbers[0] < 1:  # in a list, a layer may have none
        return "at least 1"
    if min(numbers) < 0 and (key == "num_hidden_layers" or (key.endswith("_size") and _CHANNELS.fullmatch(key))):
        return "at least 0"
    for names, most, why in limits:
        if max(numbers) > most and names.fullmatch(key):
            return f"at most {most}: {why}"
    return None


def _is_reference(value: Any) -> bool:
    """A class in the checkpoint's own code, or a slow and a fast tokenizer, of which one may be missing."""
    return is_text(value) or (isinstance(value, list) and all(v is None or is_text(v) for v in value))
