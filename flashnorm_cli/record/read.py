"""What a folded checkpoint says of itself."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.folded import flags_of, in_words
from flashnorm_cli.checkpoint.model import RECORD, Checkpoint, Source, read_json
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError
from flashnorm_cli.plan.model import FORMAT

if TYPE_CHECKING:  # the plugin of vLLM reads records before anything heavy is imported
    from transformers import PretrainedConfig


_log = logging.getLogger(__name__)


def recorded_source(
    said: dict[str, Any],
    name: str,
    folder: Path,
    token: str | bool | None,
    cache_dir: Path | None,
    local_files_only: bool,
) -> Source:
    """The source that the record `said` of the checkpoint `name` in `folder` names.

    Raises UsageError where it names none, or a folder that is not here.
    """
    source, commit = said.get("source"), said.get("commit")
    if not isinstance(source, str) or not source or not isinstance(commit, (str, type(None))):
        raise UsageError(f"{name}: its {RECORD} names no source; add --source <the model it was made from>")
    if commit is None:
        here = Path(source).expanduser()
        beside = folder.resolve().parent / source
        if not here.is_dir() and not beside.is_dir():
            raise UsageError(f"{name}: was made from {source}, which is not here; say where it is with --source")
        return Source(str(here if here.is_dir() else beside))
    return Source(source, commit, token, cache_dir, local_files_only)


def config_record_of(base: Checkpoint) -> dict[str, Any]:
    """The base's record. Raises UsageError where it is not folded, or not by this tool."""
    name = base.source.name
    if not (base.folder / RECORD).is_file():
        if flags_of(base.config):
            raise UsageError(
                f"{name}: is folded, but has no {RECORD} that says how; `flashnorm verify {name} --source <its source> "
                "--adopt` writes one"
            )
        raise UsageError(f"{name}: is not a folded checkpoint (no {RECORD}); fold it with `flashnorm fold` first")
    said = read_json(base.folder / RECORD)
    if said.get("format") != FORMAT:
        raise FlashNormError(f"{name}: its {RECORD} has format {said.get('format')!r}; a newer flashnorm may read it")
    wanted = {"norms": {"tensor", "shape", "scale", "offset", "folded"}, "readers": {"tensor", "dim", "runs"}}
    for what, keys in wanted.items():
        entries = said.get(what)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and keys <= e.keys() for e in entries):
            raise CheckpointError(f"{name}: its {RECORD} holds no plan")
    return said


def record_of(config: PretrainedConfig) -> dict[str, Any]:
    """The `flashnorm` object of a config. Raises FlashNormError if it is not there or cannot be read."""
    said: Any = getattr(config, "flashnorm", None)
    if (said is None or said is True) and (flags := flags_of(config.to_dict())):
        raise FlashNormError(
            f"another tool has folded this model (config.json has {in_words(flags)}), which does not say which norms; "
            "`flashnorm verify <folded> --source <source> --adopt` checks it and writes the record"
        )
    if said is None:
        raise FlashNormError(
            "this model is not folded: its config has no record of flashnorm; load a checkpoint that `flashnorm fold` "
            "wrote, or fold it in memory first: flashnorm_cli.fold_model_(model)"
        )
    patterns = said.get("folded") if isinstance(said, dict) else None
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        raise CheckpointError("the record of flashnorm in config.json names no list of folded norms; it was edited")
    if said.get("format") != FORMAT:
        raise CheckpointError(
            f"the record of flashnorm in config.json has format {said.get('format')!r}, and this version reads "
            f"{FORMAT}; upgrade flashnorm-cli"
        )
    return said


def identities(where: str, hub: dict[str, Any]) -> dict[str, float]:
    """What each folded norm's weight would be, from flashnorm.json; empty if that is not there."""
    from transformers.utils import cached_file  # type: ignore[attr-defined]

    found = cached_file(
        where,
        RECORD,
        _raise_exceptions_for_missing_entries=False,
        **{k: v for k, v in hub.items() if k != "code_revision"},
    )
    try:
        norms = json.loads(Path(found).read_text(encoding="utf-8"))["norms"] if found else []
        return {n["tensor"]: (1.0 - n["offset"]) / n["scale"] for n in norms if n["folded"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where}: {RECORD} cannot be read: {error}") from error


@dataclass(frozen=True)
class Record:
    """The object `flashnorm` of a folded checkpoint's config.json, as far as it matters here.

    `folded` and `kept` are patterns of tensor names; where only some layers of a kind are folded, both hold it.
    """

    layout: str
    folded: frozenset[str]
    kept: frozenset[str]
    lm_head: str

    def names(self, tensor: str) -> bool:
        """Whether a tensor on disk belongs to a folded norm; in doubt, no."""
        return pattern_of(tensor) in self.folded - self.kept

    def may_name(self, module: str) -> bool:
        """Whether a module of the runtime, whose path need not be the one on disk, may be a folded norm."""
        return module.rsplit(".", 1)[-1] in {pattern.split(".")[-2] for pattern in self.folded if "." in pattern}


def read_record(*configs: object, warn: Callable[[str], None] = _log.warning) -> Record | None:
    """The record in the first of some configs (config.json's, its text model's) that has one.

    Returns:
        None for an unfolded checkpoint, and for a record of a format that this version does not know: `warn` is told.
    """
    found = next((value for c in configs if (value := getattr(c, "flashnorm", None)) is not None), None)
    if found is None:
        return None
    values = found if isinstance(found, dict) else {}
    folded: Any = values.get("folded")
    kept: Any = values.get("kept")
    if values.get("format") != FORMAT or not _are_names(folded) or not _are_names(kept):
        warn(
            f"flashnorm: config.json holds a record of format {values.get('format')}, this version reads {FORMAT}: "
            "norms keep their weights"
        )
        return None
    return Record(str(values.get("layout")), frozenset(folded), frozenset(kept), str(values.get("lm_head")))


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, dict)) and all(isinstance(name, str) for name in value)


def left_out(record: Record, plan: Any, seen: Iterable[str]) -> list[tuple[str, tuple[int, ...], float]]:
    """What layout dropped left out, as (tensor, shape, value of all its elements), by the plan in flashnorm.json.

    Only tensors that config.json's record names as well, and that the files did not hold. The value is the identity by
    the norm's own convention: 1, or 0 where its gain is `1 + w`.

    Raises:
        ValueError: there is no plan, or it cannot be read.
    """
    there = set(seen)
    try:
        found = []
        for norm in plan["norms"]:
            name = norm["tensor"]
            if norm["folded"] and name not in there and pattern_of(name) in record.folded:
                value = (1.0 - norm["offset"]) / norm["scale"]
                found.append((name, tuple(int(n) for n in norm["shape"]), value))
    except (TypeError, KeyError, AttributeError, ValueError, ZeroDivisionError):
        raise ValueError(
            f"layout dropped cannot be loaded without the checkpoint's {RECORD}, which lists what was left out: "
            "copy it beside config.json, or fold again with --layout identity"
        ) from None
    return found
