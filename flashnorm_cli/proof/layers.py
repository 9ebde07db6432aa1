"""Level layers: each folded norm with its readers, before and after the fold, on the same activations.

A norm's output is `x / rms(x)` times its gain; a reader contracts it. Both checkpoints do this in their own dtype, as
transformers does: the normalised activation is rounded, the gain's product too (once for `1 + w`, which is multiplied
before rounding), products are summed in float32, and the sum is rounded. The reference is the source in float64. The
source's own error is the noise floor; the folded checkpoint's may be `max_ratio` times as large.

One reader is in memory at a time, and of a large one only a few MiB.
"""

from __future__ import annotations

import math
import mmap
import secrets
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Checkpoint, Progress
from flashnorm_cli.checkpoint.progress import Steps
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.plan.model import Norm, Reader
from flashnorm_cli.proof.blocks import ShardReader, blocks
from flashnorm_cli.proof.figures import LayersFigures, NormFigures
from flashnorm_cli.proof.pairing import Pair, gain_of
from flashnorm_cli.proof.result import Finding, LevelResult

BLOCK_ELEMENTS = 2**21
# Outputs that an error is taken over: a gate with one row gets more activations than a matrix with thousands.
MIN_OUTPUTS, MIN_ACTIVATIONS = 4096, 64
SECOND_LOOK = 4  # times as many activations, and others, where the first look was over the limit
OUTLIER_SHARE, OUTLIER_SIZE = 0.01, 50.0
KINDS = ("random", "outliers")
ROTATED = (
    "the residual stream is rotated: a reader by itself computes something else than the source's; level weights "
    "recomputes each one, level logits runs them"
)


@dataclass
class _Errors:
    """Relative errors of one reader, for random and for outlier-heavy activations.

    The floor is what the source's dtype does to the source, for as many roundings as a fold has: see `_roundings`.
    Folding draws the rounding of each weight anew, once, and activations are drawn too: with few that count, chance
    alone makes the errors differ, by a standard deviation of `spread`. Three of them are granted to the floor. For a
    matrix of a trained model that is some percent; for a gate, or a gain of which one channel dominates, more.
    """

    source: dict[str, float]
    folded: dict[str, float]
    least: float  # below this, an error is what any dtype of this width has
    roundings: float
    spread: float

    def floor(self, kind: str) -> float:
        return max(self.source[kind] * self.roundings, self.least) * (1 + 3 * self.spread)

    def ratio(self) -> float:
        ratios = [self.folded[kind] / self.floor(kind) for kind in KINDS]
        return math.inf if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


def check_layers(pair: Pair, max_ratio: float, device: str, report: Progress, seed: int = 0) -> LevelResult:
    """Compare the outputs of every folded norm's readers; figures: `LayersFigures`.

    A reader over the limit is measured again with more activations and a seed of its own, and that decides: whoever
    asks again is not told the same by the same chance.

    Args:
        seed: of the activations of the first look.
    """
    if pair.plan.rotation is not None:
        return LevelResult("layers", "skipped", reason=ROTATED)
    findings: list[Finding] = []
    rows: list[NormFigures] = []
    dtypes: Counter[str] = Counter()
    second_looks = 0
    norms = [norm for norm in pair.plan.norms if norm.folded]
    with _Files(pair) as files:
        for i, norm in enumerate(norms):
            report(i, len(norms), Steps(f"Comparing {norm.tensor.removesuffix('.weight')}"))
            found: dict[str, _Errors] = {}
            for reader in _readers_of(pair, norm):
                name = reader.tensor
                entry, origin = pair.folded.tensors.get(name), pair.source.tensors[reader.values_from or name]
                if entry is None or entry.shape != origin.shape or entry.dtype not in TORCH_DTYPE:
                    findings.append(Finding(name, "is missing" if entry is None else "has another shape or dtype"))
                    continue
                dtypes[origin.dtype] += 1
                found[name] = _compare(pair, files, reader, device, seed)
                if not found[name].ratio() <= max_ratio:  # NaN too
                    second_looks += 1
                    found[name] = _compare(pair, files, reader, device, secrets.randbits(63), SECOND_LOOK)
                if not found[name].ratio() <= max_ratio:
                    findings.append(_finding(name, norm, found[name]))
            if found:
                rows.append(_row(norm, found))
    if not rows:
        return LevelResult("layers", "failed" if findings else "passed", {}, tuple(findings))
    top = max(rows, key=lambda row: row.ratio)
    dtype = str(TORCH_DTYPE[dtypes.most_common(1)[0][0]]).removeprefix("torch.")
    figures = LayersFigures(dtype, MIN_ACTIVATIONS, second_looks, top.ratio, top.norm, tuple(rows))
    return LevelResult("layers", "failed" if findings else "passed", figures, tuple(findings))


