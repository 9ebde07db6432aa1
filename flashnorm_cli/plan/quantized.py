"""What quantizing costs before and after a fold, as measured, and what follows for `fold --for`.

The figures are in quantized.json, which docs/experiments/quantization_table.py writes from the raw results; the same
script writes the table of docs/quantization.md.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flashnorm_cli.errors import UsageError, quoted

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import numpy as np

KEEP, FOLD, ROTATE = "keep", "fold", "rotate"
ROTATION = "hadamard"
DOCS = "docs/quantization.md"
FIGURES = Path(__file__).with_name("quantized.json")
CAUTION = (
    "quantized, this fold may lose far more than its source, up to a useless model in integers of 4 bits: with "
    f"`target` a fold does what was measured to be best for a format ({DOCS})"
)
# Gains become part of the weights: the largest in a group of 32, relative to their root mean square, scales the
# rounding error. It is 1 where all are equal.
GROUP, UNEVEN = 32, 1.2


class Ratio(NamedTuple):
    """A KL divergence from the float32 source, relative to the source's own in the same format."""

    mean: float  # of all texts
    worst: float  # of single texts


@dataclass(frozen=True)
class Format:
    """A format of quantization. `ratios` are those of the fold, and of the fold with a rotation (None: refused for
    this model, or not measured), by model."""

    name: str
    what: str
    ratios: Mapping[str, tuple[Ratio, Ratio | None]]

    def of(self, choice: str) -> dict[str, Ratio]:
        """The ratios of a choice, by model."""
        pairs = {name: pair[choice == ROTATE] for name, pair in self.ratios.items()}
        return {name: ratio for name, ratio in pairs.items() if ratio is not None}

    def largest(self, choice: str) -> float:
        """The ratio of a choice on the model where it is worst; infinity where fewer than two models had it."""
        found = [ratio.mean for ratio in self.of(choice).values()]
        return max(found) if len(found) > 1 else math.inf

    def pays(self, choice: str) -> bool:
        """Whether a choice was no worse than the source on any text of any model: means alone may be chance."""
        return self.largest(choice) < math.inf and all(ratio.worst <= 1 for ratio in self.of(choice).values())

    def best(self, rotatable: bool = True) -> str:
        """What to do with a model that will be quantized so: never what was worse than the source on any text."""
        choices = [choice for choice in (FOLD, ROTATE) if self.pays(choice) and (rotatable or choice == FOLD)]
        return min(choices, key=self.largest, default=KEEP)

    def measured(self, choice: str) -> str:
        """Ratios of a choice in words: "0.57 (SmolLM2) and 0.7 (demo) times"."""
        return ", ".join(
            f"{ratio.mean:.0f} ({name})" if ratio.mean >= 100 else f"{ratio.mean:.2g} ({name})"
            for name, ratio in self.of(choice).items()
        )


@cache
def formats() -> dict[str, Format]:
    """All formats that were measured, by name."""
    found = json.loads(FIGURES.read_text(encoding="utf-8"))
    return {
        name: Format(
            name,
            each["what"],
            {m: (Ratio(*pair[0]), Ratio(*pair[1]) if pair[1] else None) for m, pair in each["ratios"].items()},
        )
        for name, each in found.items()
    }


def format_of(name: str) -> Format:
    """Raises UsageError for one that was not measured."""
    known = formats()
    if name.lower() not in known:
        raise UsageError(f"`target` is one of {', '.join(known)} ({DOCS}), not {quoted(name)}")
    return known[name.lower()]


def keep_line(form: Format, why: str = "") -> str:
    """Why a model is better left alone, to follow its name."""
    rotated = f", with a rotation {form.measured(ROTATE)}" if form.of(ROTATE) else ""
    chance = ", but above 1 on single texts" if form.largest(ROTATE) <= 1 else ""
    return (
        f"`target={form.name!r}`: keep the norms, and quantize the source as it is: KL divergence after a fold was "
        f"{form.measured(FOLD)} times the source's{rotated}{chance}{why} ({DOCS}); fold without `target` to do it all "
        "the same"
    )


def card_line(rotated: bool) -> str:
    """What a model card says of quantizing a fold further, in sentences."""
    choice = ROTATE if rotated else FOLD
    measured = [(name, form) for name, form in formats().items() if form.largest(choice) < math.inf]
    better = [name for name, form in measured if form.pays(choice)]
    worse = [name for name, form in measured if not form.pays(choice)]
    models = dict.fromkeys(model for form in formats().values() for model in form.ratios)
    done = "rotated folds" if rotated else "folds"
    line = (
        f"not measured on this model. On {_names(models)}, {done} lost more than their sources on some text "
        f"when quantized to {_names(worse)}: quantize the source for these."
    )
    return f"{line} To {_names(better)} they lost no more on any of them." if better else line


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)


def uneven(gains: Iterable[np.ndarray]) -> bool:
    """Whether gains, each of shape (elements,), differ so much within groups that quantizing gets worse by them."""
    import numpy as np

    ratios = []
    for gain in gains:
        groups = gain[: len(gain) // GROUP * GROUP].reshape(-1, GROUP).astype(np.float64)
        square = (groups**2).mean(1)
        if np.any(square > 0):
            ratios.append(np.mean(np.abs(groups).max(1)[square > 0] / np.sqrt(square[square > 0])))
    return bool(ratios) and float(np.median(ratios)) > UNEVEN
