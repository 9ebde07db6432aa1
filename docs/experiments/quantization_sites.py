"""Which linear layers' inputs cost what, when activations are rounded: docs/quantization.md quotes the result.

    python docs/experiments/quantization_sites.py WORK OUT.json --texts A.txt B.txt ... [--pieces 8] [--tokens 256]

WORK is what quantization.py leaves with --work: source, fold, rotated, and the source's probabilities on the same
texts. Weights stay in float32; the inputs of one kind of linear layer at a time, and then of all, are rounded to 8 and
to 6 bits per token. A rotation changes what q, k, v, gate and up read, and nothing of what o and down read.

`kl` is the mean divergence from the source in float32, per piece of text; `noise` the mean square error of the rounded
inputs relative to their mean square. `smoothed` is the source with scales in its norms as AWQ and SmoothQuant put them
there (each channel divided by the root of its mean magnitude, the readers multiplied by it; Lin et al., arXiv
2306.00978): the same model, whose fold is the source's. `peaks` are the shares of a norm's mean square output that the
largest and the 8 largest of its channels hold, before and after the gain, mean over the layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from quantization import later, later_parser, load
from quantizers import integers

SITES = {
    "q, k, v": ("q_proj", "k_proj", "v_proj"),
    "o": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
EVERY = tuple(name for names in SITES.values() for name in names)
TOGETHER = {"all but down": EVERY[:-1], "all": EVERY}
READERS = {"input_layernorm": ("self_attn", SITES["q, k, v"]), "post_attention_layernorm": ("mlp", SITES["gate, up"])}


@contextmanager
def rounded_inputs(model: Any, names: tuple[str, ...], bits: int) -> Iterator[list[float]]:
    """Round what linear layers of these names read; yields the noise of each call."""
    noise: list[float] = []
    rounding = integers(bits)

    def hook(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        found = rounding(args[0])
        noise.append(((found - args[0]).square().mean() / args[0].square().mean()).item())
        return (found,)

    hooks = [m.register_forward_pre_hook(hook) for n, m in model.named_modules() if n.rpartition(".")[2] in names]
    try:
        yield noise
    finally:
        for each in hooks:
            each.remove()


def norms_of(model: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The norms of all layers, each with the linear layers that read it."""
    for layer in model.model.layers:
        for norm, (part, names) in READERS.items():
            yield getattr(layer, norm), [getattr(getattr(layer, part), name) for name in names]


@torch.no_grad()
def seen(model: Any, texts: list[list[int]]) -> dict[Any, dict[str, torch.Tensor]]:
    """Per norm: the mean square of each channel before its gain and after it, and the mean magnitude after."""
    found: dict[Any, dict[str, torch.Tensor]] = {}

    def hook(norm: Any, _: Any, out: torch.Tensor) -> None:
        after = out[0]
        before = after / norm.weight.where(norm.weight != 0, 1)
        sums = {"before": before.square().sum(0), "after": after.square().sum(0), "magnitude": after.abs().sum(0)}
        old = found.setdefault(norm, {})
        found[norm] = {key: old.get(key, 0) + value for key, value in sums.items()}

    hooks = [norm.register_forward_hook(hook) for norm, _ in norms_of(model)]
    for ids in texts:
        model(torch.tensor([ids]))
    for each in hooks:
        each.remove()
    return found


def peaks(found: dict[Any, dict[str, torch.Tensor]]) -> dict[str, list[float]]:
    shares = {}
    for key in ("before", "after"):
        tops = torch.stack([sums[key].sort(descending=True).values / sums[key].sum() for sums in found.values()]).mean(
            0
        )
        shares[key] = [round(tops[0].item(), 4), round(tops[:8].sum().item(), 4)]
    return shares


@torch.no_grad()
def smooth(model: Any, found: dict[Any, dict[str, torch.Tensor]]) -> None:
    """The same model, with AWQ's scales in its norms."""
    for norm, readers in norms_of(model):
        scale = found[norm]["magnitude"].clamp(min=1e-8).sqrt()
        scale /= (scale.max() * scale.min()).sqrt()
        norm.weight.div_(scale)
        for reader in readers:
            reader.weight.mul_(scale)


def main() -> None:
    asked = later_parser(__doc__).parse_args()
    measure, result = later(asked)
    for variant in ("source", "smoothed", "fold", "rotated"):
        model = load(asked.work / ("source" if variant == "smoothed" else variant))
        if variant in ("source", "smoothed"):
            found = seen(model, measure.texts)
            if variant == "smoothed":
                smooth(model, found)
                found = seen(model, measure.texts)
            result.setdefault("peaks", {})[variant] = peaks(found)
        for bits in (8, 6):
            for site, names in (SITES | TOGETHER).items():
                if site in result["rows"].get(variant, {}).get(str(bits), {}):
                    continue
                with rounded_inputs(model, names, bits) as noise:
                    kl = measure(model)["kl"]
                row = {"kl": kl, "noise": float(f"{sum(noise) / len(noise):.3g}")}
                result["rows"].setdefault(variant, {}).setdefault(str(bits), {})[site] = row
                print(variant, bits, site, f"{sum(kl) / len(kl):.3g}", row["noise"], flush=True)
        asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
