"""JSON of a user's files: what Python's parser lets pass and would hurt later is refused in one line."""

from __future__ import annotations

import pytest

from flashnorm_cli.checkpoint.json_files import parse_json


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"[" * 10**5 + b"]" * 10**5, "nested too deeply"),
        (b"[" * 100 + b"]" * 100, "nested too deeply"),
        (b'{"a":' * 500 + b"1" + b"}" * 500, "nested too deeply"),
        (b"9" * 5000, "a number of 5000 digits"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice with two values"),
        (b'{"a": {"b": 1, "b": null}}', "'b' occurs twice with two values"),
        (b"\xef\xbb\xbf{}", "byte order mark"),
        (b'{"a": "\\ud800"}', "half a surrogate pair"),
        (b'"\xff"', "utf-8"),
        (b"", "Expecting value"),
        (b"[1, 2", "Expecting"),
    ],
)
def test_json_that_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as error:
        parse_json(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_json_that_passes() -> None:
    assert parse_json(b'{"a": 1, "a": 1, "b": "\\ud83d\\ude00", "c": [0.0, Infinity]}')["b"] == "\U0001f600"
    with pytest.raises(ValueError, match="more than the 3 that are read"):
        parse_json(b"[1,2]", 3)
