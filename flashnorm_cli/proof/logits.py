"""Level logits: both models on the same prompts, judged against the noise floor.

Four models, one after the other in memory: the source in the reference dtype; the same with the fold made in that
dtype (is the algebra right?); the source in its own dtype (the noise floor: what rounding does to it anyway); the
folded checkpoint in its own dtype (how much more?). The reference is float32, or float64 for a float32 checkpoint.
"""

from __future__ import annotations

import math
import random
import statistics
from dataclasses import dataclass, field
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.modeling import build
from flashnorm_cli.modeling.quiet import first_line, quiet_transformers
from flashnorm_cli.proof.models import (
    LARGE,
    _deterministic,
    _device_of,
    _fold_in_memory,
    _load,
    _logits,
    _memory,
    _name,
    _Run,
    _weightless,
)
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.prompts import Prompts
from flashnorm_cli.proof.result import Finding, LevelResult

DRAWS = 300
NEW_TOKENS, GREEDY_PROMPTS = 24, 2


@dataclass
class _Score:
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

    def figures(self) -> dict[str, Any]:
        return {
            "kl": self.kl / max(self.positions, 1),
            "top1": self.same_top / max(self.positions, 1),
            "perplexity": self.perplexity(),
        }


def check_logits(
    pair: Pair,
    prompts: Prompts,
    *,
    dtype: torch.dtype,
    device: str,
    max_algebra: float,
    max_ratio: float,
    trust_remote_code: bool,
    insist: bool,
    report: Progress,
) -> LevelResult:
    """Compare both models on prompts.

    Args:
        dtype: what both models run in; the noise floor is the source's error in it.
        device: "cpu", "cuda", "cuda:1", ... A model too large for it is spread by accelerate.
        insist: try although the memory may not suffice; otherwise such a model is skipped.

    On a GPU, the plain RMSNorms of the folded model run on this project's kernels, weightless where they are folded;
    the source runs as it is.

    figures: `reference`, `dtype`, `device`, `norms_on_kernels` (how many), `prompts`, `tokens`, `text`,
    `algebra_error` (None if not measured),
    `rounding_error`, `noise_floor` (errors relative to the norm of the reference's logits, the median over positions),
    `ratio` (None where the reference is the dtype itself, because the model does not run in float64),
    `certain_ratio` (what the ratio exceeds in 99 of 100 samples of the prompts: this is judged),
    `source` and `folded` (each `kl` in nats per position, `top1` agreement, `perplexity`), `reference_perplexity`,
    `greedy` (per prompt: `prompt`, `source`, `folded`, `same` of `tokens`).
    """
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    need = sum(math.prod(e.shape) for e in pair.source.tensors.values() if e.dtype in TORCH_DTYPE) * wide.itemsize
    room = _memory(device)
    fits = need * 1.2 < room
    if not fits and not insist:
        return LevelResult(
            "logits",
            "skipped",
            reason=f"the model takes {need / 1e9:.0f} GB in {_name(wide)}, {room / 1e9:.0f} GB are free on {device}; "
            "--level logits runs it all the same, spread over devices, memory and disk",
        )
    config = build.load_config(pair.source.folder, trust_remote_code)
    if hasattr(config, "quantization_config"):
        return LevelResult("logits", "skipped", reason="the checkpoint is quantized; its float32 self does not exist")
    cls = build.model_class(config, pair.source.folder, trust_remote_code)
    notes: list[str] = []
    with TemporaryDirectory() as offload, _deterministic():
        device_map = {"": device} if fits else "auto"
        run = _Run(pair, cls, trust_remote_code, device, device_map, None if fits else offload, prompts, need > LARGE)
        steps = 4

        try:
            report(0, steps, f"Logits of the source in {_name(wide)}")
            wide, baseline = _baseline(run, wide, dtype)
            report(1, steps, f"Logits of the source in {_name(dtype)}")
            model = _load(run, pair.source, dtype)
            floor = _score(run, model)
            greedy = _generate(run, model, notes)
            del model
        except Exception as error:  # a model's own code may raise anything
            why = f"the source itself cannot be run in {_name(dtype)}: {first_line(error)}"
            return LevelResult("logits", "skipped", reason=why)
        if not math.isfinite(floor.error()):
            why = f"the source itself computes NaN or inf in {_name(dtype)}; try another --dtype"
            return LevelResult("logits", "skipped", reason=why)
        algebra = None
        if fits:
            report(2, steps, f"Logits of the fold in {_name(wide)}")
            model = _fold_in_memory(run, config, wide)
            algebra = _score(run, model)
            del model
        else:
            notes.append("the algebra was not measured: the model is too large to be folded in memory")
        report(3, steps, f"Logits of the folded checkpoint in {_name(dtype)}")
        try:
            model = _load(run, pair.folded, dtype)
            with _weightless(model, device) as swapped:
                mine = _score(run, model)
                continued = _generate(run, model, notes)
            del model
        except Exception as error:  # it is the folded files that make the difference
            finding = Finding("logits", f"the folded checkpoint cannot be run: {first_line(error)}")
            return LevelResult("logits", "failed", findings=(finding,))
        run.free()
    least = torch.finfo(dtype).eps / 16
    ratio = None if wide == dtype else mine.error() / max(floor.error(), least)
    certain = None if wide == dtype else _certain_ratio(mine, floor, least)
    findings = _judge(algebra, mine, floor, ratio, certain, max_algebra, max_ratio, wide, dtype)
    figures = {
        "reference": _name(wide),
        "dtype": _name(dtype),
        "device": device,
        "norms_on_kernels": swapped,
        "prompts": len(prompts.ids),
        "tokens": sum(map(len, prompts.ids)),
        "text": prompts.origin,
        "algebra_error": algebra.error() if algebra else None,
        "rounding_error": mine.error(),
        "noise_floor": floor.error(),
        "ratio": ratio,
        "certain_ratio": certain,
        "source": floor.figures(),
        "folded": mine.figures(),
        "reference_perplexity": baseline.perplexity(),
        "greedy": _side_by_side(prompts, greedy, continued),
    }
    return LevelResult("logits", "failed" if findings else "passed", figures, findings, tuple(dict.fromkeys(notes)))


