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
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Checkpoint, Progress
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.plan.model import Norm, Reader
from flashnorm_cli.proof.blocks import ShardReader, blocks
from flashnorm_cli.proof.pairing import Pair, gain_of
from flashnorm_cli.proof.result import Finding, LevelResult

BLOCK_ELEMENTS = 2**21
# Outputs that an error is taken over: a gate with one row gets more activations than a matrix with thousands.
MIN_OUTPUTS, MIN_ACTIVATIONS = 4096, 8
OUTLIER_SHARE, OUTLIER_SIZE = 0.01, 50.0
KINDS = ("random", "outliers")


@dataclass
class _Errors:
    """Relative errors of one reader of `weights` elements, for random and for outlier-heavy activations.

    Folding draws the rounding of each weight anew, once: with few weights chance alone makes the errors differ, by a
    standard deviation of 1 / sqrt(2 * weights). Three of them are granted to the floor, which is nothing for a matrix.
    """

    source: dict[str, float]
    folded: dict[str, float]
    least: float  # below this, an error is what any dtype of this width has
    weights: int

    def floor(self, kind: str) -> float:
        return max(self.source[kind], self.least) * (1 + 3 / math.sqrt(2 * self.weights))

    def ratio(self) -> float:
        ratios = [self.folded[kind] / self.floor(kind) for kind in KINDS]
        return math.inf if any(math.isnan(ratio) for ratio in ratios) else max(ratios)


def check_layers(pair: Pair, max_ratio: float, device: str, report: Progress) -> LevelResult:
    """Compare the outputs of every folded norm's readers.

    figures: `dtype` (that most norms' readers are stored in), `norms` (per folded norm: `norm`, `readers`,
    `error_source`, `error_folded`, `outliers_source`, `outliers_folded`: the largest over its readers; `ratio` and
    `worst_reader`), `worst_ratio`, `worst_norm`.
    """
    findings: list[Finding] = []
    rows: list[dict[str, Any]] = []
    dtypes: dict[str, int] = {}
    readers = {r.tensor: r for r in pair.plan.readers}
    norms = [norm for norm in pair.plan.norms if norm.folded]
    with _Files(pair) as files:
        for i, norm in enumerate(norms):
            report(i, len(norms), f"Comparing layers: {norm.tensor}")
            mine: dict[str, _Errors] = {}
            for name in norm.readers:
                reader = readers.get(name)
                if reader is None or (reader.values_from and name not in pair.expected_added):
                    continue  # an untied head that is not there because its norm was kept
                entry = pair.folded.tensors.get(name)
                origin = pair.source.tensors[reader.values_from or name]
                if entry is None or entry.shape != origin.shape or entry.dtype not in TORCH_DTYPE:
                    findings.append(Finding(name, "is missing" if entry is None else "has another shape or dtype"))
                    continue
                dtypes[origin.dtype] = dtypes.get(origin.dtype, 0) + 1
                mine[name] = _compare(pair, files, norm, reader, device)
            if not mine:
                continue
            worst = max(mine, key=lambda name: mine[name].ratio())
            ratio = mine[worst].ratio()
            rows.append(
                {
                    "norm": norm.tensor,
                    "readers": len(mine),
                    "error_source": max(e.source["random"] for e in mine.values()),
                    "error_folded": max(e.folded["random"] for e in mine.values()),
                    "outliers_source": max(e.source["outliers"] for e in mine.values()),
                    "outliers_folded": max(e.folded["outliers"] for e in mine.values()),
                    "ratio": ratio,
                    "worst_reader": worst,
                }
            )
            for name, errors in mine.items():
                if not errors.ratio() <= max_ratio:  # NaN too
                    findings.append(_finding(name, norm, errors))
    figures: dict[str, Any] = {"norms": rows}
    if rows:
        top = max(rows, key=lambda row: row["ratio"])
        most = max(dtypes, key=lambda dtype: dtypes[dtype])
        figures = {
            "dtype": str(TORCH_DTYPE[most]).removeprefix("torch."),
            "worst_ratio": top["ratio"],
            "worst_norm": top["norm"],
            **figures,
        }
    return LevelResult("layers", "failed" if findings else "passed", figures, tuple(findings))


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


