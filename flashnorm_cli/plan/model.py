"""A plan: which norm goes into which tensors, and which norms are kept, and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.model import RECORD
from flashnorm_cli.errors import CheckpointError

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """`length` channels scaled by the norm's elements from `start` on, `repeat` times over. No norm: unscaled."""

    norm: str | None
    start: int
    length: int
    repeat: int = 1


@dataclass(frozen=True)
class Norm:
    """A norm's weight on disk. Its gain is `scale * weight + offset`; `reason` says why it is kept (None: folded)."""

    tensor: str
    shape: tuple[int, ...]
    scale: float
    offset: float
    readers: tuple[str, ...]
    reason: str | None

    @property
    def folded(self) -> bool:
        return self.reason is None

    @property
    def identity(self) -> float:
        """The weight with which the norm scales by one: 1 for `w`, 0 for `1 + w`."""
        return (1.0 - self.offset) / self.scale


@dataclass(frozen=True)
class Reader:
    """A tensor on disk that takes gains along `dim`; `runs` cover the dimension in order.

    `values_from` names the tensor whose values are scaled, where that is another one: an untied head starts from
    the embedding.
    """

    tensor: str
    dim: int
    runs: tuple[Run, ...]
    values_from: str | None = None


@dataclass(frozen=True)
class Plan:
    """Everything that `fold` does to a checkpoint.

    `added` maps tensors that the source does not have to (dtype, shape). `lm_head` is "folded", "untied", "kept" or
    "none"; `untie` says that `tie_word_embeddings` becomes false. `text_config` are the keys that lead to the text
    model's nested config. `not_traced` are norms that the forward did not reach, `unread` tensors on disk that the
    model does not read.
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

    @property
    def folded(self) -> tuple[Norm, ...]:
        return tuple(n for n in self.norms if n.folded)

    @property
    def kept(self) -> tuple[Norm, ...]:
        return tuple(n for n in self.norms if not n.folded)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; runs become [norm, start, length, repeat]."""
        plain = dataclasses.asdict(self)
        for reader in plain["readers"]:
            reader["runs"] = [list(run.values()) for run in reader["runs"]]
        for norm, mine in zip(plain["norms"], self.norms, strict=True):
            norm["folded"] = mine.folded
        return {"format": FORMAT, "tool": f"flashnorm-cli {__version__}", **plain}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Plan:
        """The plan that `to_json` wrote, from flashnorm.json say. Raises CheckpointError where it is none."""
        try:
            fields = {field.name: said[field.name] for field in dataclasses.fields(cls)}
            norms = [{key: value for key, value in norm.items() if key != "folded"} for norm in said["norms"]]
            fields["norms"] = tuple(
                Norm(**{**norm, "shape": tuple(norm["shape"]), "readers": tuple(norm["readers"])}) for norm in norms
            )
            fields["readers"] = tuple(
                Reader(**{**reader, "runs": tuple(Run(*run) for run in reader["runs"])}) for reader in said["readers"]
            )
            fields["added"] = {name: (dtype, tuple(shape)) for name, (dtype, shape) in said["added"].items()}
            for name in ("text_config", "not_traced", "unread", "notes"):
                fields[name] = tuple(said[name])
            return cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{RECORD}: holds no plan ({type(error).__name__}: {error})") from error
