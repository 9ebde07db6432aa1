"""Measurements as text, Markdown and a picture. All of them are of one run and one dtype."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from itertools import groupby
from math import log2
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from flashnorm_cli.errors import FlashNormError, UsageError

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement

Shape = tuple[int, int]  # hidden, tokens

FUSED = "fused_add_rms_norm"
OURS = {"rms_norm": "flashnorm", FUSED: "flashnorm fused"}
LIMITS = ("copy", "PDL copy", "empty launch")
FEW = 256  # tokens up to which a norm is about latency; with more, about bandwidth
PDL = "programmatic dependent launch"

# What `words` takes apart: operation, what is gained, who lacks it, as a contender, and what it is compared with.
GAINS = (
    ("rms_norm", "Dropping the weight", "our kernel with a weight", "flashnorm, weighted", "flashnorm"),
    ("rms_norm", "Dropping the weight in torch", "torch with a weight", "F.rms_norm(weight)", "F.rms_norm(None)"),
    ("rms_norm", "Kernel and launch", "torch without a weight", "F.rms_norm(None)", "flashnorm"),
    ("rms_norm", "Launch alone", f"our kernel without {PDL}", "flashnorm, no PDL", "flashnorm"),
    (FUSED, "Dropping the weight", "our kernel with a weight", "flashnorm fused, weighted", "flashnorm fused"),
    (FUSED, "Fusion, kernel and launch", "torch without a weight", "add, F.rms_norm(None)", "flashnorm fused"),
    (FUSED, "Launch alone", f"our kernel without {PDL}", "flashnorm fused, no PDL", "flashnorm fused"),
)

# Okabe and Ito's colours, which colour-blind people tell apart, without their yellow, which is lost on white.
# A family is the same contender in both operations. Ours stands out; the slow ones that everybody has are grey.
COLORS = {
    "flashnorm": "#D55E00",
    "torch": "#0072B2",
    "notebook": "#999999",
    "transformers": "#5A5A5A",
    "Inductor": "#009E73",
    "Liger": "#CC79A7",
    "quack": "#56B4E9",
    "FlashInfer": "#E69F00",
    "vLLM": "#000000",
}
# Kinds of picture, and the metadata without which the same data give the same bytes.
PICTURES: dict[str, dict[str, None]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
MARKERS = "osv^DPX*<"  # a second way to tell the families apart


def rows_of(results: Sequence[Measurement], operation: str) -> tuple[list[str], list[list[str]]]:
    """One operation as a table, a line a shape.

    Returns:
        Head and lines: our time, bandwidth and share of the copy, then for each other contender how many times as
        long it takes, `wrong`, or `failed`. Where ours has no time, the others' own times are shown.
    """
    shapes = _by_shape(results, operation)
    ours = OURS[operation]
    names = dict.fromkeys(name for found in shapes.values() for name in found)
    others = [name for name in names if name not in (ours, *LIMITS)]
    lines = []
    for (hidden, tokens), found in shapes.items():
        own = found.get(ours)
        us = _time(own)
        line = [str(hidden), str(tokens), f"{us:.2f}" if us else _why(own)]
        line += [f"{own.gb_per_s:.0f}" if own and us and own.gb_per_s is not None else ""]
        line += [f"{100 * own.of_copy:.0f} %" if own and us and own.of_copy is not None else ""]
        for name in others:
            other = _time(found.get(name))
            if other is None:
                line.append(_why(found.get(name)))
            else:
                line.append(f"{other / us:.2f}x" if us else f"{other:.2f} us")
        lines.append(line)
    head = ["hidden", "tokens", "us", "GB/s", "of copy", *others]
    # No bandwidth is taken on a CPU: no column of nothing.
    kept = [i for i in range(len(head)) if i not in (3, 4) or any(line[i] for line in lines)]
    return [head[i] for i in kept], [[line[i] for i in kept] for line in lines]


def host_rows(results: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Host time per call, on the smallest shape that has it: there the GPU waits for the host."""
    timed = [r for r in results if r.host_us is not None and not r.error]
    smallest = min(((r.hidden * r.tokens, r.hidden) for r in timed), default=None)
    lines = [[r.contender, f"{r.host_us:.1f}"] for r in timed if (r.hidden * r.tokens, r.hidden) == smallest]
    return (["call", "host us"], lines) if lines else ([], [])