def _readers_of(pair: Pair, norm: Norm) -> Iterator[Reader]:
    """The readers of a norm, without an untied head that is not there because its norm was kept."""
    readers = {reader.tensor: reader for reader in pair.plan.readers}
    for name in norm.readers:
        reader = readers.get(name)
        if reader is not None and (not reader.values_from or name in pair.expected_added):
            yield reader


def _row(norm: Norm, found: dict[str, _Errors]) -> NormFigures:
    worst = max(found, key=lambda name: found[name].ratio())
    source, folded = (
        {kind: max(getattr(errors, who)[kind] for errors in found.values()) for kind in KINDS}
        for who in ("source", "folded")
    )
    return NormFigures(
        norm=norm.tensor,
        readers=len(found),
        error_source=source["random"],
        error_folded=folded["random"],
        outliers_source=source["outliers"],
        outliers_folded=folded["outliers"],
        ratio=found[worst].ratio(),
        worst_reader=worst,
    )


def _finding(name: str, norm: Norm, errors: _Errors) -> Finding:
    kind = max(KINDS, key=lambda kind: errors.folded[kind] / errors.floor(kind))
    error, floor = errors.folded[kind], errors.floor(kind)
    return Finding(
        name,
        f"behind {norm.tensor} its output is off by {error:.2e} (relative, {kind} activations), {error / floor:.3g} "
        f"times the noise floor of {floor:.2e}",
        error,
    )


