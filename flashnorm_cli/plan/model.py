"""A plan: which norm goes into which tensors, and which norms are kept, and why."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, get_args

from flashnorm_cli import choices
from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.json_files import Fields, is_count, is_shape, is_text
from flashnorm_cli.checkpoint.model import RECORD
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import CheckpointError, quoted

FORMAT = 1
LM_HEADS = get_args(choices.LmHead)
MOST_OF_A_NORM = 1 << 26  # elements of a norm's weight, many times more than any model has
ROTATIONS = get_args(choices.Rotation)
MOST_CHANNELS = 1 << 20  # of a residual stream, many times more than any model has
MOST_DIMS = 16
REMEDY = "it was edited or damaged: fetch it again, or fold the source again"


@dataclass(frozen=True)
class Run:
    """`length` channels scaled by the norm's elements from `start` on, `repeat` times over. No norm: unscaled."""

    norm: str | None
    start: int
    length: int
    repeat: int = 1


@dataclass(frozen=True, repr=False)
class Norm(Shown):
    """A norm's weight on disk: its tensor, of `shape`, and the `readers` on disk that take its gain.

    The gain is `scale * weight + offset`; `reason` says why the norm is kept (None: it is folded).
    """

    tensor: str
    shape: tuple[int, ...]
    scale: float
    offset: float
    readers: tuple[str, ...]
    reason: str | None

    def _facts(self) -> dict[str, Any]:
        fields = {"tensor": self.tensor, "folded": self.folded, "readers": len(self.readers)}
        return fields if self.folded else {**fields, "reason": self.reason}

    @property
    def folded(self) -> bool:
        """Whether the fold takes the norm's weight away: no `reason` keeps it."""
        return self.reason is None

    @property
    def identity(self) -> float:
        """The weight with which the norm scales by one: 1 for `w`, 0 for `1 + w`."""
        return (1.0 - self.offset) / self.scale


@dataclass(frozen=True, repr=False)
class Reader(Shown):
    """A tensor on disk that takes gains along `dim`; `runs` cover the dimension in order.

    `values_from` names the tensor whose values are scaled, where that is another one: an untied head starts from
    the embedding.
    """

    tensor: str
    dim: int
    runs: tuple[Run, ...]
    values_from: str | None = None

    def _facts(self) -> dict[str, Any]:
        return {"tensor": self.tensor, "dim": self.dim, "runs": len(self.runs), "values_from": self.values_from}


@dataclass(frozen=True)
class PlannedRotation:
    """An orthogonal matrix Q of order `size`, by its kind and seed, and the tensors on disk that it is applied to.

    `tensors` maps each one to its dimensions that hold the channels of the residual stream: every vector along such a
    dimension becomes Q times it, after the gains. docs/rotation.md defines Q.
    """

    kind: str
    size: int
    seed: int
    tensors: dict[str, tuple[int, ...]]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """Everything that `fold` does to a checkpoint.

    `added` maps tensors that the source does not have to (dtype, shape). `lm_head` is "folded", "untied", "kept" or
    "none"; `untie` says that `tie_word_embeddings` becomes false. `text_config` are the keys that lead to the text
    model's nested config. `not_traced` are norms that the forward did not reach, `unread` tensors on disk that the
    model does not read. `rotation` is what is done to the residual stream, None for nothing.
    """

    source: str
    commit: str | None
    architecture: str
    model_type: str
    text_config: tuple[str, ...]
    transformers: str
    norms: tuple[Norm, ...]
    readers: tuple[Reader, ...]
    lm_head: str
    untie: bool
    added: dict[str, tuple[str, tuple[int, ...]]]
    folded_flag: bool
    not_traced: tuple[str, ...]
    unread: tuple[str, ...]
    notes: tuple[str, ...]
    bytes_total: int
    bytes_changed: int
    bytes_added: int
    rotation: PlannedRotation | None = None

    def _facts(self) -> dict[str, Any]:
        counts = {"norms_folded": len(self.folded), "norms_kept": len(self.kept), "readers": len(self.readers)}
        return {"source": self.source, "architecture": self.architecture, **counts, "lm_head": self.lm_head}

    @property
    def folded(self) -> tuple[Norm, ...]:
        """The norms whose weights go into their readers, in the order of the disk."""
        return tuple(n for n in self.norms if n.folded)

    @property
    def kept(self) -> tuple[Norm, ...]:
        """The norms that keep their weights, each with its `reason`."""
        return tuple(n for n in self.norms if not n.folded)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; runs become [norm, start, length, repeat]."""
        plain = dataclasses.asdict(self)
        for reader in plain["readers"]:
            reader["runs"] = [list(run.values()) for run in reader["runs"]]
        for fields, norm in zip(plain["norms"], self.norms, strict=True):
            fields["folded"] = norm.folded
        if self.rotation is None:  # a plain fold's record says nothing of rotations
            del plain["rotation"]
        return {"format": FORMAT, "tool": f"flashnorm-cli {__version__}", **plain}

    def summary(self) -> dict[str, Any]:
        """What the plan comes to, as plain JSON values: counts, bytes, the kept norms and why."""
        turned = self.rotation
        return {
            "source": {"name": self.source, "commit": self.commit},
            "architecture": self.architecture,
            "lm_head": self.lm_head,
            "flashnorm_folded": self.folded_flag,
            "counts": {
                "norms_folded": len(self.folded),
                "norms_kept": len(self.kept),
                "norms_not_traced": len(self.not_traced),
                "readers": len(self.readers),
            },
            "kept_norms": [{"tensor": norm.tensor, "reason": norm.reason} for norm in self.kept],
            "rotation": None if turned is None else {"kind": turned.kind, "size": turned.size, "seed": turned.seed},
            "bytes_total": self.bytes_total,
            "bytes_changed": self.bytes_changed,
            "bytes_added": self.bytes_added,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, content: Any, where: str = RECORD) -> Plan:
        """The plan that `to_json` wrote, for example from flashnorm.json.

        Args:
            content: the JSON value; `where` is the file that it comes from, for messages.
        Raises:
            CheckpointError: it is not a plan of this format; with the file, the key and what to do.
        """
        fields = Fields(content, where, REMEDY)
        check_format(fields)
        norms = tuple(norm_from_json(each) for each in fields.objects("norms"))
        sizes = {norm.tensor: math.prod(norm.shape) for norm in norms}
        return cls(
            source=fields.text("source"),
            commit=fields.get("commit", lambda v: v is None or is_text(v), "a commit or null"),
            architecture=fields.text("architecture"),
            model_type=fields.text("model_type"),
            text_config=fields.texts("text_config"),
            transformers=fields.text("transformers"),
            norms=norms,
            readers=tuple(_reader(each, sizes) for each in fields.objects("readers")),
            lm_head=fields.get("lm_head", lambda v: v in LM_HEADS, f"one of {', '.join(LM_HEADS)}"),
            untie=fields.flag("untie"),
            added=_added(fields),
            folded_flag=fields.flag("folded_flag"),
            not_traced=fields.texts("not_traced"),
            unread=fields.texts("unread"),
            notes=fields.texts("notes"),
            bytes_total=fields.count("bytes_total"),
            bytes_changed=fields.count("bytes_changed"),
            bytes_added=fields.count("bytes_added"),
            rotation=rotation_from_json(content, where),
        )


# ---- read from JSON --------------------------------------------------------------------------------------------------


def check_format(fields: Fields) -> None:
    """Raise CheckpointError for a record that another version of flashnorm has written."""
    found = fields.value.get("format")
    if type(found) is not int or found != FORMAT:
        raise CheckpointError(
            f"{fields.where}: {fields.at}format is {quoted(found)}, and this version reads {FORMAT}; upgrade "
            "flashnorm-cli, or fold the source again"
        )


def norm_from_json(fields: Fields) -> Norm:
    """One entry of a record's `norms`; `readers` and `reason` may be missing. Raises CheckpointError."""
    folded = fields.flag("folded")
    tensor, scale, offset = fields.text("tensor"), fields.number("scale"), fields.number("offset")
    if scale == 0 or not math.isfinite((1.0 - offset) / scale):
        raise fields.error(f"{fields.at}scale", scale, "a factor that an identity exists for")
    shape = tuple(
        fields.get("shape", lambda v: is_shape(v) and math.prod(v) <= MOST_OF_A_NORM, "the shape of a norm's weight")
    )
    readers = fields.texts("readers") if "readers" in fields.value else ()
    reason = fields.get("reason", lambda v: v is None or is_text(v), "a text or null", None)
    return Norm(tensor, shape, scale, offset, readers, None if folded else reason or "no reason was recorded")


