"""How tools say in config.json that they have folded a checkpoint: this one, and the others that are in circulation."""

from __future__ import annotations

from typing import Any

# What says so, by who writes it. `flashnorm_folded`: vLLM #41431, transformers #45742. `flash_norm`: nano-vllm.
# `flashnorm: true`, `flashnorm_mode`, `flashnorm_version`: early transformer-tricks, with class names like
# LlamaFlashNorm. This tool's own `flashnorm` is an object.
FLAGS = ("flashnorm", "flashnorm_folded", "flash_norm", "flashnorm_mode", "flashnorm_version")
CLASS = "FlashNorm"


def flags_of(config: dict[str, Any]) -> dict[str, Any]:
    """What of a config.json, or of a config nested in it, says that its norms are folded: dotted key -> value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if key in FLAGS:
            if value not in (None, False, {}, ""):
                found[key] = value
        elif key == "architectures" and isinstance(value, list):
            if named := [name for name in value if isinstance(name, str) and CLASS in name]:
                found[key] = named
        elif isinstance(value, dict) and key.endswith("config"):
            found.update({f"{key}.{below}": what for below, what in flags_of(value).items()})
    return found


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a config holds a record of this tool's kind, an object."""
    return isinstance(config.get("flashnorm"), dict)


def in_words(flags: dict[str, Any]) -> str:
    """Flags of another tool, for a message: `flashnorm_mode "compat"`."""
    shown = {
        key: value[0] if isinstance(value, list) else "{...}" if isinstance(value, dict) else str(value).lower()
        for key, value in flags.items()
    }
    return ", ".join(f"{key} {value}" for key, value in list(shown.items())[:3])