class _Files:
    """Open shards of both checkpoints, read through one buffer: there may be hundreds."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.buffer = mmap.mmap(-1, BLOCK_ELEMENTS * 8)
        self.stack = ExitStack()
        self.open: dict[tuple[bool, str], ShardReader] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stack.close()

    def blocks(self, folded: bool, name: str, dim: int) -> Iterator[tuple[Any, torch.Tensor]]:
        """A tensor in blocks of shape (outer, channels, inner), in its own dtype; the next voids the last."""
        checkpoint: Checkpoint = self.pair.folded if folded else self.pair.source
        shard, entry = checkpoint.shard_of[name], checkpoint.tensors[name]
        if (folded, shard) not in self.open:
            reader = ShardReader(checkpoint, shard, self.buffer)
            self.stack.callback(reader.close)
            self.open[folded, shard] = reader
        dtype = TORCH_DTYPE[entry.dtype]
        start = checkpoint.shards[shard].data_start + entry.start
        for block in blocks(entry.shape, dim, BLOCK_ELEMENTS):
            view = self.open[folded, shard].view(start + block.first * dtype.itemsize, block.elements * dtype.itemsize)
            yield block, torch.frombuffer(view, dtype=dtype).view(block.shape)


def _compare(pair: Pair, files: _Files, reader: Reader, device: str, seed: int, times: int = 1) -> _Errors:
    """Errors of a reader's outputs, on `times` the usual number of activations."""
    name, dim = reader.tensor, reader.dim
    entry, origin = pair.folded.tensors[name], reader.values_from or name
    channels = entry.shape[dim]
    outputs = max(math.prod(entry.shape) // max(channels, 1), 1)
    activations = max(MIN_OUTPUTS // outputs, MIN_ACTIVATIONS) * times
    source_dtype = TORCH_DTYPE[pair.source.tensors[origin].dtype]
    folded_dtype = TORCH_DTYPE[entry.dtype]
    drawn = _Activations(pair, activations, seed, source_dtype, folded_dtype)
    inputs = [drawn.of(reader, kind) for kind in KINDS]
    exact, plain, weightless = (torch.cat(each).to(device) for each in zip(*inputs, strict=True))

    shape = (len(exact), math.prod(entry.shape[:dim]), math.prod(entry.shape[dim + 1 :]))
    reference = torch.zeros(shape, dtype=torch.float64, device=device)
    wide = torch.float64 if torch.float64 in (source_dtype, folded_dtype) else torch.float32
    source_sum, folded_sum = (torch.zeros(shape, dtype=wide, device=device) for _ in range(2))
    factor = pair.factor(reader).to(device)
    energy = torch.zeros(channels, dtype=torch.float64, device=device)  # of each channel: the sum of (gain * w)^2
    fourth = 0.0
    for block, weight in files.blocks(False, origin, dim):
        weight = weight.to(device)
        _contract(reference, exact, weight, block)
        _contract(source_sum, plain, weight, block)
        here = slice(block.channel, block.channel + block.shape[1])
        squares = (weight.float() * factor[here].view(1, -1, 1)).square()
        energy[here] += squares.sum((0, 2)).double()
        fourth += squares.double().square().sum().item()
    for block, weight in files.blocks(True, name, dim):
        _contract(folded_sum, weightless, weight.to(device), block)
    rounded = {"source": source_sum.to(source_dtype), "folded": folded_sum.to(folded_dtype)}
    errors: dict[str, dict[str, float]] = {}
    for who, output in rounded.items():
        gap = output.double() - reference
        errors[who] = {
            kind: (g.norm() / r.norm().clamp(min=1e-300)).item()
            for kind, g, r in zip(KINDS, gap.split(activations), reference.split(activations), strict=True)
        }
    least = torch.finfo(source_dtype).eps / 16
    spread = _spread(energy, fourth, activations)
    return _Errors(errors["source"], errors["folded"], least, _roundings(pair, reader), spread)


def _roundings(pair: Pair, reader: Reader) -> float:
    """How much larger than the source's error a right fold's is, by the number of roundings: each adds its square.

    The source rounds the normalised activation, its product with the gain, and the output; a fold rounds the
    activation, the weight's product with the gain, and the output. A norm of `1 + w` multiplies before it rounds: two
    in the source, three in the fold.
    """
    early = any(pair.norms[run.norm].offset != 0 for run in reader.runs if run.norm in pair.norms)
    return math.sqrt(3 / 2) if early else 1.0


def _spread(energy: torch.Tensor, fourth: float, activations: int) -> float:
    """The relative standard deviation of an error that is the root of a sum of independent squares.

    By the numbers of weights and of activations that count: (sum of squares)^2 / sum of fourth powers.
    """
    total = energy.sum().item()
    if not math.isfinite(total) or not fourth or not total:
        return 0.0
    weights = total**2 / fourth
    channels = total**2 / energy.square().sum().item()
    return math.sqrt(1 / (2 * weights) + 1 / (2 * channels * activations))


def _contract(out: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, block: Any) -> None:
    """Add a block's share to the outputs (activations, outer, inner), in the outputs' dtype."""
    outer, channels, inner = block.shape
    all_inner, all_channels = out.shape[2], inputs.shape[1]
    slice_, within = divmod(block.first, all_channels * all_inner)
    start = within % all_inner
    part = inputs[:, block.channel : block.channel + channels].to(out.dtype)
    # (t, c) @ (c, outer * inner): one plain product, whatever the layout
    columns = weight.to(out.dtype).permute(1, 0, 2).reshape(channels, outer * inner)
    out[:, slice_ : slice_ + outer, start : start + inner] += (part @ columns).view(-1, outer, inner)


@dataclass(frozen=True)
class _Activations:
    """What readers are given: exactly, by the source's norm, and by the folded one; always the same for one seed."""

    pair: Pair
    count: int
    seed: int
    source_dtype: torch.dtype
    folded_dtype: torch.dtype

    def of(self, reader: Reader, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Each float64 of shape (count, channels). Channels that no folded norm scales are equal in all three."""
        generator = torch.Generator().manual_seed(self.seed)
        made: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        parts: list[tuple[torch.Tensor, ...]] = []
        for run in reader.runs:
            if run.norm is None:
                other = torch.randn(self.count, run.length * run.repeat, generator=generator).double()
                rounded = other.to(self.source_dtype).to(self.folded_dtype)
                parts.append((rounded.double(), rounded.double(), rounded.double()))
                continue
            if run.norm not in made:
                made[run.norm] = self._outputs(self.pair.norms[run.norm], kind, generator)
            stretch = slice(run.start, run.start + run.length)
            parts.append(tuple(p[:, stretch].repeat(1, run.repeat) for p in made[run.norm]))
        exact, plain, weightless = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
        return exact, plain, weightless

    def _outputs(
        self, norm: Norm, kind: str, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A norm's output on random activations: exactly, by the source, by the folded checkpoint; float64."""
        size = math.prod(norm.shape)
        x = torch.randn(self.count, size, generator=generator).double()
        if kind == "outliers":
            # Other channels for each activation: a few channels alone would be few samples.
            loud = torch.rand(self.count, size, generator=generator).argsort(1)[:, : max(int(size * OUTLIER_SHARE), 1)]
            x.scatter_(1, loud, x.gather(1, loud) * OUTLIER_SIZE)
        x /= x.square().mean(1, keepdim=True).sqrt()
        gain = gain_of(self.pair.source, norm)
        after = gain_of(self.pair.folded, norm) if norm.tensor in self.pair.folded.tensors else torch.ones(size)
        return (
            x * gain.double(),
            _times_gain(x, gain, norm, self.source_dtype),
            _times_gain(x, after, norm, self.folded_dtype),
        )


def _times_gain(x: torch.Tensor, gain: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """`x` times the gain as transformers rounds it: `w` after rounding the activation, `1 + w` before."""
    if norm.offset == 0:
        return (x.to(dtype).double() * gain.double()).to(dtype).double()
    return (x.float() * gain).to(dtype).double() if dtype != torch.float64 else x * gain.double()
