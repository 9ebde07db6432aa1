"""How one model's logits compare with the reference's, and what may be concluded from it."""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import torch

from flashnorm_cli.proof.figures import ModelFigures
from flashnorm_cli.proof.models import dtype_name
from flashnorm_cli.proof.result import Finding

DRAWS = 300
DOUBT = 2.0  # times the limit: what is further beyond is not looked at twice
IN_MEMORY = 512 << 20  # bytes of the reference's logits; what is more goes to a file


@dataclass
class Score:
    """How one model's logits compare with the reference's, added up over prompts."""

    errors: list[list[float]] = field(default_factory=list)  # per prompt and position, relative
    kl: float = 0.0
    same_top: int = 0
    positions: int = 0
    loss: float = 0.0
    predicted: int = 0
    broken: int = 0  # positions with NaN or inf where the reference has none

    def error(self) -> float:
        """The median over positions.

        Where a router is nearly undecided, rounding sends a token to another expert: a leap at a few positions, in
        the source as in the fold, that would drown everything else in a mean. A wrong fold is wrong at most positions,
        because attention carries it on to all that follow.
        """
        return statistics.median(chain.from_iterable(self.errors)) if self.errors else math.nan

    def perplexity(self) -> float | None:
        return math.exp(min(self.loss / self.predicted, 700.0)) if self.predicted else None

    def figures(self) -> ModelFigures:
        positions = max(self.positions, 1)
        return ModelFigures(self.kl / positions, self.same_top / positions, self.perplexity())

    def add(self, logits: torch.Tensor, reference: torch.Tensor, following: torch.Tensor | None) -> None:
        """Add one prompt: logits of shape (tokens, ...). Masked logits (-inf on both sides) count as equal."""
        a, b = logits.double(), reference.double()
        both = ~b.isfinite() & (a == b)
        a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
        self.broken += int((~a.isfinite() & b.isfinite()).any(-1).sum())
        gap = (a - b).nan_to_num(nan=math.inf)
        size = b.nan_to_num(posinf=0, neginf=0).norm(dim=-1)
        self.errors.append((gap.norm(dim=-1) / size.clamp(min=torch.finfo(torch.float64).tiny)).flatten().tolist())
        log_p, reference_log_p = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
        self.kl += (reference_log_p.exp() * (reference_log_p - log_p)).nan_to_num(nan=0.0).sum().item()
        self.same_top += int((log_p.argmax(-1) == reference_log_p.argmax(-1)).sum())
        self.positions += log_p[..., 0].numel()
        if following is not None and len(following):
            self.loss -= log_p[:-1].gather(1, following[:, None]).sum().item()
            self.predicted += len(following)


class Reference:
    """The reference's logits of each prompt, in order; in a file where they are many."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.held = folder, 0
        self.all: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor) -> None:
        self.held += logits.nbytes
        if self.held > IN_MEMORY:
            path = self.folder / f"reference-{len(self.all)}"
            mapped = torch.from_file(str(path), shared=True, size=logits.numel(), dtype=logits.dtype)
            logits = mapped.view(logits.shape).copy_(logits)
            path.unlink()  # gone with the mapping
        else:
            logits = logits.clone()
        self.all.append(logits)


@dataclass(frozen=True)
class Judgement:
    """What is concluded: `ratio` and `certain` are None where the reference is the dtype itself.

    `doubtful` says that nothing is wrong but the size of the rounding error, and that not by far: chance may do so.
    """

    findings: tuple[Finding, ...]
    ratio: float | None
    certain: float | None
    doubtful: bool


def judge(
    algebra: Score | None,
    folded: Score,
    floor: Score,
    wide: torch.dtype,
    dtype: torch.dtype,
    max_algebra: float,
    max_ratio: float,
) -> Judgement:
    """Compare the scores with the limits; `floor` is the source's in the dtype that `folded` has."""
    least = torch.finfo(dtype).eps / 16
    same = wide == dtype
    ratio = None if same else folded.error() / max(floor.error(), least)
    certain = None if same else certain_ratio(folded, floor, least)
    findings = []
    doubtful = False
    if algebra is not None and not algebra.error() <= max_algebra:
        message = (
            f"folded in {dtype_name(wide)}, they are off by {algebra.error():.2e} (relative; {max_algebra:.0e} is "
            "allowed): this fold does not compute the same function"
        )
        findings.append(Finding("logits", message, algebra.error()))
    if folded.broken > floor.broken:
        message = f"NaN or inf at {folded.broken} positions, and at {floor.broken} of the source"
        findings.append(Finding("logits", message))
    elif ratio is None and not folded.error() <= max_algebra:
        message = f"off by {folded.error():.2e} (relative) in {dtype_name(dtype)}"
        findings.append(Finding("logits", message, folded.error()))
    elif ratio is not None and certain is not None and not certain <= max_ratio:
        message = (
            f"off by {folded.error():.2e} (relative), {ratio:.3g} times the noise floor of {floor.error():.2e} that "
            f"{dtype_name(dtype)} has anyway ({max_ratio:g} times is allowed)"
        )
        doubtful = not findings and certain <= DOUBT * max_ratio
        findings.append(Finding("logits", message, folded.error()))
    return Judgement(tuple(findings), ratio, certain, doubtful)


def certain_ratio(folded: Score, floor: Score, least: float) -> float:
    """The first percentile of the ratio, if prompts are drawn again and again from these: what is no accident of them.

    Within a prompt, positions depend on each other (one token that changes its expert moves all that follow).
    """
    generator = random.Random(0)
    ratios = []
    for _ in range(DRAWS):
        drawn = generator.choices(range(len(folded.errors)), k=len(folded.errors))
        top, bottom = (statistics.median(chain.from_iterable(s.errors[i] for i in drawn)) for s in (folded, floor))
        ratios.append(top / max(bottom, least))
    return sorted(ratios)[DRAWS // 100]
