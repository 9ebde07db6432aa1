"""Docstrings here put no empty line between their sections, and the parser wants one."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

SECTION = re.compile(r"(?<!\n)\n(?=(?:Args|Returns|Yields|Raises):\n)")


class Docstrings(Extension):
    """Sections that are told apart."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = SECTION.sub("\n\n", obj.docstring.value)
