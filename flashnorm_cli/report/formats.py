"""Figures in words."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from flashnorm_cli.plan import wording
from flashnorm_cli.proof.result import Verification

NOTHING = "\u2013"


SPACE = "\u00a0"  # between a number and its unit: no line ends there


# What no page may hold: control characters, lone surrogates, and marks that reorder the text around them.
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def figures_of(result: Verification, name: str) -> Mapping[str, Any]:
    level = result.level(name)
    return level.figures if level else {}


def dicts_in(value: Any) -> list[dict[str, Any]]:
    return [dict(v) for v in value if isinstance(v, Mapping)] if isinstance(value, list | tuple) else []


def as_number(value: Any) -> float | None:
    """A number as a float; None for what is not one."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def rank(value: float | None, unknown: float = -math.inf) -> float:
    """For sorting: nan is as bad as inf."""
    number = as_number(value)
    return unknown if number is None else math.inf if math.isnan(number) else number


def _shown(form: Callable[[float], str]) -> Callable[[Any], str]:
    """A filter of numbers: what is missing becomes a dash, inf and nan are named."""

    @functools.wraps(form)
    def filtered(value: Any) -> str:
        number = as_number(value)
        if number is None:
            return NOTHING
        return form(number) if math.isfinite(number) else str(number)

    return filtered


@_shown
def error(value: float) -> str:
    """1.2e-07"""
    return f"{value:.1e}" if value else "0"


@_shown
def percent(share: float) -> str:
    """99.98 %; never 100 % for a little less, never 0 % for a little more."""
    if 0.9999 < share < 1:
        return f"> 99.99{SPACE}%"
    if 0 < share < 0.0001:
        return f"< 0.01{SPACE}%"
    return f"{share * 100:.{0 if share in (0, 1) else 2}f}{SPACE}%"


@_shown
def count(value: float) -> str:
    """1,234"""
    return f"{value:,.0f}"


@_shown
def times(ratio: float) -> str:
    """1.08 and a multiplication sign"""
    digits = f"{ratio:.2f}" if ratio < 10 else f"{ratio:,.0f}" if ratio < 1e6 else f"{ratio:.1e}"
    return f"{digits}{SPACE}\u00d7"


@_shown
def perplexity(value: float) -> str:
    """Enough digits to see a difference."""
    return f"{value:,.4f}" if value < 1000 else f"{value:,.1f}"


@_shown
def decimal(value: float) -> str:
    """Four significant digits, as they come."""
    return f"{value:.4g}"


@_shown
def signed(value: float) -> str:
    """A difference: +0.0012, or 0."""
    return f"{value:+.4g}" if value else "0"


@_shown
def px(value: float) -> str:
    """A coordinate in the chart."""
    return f"{value:.1f}"


@_shown
def seconds(value: float) -> str:
    """0.4 s, or 3 min 12 s"""
    return f"{value:.1f}{SPACE}s" if value < 60 else f"{value // 60:.0f}{SPACE}min {value % 60:.0f}{SPACE}s"


@_shown
def size(value: float) -> str:
    """1.2 GB"""
    return wording.size(value).replace(" ", SPACE)


def date(value: Any) -> str:
    """`2026-01-31T12:30:05Z` as 2026-01-31 12:30 UTC; anything else as it is."""
    found = re.fullmatch(r"(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d)(:\d\d(\.\d+)?)?(Z|\+00:?00)", str(value))
    return f"{found[1]} {found[2]} UTC" if found else str(value)


def anchor(name: Any) -> str:
    """A level's name as the id of its section."""
    return "level-" + re.sub(r"[^A-Za-z0-9]+", "-", str(name))


def breakable(text: Any) -> Markup:
    """Text in which long names and paths may be broken after their dots, slashes and underscores."""
    parts = re.split(r"(?<=\S{12}[./_-])(?=[^\s./_-])", printable(str(text)))
    return Markup("<wbr>").join(parts)


def prose(text: Any) -> Markup:
    """Words in which names stand between backticks, with the names as code."""
    parts = re.split(r"`([^`]+)`", str(text))
    return Markup().join(
        Markup("<code>{}</code>").format(breakable(part)) if i % 2 else breakable(part) for i, part in enumerate(parts)
    )


def printable(value: Any) -> Any:
    """Text from outside without the characters that no page may hold; everything else as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return UNPRINTABLE.sub("\ufffd", value)
    return value
