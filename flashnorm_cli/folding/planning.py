"""The plan of a fold as it was asked for: a rotation, or what is best for a format of quantization."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from operator import index
from typing import TYPE_CHECKING, SupportsIndex

from flashnorm_cli.checkpoint.model import Checkpoint, Progress
from flashnorm_cli.choices import FinalNorm
from flashnorm_cli.errors import FlashNormError, PlanError, UsageError, quoted
from flashnorm_cli.plan import quantized
from flashnorm_cli.plan.grid import plan_on_grid
from flashnorm_cli.plan.model import ROTATIONS, Plan
from flashnorm_cli.plan.planner import plan_checkpoint

if TYPE_CHECKING:
    import numpy as np

LEAVE_GRID = "quantize the source, or pass `leave_grid=True`"


@dataclass(frozen=True)
class Planning:
    """What the plan depends on besides the checkpoint.

    `rotation` is kind and seed; `target` is a format of quantization that chooses it (`plan/quantized.py`), with
    `seed`. `leave_grid` folds weights that lie on a quantizer's grid.
    """

    final_norm: FinalNorm
    trust_remote_code: bool
    rotation: tuple[str, int] | None = None
    target: str | None = None
    leave_grid: bool = False
    seed: int = 0


def checked_seed(rotate: str | None, seed: int, target: str | None = None) -> int:
    """The seed as a plain int, of a rotation that is asked for as it can be. Raises UsageError."""
    if rotate is not None and rotate not in ROTATIONS:
        raise UsageError(f"`rotate` is one of {', '.join(ROTATIONS)}, not {rotate!r}")
    whole = isinstance(seed, SupportsIndex) and not isinstance(seed, bool)
    if not whole or not 0 <= (number := index(seed)) < 2**63:
        raise UsageError(f"`seed` is a whole number from 0 to 2^63 - 1, not {quoted(seed)}")
    if target is not None:
        quantized.format_of(target)
        if rotate is not None:
            raise UsageError("`target` chooses whether to rotate: leave `rotate` out")
    return number


def check_streamed(target: str | None) -> None:
    """Raises UsageError for a format that is best rotated, which a fold from Hub to Hub cannot do."""
    if target is not None and quantized.format_of(target).best() == quantized.ROTATE:
        raise UsageError(
            f"a fold from Hub to Hub does not rotate, as is best for {target}: fold into a folder, then `push_to_hub`"
        )


def plan_for(checkpoint: Checkpoint, planning: Planning, report: Progress) -> tuple[Plan, list[str]]:
    """The plan, and what it has chosen for a format and why.

    Raises FlashNormError where the model is better left alone, and what `plan_fold` raises.
    """
    final_norm, trust = planning.final_norm, planning.trust_remote_code
    if planning.target is None:
        return plan_fold(checkpoint, final_norm, trust, report, planning.rotation), []
    form = quantized.format_of(planning.target)
    choice, why = form.best(), ""
    if choice == quantized.ROTATE:
        try:
            plan = plan_fold(checkpoint, final_norm, trust, report, (quantized.ROTATION, planning.seed))
            ratios = form.measured(choice)
            note = f"`target={form.name!r}`: folded and rotated: KL divergence was {ratios} times the source's"
            return plan, [f"{note} ({quantized.DOCS})"]
        except (PlanError, UsageError) as error:
            from flashnorm_cli.plan.rotation import REFUSED

            choice, why = form.best(rotatable=False), f", and it cannot be rotated: {str(error).removeprefix(REFUSED)}"
    if choice == quantized.KEEP:
        raise FlashNormError(f"{checkpoint.source.name}: {quantized.keep_line(form, why)}")
    note = f"`target={form.name!r}`: folded: KL divergence was {form.measured(choice)} times the source's"
    return plan_fold(checkpoint, final_norm, trust, report), [f"{note}{why} ({quantized.DOCS})"]


def plan_fold(
    checkpoint: Checkpoint,
    final_norm: FinalNorm,
    trust_remote_code: bool,
    report: Progress,
    rotate: tuple[str, int] | None = None,
) -> Plan:
    """The plan, with a rotation by kind and seed where one is asked for.

    Raises FlashNormError where there is nothing to fold, UsageError where there is no such rotation of this size.
    """
    report(0, 0, f"Tracing {', '.join(checkpoint.config.get('architectures') or ['the model'])}")
    if rotate is None:
        plan = plan_checkpoint(checkpoint, final_norm, trust_remote_code).plan
    else:
        from flashnorm_cli.folding.rotation import rotation
        from flashnorm_cli.plan.rotation import make_rotated_plan

        plan = make_rotated_plan(checkpoint, final_norm, trust_remote_code, *rotate)
        if plan.rotation is not None:
            rotation(rotate[0], plan.rotation.size, rotate[1])
    if not plan.folded:
        reasons = "; ".join(dict.fromkeys(n.reason or "" for n in plan.kept)) or "it has no norm with a weight"
        raise FlashNormError(f"{checkpoint.source.name}: there is nothing to fold: {reasons}")
    return plan


def with_grid(checkpoint: Checkpoint, plan: Plan, leave: bool) -> Plan:
    """The plan, with a note where weights that change lie on a quantizer's grid: a fold of such costs a little.

    Raises FlashNormError where all were made for few bits, but for `leave`: they have no use but to be quantized again.
    """
    found = plan_on_grid(checkpoint, plan)
    if found is None:
        return plan
    if found.all_few and not leave:
        raise FlashNormError(f"{checkpoint.source.name}: {found.line}; {LEAVE_GRID}")
    return replace(plan, notes=(*plan.notes, found.line))


def caution(planning: Planning, gains: Iterable[np.ndarray]) -> str | None:
    """A line for who may quantize the fold, where its gains matter and nothing was chosen with that in mind."""
    chosen = planning.target is not None or planning.rotation is not None
    return None if chosen or not quantized.uneven(gains) else quantized.CAUTION
