"""Measurements as a picture: each contender's share of the copy over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from itertools import groupby
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.bench.report import LIMITS, OURS, family_of
from flashnorm_cli.errors import FlashNormError, UsageError

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement

# Okabe and Ito's colours, which colour-blind people tell apart, without their yellow, which is lost on white.
# A family is the same contender in both operations. Ours stands out; the slow one that everybody has is grey.
COLORS = {
    "flashnorm": "#D55E00",
    "torch": "#0072B2",
    "transformers": "#5A5A5A",
    "Inductor": "#009E73",
    "Liger": "#CC79A7",
    "quack": "#56B4E9",
    "FlashInfer": "#E69F00",
    "vLLM": "#000000",
}
MARKERS = "os^DPX*<"  # a second way to tell the families apart
# Kinds of picture, and the metadata without which the same data give the same bytes.
KINDS: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
IN_A_ROW = 3  # panels: a page is about as wide as three that can be read
PANEL = (3.1, 2.7)  # inches


def require_matplotlib() -> None:
    """Raise an error that says what to install, for callers with a long way to go before they plot."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise FlashNormError("a picture takes matplotlib: pip install 'flashnorm-cli[plot]'") from error


def drawn_of(results: Sequence[Measurement]) -> list[Measurement]:
    """What is drawn: of each family the contender that does least, which is the one without a weight where it has one.

    The notebook's swap is left out: it is a slow transformers norm. What a weight or a plain launch costs our own
    kernel is told in words.
    """
    shown = [r for r in results if r.of_copy is not None and not r.error and r.contender not in LIMITS]
    first: dict[tuple[str, str], str] = {}
    for r in shown:
        family = family_of(r.contender)
        if family in COLORS:
            known = first.setdefault((r.operation, family), r.contender)
            if "weight" in known and "weight" not in r.contender and "no PDL" not in r.contender:
                first[r.operation, family] = r.contender
    return [r for r in shown if first.get((r.operation, family_of(r.contender))) == r.contender]


def plot(results: Sequence[Measurement], path: Path, gpu: str | None = None) -> None:
    """Draw a panel a hidden size, for each operation.

    The same measurements and the same matplotlib give the same bytes.

    Args:
        results: of one dtype.
        path: file to write; the suffix decides on .svg, .png or .pdf.
        gpu: what they were measured on.
    """
    metadata = KINDS.get(path.suffix.lower())
    if metadata is None:
        raise UsageError(f"{path}: pictures are .svg, .png or .pdf")
    require_matplotlib()
    drawn = drawn_of(results)
    if not drawn:
        raise FlashNormError("nothing to draw: no norm was timed beside a copy, which takes a GPU")
    matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    operations = [operation for operation in OURS if any(r.operation == operation for r in drawn)]
    of_each = [[r for r in drawn if r.operation == operation] for operation in operations]
    across = min(IN_A_ROW, max(len({r.hidden for r in mine}) for mine in of_each))
    down = [-(-len({r.hidden for r in mine}) // across) for mine in of_each]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        # Texts stay texts, ids do not depend on chance.
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "flashnorm", "font.size": 10})
        # Not pyplot, which would choose a backend for the whole process: savefig takes Agg, SVG or PDF by the suffix.
        wide = max(PANEL[0] * across + 0.6, 8.0)
        tall = [PANEL[1] * n + 1.3 for n in down]
        figure = figures.Figure(figsize=(wide, sum(tall)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        parts = figure.subfigures(len(operations), 1, squeeze=False, height_ratios=tall)[:, 0]
        for operation, mine, part, rows in zip(operations, of_each, parts, down, strict=True):
            _operation(part, operation, mine, (rows, across), wide, gpu)
        figure.savefig(path, dpi=150, metadata=metadata)


def _operation(
    part: Any, operation: str, mine: Sequence[Measurement], grid: tuple[int, int], wide: float, gpu: str | None
) -> None:
    dtypes = ", ".join(dict.fromkeys(r.dtype for r in mine))
    part.suptitle(f"{operation} in {dtypes}{f' on {gpu}' if gpu else ''}", fontsize=12, fontweight="bold")
    axes = list(part.subplots(*grid, sharex=True, sharey=True, squeeze=False).flat)
    hiddens = sorted({r.hidden for r in mine})
    tokens = _spaced(sorted({r.tokens for r in mine}))
    top = 25 * (int(max(100.0, *(100 * (r.of_copy or 0) for r in mine)) / 25) + 1)
    for ax in axes[len(hiddens) :]:
        ax.remove()
    for i, (hidden, ax) in enumerate(zip(hiddens, axes, strict=False)):
        _panel(ax, [r for r in mine if r.hidden == hidden], operation)
        ax.set_title(f"hidden {hidden}", fontsize=10)
        ax.set_ylim(0, top)
        ax.set_yticks(range(0, top + 1, 50 if top > 150 else 25))
        ax.set_xscale("log", base=2)
        ax.set_xticks(tokens, [_short(t) for t in tokens])
        ax.minorticks_off()
        lowest = i + grid[1] >= len(hiddens)
        ax.tick_params(labelbottom=lowest)
        ax.set_xlabel("tokens" if lowest else "")
    part.supylabel("speed, % of a copy of the same bytes", fontsize=10)
    # A contender may be missing from some panels.
    shown = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    labels = sorted(shown, key=lambda name: list(COLORS).index(family_of(name)))
    columns = max(1, int(wide / (0.75 + 0.08 * max(map(len, labels)))))
    part.legend(
        [shown[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=min(len(labels), columns),
        frameon=False,
        handlelength=3.2,
    )


def _panel(ax: Any, mine: Sequence[Measurement], operation: str) -> None:
    ax.axhline(100, color="#444444", linewidth=0.8)
    ax.grid(color="#E4E4E4", linewidth=0.6)
    ax.set_axisbelow(True)
    families = list(COLORS)
    for name, group in groupby(sorted(mine, key=lambda r: (r.contender, r.tokens)), key=lambda r: r.contender):
        family, ours = family_of(name), name == OURS[operation]
        ax.plot(
            *zip(*((r.tokens, 100 * (r.of_copy or 0)) for r in group), strict=True),
            label=name,
            color=COLORS[family],
            marker=MARKERS[families.index(family)],
            linestyle="--" if "weight" in name else "-",
            linewidth=3 if ours else 1.2,
            markersize=5 if ours else 3.5,
            zorder=4 if ours else 2,
        )


def _spaced(tokens: Sequence[int]) -> list[int]:
    """Those that leave their labels room beside each other."""
    apart = log2(tokens[-1] / tokens[0]) / 7
    kept = [tokens[0]]
    for each in tokens[1:]:
        if log2(each / kept[-1]) >= apart:
            kept.append(each)
    return kept


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
