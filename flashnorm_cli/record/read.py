"""What a folded checkpoint says of itself, by type: flashnorm.json, and the `flashnorm` object of config.json.

Folds, proofs, adapters, the Hub and the runtimes all read records through this module. A record is a file that anybody
may have written: a wrong type raises CheckpointError with the file, the key and what to do.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from flashnorm_cli.checkpoint.folded import flags_of, in_words
from flashnorm_cli.checkpoint.json_files import Fields, is_text, read_object
from flashnorm_cli.checkpoint.model import RECORD, Checkpoint, Source
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.choices import Layout
from flashnorm_cli.errors import CheckpointError, FlashNormError, UsageError, one_line, quoted
from flashnorm_cli.plan.model import LM_HEADS, REMEDY, Norm, Plan, check_format, norm_from_json

if TYPE_CHECKING:  # the plugin of vLLM reads records before anything heavy is imported
    from transformers import PretrainedConfig

LAYOUTS = get_args(Layout)
ADD_SOURCE = 'add `source="<the model it was made from>"`'
MOST_PATTERNS = 10_000  # of names in config.json: one for each kind of norm, or a name where a kind is mixed

_log = logging.getLogger(__name__)


# ---- flashnorm.json --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FoldRecord:
    """The content of a checkpoint's flashnorm.json. `where` names the file; `content` is what is written back.

    A proof judges a record, and has to get hold of one that is wrong in parts. So each property checks its own keys:
    `source`, `plan` and `norms` raise CheckpointError, and the others answer what a wrong type amounts to: nothing.
    """

    where: str
    content: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, path: Path, where: str | None = None) -> FoldRecord:
        """The record in a file. Raises CheckpointError where it is not a JSON object."""
        return cls(where or str(path), read_object(path))

    @cached_property
    def plan(self) -> Plan:
        """The plan of the fold."""
        return Plan.from_json(self.content, self.where)

    @cached_property
    def norms(self) -> tuple[Norm, ...]:
        """The norms alone, without what else a plan needs."""
        return tuple(norm_from_json(each) for each in Fields(self.content, self.where, REMEDY).objects("norms"))

    @property
    def source(self) -> tuple[str, str | None] | None:
        """What it was folded from: (folder or Hub id, commit or None for a folder); None where it does not say."""
        name, commit = self.content.get("source"), self.content.get("commit")
        return (name, commit) if is_text(name) and name and (commit is None or is_text(commit)) else None

    @property
    def layout(self) -> str | None:
        """One of LAYOUTS."""
        found = self.content.get("layout")
        return found if found in LAYOUTS else None

    @property
    def adopted(self) -> bool:
        """Whether `verify --adopt` has written it for a fold of another tool."""
        return self.content.get("adopted") is True

    @property
    def source_files(self) -> dict[str, dict[str, Any]] | None:
        """Size and hashes of the source's files, by name; where a file's are of another type, an empty object."""
        facts = self.content.get("source_files")
        return {k: v if isinstance(v, dict) else {} for k, v in facts.items()} if isinstance(facts, dict) else None

    @property
    def source_sizes(self) -> dict[str, int]:
        """Bytes of the source's files, by name. Raises CheckpointError where it does not say."""
        facts = Fields(self.content.get("source_files"), self.where, REMEDY, "source_files")
        each = {k: Fields(v, self.where, REMEDY, f"source_files.{k}.") for k, v in facts.value.items()}
        return {name: fact.count("size") for name, fact in each.items()}

    def entries(self, key: str) -> dict[str, dict[str, Any]] | None:
        """The objects in the list `key` by their `tensor`, those without left out; None where there is no list."""
        found = self.content.get(key)
        if not isinstance(found, list):
            return None
        return {e["tensor"]: e for e in found if isinstance(e, dict) and is_text(e.get("tensor"))}


def recorded_source(
    record: FoldRecord,
    name: str,
    folder: Path,
    token: str | bool | None,
    cache_dir: Path | None,
    local_files_only: bool,
) -> Source:
    """The source that the record of the checkpoint `name` in `folder` names.

    Raises UsageError where it names none, or a folder that is not here.
    """
    if record.source is None:
        raise UsageError(f"{name}: its {RECORD} names no source; {ADD_SOURCE}")
    source, commit = record.source
    if commit is not None:
        return Source(source, commit, token, cache_dir, local_files_only)
    try:
        here = Path(source).expanduser()
        found = here if here.is_dir() else folder.resolve().parent / source
        is_there = found.is_dir()
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, the home of nobody
        is_there = False
    if not is_there:
        raise UsageError(f"{name}: was made from {source}, which is not here; say where it is with `source`")
    return Source(str(found))


