"""Measurements as tables and in words. All of them are of one run and one dtype."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashnorm_cli.bench.kernels import Measurement

Shape = tuple[int, int]  # hidden, tokens

FUSED = "fused_add_rms_norm"
OURS = {"rms_norm": "flashnorm", FUSED: "flashnorm fused"}
ON_A_CPU = "where flashnorm's own norm is torch's and is not timed apart"
TORCHS = "F.rms_norm(None)"
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


def rows_of(results: Sequence[Measurement], operation: str) -> tuple[list[str], list[list[str]]]:
    """One operation as a table, a line a shape.

    Returns:
        Head and lines: our time, bandwidth and share of the copy, then for each other contender how many times as
        long it takes, `wrong`, or `failed`. Where ours has no time, the others' own times are shown. On a CPU our norm
        is torch's, which stands in its place.
    """
    shapes = _by_shape(results, operation)
    names = dict.fromkeys(name for found in shapes.values() for name in found)
    ours = base_of(results, operation)
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


def line_of(measured: Sequence[Measurement]) -> str:
    """One operation on one shape in a line."""
    head, lines = rows_of(measured, measured[0].operation)
    hidden, tokens, us, *others = lines[0]
    beside = ", ".join(f"{name} {cell}" for name, cell in zip(head[3:], others, strict=True) if cell)
    base = base_of(measured, measured[0].operation)
    time = f"{us} us" if us[:1].isdigit() else us
    return f"{measured[0].operation} {hidden} x {tokens}: {base} {time}" + (f"; {beside}" if beside else "")


def base_of(results: Sequence[Measurement], operation: str) -> str:
    """The contender that all others are compared with: ours, or torch's where ours would be torch's."""
    names = {r.contender for r in results if r.operation == operation}
    return TORCHS if OURS[operation] not in names and TORCHS in names else OURS[operation]


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
        if family_of(name) != "flashnorm" and name not in LIMITS:
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


def family_of(contender: str) -> str:
    """Whose norm a contender is."""
    first = re.split(r"[ ,(]", contender)[0]
    return "torch" if first in ("F.rms_norm", "add") else first
