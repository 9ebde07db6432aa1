"""Where files came from: keys of configs that say it, which are no part of the model, and paths of one machine."""

from __future__ import annotations

import json
import re
from typing import Any

# transformers and tokenizers write them when they save; nothing is computed from them.
PLACE_KEYS = ("_name_or_path", "name_or_path", "special_tokens_map_file", "tokenizer_file", "base_model_name_or_path")
_ENTRY = re.compile(rf'("(?:{"|".join(PLACE_KEYS)})"\s*:\s*)("(?:[^"\\]|\\.)*")')
# Absolute, or from home or `.`; a drive of Windows; a share; a file: address. Not what follows `https:/`.
LOCAL_PATH = re.compile(
    r"""file:/+[^\s'"`,;]+
    | (?<![\w/.~-])(?:[A-Za-z]:)?(?:\\\\?[^\s\\/'"`:,;]+){2,}\\?
    | (?<![\w/.~-])(?:[A-Za-z]:|~|\.{1,2})?(?:/[^\s/'"`:,;]+)+/?""",
    re.VERBOSE,
)


def last_part(path: str) -> str:
    """The last part of a path: what a file or folder is called."""
    parts = [part for part in re.split(r"[\\/]", path) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else ""


def is_local(value: str) -> bool:
    """Whether a text is a path that only one machine knows; a Hub id is not."""
    return bool(re.match(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]|file:", value)) or "\\" in value


def without_places(text: str) -> str:
    """A JSON text whose keys of origin name local folders by their last part only; all other bytes as they are."""

    def shortened(match: re.Match[str]) -> str:
        try:
            value = json.loads(match[2])
        except ValueError:
            return match[0]
        return match[1] + json.dumps(last_part(value)) if is_local(value) else match[0]

    return _ENTRY.sub(shortened, text)


def same_but_places(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal apart from their keys of origin."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [key for key in {**a, **b} if key not in PLACE_KEYS]
        return all(key in a and key in b and same_but_places(a[key], b[key]) for key in keys)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_but_places, a, b))
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)  # 1 and True are equal in Python only


def local_paths(value: Any, key: str = "") -> list[str]:
    """Keys of a config whose values are absolute paths of a machine, keys of origin apart."""
    if isinstance(value, dict):
        return [k for name, inner in value.items() for k in local_paths(inner, f"{key}.{name}" if key else name)]
    if isinstance(value, list):
        return [k for inner in value for k in local_paths(inner, key)]
    here = isinstance(value, str) and re.match(r"/\w[^\s]*/|~/|[A-Za-z]:\\|file:/", value)
    return [key] if here and key.rsplit(".", 1)[-1] not in PLACE_KEYS else []