def words(results: Sequence[Measurement]) -> list[str]:
    """What dropping the weight itself gives, what else there is to gain, and who is faster than we are.

    Computed from what was measured: a line whose contenders were not timed on the same shapes is left out.
    """
    lines = []
    for operation, ours in OURS.items():
        shapes = _by_shape(results, operation)
        on_gpu = any("copy" in found for found in shapes.values())
        for about, gain, lacking, contender, base in GAINS:
            # On a CPU our function is torch's: there is nothing to say but of torch.
            if about == operation and (on_gpu or base == "F.rms_norm(None)"):
                ratios = _ratios(_times(shapes, contender), _times(shapes, base))
                if ratios:
                    lines.append(f"{gain} ({operation}): {lacking} takes {_ranges(ratios, base)}.")
        best = _ratios(_best_peers(shapes), _times(shapes, ours)) if on_gpu else {}
        if best:
            quicker = sum(ratio < 0.995 for ratio in best.values())  # 1.00x is no difference
            lines.append(
                f"The fastest of the others ({operation}) takes {_ranges(best, ours)}; "
                f"it is faster than we are on {quicker} of {len(best)} shapes."
            )
        own = max((r.of_copy or 0 for r in results if r.contender == ours and not r.error), default=0)
        if own > 1.02:
            plain = [r.of_copy for r in results if r.contender == f"{ours}, no PDL" and r.of_copy and not r.error]
            beside = f"; our kernel without it reaches {100 * max(plain):.0f} %" if plain else ""
            lines.append(
                f"Up to {100 * own:.0f} % of the copy ({operation}): the copy is launched without {PDL}{beside}."
            )
    return lines + _host_words(results)


