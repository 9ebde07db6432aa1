"""Level logits: both models on the same prompts, judged against the noise floor.

Four models, one after the other in memory: the source in the reference dtype; the source in its own dtype (the noise
floor: what rounding does to it anyway); the same fold made in the reference dtype (is the algebra right?); the folded
checkpoint in its own dtype (how much more?). The reference is float32, or float64 for a float32 checkpoint. What does
not fit into memory is run layer by layer from disk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.checkpoint.progress import Steps
from flashnorm_cli.proof import models
from flashnorm_cli.proof.figures import GreedyFigures, LogitsFigures
from flashnorm_cli.proof.models import ModelError, Setting, dtype_name
from flashnorm_cli.proof.options import DTYPES, VerifyOptions
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.prompts import Prompts, drawn_afresh, in_few_lengths
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.proof.scores import Judgement, Reference, Score, judge

NEW_TOKENS, GREEDY_PROMPTS = 24, 2
STEPS = 4
# A plain fold trades the rounding of a product with a gain for that of a weight. A rotation rounds all weights once
# more, beside what a forward rounds: two squares for one. Measured in float32: 1.3 to 1.55 times the floor.
ROUNDINGS_OF_ROTATED = math.sqrt(2)


class _SourceError(ModelError):
    """The source itself does not run: nothing can be said of its fold."""


class _FoldedError(ModelError):
    """The folded files do not run, and the source does."""


@dataclass(frozen=True)
class _Measured:
    """The scores of the models on the same prompts; `algebra` is None where it was not measured."""

    wide: torch.dtype
    baseline: Score
    floor: Score
    algebra: Score | None
    folded: Score
    on_kernels: int
    source_text: list[list[int]] | None
    folded_text: list[list[int]] | None
    notes: tuple[str, ...]


def check_logits(pair: Pair, prompts: Prompts, options: VerifyOptions, report: Progress) -> LevelResult:
    """Compare both models on prompts; figures: `LogitsFigures`.

    On a GPU, the plain RMSNorms of the folded model run on this project's kernels, weightless where they are folded;
    the source runs as it is.

    Where nothing but the rounding error is too large, and not by far, everything is measured a second time on tokens
    that are drawn afresh, and that decides: whoever asks again is not told the same by the same chance.
    """
    dtype = DTYPES[options.dtype] if options.dtype else models.own_dtype(pair.source)
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    with TemporaryDirectory() as scratch, models.deterministic():
        setting = Setting.of(pair, wide, options.device, options.trust_remote_code, Path(scratch))
        if hasattr(setting.config, "quantization_config"):
            why = "the checkpoint is quantized; its float32 self does not exist"
            return LevelResult("logits", "skipped", reason=why)
        if setting.from_disk:
            prompts = in_few_lengths(prompts)
        try:
            first = measured = _measure(setting, prompts, dtype, wide, report)
            judgement = _judge(setting, first, dtype, options)
            greedy = _side_by_side(prompts, first.source_text, first.folded_text)
            if judgement.doubtful:
                prompts = drawn_afresh(pair.source, len(prompts.ids))
                measured = _measure(setting, prompts, dtype, wide, report)
                judgement = _judge(setting, measured, dtype, options)
        except _SourceError as error:
            return LevelResult("logits", "skipped", reason=str(error))
        except _FoldedError as error:
            return LevelResult("logits", "failed", findings=(Finding("logits", str(error)),))
    notes = list(first.notes)
    if measured is not first:
        verdict = "over the limit again" if judgement.findings else "within the limit"
        notes.append(f"the rounding error was over the limit; measured again on other tokens, it was {verdict}")
    figures = _figures(setting, measured, judgement, prompts, dtype, greedy)
    status = "failed" if judgement.findings else "passed"
    return LevelResult("logits", status, figures, judgement.findings, tuple(dict.fromkeys(notes)))


def _judge(setting: Setting, measured: _Measured, dtype: torch.dtype, options: VerifyOptions) -> Judgement:
    roundings = ROUNDINGS_OF_ROTATED if setting.pair.plan.rotation else 1.0
    limits = options.max_algebra, options.max_ratio * roundings
    return judge(measured.algebra, measured.folded, measured.floor, measured.wide, dtype, *limits)


def _measure(setting: Setting, prompts: Prompts, dtype: torch.dtype, wide: torch.dtype, report: Progress) -> _Measured:
    """Run the models. Raises _SourceError or _FoldedError where one of them cannot be."""
    reference = Reference(setting.scratch)
    notes: list[str] = []
    try:
        report(0, STEPS, Steps(f"Running the source in {dtype_name(wide)}"))
        wide, baseline = _baseline(setting, prompts, reference, wide, dtype)
        report(1, STEPS, Steps(f"Running the source in {dtype_name(dtype)}"))
        model = models.load(setting, setting.pair.source, dtype)
        floor = _score(setting, model, prompts, reference)
        source_text = _generate(setting, model, prompts, notes)
        del model
    except ModelError as error:
        raise _SourceError(f"the source itself cannot be run in {dtype_name(dtype)}: {error}") from error
    if not math.isfinite(floor.error()):
        raise _SourceError(f"the source itself computes NaN or inf in {dtype_name(dtype)}; try another `dtype`")
    algebra = None
    if setting.from_disk:
        notes.append("the algebra was not measured: the model is too large to be folded in memory")
    else:
        report(2, STEPS, Steps(f"Running a fold in {dtype_name(wide)}"))
        try:
            model = models.fold_in_memory(setting, wide)
            algebra = _score(setting, model, prompts, reference)
            del model
        except ModelError as error:
            raise _FoldedError(f"the source, folded in memory, cannot be run: {error}") from error
    report(3, STEPS, Steps(f"Running the folded checkpoint in {dtype_name(dtype)}"))
    try:
        model = models.load(setting, setting.pair.folded, dtype)
        with models.weightless(model, setting.device) as on_kernels:
            folded = _score(setting, model, prompts, reference)
            folded_text = _generate(setting, model, prompts, notes)
        del model
    except ModelError as error:
        raise _FoldedError(f"the folded checkpoint cannot be run: {error}") from error
    setting.free()
    return _Measured(wide, baseline, floor, algebra, folded, on_kernels, source_text, folded_text, tuple(notes))


def _baseline(
    setting: Setting, prompts: Prompts, reference: Reference, wide: torch.dtype, dtype: torch.dtype
) -> tuple[torch.dtype, Score]:
    """Run the source in the reference dtype. Some models mix float32 into float64 and fail: then float32 has to do."""

    def run(dtype: torch.dtype) -> Score:
        score, model = Score(), models.load(setting, setting.pair.source, dtype)
        for ids, logits in models.logits_of(setting, model, prompts):
            reference.add(logits)
            score.add(logits, logits, _following(model, ids, logits))
        return score

    try:
        return wide, run(wide)
    except ModelError:
        if wide != torch.float64 or dtype == torch.float64:
            raise
    reference.all.clear()
    return torch.float32, run(torch.float32)


def _score(setting: Setting, model: Any, prompts: Prompts, reference: Reference) -> Score:
    score = Score()
    found = models.logits_of(setting, model, prompts)
    for (ids, logits), expected in zip(found, reference.all, strict=True):
        if logits.shape != expected.shape:
            raise ModelError(f"its logits have shape {list(logits.shape)} instead of {list(expected.shape)}")
        score.add(logits, expected, _following(model, ids, logits))
    return score


def _following(model: Any, ids: tuple[int, ...], logits: torch.Tensor) -> torch.Tensor | None:
    """The tokens that a causal model predicts at all positions but the last; None for other models."""
    causal = model.can_generate() and not model.config.is_encoder_decoder and len(logits) == len(ids)
    return torch.tensor(ids[1:]) if causal else None


def _figures(
    setting: Setting,
    measured: _Measured,
    judgement: Judgement,
    prompts: Prompts,
    dtype: torch.dtype,
    greedy: tuple[GreedyFigures, ...],
) -> LogitsFigures:
    return LogitsFigures(
        reference=dtype_name(measured.wide),
        dtype=dtype_name(dtype),
        device=setting.device,
        norms_on_kernels=measured.on_kernels,
        prompts=len(prompts.ids),
        tokens=sum(map(len, prompts.ids)),
        judged=measured.folded.positions,
        from_disk=setting.from_disk,
        text=prompts.in_words(),
        algebra_error=measured.algebra.error() if measured.algebra else None,
        rounding_error=measured.folded.error(),
        noise_floor=measured.floor.error(),
        ratio=judgement.ratio,
        certain_ratio=judgement.certain,
        source=measured.floor.figures(),
        folded=measured.folded.figures(),
        reference_perplexity=measured.baseline.perplexity(),
        greedy=greedy,
    )


# ---- greedy continuations --------------------------------------------------------------------------------------------


def _generate(setting: Setting, model: Any, prompts: Prompts, notes: list[str]) -> list[list[int]] | None:
    """Greedy continuations of the first prompts, as token ids; each token would read the whole model from a disk."""
    if prompts.random or setting.from_disk or not model.can_generate() or model.config.is_encoder_decoder:
        return None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    out = []
    for ids in prompts.ids[:GREEDY_PROMPTS]:
        start = ids[: max(len(ids) // 2, 1)]
        new = int(min(NEW_TOKENS, positions - len(start)))
        tokens = torch.tensor([start], device=models.input_device(setting, model))
        try:
            with models.its_own_errors():
                found = model.generate(
                    input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
                )
        except ModelError as error:  # generation has its own requirements, some of which no text meets
            notes.append(f"no greedy continuation: {error}")
            return None
        out.append(found[0, len(start) :].tolist())
    return out


def _side_by_side(
    prompts: Prompts, source: list[list[int]] | None, folded: list[list[int]] | None
) -> tuple[GreedyFigures, ...]:
    def words(ids: Any) -> str:
        if prompts.tokenizer is None:
            return " ".join(map(str, ids))
        return str(prompts.tokenizer.decode(ids, skip_special_tokens=True))

    rows = []
    for ids, a, b in zip(prompts.ids, source or (), folded or (), strict=False):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = ids[: max(len(ids) // 2, 1)]
        rows.append(GreedyFigures(words(start), words(a), words(b), same, len(a)))
    return tuple(rows)
