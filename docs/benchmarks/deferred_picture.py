"""README's picture: tokens per second of stock and of deferred norms, from deferred_1b.json and deferred_8b.json.

    python docs/benchmarks/deferred_picture.py

writes deferred.svg. Each group is drawn in units of its own stock, so that groups of different speed can be read.
"""

import json
from pathlib import Path

HERE = Path(__file__).parent
GROUPS = (
    ("deferred_1b", "Llama-3.2-1B's shape, CUDA graph", "decode, CUDA graph"),
    ("deferred_1b", "Llama-3.2-1B's shape, torch.compile", "decode, compiled"),
    ("deferred_8b", "Llama-3.1-8B's shape, CUDA graph", "decode, CUDA graph"),
    ("deferred_8b", "Llama-3.1-8B's shape, torch.compile", "decode, compiled"),
)
WAYS = {"stock": "transformers", "stock, coordinate descent": "tuned Inductor", "flashnorm deferred": "flashnorm"}
PAD, LEFT, UNIT, BAR, GAP, WIDTH = 16, 124, 190, 18, 34, 580
STYLE = """text{font:13px system-ui,sans-serif;fill:#1f2328}.head{font-weight:600}
.panel{fill:#fff}.plain{fill:#afb8c1}.ours{fill:#0b7a5e}
@media(prefers-color-scheme:dark){text{fill:#e6edf3}.panel{fill:#0d1117}.plain{fill:#545d68}.ours{fill:#2fbf96}}"""


def picture() -> str:
    """The picture as SVG."""
    y, parts, said = PAD // 2, [], []
    for file, title, mode in GROUPS:
        measured = json.loads((HERE / f"{file}.json").read_text())["models"]
        speeds = {each["way"]: each["tok_per_s"] for each in measured if each["mode"] == mode}
        y += GAP
        parts.append(f'<text class="head" x="{PAD}" y="{y - 10}">{title}</text>')
        for way, label in WAYS.items():
            if way not in speeds:
                continue
            ratio = speeds[way] / speeds["stock"]
            more = "" if way == "stock" else f"  +{100 * (ratio - 1):.0f} %"
            kind = "ours" if way.startswith("flashnorm") else "plain"
            parts.append(
                f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{label}</text>'
                f'<rect class="{kind}" x="{LEFT}" y="{y}" width="{UNIT * ratio:.1f}" height="{BAR}" rx="2"/>'
                f'<text x="{LEFT + UNIT * ratio + 8:.1f}" y="{y + 13}">{speeds[way]:.0f} tokens/s{more}</text>'
            )
            said.append(f"{title}, {label}: {speeds[way]:.0f} tokens per second{more}.")
            y += BAR + 4
    box = f'viewBox="0 0 {WIDTH} {y + PAD}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {box} role="img" aria-labelledby="title desc">'
    panel = f'<rect class="panel" width="{WIDTH}" height="{y + PAD}" rx="6"/>'
    words = f'<title id="title">Decoding, tokens per second</title><desc id="desc">{" ".join(said)}</desc>'
    return "\n".join([head, words, f"<style>{STYLE}</style>", panel, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    (HERE / "deferred.svg").write_text(picture())