def _judge(
    algebra: _Score | None,
    mine: _Score,
    floor: _Score,
    ratio: float | None,
    certain: float | None,
    max_algebra: float,
    max_ratio: float,
    wide: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Finding, ...]:
    findings = []
    if algebra is not None and not algebra.error() <= max_algebra:
        findings.append(
            Finding(
                "logits",
                f"folded in {_name(wide)}, they are off by {algebra.error():.2e} (relative; {max_algebra:.0e} is "
                "allowed): this fold does not compute the same function",
                algebra.error(),
            )
        )
    if mine.broken > floor.broken:
        findings.append(
            Finding("logits", f"NaN or inf at {mine.broken} positions, and at {floor.broken} of the source")
        )
    elif ratio is None and not mine.error() <= max_algebra:
        findings.append(Finding("logits", f"off by {mine.error():.2e} (relative) in {_name(dtype)}", mine.error()))
    elif ratio is not None and certain is not None and not certain <= max_ratio:
        findings.append(
            Finding(
                "logits",
                f"off by {mine.error():.2e} (relative), {ratio:.3g} times the noise floor of {floor.error():.2e} that "
                f"{_name(dtype)} has anyway ({max_ratio:g} times is allowed)",
                mine.error(),
            )
        )
    return tuple(findings)


