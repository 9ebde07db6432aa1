"""What `verify` finds, as plain data: it is printed, recorded in flashnorm.json and shown in the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from flashnorm_cli.choices import Level, Verdict
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import CheckpointError, NotRunError, VerificationError
from flashnorm_cli.plan.model import Plan

LEVELS: tuple[Level, ...] = get_args(Level)
# What counts as equivalent: exact algebra in float32, and rounding no worse than the dtype's own.
MAX_ALGEBRA_ERROR = 1e-5
MAX_NOISE_RATIO = 1.5

# The three verdicts. Nothing is called equivalent that was not run.
EQUIVALENT: Final = "equivalent"
NOT_RUN: Final = "as planned, not run"
NOT_EQUIVALENT: Final = "not equivalent"
RUNS_MODELS = ("logits", "runtime:")  # levels that compare a forward of both models, apart from the plan


def verdict_of(statuses: Mapping[str, str]) -> Verdict:
    """The verdict that levels ("weights", "runtime:vllm", ...) with these statuses allow.

    A forward of both models has to have been compared. Where the checkpoint announces users besides the logits, level
    users belongs to it: one that could not be run leaves the verdict open.
    """
    if "failed" in statuses.values():
        return NOT_EQUIVALENT
    ran = any(level.startswith(RUNS_MODELS) and status == "passed" for level, status in statuses.items())
    return EQUIVALENT if ran and statuses.get("users", "passed") == "passed" else NOT_RUN


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: `what` is a tensor, a file or a config key; `error` is relative, where one is known."""

    what: str
    message: str
    error: float | None = None


@dataclass(frozen=True, repr=False)
class LevelResult(Shown):
    """The outcome of one level: "passed", "failed" (see `findings`) or "skipped" (see `reason`).

    `figures` holds what the level measured: one of the classes in `figures.py`, or what a record says of it.
    """

    level: str
    status: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    reason: str | None = None
    seconds: float = 0.0

    def _facts(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"level": self.level, "status": self.status}
        fields |= {"findings": len(self.findings)} if self.findings else {}
        return {**fields, **({"reason": self.reason} if self.reason else {}), "seconds": self.seconds}


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """The result of `verify`; true where the verdict is "equivalent".

    `foreign` says that the checkpoint does not carry a record of this tool. `environment` holds versions, device,
    date (ISO 8601, UTC), and the command; `thresholds` what was counted as equivalent; `recorded` the file that holds
    the result, or None.
    """

    folded: str
    source: str
    commit: str | None
    foreign: bool
    plan: Plan | None
    levels: tuple[LevelResult, ...]
    thresholds: dict[str, float]
    environment: dict[str, str]
    notes: tuple[str, ...] = ()
    recorded: str | None = None

    def _facts(self) -> dict[str, Any]:
        levels = {level.level: level.status for level in self.levels}
        return {"verdict": self.verdict, "folded": self.folded, "source": self.source, **levels}

    @property
    def verdict(self) -> Verdict:
        """One of "equivalent", "as planned, not run", "not equivalent"."""
        return verdict_of({level.level: level.status for level in self.levels})

    @property
    def equivalent(self) -> bool:
        """A forward of both models was compared, and no level failed."""
        return self.verdict == EQUIVALENT

    def __bool__(self) -> bool:
        return self.equivalent

    def raise_for_failure(self) -> Verification:
        """The verification itself, where it is equivalent.

        Raises:
            VerificationError: it is not equivalent; with the first thing that is wrong.
            NotRunError: the files are as planned, and no run of both models was compared; with the reason.
        """
        if self.equivalent:
            return self
        if self.verdict == NOT_EQUIVALENT:
            wrong = [f"{level.level}: {f.what}: {f.message}" for level in self.levels for f in level.findings]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise VerificationError(f"{self.folded}: {self.verdict}: {''.join(wrong[:1])}{more}", self)
        why = "; ".join(f"{level.level}: {level.reason}" for level in self.skipped) or "no level that runs both models"
        raise NotRunError(f"{self.folded}: {self.verdict}: {why}", self)

    @property
    def skipped(self) -> tuple[LevelResult, ...]:
        """Levels that were asked for and did not run, each with its reason."""
        return tuple(level for level in self.levels if level.status == "skipped")

    def level(self, name: str) -> LevelResult | None:
        """The result of a level by its name."""
        return next((level for level in self.levels if level.level == name), None)

    @classmethod
    def from_record(cls, record: dict[str, Any], folded: str) -> Verification:
        """The result that flashnorm.json holds (`verify` in it), of the checkpoint called `folded`.

        Raises CheckpointError if there is none, or if it is not what `verify` writes.
        """
        try:
            recorded = record["verify"]
            known = {field.name for field in dataclasses.fields(LevelResult)}
            levels = []
            for name, entry in recorded["levels"].items():
                plain = {key: value for key, value in entry.items() if key in known}
                plain["findings"] = tuple(Finding(**finding) for finding in entry.get("findings", ()))
                plain["notes"] = tuple(entry.get("notes", ()))
                levels.append(LevelResult(**{**plain, "level": name}))
            objects = [*(level.figures for level in levels), recorded["thresholds"], recorded["environment"]]
            if not all(isinstance(value, Mapping) for value in objects):
                raise TypeError("figures, thresholds and environment have to be objects")
            return cls(
                folded=folded,
                source=recorded["source"]["name"],
                commit=recorded["source"]["commit"],
                foreign=bool(record.get("adopted")),
                plan=Plan.from_json(record),
                levels=tuple(levels),
                thresholds=recorded["thresholds"],
                environment=recorded["environment"],
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"flashnorm.json: holds no verification ({type(error).__name__}: {error})") from error

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, without the plan."""
        return {
            "verdict": self.verdict,
            "folded": self.folded,
            "source": {"name": self.source, "commit": self.commit},
            "foreign": self.foreign,
            "levels": {level.level: level_json(level) for level in self.levels},
            "thresholds": self.thresholds,
            "environment": self.environment,
            "notes": list(self.notes),
            "recorded": self.recorded,
        }


def level_json(level: LevelResult) -> dict[str, Any]:
    """A level as plain JSON values, without its name; what is empty is left out."""
    plain = {field.name: getattr(level, field.name) for field in dataclasses.fields(level) if field.name != "level"}
    plain["findings"] = [dataclasses.asdict(finding) for finding in level.findings]
    return {key: _plain(value) for key, value in plain.items() if value is not None and value not in ((), {}, [])}


def _plain(value: Any) -> Any:
    """As JSON values, which know neither inf nor NaN: they become null."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
