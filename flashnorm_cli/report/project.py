"""Where this project lives, and how to install it: what reports and cards say of it."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, metadata

DISTRIBUTION = "flashnorm-cli"
INSTALL = f"pip install {DISTRIBUTION}"


@cache
def address() -> str | None:
    """The address that `project.urls` of pyproject.toml calls Source; None where it names none, or is not installed."""
    try:
        lines = metadata(DISTRIBUTION).get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = dict(line.split(", ", 1) for line in lines if ", " in line)
    found = urls.get("Source", "")
    return found if found.startswith("https://") else None