def _certain_ratio(mine: _Score, floor: _Score, least: float) -> float:
    """The first percentile of the ratio, if prompts are drawn again and again from these: what is no accident of them.

    Within a prompt, positions depend on each other (one token that changes its expert moves all that follow).
    """
    generator = random.Random(0)
    ratios = []
    for _ in range(DRAWS):
        drawn = generator.choices(range(len(mine.errors)), k=len(mine.errors))
        top, bottom = (statistics.median(chain.from_iterable(s.errors[i] for i in drawn)) for s in (mine, floor))
        ratios.append(top / max(bottom, least))
    return sorted(ratios)[DRAWS // 100]


# ---- prompts ---------------------------------------------------------------------------------------------------------


# ---- models ----------------------------------------------------------------------------------------------------------


def _baseline(run: _Run, wide: torch.dtype, dtype: torch.dtype) -> tuple[torch.dtype, _Score]:
    """Run the source in the reference dtype. Some models mix float32 into float64 and fail: then float32 has to do."""
    try:
        return wide, _score(run, _load(run, run.pair.source, wide), keep=True)
    except RuntimeError:
        if wide != torch.float64 or dtype == torch.float64:
            raise
    run.reference.clear()
    return torch.float32, _score(run, _load(run, run.pair.source, torch.float32), keep=True)


def _score(run: _Run, model: Any, keep: bool = False) -> _Score:
    score = _Score()
    causal = model.can_generate() and not model.config.is_encoder_decoder
    for i, (ids, logits) in enumerate(_logits(run, model)):
        if keep:
            run.reference.append(logits.clone())
        following = torch.tensor(ids[1:]) if causal and len(logits) == len(ids) else None
        _add(score, logits, run.reference[i], following)
    return score


def _add(score: _Score, logits: torch.Tensor, reference: torch.Tensor, following: torch.Tensor | None) -> None:
    """Add one prompt. Masked logits (-inf on both sides) count as equal."""
    a, b = logits.double(), reference.double()
    both = ~b.isfinite() & (a == b)
    a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    score.broken += int((~a.isfinite() & b.isfinite()).any(-1).sum())
    gap = (a - b).nan_to_num(nan=math.inf)
    size = b.nan_to_num(posinf=0, neginf=0).norm(dim=-1)
    score.errors.append((gap.norm(dim=-1) / size.clamp(min=torch.finfo(torch.float64).tiny)).tolist())
    mine, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    score.kl += (theirs.exp() * (theirs - mine)).nan_to_num(nan=0.0).sum().item()
    score.same_top += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    score.positions += len(mine)
    if following is not None and len(following):
        score.loss -= mine[:-1].gather(1, following[:, None]).sum().item()
        score.predicted += len(following)


def _generate(run: _Run, model: Any, notes: list[str]) -> list[list[int]] | None:
    """Greedy continuations of the first prompts, as token ids."""
    if run.prompts.random or not model.can_generate() or model.config.is_encoder_decoder:
        return None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    out = []
    for ids in run.prompts.ids[:GREEDY_PROMPTS]:
        start = ids[: max(len(ids) // 2, 1)]
        new = int(min(NEW_TOKENS, positions - len(start)))
        tokens = torch.tensor([start], device=_device_of(run, model))
        try:
            with quiet_transformers():
                found = model.generate(
                    input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
                )
        except Exception as error:  # generation has its own requirements, some of which no text meets
            notes.append(f"no greedy continuation: {first_line(error)}")
            return None
        out.append(found[0, len(start) :].tolist())
    return out


def _side_by_side(
    prompts: Prompts, source: list[list[int]] | None, folded: list[list[int]] | None
) -> list[dict[str, Any]]:
    def words(ids: Any) -> str:
        if prompts.tokenizer is None:
            return " ".join(map(str, ids))
        return str(prompts.tokenizer.decode(ids, skip_special_tokens=True))

    rows = []
    for ids, a, b in zip(prompts.ids, source or (), folded or (), strict=False):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = ids[: max(len(ids) // 2, 1)]
        rows.append({"prompt": words(start), "source": words(a), "folded": words(b), "same": same, "tokens": len(a)})
    return rows
