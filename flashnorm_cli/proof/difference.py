"""How a tensor differs from what it must hold."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Difference:
    """How a tensor differs from what it must hold, added up over its blocks."""

    values: int = 0  # that differ
    largest: float = 0.0  # difference, in units in the last place of the coarser dtype
    squares: float = 0.0
    reference_squares: float = 0.0
    first: tuple[int, float, float] | None = None  # flat index, found, expected
    words: str = ""  # what has happened, where that is plain

    @property
    def error(self) -> float:
        """Frobenius norm of the difference, relative to what must be there, over the blocks of 1 MiB that differ."""
        return math.sqrt(self.squares / self.reference_squares) if self.reference_squares else math.inf
