"""A plan in words: the terminal, the report page and the model card say it in the same ones."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flashnorm_cli.checkpoint.names import any_number, grouped, pattern_of

if TYPE_CHECKING:
    from flashnorm_cli.plan.model import Norm, Plan

A_LOT = 0.1  # of a model's bytes: what untying may add without a word
MOST_NAMES = 3

HEADS = {
    "folded": "the final norm is folded into the output head",
    "untied": "the final norm is folded into an output head of its own, no longer tied to the embedding",
    "kept": "the final norm keeps its weight",
    "none": "no norm feeds an output head",
}


@dataclass(frozen=True)
class Kind:
    """Norms that share a fate: the pattern of their names, their gain where it is not `w`, how many there are.

    `into` names the readers that folded ones go into, by the ends of their names; `reason` says why kept ones stay.
    """

    name: str
    gain: str
    number: int
    into: str
    reason: str

    @property
    def fate(self) -> str:
        return self.reason or f"into {self.into}"


def kinds(norms: Iterable[Norm]) -> list[Kind]:
    """Norms by kinds, in order of first appearance."""
    found: dict[tuple[str, str, str], list[Norm]] = {}
    for norm in norms:
        gain = {0.0: "", 1.0: "1 + w"}.get(norm.offset, f"w + {norm.offset:g}")
        reason = any_number(norm.reason or "")
        found.setdefault((pattern_of(norm.tensor), gain, reason), []).append(norm)
    rows = []
    for (name, gain, reason), alike in found.items():
        readers = dict.fromkeys(pattern_of(r).removesuffix(".weight") for norm in alike for r in norm.readers)
        into = ", ".join(dict.fromkeys(r.rsplit(".", 1)[-1] for r in readers))
        rows.append(Kind(name, gain, len(alike), into, reason))
    return rows


def rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(what happens, the names with their gain, how many, into what or why) of every kind of norm."""
    return [
        (
            "kept" if kind.reason else "folded",
            kind.name.removesuffix(".weight") + (f" ({kind.gain})" if kind.gain else ""),
            f"{kind.number} x",
            kind.fate,
        )
        for kind in kinds(plan.norms)
    ]


def sentences(plan: Plan) -> list[str]:
    """What there is to say beside the kinds of norms, a sentence a line."""
    lines = [
        f"{len(plan.folded)} of {len(plan.norms)} norms are folded into {len(plan.readers)} tensors; "
        f"{HEADS[plan.lm_head]}.",
        f"{size(plan.bytes_changed)} change, {size(plan.bytes_added)} are added; "
        f"flashnorm_folded: {str(plan.folded_flag).lower()}.",
    ]
    if not plan.folded_flag and plan.folded:
        lines.append(_why_no_flag(plan))
    if plan.untie and plan.bytes_added > plan.bytes_total * A_LOT:
        lines.append(
            f"The head of its own makes the model {plan.bytes_added / plan.bytes_total:.0%} larger; "
            '`final_norm="keep"` leaves it tied, and the final norm as it is.'
        )
    if plan.rotation:
        lines.append(
            f"The residual stream ({plan.rotation.size} channels) is rotated in {len(plan.rotation.tensors)} tensors: "
            f"{plan.rotation.kind}, seed {plan.rotation.seed}."
        )
    if plan.not_traced:
        lines.append(f"Not reached by a text forward, left alone: {', '.join(p for p, _ in grouped(plan.not_traced))}")
    if plan.unread:
        lines.append(f"On disk but not read by the model, left alone: {', '.join(p for p, _ in grouped(plan.unread))}")
    return lines + [f"Note: {note}." for note in plan.notes]


def _why_no_flag(plan: Plan) -> str:
    """What it means that `flashnorm_folded` is false, with the norms that it is false for."""
    fed = kinds(norm for norm in plan.kept if norm.readers) or kinds(plan.kept)
    names = [kind.name.removesuffix(".weight") for kind in fed]
    more = f" and {len(names) - MOST_NAMES} other kinds of norms" if len(names) > MOST_NAMES else ""
    need = "still needs its" if len(names) == 1 else "still need their"
    return (
        "flashnorm_folded is false: a runtime that reads it drops every norm's weight, and "
        f"{', '.join(names[:MOST_NAMES])}{more} {need} own. What is folded is folded all the same."
    )


def size(number: float) -> str:
    """Bytes for people: 1.2 GB, decimal as disks are sold and `ls --si` prints."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 999.95:
            return f"{number:.{0 if unit == 'B' else 1}f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"
