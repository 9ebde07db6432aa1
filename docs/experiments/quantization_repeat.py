"""Does the cost of integer activations repeat, and what does it hang on? docs/quantization.md quotes the result.

    python docs/experiments/quantization_repeat.py WORK OUT.json --texts A.txt B.txt ... [--pieces 8] [--tokens 256]
        [--bits 8,6] [--stretch 1,1.01,1.02] [--variants source,rotated] [--sites "all,but down"]

WORK is what quantization.py leaves with --work. Weights are int8 as in `w8a8-int8` and `w8a6`; activations are rounded
with a scale per token that is `stretch` times the usual one. A stretch of a per cent changes which way values are
rounded, and how much of each token's largest value is cut off (with 8 bits 1.4 % at 0.99, 0.4 % at 1, nothing above):
compare variants at the same stretch, and take no ratio for firmer than these agree.

`all` rounds what every linear layer but the head reads; `but down` leaves down_proj's inputs as they are; `but down's
first token` leaves only these inputs at the first position, where such models put their massive activations. Rows that
are in OUT.json are not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from quantization import VARIANTS, later, later_parser, load
from quantizers import TINY, integers

SITES = ("all", "but down", "but down's first token")


def stretched(rows: torch.Tensor, bits: int, stretch: float) -> torch.Tensor:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale = rows.abs().amax(-1, keepdim=True).clamp(min=TINY) * 2 / (high - low) * stretch
    return (rows / scale).round().clamp(low, high) * scale


def linears(model: Any) -> list[tuple[str, torch.nn.Linear]]:
    head = model.get_output_embeddings()
    return [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]


@contextmanager
def rounded_inputs(model: Any, site: str, bits: int, stretch: float) -> Iterator[None]:
    def hook(down: bool) -> Any:
        def rounding(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            found = stretched(args[0], bits, stretch)
            if down and site != "all":
                found[:, :1] = args[0][:, :1]
            return (found,)

        return rounding

    hooks = []
    for name, linear in linears(model):
        down = name.endswith("down_proj")
        if not (down and site == "but down"):
            hooks.append(linear.register_forward_pre_hook(hook(down)))
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


def main() -> None:
    parser = later_parser(__doc__)
    parser.add_argument("--bits", default="8,6")
    parser.add_argument("--stretch", default="1,1.01,1.02")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--sites", default=",".join(SITES))
    asked = parser.parse_args()
    measure, result = later(asked)
    for bits in map(int, asked.bits.split(",")):
        for variant in asked.variants.split(","):
            model = load(asked.work / variant)
            for _, linear in linears(model):
                linear.weight.data = integers(8)(linear.weight.data)
            for site in asked.sites.split(","):
                for stretch in asked.stretch.split(","):
                    rows = result["rows"].setdefault(variant, {}).setdefault(str(bits), {}).setdefault(site, {})
                    if stretch in rows:
                        continue
                    with rounded_inputs(model, site, bits, float(stretch)):
                        row = measure(model)
                    rows[stretch] = {"kl": row["kl"], "nll": row["nll"]}
                    print(bits, variant, site, stretch, f"{sum(row['kl']) / len(row['kl']):.3g}", row["kl"], flush=True)
                    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
