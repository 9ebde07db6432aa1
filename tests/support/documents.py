"""What --json prints, read as a script reads it: one document, and one that schema.json allows."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

import flashnorm_cli.cli

SCHEMA = Path(flashnorm_cli.cli.__file__).with_name("schema.json")


@cache
def _validator(part: str) -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    whole = schema if not part else {**schema, "$ref": f"#/$defs/{part}"}
    if part:
        for key in ("required", "allOf", "unevaluatedProperties"):
            del whole[key]
    return Draft202012Validator(whole)


def check(value: Any, part: str = "") -> Any:
    """A value that the schema, or one of its $defs, allows."""
    wrong = [f"{e.json_path}: {e.message[:300]}" for e in _validator(part).iter_errors(value)]
    assert not wrong, "\n".join(wrong)
    return value


def document(printed: str) -> dict[str, Any]:
    """What a command printed, all of it, as JSON (NaN and Infinity are none)."""
    return check(json.loads(printed, parse_constant=lambda name: pytest_fail(name)))


def pytest_fail(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")
