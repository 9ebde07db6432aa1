"""Kinds of adapters that peft writes: which can be folded, which fit as they are, which are refused and why."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from flashnorm_cli.checkpoint.json_files import Fields, is_count, is_number, is_text
from flashnorm_cli.errors import FlashNormError

# These read no norm, or commute with its gain: they run on source and folded base alike (adapter_plan.py).
FITTING_TYPES = ("IA3", "PROMPT_TUNING", "P_TUNING", "CPT", "PREFIX_TUNING")


# The update is linear in what the layer reads, and one factor of it holds the input dimension.
LINEAR_TYPES = ("LORA", "ADALORA", "LOHA")


# Inputs or outputs are scaled channel by channel, which a gain per channel commutes with; or norms are replaced.
OTHER_TYPES = (FITTING_TYPES[0], "LN_TUNING", "TRAINABLE_TOKENS")


# Vectors in front of the embedded text, or keys and values in front of the computed ones.
PROMPT_TYPES = FITTING_TYPES[1:]


_ROTATES = "it rotates what the layer reads, and a gain per channel does not commute with a rotation"


_SHARES = "its matrices are shared by layers that read different norms"


REFUSED_TYPES = {
    "LOKR": "its update is a Kronecker product, and that times a gain per channel is none",
    "OFT": _ROTATES,
    "BOFT": _ROTATES,
    "HRA": _ROTATES,
    "PSOFT": _ROTATES,
    "VERA": _SHARES,
    "PVERA": _SHARES,
    "VBLORA": _SHARES,
    "RANDLORA": _SHARES,
    "UNILORA": _SHARES,
    "ADAPTION_PROMPT": "its prompts go through the layers' weights without passing their norm",
}


REFUSED_VARIANTS = {
    "use_qalora": "QALoRA averages groups of channels before its A, which no longer tells their gains apart",
    "use_bdlora": "the blocks of BD-LoRA are not handled",
    "arrow_config": "Arrow chooses adapters by the directions of their A matrices, which the fold changes",
    "kasa_config": "KaSA changes the base's weights by their singular values, which the fold changes",
    "monteclora_config": "MonteCLoRA's samples are not handled",
}


# These replace the base's weights by what is left of them, derived from the weights themselves.
MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


MERGE_HINT = "merge it into the source (merge_and_unload of peft) and fold the merged model instead"


MOST_LAYERS = 10_000  # that layer_replication may speak of


class AdapterError(FlashNormError):
    """The adapter cannot be folded exactly; the message names the tensor or the setting, and the reason."""


def check_adapter_config(config: dict[str, Any], where: str) -> None:
    """Raise CheckpointError for keys of adapter_config.json that are read here, and are of another type than peft's."""

    def are_texts(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_text, value))

    def is_range(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(is_count(n) and n <= MOST_LAYERS for n in value)

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list) and all(map(is_count, value))

    fields = Fields(config, where, "it was edited or damaged: save the adapter again")
    optional: dict[str, tuple[Callable[[Any], bool], str]] = {
        **dict.fromkeys(("peft_type", "task_type", "base_model_name_or_path", "revision"), (is_text, "a text or null")),
        **dict.fromkeys(("use_rslora", "ensure_weight_tying"), (lambda v: isinstance(v, bool), "true or false")),
        **dict.fromkeys(("target_parameters", "modules_to_save"), (are_texts, "a list of names or null")),
        "target_modules": (lambda v: is_text(v) or are_texts(v), "a pattern or a list of names"),
        "layer_replication": (lambda v: isinstance(v, list) and all(map(is_range, v)), "a list of [start, end]"),
        "lora_alpha": (is_number, "a number"),
        "alpha_pattern": (
            lambda v: isinstance(v, dict) and all(map(is_safe_pattern, v)) and all(map(is_number, v.values())),
            "an object of numbers by plain patterns of module names",
        ),
        "trainable_token_indices": (
            lambda v: are_tokens(v) or (isinstance(v, dict) and all(map(are_tokens, v.values()))),
            "a list of token ids, or an object of such lists",
        ),
    }
    for key, (check, wanted) in optional.items():
        if config.get(key) is not None:
            fields.get(key, check, wanted)


def is_safe_pattern(pattern: str) -> bool:
    """Whether a regular expression of a file is matched in no time: no repeated group, few repeats."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return len(pattern) <= 1000 and not re.search(r"\)[*+{]", pattern) and len(re.findall(r"[*+{]", pattern)) <= 4


def refuse_unfoldable(config: dict[str, Any]) -> None:
    """Raise AdapterError for a kind of adapter that cannot be folded exactly, whatever its tensors are."""
    kind = config.get("peft_type")
    if kind not in (*LINEAR_TYPES, *OTHER_TYPES, *PROMPT_TYPES):
        why = REFUSED_TYPES.get(str(kind), "how it reads the norms' output is not known here")
        raise AdapterError(f"peft type {kind} cannot be folded: {why}; {MERGE_HINT}")
    for key, why in REFUSED_VARIANTS.items():
        if config.get(key):
            raise AdapterError(f"{key} is set in adapter_config.json: {why}; {MERGE_HINT}")
    init = config.get("init_lora_weights")
    if kind == "LORA" and isinstance(init, str) and init.lower().startswith(MUTATING_INITS):
        raise AdapterError(
            f"init_lora_weights is {init!r}: such an adapter belongs to what its initialisation left of the source's "
            "weights, and peft would derive that afresh from the folded ones; convert it to plain LoRA first, with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=<the adapter as it was initialised>), or "
            f"{MERGE_HINT}"
        )