def _compare(pair: Pair, files: _Files, norm: Norm, reader: Reader, device: str) -> _Errors:
    name, dim = reader.tensor, reader.dim
    entry, origin = pair.folded.tensors[name], reader.values_from or name
    channels = entry.shape[dim]
    outputs = max(math.prod(entry.shape) // max(channels, 1), 1)
    activations = max(MIN_OUTPUTS // outputs, MIN_ACTIVATIONS)
    source_dtype = TORCH_DTYPE[pair.source.tensors[origin].dtype]
    folded_dtype = TORCH_DTYPE[entry.dtype]
    inputs = [_inputs(pair, reader, kind, activations, source_dtype, folded_dtype) for kind in KINDS]
    exact, plain, weightless = (torch.cat(each).to(device) for each in zip(*inputs, strict=True))

    shape = (len(exact), math.prod(entry.shape[:dim]), math.prod(entry.shape[dim + 1 :]))
    reference = torch.zeros(shape, dtype=torch.float64, device=device)
    wide = torch.float64 if torch.float64 in (source_dtype, folded_dtype) else torch.float32
    mine, theirs = torch.zeros(shape, dtype=wide, device=device), torch.zeros(shape, dtype=wide, device=device)
    for block, weight in files.blocks(False, origin, dim):
        _contract(reference, exact, weight.to(device), block)
        _contract(theirs, plain, weight.to(device), block)
    for block, weight in files.blocks(True, name, dim):
        _contract(mine, weightless, weight.to(device), block)
    rounded = {"source": theirs.to(source_dtype), "folded": mine.to(folded_dtype)}
    errors: dict[str, dict[str, float]] = {}
    for who, output in rounded.items():
        gap = output.double() - reference
        errors[who] = {
            kind: (g.norm() / r.norm().clamp(min=1e-300)).item()
            for kind, g, r in zip(KINDS, gap.split(activations), reference.split(activations), strict=True)
        }
    return _Errors(
        errors["source"], errors["folded"], torch.finfo(source_dtype).eps / 16, max(math.prod(entry.shape), 1)
    )


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


def _inputs(
    pair: Pair, reader: Reader, kind: str, count: int, source_dtype: torch.dtype, folded_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What a reader is given: exactly, by the source's norm, by the folded one; each (count, channels).

    Channels that no folded norm scales get the same values in all three.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    parts = []
    for run in reader.runs:
        if run.norm is None:
            other = torch.randn(count, run.length * run.repeat, generator=generator).double()
            rounded = other.to(source_dtype).to(folded_dtype)
            parts.append((rounded.double(), rounded.double(), rounded.double()))
            continue
        if run.norm not in made:
            made[run.norm] = _outputs(pair, pair.norms[run.norm], kind, count, generator, source_dtype, folded_dtype)
        parts.append(
            tuple(p[:, run.start : run.start + run.length].repeat(1, run.repeat) for p in made[run.norm])  # type: ignore[arg-type]
        )
    exact, plain, weightless = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    return exact, plain, weightless


def _outputs(
    pair: Pair,
    norm: Norm,
    kind: str,
    count: int,
    generator: torch.Generator,
    source_dtype: torch.dtype,
    folded_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A norm's output on random activations: exactly, by the source, by the folded checkpoint; float64."""
    size = math.prod(norm.shape)
    x = torch.randn(count, size, generator=generator).double()
    if kind == "outliers":
        # Other channels for each activation: a few channels alone would be few samples.
        loud = torch.rand(count, size, generator=generator).argsort(1)[:, : max(int(size * OUTLIER_SHARE), 1)]
        x.scatter_(1, loud, x.gather(1, loud) * OUTLIER_SIZE)
    x /= x.square().mean(1, keepdim=True).sqrt()
    gain = gain_of(pair.source, norm)
    after = gain_of(pair.folded, norm) if norm.tensor in pair.folded.tensors else torch.ones(size)
    return (
        x * gain.double(),
        _times_gain(x, gain, norm, source_dtype),
        _times_gain(x, after, norm, folded_dtype),
    )


def _times_gain(x: torch.Tensor, gain: torch.Tensor, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """`x` times the gain as transformers rounds it: `w` after rounding the activation, `1 + w` before."""
    if norm.offset == 0:
        return (x.to(dtype).double() * gain.double()).to(dtype).double()
    return (x.float() * gain).to(dtype).double() if dtype != torch.float64 else x * gain.double()
