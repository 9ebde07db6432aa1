"""Write what follows from docs/benchmarks/quantization_*.json: the table of docs/quantization.md, and quantized.json.

    python docs/experiments/quantization_table.py

`fold --for` reads the second one. A test runs this and compares.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "docs" / "benchmarks"
RAW = ("smollm2", "qwen25", "gemma3", "demo")
FIGURES = ROOT / "flashnorm_cli" / "plan" / "quantized.json"
PAGE = ROOT / "docs" / "quantization.md"
SUMMARY, END_OF_SUMMARY = "<!-- summary: docs/experiments/quantization_table.py -->", "<!-- end of summary -->"
SITES, END_OF_SITES = "<!-- sites: docs/experiments/quantization_sites.py -->", "<!-- end of sites -->"
BEGIN, END = "<!-- table: docs/experiments/quantization_table.py -->", "<!-- end of table -->"
# What `--for` knows, in the order of the table.
FORMATS = {
    "q8_0": "llama.cpp Q8_0",
    "q4_k_m": "llama.cpp Q4_K_M",
    "q4_0": "llama.cpp Q4_0",
    "int8": "int8 weights, a scale per channel",
    "fp8": "FP8 weights, a scale per tensor",
    "int4-g128": "int4 weights, groups of 128",
    "int4-g32": "int4 weights, groups of 32",
    "nf4": "NF4 weights, blocks of 64",
    "w8a8-int8": "int8 weights per channel, int8 activations per token",
    "w8a8-fp8": "FP8 weights per channel, FP8 activations per token",
    "nvfp4": "NVFP4 weights and activations",
    "w4a8": "int4 weights in groups of 32, int8 activations per token",
    "w8a6": "int8 weights per channel, 6-bit activations per token",
    "w8a4": "int8 weights per channel, 4-bit activations per token",
}
TOOLS = {
    "llm-compressor-w8a8": "llm-compressor W8A8",
    "llm-compressor-fp8": "llm-compressor FP8_DYNAMIC",
    "torchao-w8a8": "torchao int8 weights and activations",
    "torchao-int8": "torchao int8 weights",
}
OTHERS = ("fold", "rotated")
SITE_NAMES = ("q, k, v", "o", "gate, up", "down", "all but down", "all")
# What the sentences above the table put together.
ROUND_WEIGHTS = ("q8_0", "q4_k_m", "q4_0", "int8", "int4-g128", "int4-g32", "nf4", "w4a8")
FLOAT8 = ("fp8", "w8a8-fp8")
ROUND_ACTIVATIONS = {"w8a8-int8": 8, "w8a6": 6, "w8a4": 4}


def models() -> list[dict[str, Any]]:
    """The raw results, by model; those of tools that run in another environment lie in a file of their own."""
    found = []
    for name in RAW:
        paths = sorted(BENCHMARKS.glob(f"quantization_{name}*.json"), key=lambda path: len(path.name))
        model, *more = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        for each in more:
            for variant, rows in each["rows"].items():
                model["rows"].setdefault(variant, {}).update(rows)
        found.append(model)
    return found


def row_of(model: dict[str, Any], variant: str, name: str) -> dict[str, Any] | None:
    row = model["rows"].get(variant, {}).get(name)
    return row if isinstance(row, dict) and "kl" in row else None


def ratio(model: dict[str, Any], variant: str, name: str) -> float | None:
    row, source = row_of(model, variant, name), row_of(model, "source", name)
    return round(sum(row["kl"]) / sum(source["kl"]), 3) if row and source else None


def texts_of(model: dict[str, Any], variant: str, name: str) -> list[float]:
    """The ratios of single texts, ascending; none where it was not measured."""
    row, source = row_of(model, variant, name), row_of(model, "source", name)
    return sorted(a / b for a, b in zip(row["kl"], source["kl"], strict=True)) if row and source else []


def figures() -> dict[str, Any]:
    """By format and model, of the fold and of its rotation: the ratio to the source, and that of the worst text."""
    found: dict[str, Any] = {}
    for name, what in FORMATS.items():
        ratios = {}
        for model in models():
            worst = [texts_of(model, variant, name)[-1:] for variant in OTHERS]
            means = [ratio(model, variant, name) for variant in OTHERS]
            ratios[model["model"]] = [[m, round(w[0], 3)] if w else None for m, w in zip(means, worst, strict=True)]
        found[name] = {"what": what, "ratios": {m: pair for m, pair in ratios.items() if pair[0] is not None}}
    return {name: each for name, each in found.items() if each["ratios"]}


def cell(model: dict[str, Any], variant: str, name: str) -> str:
    """KL with its standard error over the texts, perplexity, and the ratio to the source with its range over texts."""
    row, source = row_of(model, variant, name), row_of(model, "source", name)
    if row is None or source is None:
        return ""
    kl = row["kl"]
    mean = sum(kl) / len(kl)
    error = math.sqrt(sum((v - mean) ** 2 for v in kl) / (len(kl) - 1) / len(kl))
    text = f"{mean:.2g} ± {error:.1g}, {row['perplexity']:.4g}"
    if variant == "source":
        return text
    each = texts_of(model, variant, name)
    ratio_of_all = ratio(model, variant, name) or 0
    shown = f"{ratio_of_all:.2f}"
    return f"{'**' + shown + '**' if ratio_of_all <= 1 else shown} ({each[0]:.2f} to {each[-1]:.2f}); {text}"


def table() -> str:
    lines = []
    for model in models():
        plain = row_of(model, "source", "float32") or {}
        rotated = model["rows"].get("rotated", {})
        lines += [f"### {model['model']}", ""]
        pieces = f"{len(model['texts'])} pieces of {model['tokens']} tokens"
        lines += [f"Source in float32: perplexity {plain['perplexity']:.4g}, on {pieces}."]
        if "refused" in rotated:
            lines += ["", f"`--rotate`: {rotated['refused'].rpartition('cannot be rotated: ')[2]}."]
        lines += ["", "| format | source: KL, perplexity | fold | fold and rotation |", "|--|--|--|--|"]
        for name, what in {**FORMATS, **TOOLS}.items():
            if row_of(model, "source", name):
                known = f"`{name}`: {what}" if name in FORMATS else what
                cells = [cell(model, variant, name) for variant in ("source", *OTHERS)]
                lines.append(f"| {' | '.join([known, *cells])} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def span(model: dict[str, Any], variant: str, names: tuple[str, ...]) -> str:
    """The smallest and the largest ratio of a model's formats; nothing where none was measured."""
    found = sorted(r for name in names if (r := ratio(model, variant, name)) is not None)
    low, high = (f"{found[k]:.2g}" if found[k] < 100 else f"{found[k]:.0f}" for k in (0, -1)) if found else ("", "")
    return low if low == high else f"{low} to {high}"


