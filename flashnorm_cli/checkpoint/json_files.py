"""JSON that anybody may have written: parsed once, strictly, and read by type.

What Python's parser lets pass and would hurt later is refused here, with the file and the reason: a key twice with two
values (parsers disagree which one counts), half a surrogate pair (it cannot be written again), nesting without end,
numbers without end. `Infinity` and `NaN` pass, because transformers has written them into configs; a typed reader
refuses them where a number is wanted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from flashnorm_cli.checkpoint.files import open_file
from flashnorm_cli.errors import CheckpointError, quoted, shown

MAX_BYTES = 512 << 20  # an index of a million tensors takes a fifth of it
MAX_DEPTH = 64
MAX_DIGITS = 400  # more than any float has

T = TypeVar("T")


class _Refused(ValueError):
    """Words of our own for what Python's parser would let pass, or say in other words."""


def parse_json(data: bytes, most: int = MAX_BYTES) -> Any:
    """The value that some bytes hold.

    Raises ValueError, with the reason in one line, for what is not JSON or what is listed at the top of this module.
    """
    if len(data) > most:
        raise _Refused(f"{len(data)} bytes are more than the {most} that are read")
    if data.startswith(b"\xef\xbb\xbf"):
        raise _Refused("it begins with a byte order mark; save it as UTF-8 without one")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_two_values, parse_int=_integer)
    except RecursionError:
        raise _Refused("nested too deeply") from None
    if not _is_shallow(value):
        raise _Refused("nested too deeply")
    if b"\\u" in data:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise _Refused("a string holds half a surrogate pair") from None
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError, with the path, if it cannot be read or is something else."""
    try:
        with open_file(path) as file:
            # What is asked for is allocated first: not half a gigabyte for every config.
            size = os.fstat(file.fileno()).st_size
            value = parse_json(file.read(min(size, MAX_BYTES) + 1))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: cannot be read as JSON: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return value


def _without_two_values(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise _Refused(f"{quoted(key)} occurs twice with two values; remove the wrong one")
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _Refused(f"a number of {len(digits)} digits")
    return int(digits)


def _is_shallow(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return True
    return False


# ---- by type ---------------------------------------------------------------------------------------------------------


class Fields:
    """The values of a JSON object, by type. A wrong one raises CheckpointError: file, key, what it is and has to be.

    Args:
        value: what the file holds there.
        where: the file, for messages.
        remedy: what the user can do about it.
        at: the keys that lead to this object.
    """

    def __init__(self, value: Any, where: str, remedy: str, at: str = "") -> None:
        self.where, self.remedy, self.at = where, remedy, at
        if not isinstance(value, dict):
            raise self.error(at, value, "an object")
        self.value: dict[str, Any] = value

    def error(self, key: str, value: Any, wanted: str) -> CheckpointError:
        name = shown(key.removesuffix(".")) or "its content"
        is_what = "is missing" if value is ... else f"is {quoted(value)}"
        return CheckpointError(f"{self.where}: {name} {is_what}, and has to be {wanted}; {self.remedy}")

    def get(self, key: str, check: Callable[[Any], bool], wanted: str, default: Any = ...) -> Any:
        """The value of a key that passes `check`; `default` where the key is not there, if one is given."""
        value = self.value.get(key, default)
        if (key in self.value or default is ...) and (value is ... or not check(value)):
            raise self.error(f"{self.at}{key}", value, wanted)
        return value

    def text(self, key: str) -> str:
        found: str = self.get(key, is_text, "a text")
        return found

    def flag(self, key: str, default: Any = ...) -> bool:
        found: bool = self.get(key, lambda v: isinstance(v, bool), "true or false", default)
        return found

    def number(self, key: str) -> float:
        found: float = self.get(key, is_number, "a number")
        return found

    def count(self, key: str) -> int:
        found: int = self.get(key, is_count, "a whole number from 0 on")
        return found

    def texts(self, key: str) -> tuple[str, ...]:
        return tuple(self.get(key, lambda v: isinstance(v, list) and all(map(is_text, v)), "a list of texts"))

    def objects(self, key: str) -> list[Fields]:
        """The objects of a list, each with its own place for messages."""
        entries = self.get(key, lambda v: isinstance(v, list), "a list of objects")
        return [Fields(e, self.where, self.remedy, f"{self.at}{key}[{i}].") for i, e in enumerate(entries)]


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_count(value: Any) -> bool:
    # type(), because True is an int for isinstance
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    return (type(value) is int and abs(value) < 2**63) or (type(value) is float and math.isfinite(value))


def is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= MAX_DEPTH and all(map(is_count, value))