def require_matplotlib() -> None:
    """Raise an error that says what to install, for callers with a long way to go before they plot."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise FlashNormError("a picture takes matplotlib: pip install 'flashnorm-cli[plot]'") from error


def plot(results: Sequence[Measurement], path: Path) -> None:
    """Draw each contender's share of the copy over tokens: a panel a hidden size, a row of panels an operation.

    The same measurements and the same matplotlib give the same bytes.

    Args:
        path: file to write; the suffix decides on .svg, .png or .pdf.
    """
    # Dates are left out, ids do not depend on chance.
    metadata = PICTURES.get(path.suffix.lower())
    if metadata is None:
        raise UsageError(f"{path}: pictures are .svg, .png or .pdf")
    require_matplotlib()
    drawn = [r for r in results if r.of_copy is not None and not r.error and r.contender not in LIMITS]
    if not drawn:
        raise FlashNormError("nothing to draw: no norm was timed beside a copy, which takes a GPU")
    matplotlib, figures = import_module("matplotlib"), import_module("matplotlib.figure")
    operations = [operation for operation in OURS if any(r.operation == operation for r in drawn)]
    hiddens = sorted({r.hidden for r in drawn})
    top = max(1.0, *(r.of_copy or 0 for r in drawn)) * 106
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # whatever the user's own settings are
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "flashnorm", "font.size": 9})
        # Not pyplot, which would choose a backend for the whole process: savefig takes Agg, SVG or PDF by the suffix.
        wide = max(2.3 * len(hiddens) + 0.6, 7.0)  # inches
        names = [list(dict.fromkeys(r.contender for r in drawn if r.operation == o)) for o in operations]
        columns = [max(1, int(wide / (0.75 + 0.07 * max(map(len, each))))) for each in names]  # of the legends
        tall = [3.1 + 0.2 * -(-len(each) // n) for each, n in zip(names, columns, strict=True)]
        figure = figures.Figure(figsize=(wide, sum(tall)), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)
        rows = figure.subfigures(len(operations), 1, squeeze=False, height_ratios=tall)[:, 0]
        for operation, row, labels, n in zip(operations, rows, names, columns, strict=True):
            mine = [r for r in drawn if r.operation == operation]
            axes = row.subplots(1, len(hiddens), sharex=True, sharey=True, squeeze=False)[0]
            for hidden, ax in zip(hiddens, axes, strict=True):
                _panel(ax, [r for r in mine if r.hidden == hidden], operation)
                ax.set_title(f"hidden {hidden}", fontsize=9)
                ax.set_ylim(0, top)
            tokens = _spaced(sorted({r.tokens for r in mine}))
            axes[0].set_xscale("log", base=2)
            axes[0].set_xticks(tokens, [_short(t) for t in tokens])
            axes[0].set_ylabel("% of a copy of the same bytes")
            axes[len(axes) // 2].set_xlabel("tokens")
            row.suptitle(
                f"{operation}: speed beside a plainly launched copy",
                fontsize=11,
                fontweight="bold",
            )
            # A contender may be missing from some panels.
            shown = {
                label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)
            }
            row.legend(
                [shown[label] for label in labels],
                labels,
                loc="outside lower center",
                ncols=min(len(labels), n),
                frameon=False,
                handlelength=3.2,
            )
        figure.savefig(path, dpi=150, metadata=metadata)


def _by_shape(results: Sequence[Measurement], operation: str) -> dict[Shape, dict[str, Measurement]]:
    shapes: dict[Shape, dict[str, Measurement]] = {}
    for r in results:
        if r.operation == operation:
            shapes.setdefault((r.hidden, r.tokens), {})[r.contender] = r
    return shapes


def _time(measurement: Measurement | None) -> float | None:
    return measurement.us if measurement is not None and not measurement.error else None


def _why(measurement: Measurement | None) -> str:
    """In place of a time. Whoever is not there has no error to show."""
    if measurement is None:
        return ""
    return "wrong" if (measurement.error or "").startswith("wrong") else "failed"


def _times(shapes: dict[Shape, dict[str, Measurement]], contender: str) -> dict[Shape, float]:
    times = {shape: _time(found.get(contender)) for shape, found in shapes.items()}
    return {shape: us for shape, us in times.items() if us}


def _best_peers(shapes: dict[Shape, dict[str, Measurement]]) -> dict[Shape, float]:
    """The least time of those that are not ours, whoever that is on a shape."""
    best: dict[Shape, float] = {}
    for name in {name for found in shapes.values() for name in found}:
        if _family(name) != "flashnorm" and name not in LIMITS:
            for shape, us in _times(shapes, name).items():
                best[shape] = min(us, best.get(shape, us))
    return best


def _ratios(times: dict[Shape, float], base: dict[Shape, float]) -> dict[Shape, float]:
    """How many times as long, on the shapes that both have."""
    return {shape: us / base[shape] for shape, us in times.items() if shape in base}


def _ranges(ratios: dict[Shape, float], base: str) -> str:
    """1.02x to 1.34x as long as flashnorm up to 256 tokens (median 1.05x of 20 shapes), 1.00x with more."""
    texts: list[str] = []
    for few in (True, False):
        part = sorted(ratio for (_, tokens), ratio in ratios.items() if (tokens <= FEW) == few)
        if part:
            low, high = f"{part[0]:.2f}x", f"{part[-1]:.2f}x"
            text = low if low == high else f"{low} to {high}"
            text += "" if texts else f" as long as {base}"
            text += f" up to {FEW} tokens" if few else " with more" if texts else f" with more than {FEW} tokens"
            texts.append(text + (f" (median {median(part):.2f}x of {len(part)} shapes)" if len(part) > 1 else ""))
    return ", ".join(texts)


def _host_words(results: Sequence[Measurement]) -> list[str]:
    host = dict(host_rows(results)[1])
    lines = []
    for ours, torchs in (("flashnorm", "F.rms_norm(None)"), ("flashnorm fused", "add, F.rms_norm(None)")):
        if ours in host:
            beside = f", one of {torchs} {host[torchs]} us" if torchs in host else ""
            lines.append(f"Host: a call of {ours} takes {host[ours]} us of the host's time{beside}.")
    return lines


def _family(contender: str) -> str:
    first = re.split(r"[ ,(]", contender)[0]
    return "torch" if first in ("F.rms_norm", "add") else first


def _panel(ax: Any, mine: Sequence[Measurement], operation: str) -> None:
    ax.axhline(100, color="#444444", linewidth=0.8)
    ax.grid(color="#E4E4E4", linewidth=0.6)
    ax.set_axisbelow(True)
    families = list(COLORS)
    for name, group in groupby(sorted(mine, key=lambda r: (r.contender, r.tokens)), key=lambda r: r.contender):
        points = [(r.tokens, 100 * (r.of_copy or 0)) for r in group]
        family = _family(name)
        ours = name == OURS[operation]
        style = "--" if "weight" in name else ":" if "no PDL" in name else "-"
        ax.plot(
            *zip(*points, strict=True),
            label=name,
            color=COLORS.get(family, "#8C6D31"),
            marker=MARKERS[families.index(family)] if family in families else ".",
            linestyle=style,
            linewidth=3 if ours else 1.2,
            markersize=5 if ours else 3.2,
            zorder=4 if ours else 3 if family == "flashnorm" else 2,
        )


def _spaced(tokens: Sequence[int]) -> list[int]:
    """Those that leave their labels room beside each other."""
    apart = log2(tokens[-1] / tokens[0]) / 9
    kept = [tokens[0]]
    for each in tokens[1:]:
        if log2(each / kept[-1]) >= apart:
            kept.append(each)
    return kept


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens >= 1024 and tokens % 1024 == 0 else str(tokens)
