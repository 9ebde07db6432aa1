"""What each level measures, typed. Read back from a record, figures are a plain mapping: any of them may be missing."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


class Figures(Mapping[str, Any]):
    """Base of all figures: a frozen dataclass that reads like the JSON object which the record keeps of it."""

    def __getitem__(self, key: str) -> Any:
        if key not in self._names():
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())

    def _names(self) -> list[str]:
        """The fields; optional ones only where they were measured."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return [f.name for f in fields if f.default is not None or getattr(self, f.name) is not None]


@dataclass(frozen=True)
class WeightsFigures(Figures):
    """Tensors and norms are counted: `changed` take a gain or the identity, `identical` are so bit for bit."""

    tensors: int
    changed: int
    identical: int
    rounded_otherwise: int
    differing: int
    bytes_read: int
    layout: str
    folded: int
    kept: int


@dataclass(frozen=True)
class NormFigures(Figures):
    """A folded norm: the largest relative errors over its readers, on random and on outlier-heavy activations.

    `ratio` is the worst reader's error in terms of its noise floor, and decides.
    """

    norm: str
    readers: int
    error_source: float
    error_folded: float
    outliers_source: float
    outliers_folded: float
    ratio: float
    worst_reader: str


@dataclass(frozen=True)
class LayersFigures(Figures):
    """`dtype` is what most readers are stored in; `second_looks` counts readers that were measured a second time."""

    dtype: str
    activations: int
    second_looks: int
    worst_ratio: float
    worst_norm: str
    norms: tuple[NormFigures, ...]


@dataclass(frozen=True)
class ModelFigures(Figures):
    """One model beside the reference: KL divergence in nats per position, share of equal top tokens, perplexity."""

    kl: float
    top1: float
    perplexity: float | None


@dataclass(frozen=True)
class GreedyFigures(Figures):
    """What both models write after a prompt; the first `same` of `tokens` agree."""

    prompt: str
    source: str
    folded: str
    same: int
    tokens: int


@dataclass(frozen=True)
class LogitsFigures(Figures):
    """Errors are relative to the norm of the reference's logits, the median over positions.

    `algebra_error` and `ratio` are None where they were not measured (the latter where the reference is the dtype
    itself, because the model does not run in float64). `certain_ratio` is what the ratio exceeds in 99 of 100 samples
    of the prompts: this is judged. `judged` are the positions that it is taken over, and `from_disk` says that the
    models were run layer by layer from disk.
    """

    reference: str
    dtype: str
    device: str
    norms_on_kernels: int
    prompts: int
    tokens: int
    judged: int
    from_disk: bool
    text: str
    algebra_error: float | None
    rounding_error: float
    noise_floor: float
    ratio: float | None
    certain_ratio: float | None
    source: ModelFigures
    folded: ModelFigures
    reference_perplexity: float | None
    greedy: tuple[GreedyFigures, ...]


@dataclass(frozen=True)
class UserFigures(Figures):
    """What a user of the checkpoint computes: relative error of its output, folded beside source, in float32."""

    user: str
    compared: str
    numbers: int
    error: float | None


@dataclass(frozen=True)
class UsersFigures(Figures):
    """Users that the checkpoint announces besides its logits."""

    users: tuple[UserFigures, ...]


@dataclass(frozen=True)
class KernelsFigures(Figures):
    """`error` is the largest of an element relative to it, in eps of the dtype: half an eps is one rounding."""

    path: str
    gpu: str
    sizes: tuple[int, ...]
    rows: tuple[int, ...]
    dtype: str
    error: float


@dataclass(frozen=True)
class RuntimeFigures(Figures):
    """Log-probabilities in an engine, in nats: mean distances from the float32 reference over `tokens` positions.

    `noise` is the source's in its own dtype. vLLM also tells how many `norms` carry a weight, and how many of them
    run without it. Everything but engine and version is None where the engine did not run the folded checkpoint.
    """

    engine: str
    version: str
    prompts: int | None = None
    tokens: int | None = None
    same_tokens: int | None = None
    logprob_difference: float | None = None
    certain_difference: float | None = None
    noise: float | None = None
    tolerance: float | None = None
    norms: int | None = None
    norms_without_weight: int | None = None


@dataclass(frozen=True)
class TaskFigures(Figures):
    """A metric of a benchmark task for both checkpoints; a standard error is None where the harness gives none."""

    task: str
    metric: str
    source: float
    source_stderr: float | None
    folded: float
    folded_stderr: float | None
    delta: float


@dataclass(frozen=True)
class EvalFigures(Figures):
    """`limit` is the number of items of each task; None for all."""

    tasks: tuple[TaskFigures, ...]
    limit: int | None