def record_of_base(base: Checkpoint) -> FoldRecord:
    """The base's record, with a plan. Raises UsageError where it is not folded, or not by this tool."""
    name = base.source.name
    if not (base.folder / RECORD).is_file():
        if flags_of(base.config):
            raise UsageError(
                f"{name}: is folded, but has no {RECORD} that says how; "
                f'`verify({name!r}, source="<its source>", adopt=True)` writes one'
            )
        raise UsageError(f"{name}: is not a folded checkpoint (no {RECORD}); fold it with `flashnorm fold` first")
    record = FoldRecord.read(base.folder / RECORD, f"{name}/{RECORD}")
    record.plan  # noqa: B018  (raises here, before the long work)
    return record


def identities(where: str, hub: dict[str, Any]) -> dict[str, float]:
    """What each folded norm's weight would be, from flashnorm.json; empty if that is not there."""
    from transformers.utils import cached_file  # type: ignore[attr-defined]

    found = cached_file(
        where,
        RECORD,
        _raise_exceptions_for_missing_entries=False,
        **{k: v for k, v in hub.items() if k != "code_revision"},
    )
    norms = FoldRecord.read(Path(found), f"{where}/{RECORD}").norms if found else ()
    return {norm.tensor: norm.identity for norm in norms if norm.folded}


# ---- the `flashnorm` object of config.json ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """The object `flashnorm` of a folded checkpoint's config.json, as far as runtimes need it.

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


def config_record(content: Any, where: str = "the record of flashnorm in config.json") -> Record:
    """The record that a config's `flashnorm` holds. Raises CheckpointError where it is not one of this format."""
    patterns: Any = content.get("folded") if isinstance(content, dict) else None
    if not _are_names(patterns):
        raise CheckpointError(f"{where} names no list of folded norms, but {quoted(patterns)}; {REMEDY}")
    fields = Fields(content, where, REMEDY)
    check_format(fields)
    return Record(
        layout=fields.get("layout", lambda v: v in LAYOUTS, f"one of {', '.join(LAYOUTS)}", "identity"),
        folded=frozenset(patterns),
        kept=frozenset(fields.get("kept", _are_names, "names with the reasons", {})),
        lm_head=fields.get("lm_head", lambda v: v in LM_HEADS, f"one of {', '.join(LM_HEADS)}", "none"),
    )


def record_of(config: PretrainedConfig) -> Record:
    """The record in a config. Raises FlashNormError if it is not there or cannot be read."""
    content: Any = getattr(config, "flashnorm", None)
    if (content is None or content is True) and (flags := flags_of(config.to_dict())):
        raise FlashNormError(
            f"another tool has folded this model (config.json has {in_words(flags)}), which does not say which norms; "
            '`verify("<folded>", source="<source>", adopt=True)` checks it and writes the record'
        )
    if content is None:
        raise FlashNormError(
            "this model is not folded: its config has no record of flashnorm; load a checkpoint that `flashnorm fold` "
            "wrote, or fold it in memory first: flashnorm_cli.fold_model_(model)"
        )
    return config_record(content)


def read_record(*configs: object, warn: Callable[[str], None] = _log.warning) -> Record | None:
    """The record in the first of some configs (config.json's, its text model's) that has one.

    Returns:
        None for an unfolded checkpoint, and for a record that this version cannot read: `warn` is told.
    """
    found = next((value for c in configs if (value := getattr(c, "flashnorm", None)) is not None), None)
    if found is None:
        return None
    try:
        return config_record(found)
    except CheckpointError as error:
        warn(one_line(f"flashnorm: norms keep their weights: {error}"))
        return None


def _are_names(value: Any) -> bool:
    return isinstance(value, (list, dict)) and len(value) <= MOST_PATTERNS and all(map(is_text, value))


def left_out(record: Record, content: Any, seen: Iterable[str]) -> list[tuple[str, tuple[int, ...], float]]:
    """What layout dropped left out, as (tensor, shape, value of all its elements), by the content of flashnorm.json.

    Only tensors that config.json's record names as well, and that the files did not hold. The value is the identity by
    the norm's own convention: 1, or 0 where its gain is `1 + w`.

    Raises:
        ValueError: there is no plan, or it cannot be read.
    """
    there = set(seen)
    if content is None:
        raise ValueError(
            f"layout dropped cannot be loaded without the checkpoint's {RECORD}, which lists what was left out: "
            "copy it beside config.json, or fold again with layout identity"
        )
    try:
        norms = FoldRecord(RECORD, Fields(content, RECORD, REMEDY).value).norms
    except CheckpointError as error:
        raise ValueError(f"{error}; layout dropped cannot be loaded without it (layout identity can)") from None
    return [
        (norm.tensor, norm.shape, norm.identity)
        for norm in norms
        if norm.folded and norm.tensor not in there and pattern_of(norm.tensor) in record.folded
    ]
