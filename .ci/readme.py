"""README as index pages show it: they hold no other file of the project, so relative links become addresses.

hatchling calls this for every build. Without a `Source` in pyproject.toml's `project.urls` there is no address to link
to, and the links become plain text.
"""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)\s]+)\)")


class Readme(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": absolute(text, source, metadata["version"])}


def absolute(text: str, source: str | None, version: str) -> str:
    """Markdown with the relative links as addresses in the repository `source`, at the tag of this version."""

    def link(match: re.Match) -> str:
        image, words, target = match.groups()
        if source is None:
            return "" if image else words
        return f"{image}[{words}]({source.rstrip('/')}/{'raw' if image else 'blob'}/v{version}/{target})"

    return LINK.sub(link, text)