def rotation_from_json(content: Any, where: str = RECORD) -> PlannedRotation | None:
    """The rotation that a record tells of, None where it tells of none. Raises CheckpointError."""
    if "rotation" not in content:
        return None
    fields = Fields(content["rotation"], where, REMEDY, "rotation.")

    def is_dims(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and len(value) < MOST_DIMS and all(map(is_count, value))

    tensors = fields.get(
        "tensors", lambda v: isinstance(v, dict) and all(map(is_dims, v.values())), "an object of lists of dimensions"
    )
    size = fields.get("size", lambda v: is_count(v) and 0 < v <= MOST_CHANNELS, "the width of a residual stream")
    kind, seed = _kind_and_seed(fields)
    return PlannedRotation(kind, size, seed, {name: tuple(dims) for name, dims in tensors.items()})


def claimed_rotation(content: Any, where: str) -> tuple[str, int] | None:
    """Kind and seed that the object `flashnorm` of a config tells of, None for no rotation. Raises CheckpointError."""
    if not isinstance(content, dict) or "rotation" not in content:
        return None
    return _kind_and_seed(Fields(content["rotation"], where, REMEDY, "rotation."))


def _kind_and_seed(fields: Fields) -> tuple[str, int]:
    kind = fields.get("kind", lambda v: v in ROTATIONS, f"one of {', '.join(ROTATIONS)}")
    return kind, fields.get("seed", lambda v: is_count(v) and v < 2**63, "a whole number from 0 on")


def _reader(fields: Fields, sizes: dict[str, int]) -> Reader:
    def is_run(value: Any) -> bool:
        if not isinstance(value, list) or len(value) != 4 or not all(map(is_count, value[1:])):
            return False
        norm, start, length, _ = value
        return norm is None or (is_text(norm) and start + length <= sizes.get(norm, -1))

    runs = fields.get(
        "runs",
        lambda v: isinstance(v, list) and all(map(is_run, v)),
        "a list of [a norm of this record or null, start, length, repeat] within that norm",
    )
    values_from = fields.get("values_from", lambda v: v is None or is_text(v), "a tensor's name or null", None)
    return Reader(fields.text("tensor"), fields.count("dim"), tuple(Run(*run) for run in runs), values_from)


def _added(fields: Fields) -> dict[str, tuple[str, tuple[int, ...]]]:
    def is_entry(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and is_text(value[0]) and is_shape(value[1])

    added = fields.get(
        "added", lambda v: isinstance(v, dict) and all(map(is_entry, v.values())), "an object of [dtype, shape]"
    )
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in added.items()}