def summary() -> str:
    """The sentences with figures above the table."""
    found = models()

    def spans(variant: str, names: tuple[str, ...]) -> str:
        each = {m["model"]: span(m, variant, names) for m in found}
        return ", ".join(f"{figures} on {name}" for name, figures in each.items() if figures)

    activations = []
    for model in found:
        ratios = [(bits, ratio(model, "rotated", name)) for name, bits in ROUND_ACTIVATIONS.items()]
        known = [f"{value:.2f} with {bits} bits" for bits, value in ratios if value is not None]
        if known:
            activations.append(f"on {model['model']} {', '.join(known)}")
    return "\n".join(
        [
            "Error (KL) relative to that of the source in the same format:",
            "",
            f"- **Weights in integers or NF4**, folded: {spans('fold', ROUND_WEIGHTS)}.",
            f"- **FP8 weights, with or without FP8 activations**, folded: {spans('fold', FLOAT8)}; folded and rotated: "
            f"{spans('rotated', FLOAT8)}.",
            f"- **Integer activations, weights in 8 bits**, folded and rotated: {'; '.join(activations)}.",
        ]
    )


def sites() -> str:
    """What it costs to round the inputs of some linear layers alone, and where channels peak."""
    lines = []
    for path in sorted(BENCHMARKS.glob("quantization_sites_*.json")):
        raw = json.loads(path.read_text(encoding="utf-8"))
        names = [*SITE_NAMES]
        lines += [f"| {raw['model']} | {' | '.join(names)} | all, 6 bits |", "|--" * (len(names) + 2) + "|"]
        for variant, rows in raw["rows"].items():
            means = [sum(kl) / len(kl) for kl in [rows["8"][n]["kl"] for n in names] + [rows["6"]["all"]["kl"]]]
            shown = {"rotated": "fold and rotation", "smoothed": "source, smoothed"}.get(variant, variant)
            lines.append(f"| {shown} | {' | '.join(f'{mean:.2g}' for mean in means)} |")
        tops = {
            variant: [f"{100 * share:.0f} %" for share in shares["after"]] for variant, shares in raw["peaks"].items()
        }
        before = [f"{100 * share:.0f} %" for share in raw["peaks"]["source"]["before"]]
        lines += ["", "Of a norm's mean square output, the largest channel and the 8 largest hold "]
        lines[-1] += (
            f"{before[0]} and {before[1]} before the gain, {tops['source'][0]} and {tops['source'][1]} after it"
        )
        lines[-1] += f", {tops['smoothed'][0]} and {tops['smoothed'][1]} once smoothed."
        lines.append("")
    return "\n".join(lines).rstrip()


def choices() -> str:
    """What `--for` does, by format."""
    from flashnorm_cli.plan.quantized import formats

    done = {"keep": "leaves the model alone", "fold": "folds", "rotate": "folds and rotates"}
    found: dict[str, list[str]] = {}
    for name, form in formats().items():
        found.setdefault(form.best(), []).append(f"`{name}`")
    return "\n".join(f"- **{done[choice]}** for {', '.join(names)}" for choice, names in sorted(found.items()))


def page() -> str:
    text = PAGE.read_text(encoding="utf-8")
    before, after = text[: text.index(SUMMARY) + len(SUMMARY)], text[text.index(END_OF_SUMMARY) :]
    text = f"{before}\n\n{summary()}\n\n{after}"
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    text = f"{before}\n\n`fold --for`\n\n{choices()}\n\n{table()}\n\n{after}"
    before, after = text[: text.index(SITES) + len(SITES)], text[text.index(END_OF_SITES) :]
    return f"{before}\n\n{sites()}\n\n{after}"


def main() -> None:
    FIGURES.write_text(json.dumps(figures(), indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
