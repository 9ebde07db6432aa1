"""What has probably happened to a tensor that does not hold what it must: words for the person who has to mend it.

A tensor and its source are sampled. If one is the other times a factor per channel, that factor is estimated by
least squares and compared with the mistakes that folding tools make.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.plan.model import Norm
from flashnorm_cli.proof.pairing import SOURCE, Pair, values

MAX_SAMPLE = 1 << 20  # elements that are looked at
ROUNDING_UNITS = 4.0  # more than any order of roundings makes
ROUNDED = "it was rounded in another way than the product in float32, once"
MAX_CANDIDATES = 300  # other tensors that are tried as the one whose values were written here


def diagnose(pair: Pair, name: str, units: float) -> str:
    """A clause about a tensor that differs, or "" where nothing known explains it.

    `units` is the largest difference, in units in the last place.
    """
    entry = pair.folded.tensors[name]
    reader = pair.readers.get(name)
    origin = (reader.values_from if reader else None) or name
    if origin not in pair.source.tensors or entry.dtype not in TORCH_DTYPE or name in pair.gains:
        return ""
    if pair.source.tensors[origin].dtype not in TORCH_DTYPE:
        return ""
    found, source = _sample(pair.folded, name), _sample(pair.source, origin)
    if found is None or source is None or found.shape != source.shape:
        return ""
    if not found.any() and source.any():
        return "it holds zeros"
    if not found.isfinite().all():
        return "it holds inf or NaN" if source.isfinite().all() else ""
    wanted = pair.factor(reader).double() if reader else None
    dim = reader.dim if reader else -1
    if wanted is not None and len(wanted) == found.shape[dim]:
        if torch.equal(found, source):
            return f"it holds the source's values: {_norms_of(pair, name)} was not folded into it"
        words = _wrong_factor(pair, name, found, source, dim, wanted, units)
        if words:
            return words
    elif wanted is None and (words := _factor_on_untouched(pair, name, found, source)):
        return words
    return _another_tensor(pair, name, found, dim, wanted)


def _norms_of(pair: Pair, name: str) -> str:
    norms = dict.fromkeys(run.norm for run in pair.readers[name].runs if run.norm in pair.gains)
    return ", ".join(str(n) for n in list(norms)[:3]) + (" and others" if len(norms) > 3 else "")


def _wrong_factor(
    pair: Pair,
    name: str,
    found: torch.Tensor,
    source: torch.Tensor,
    dim: int,
    wanted: torch.Tensor,
    units: float,
) -> str:
    tolerance = _tolerance(pair.folded.tensors[name])
    norms = _norms_of(pair, name)
    factor = _factor_along(found, source, dim, tolerance)
    if factor is not None:
        weights = _plain_weights(pair, name)
        for candidate, words in (
            (wanted, ROUNDED if units <= ROUNDING_UNITS else "single values of it were changed"),
            (wanted * wanted, f"the gain of {norms} was applied twice"),
            (1 / wanted, f"it was divided by the gain of {norms}"),
            (wanted.abs().sqrt(), f"the square root of the gain of {norms} was applied"),
        ):
            if _near(factor, candidate, tolerance):
                return words
        if weights is not None and _near(factor, weights, tolerance):
            norm = next(pair.norms[str(r.norm)] for r in pair.readers[name].runs if r.norm in pair.gains)
            return f"it was multiplied by w of {norms}, but the gain of this norm is {norm.offset:g} + w"
        ones = torch.ones_like(wanted)
        if _partly(factor, ones, wanted, tolerance):
            missing = int((~_close(factor, wanted, tolerance)).sum())
            return f"{missing} of its {len(wanted)} channels were not multiplied by the gain of {norms}"
        for norm, gain in _other_gains(pair, len(factor)):
            if _near(factor, gain, tolerance):
                return f"it was multiplied by the gain of {norm.tensor} instead of {norms}"
        if _near(factor.sort().values, wanted.sort().values, tolerance):
            return f"the gain of {norms} was applied in another order of the channels"
        return f"it is the source times a factor per channel, but not the gain of {norms}"
    for other in range(found.ndim):
        if other == dim:
            continue
        along = _factor_along(found, source, other, tolerance)
        if along is not None:
            same = len(along) == len(wanted) and _near(along, wanted, tolerance)
            what = f"the gain of {norms}" if same else "a factor"
            return f"{what} was applied along dimension {other} instead of {dim}"
    return ""


def _factor_on_untouched(pair: Pair, name: str, found: torch.Tensor, source: torch.Tensor) -> str:
    """A tensor that no folded norm scales was multiplied by something."""
    tolerance = _tolerance(pair.folded.tensors[name])
    for dim in range(found.ndim):
        factor = _factor_along(found, source, dim, tolerance)
        if factor is None or _near(factor, torch.ones_like(factor), tolerance):
            continue
        for norm, gain in _other_gains(pair, len(factor)):
            if not _near(factor, gain, tolerance):
                continue
            embedding = any(r.values_from == name for r in pair.plan.readers)
            if embedding:
                return f"it was multiplied by the gain of {norm.tensor}, but it is the embedding as well"
            if pair.states[norm.tensor] == SOURCE:
                return f"it was multiplied by the gain of {norm.tensor}, which keeps its weight: that counts twice"
            return f"it was multiplied by the gain of {norm.tensor}, which it does not read"
        return f"it is the source times a factor along dimension {dim}"
    return ""


def _another_tensor(pair: Pair, name: str, found: torch.Tensor, dim: int, wanted: torch.Tensor | None) -> str:
    """Whether the values are those of another tensor of this shape: a swap."""
    entry = pair.folded.tensors[name]
    tried = 0
    for other, its in pair.source.tensors.items():
        if other == name or its.shape != entry.shape or its.dtype not in TORCH_DTYPE:
            continue
        tried += 1
        if tried > MAX_CANDIDATES:
            return ""
        sample = _sample(pair.source, other, 1 << 14)
        here = _sample(pair.folded, name, 1 << 14)
        if sample is None or here is None:
            continue
        if torch.equal(sample, here):
            return f"it holds the source's {other}"
        along = dim if wanted is not None else -1
        if _factor_along(here, sample, along, _tolerance(entry)) is not None:
            return f"it holds the source's {other}, times a factor per channel"
    return ""


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _tolerance(entry: TensorEntry) -> float:
    return 4 * torch.finfo(TORCH_DTYPE[entry.dtype]).eps


def _sample(checkpoint: Checkpoint, name: str, limit: int = MAX_SAMPLE) -> torch.Tensor | None:
    """The first slices of a tensor along its first dimension, float64; None where one slice is too large."""
    entry = checkpoint.tensors[name]
    elements = 1
    for size in entry.shape[1:]:
        elements *= size
    if not entry.shape or not entry.nbytes:
        return None
    rows = min(entry.shape[0], max(limit // elements, 1))
    if rows * elements > 64 * MAX_SAMPLE:
        return None
    dtype = TORCH_DTYPE[entry.dtype]
    shard = checkpoint.shard_of[name]
    with (checkpoint.folder / shard).open("rb") as file:
        file.seek(checkpoint.shards[shard].data_start + entry.start)
        raw = bytearray(file.read(rows * elements * dtype.itemsize))
    return torch.frombuffer(raw, dtype=dtype).view(rows, *entry.shape[1:]).double()


def _factor_along(found: torch.Tensor, source: torch.Tensor, dim: int, tolerance: float) -> torch.Tensor | None:
    """The factor per channel that makes `source` into `found`, or None where there is none."""
    if found.ndim < 2:
        return None
    a, b = found.movedim(dim, 0).flatten(1), source.movedim(dim, 0).flatten(1)
    squares = b.square().sum(1)
    factor = torch.where(squares > 0, (a * b).sum(1) / squares.clamp(min=1e-300), 1.0)
    residual = (a - b * factor[:, None]).norm() / a.norm().clamp(min=1e-300)
    return factor if a.shape[1] > 1 and residual < tolerance else None


def _close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> torch.Tensor:
    return (a - b).abs() <= tolerance * b.abs().clamp(min=b.abs().mean() * 0.1)


def _near(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return a.shape == b.shape and bool(_close(a, b, tolerance).all())


def _partly(factor: torch.Tensor, ones: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> bool:
    """Every channel is either scaled as it should be, or not at all."""
    return bool((_close(factor, ones, tolerance) | _close(factor, wanted, tolerance)).all())


def _other_gains(pair: Pair, size: int) -> Iterator[tuple[Norm, torch.Tensor]]:
    """Every norm of the plan whose gain has this many elements, or is repeated to that many."""
    for norm in pair.plan.norms:
        if norm.tensor not in pair.source.tensors or pair.source.tensors[norm.tensor].dtype not in TORCH_DTYPE:
            continue
        gain = values(pair.source, norm.tensor).flatten().double() * norm.scale + norm.offset
        if len(gain) and size % len(gain) == 0:
            yield norm, gain.repeat(size // len(gain))


def _plain_weights(pair: Pair, name: str) -> torch.Tensor | None:
    """What a reader would be multiplied by if `w` were taken for the gain; None where it is."""
    reader = pair.readers[name]
    norms = [pair.norms[str(run.norm)] for run in reader.runs if run.norm in pair.gains]
    if all(norm.offset == 0 and norm.scale == 1 for norm in norms):
        return None
    parts = []
    for run in reader.runs:
        if run.norm in pair.gains:
            weight = values(pair.source, str(run.norm)).flatten().double()
            parts.append(weight[run.start : run.start + run.length].repeat(run.repeat))
        else:
            parts.append(torch.ones(run.length * run.repeat, dtype=torch.float64))
    return torch.cat(parts)
