"""Measurements as text, Markdown and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from math import log2
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement

OURS = {"rms_norm": "flashnorm", "fused_add_rms_norm": "flashnorm fused"}
LIMITS = ("copy", "empty launch")


def rows_of(results: Sequence[Measurement], operation: str) -> tuple[list[str], list[list[str]]]:
    """A table: one line a shape, our time and share of the copy, then how many times longer each other one takes."""
    mine = [r for r in results if r.operation == operation]
    ours = OURS[operation]
    others = [c for c in dict.fromkeys(r.contender for r in mine) if c not in (ours, *LIMITS)]
    head = ["hidden", "tokens", "us", "GB/s", "of copy", "copy us", *others]
    lines = []
    for shape in dict.fromkeys((r.hidden, r.tokens) for r in mine):
        found = {r.contender: r for r in mine if (r.hidden, r.tokens) == shape}
        us, copy = found[ours].us if ours in found else None, found.get("copy")
        line = [f"{shape[0]}", f"{shape[1]}"]
        if us is None:
            line += [found[ours].error or "-" if ours in found else "-", "", "", ""]
        else:
            mine_now = found[ours]
            line += [f"{us:.2f}", f"{mine_now.gb_per_s:.0f}" if mine_now.gb_per_s else ""]
            line += [f"{100 * mine_now.of_copy:.0f} %" if mine_now.of_copy else ""]
            line += [f"{copy.us:.2f}" if copy and copy.us else ""]
        for other in others:
            each = found.get(other)
            if each is None:
                line.append("")
            elif each.us is None:
                line.append("wrong" if (each.error or "").startswith("wrong") else "failed")
            else:
                line.append(f"{each.us / us:.2f}x" if us else f"{each.us:.2f}")
        lines.append(line)
    return head, lines


def host_rows(results: Sequence[Measurement]) -> tuple[list[str], list[list[str]]]:
    """Host time per call, the smallest shape that has it."""
    timed = [r for r in results if r.host_us is not None]
    if not timed:
        return [], []
    smallest = min(r.hidden * r.tokens for r in timed)
    return ["call", "host us"], [
        [r.contender, f"{r.host_us:.1f}"] for r in timed if r.hidden * r.tokens == smallest and r.host_us is not None
    ]


def text_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in (head, *lines)]


def markdown_table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (head, ["--"] * len(head), *lines)]


def words(results: Sequence[Measurement]) -> list[str]:
    """What the multiply by the weight itself costs here, and what else there is to gain."""
    by_shape = {(r.operation, r.hidden, r.tokens, r.contender): r.us for r in results if r.us}
    lines = []
    for operation, ours in OURS.items():
        shapes = {(r.hidden, r.tokens) for r in results if r.operation == operation}

        def ratios(contender: str, shapes: Any = shapes, operation: str = operation, ours: str = ours) -> list[float]:
            found = [(by_shape.get((operation, *s, contender)), by_shape.get((operation, *s, ours))) for s in shapes]
            return sorted(a / b for a, b in found if a and b)

        if gain := ratios(f"{ours}, weighted"):
            lines.append(
                f"{operation}: the same kernel with a weight takes {gain[0]:.2f} to {gain[-1]:.2f} times as long."
            )
        if base := ratios("F.rms_norm(None)" if operation == "rms_norm" else "add, F.rms_norm(None)"):
            lines.append(f"{operation}: torch without a weight takes {base[0]:.2f} to {base[-1]:.2f} times as long.")
    return lines


def plot(results: Sequence[Measurement], operation: str) -> str:
    """An SVG: share of the copy over tokens, a panel per hidden size, a line per contender."""
    mine = [r for r in results if r.operation == operation and r.of_copy and r.contender != "copy"]
    hiddens = sorted({r.hidden for r in mine})
    names = list(dict.fromkeys(r.contender for r in mine))
    colors = [
        "#d62728",
        "#1f77b4",
        "#2ca02c",
        "#9467bd",
        "#8c564b",
        "#e377c2",
        "#7f7f7f",
        "#bcbd22",
        "#17becf",
        "#ff7f0e",
    ]
    width, height, gap = 260, 200, 46
    total = gap + len(hiddens) * (width + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height + 110 + 16 * (len(names) // 3 + 1)}" '
        'font-family="sans-serif" font-size="11">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{gap}" y="18" font-size="14">{operation}: speed as a share of a copy of the same bytes</text>',
    ]
    tokens = [r.tokens for r in mine]
    low, high = log2(min(tokens, default=1)), max(log2(max(tokens, default=2)), log2(min(tokens, default=1)) + 1)
    for p, hidden in enumerate(hiddens):
        left, top = gap + p * (width + gap), 40
        parts.append(f'<text x="{left}" y="{top - 6}">hidden {hidden}</text>')
        for share in (0, 0.25, 0.5, 0.75, 1):
            y = top + height * (1 - share / 1.1)
            parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
            parts.append(f'<text x="{left - 4}" y="{y + 4:.1f}" text-anchor="end">{share:.0%}</text>')
        for each in sorted({r.tokens for r in mine if r.hidden == hidden}):
            x = left + width * (log2(each) - low) / (high - low)
            parts.append(f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{each}</text>')
        for n, name in enumerate(names):
            points = sorted((r.tokens, r.of_copy or 0) for r in mine if r.hidden == hidden and r.contender == name)
            path = " ".join(
                f"{left + width * (log2(t) - low) / (high - low):.1f},{top + height * (1 - min(share, 1.1) / 1.1):.1f}"
                for t, share in points
            )
            stroke = 3 if n == 0 else 1.3
            color = colors[n % len(colors)]
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{stroke}"/>')
    for n, name in enumerate(names):
        x, y = gap + (n % 3) * 220, height + 84 + 16 * (n // 3)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colors[n % len(colors)]}"/>')
        parts.append(f'<text x="{x + 15}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
