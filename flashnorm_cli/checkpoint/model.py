"""A checkpoint as its files say it is: what the other parts of the package are handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.files import Seen
from flashnorm_cli.checkpoint.folded import flags_of, in_words, is_ours
from flashnorm_cli.checkpoint.header import Header, TensorEntry
from flashnorm_cli.checkpoint.hub_ids import hub_id
from flashnorm_cli.checkpoint.json_files import read_object
from flashnorm_cli.display import Shown
from flashnorm_cli.errors import CheckpointError, FlashNormError

CONFIG = "config.json"


INDEX = "model.safetensors.index.json"


SINGLE = "model.safetensors"


RECORD = "flashnorm.json"


# Of peft, beside an adapter's weights.
ADAPTER_CONFIG = "adapter_config.json"


# How files of tensors are called. What they hold decides whether they travel: see belongs.py.
OTHER_WEIGHTS = (
    ".bin .bin.index.json .pt .pth .ckpt .h5 .msgpack .gguf .onnx .onnx_data .ot .tflite .mlmodel .npz .safetensors"
).split()


# done, all (0 where nothing is counted), what is going on: bytes are counted, or steps where that is a `Steps`
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Source:
    """Where a checkpoint comes from, a folder or a Hub id, and how to reach it, as in huggingface_hub.

    The address of a page on the Hub becomes its id. `follow_links`: links of a folder are followed also where they lead
    out of it.
    """

    name: str
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: Path | None = None
    local_files_only: bool = False
    follow_links: bool = False

    def __post_init__(self) -> None:
        name, revision = hub_id(self.name, self.revision)
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "revision", revision)


@dataclass(frozen=True)
class LeftOut:
    """A file of the source that a folded checkpoint does not hold: its relative path, bytes, and why."""

    name: str
    bytes: int
    reason: str


@dataclass(frozen=True, repr=False)
class Checkpoint(Shown):
    """A checkpoint whose headers, index and files hold together.

    `folder` holds the small files (and the shards too, unless only the headers of a Hub repository were read).
    `shards` maps the shards' file names, in the index's order, to their headers. `others` are the relative paths
    of the files to carry over, in `seen` as they were found (those that are on this disk), `left_out` the other files.
    `index_name` is the index's file name, which config.json may choose. `sha256` are the shards' hashes where the Hub
    was asked for them.
    """

    source: Source
    folder: Path
    commit: str | None
    config: dict[str, Any]
    shards: dict[str, Header]
    index: dict[str, Any] | None
    others: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    index_name: str = INDEX
    seen: dict[str, Seen] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)

    def _facts(self) -> dict[str, Any]:
        where = {"source": self.source.name} | ({"commit": self.commit} if self.commit else {})
        return {**where, "shards": len(self.shards), "tensors": len(self.tensors), "other_files": len(self.others)}

    @cached_property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor's header entry, in file order."""
        return {name: entry for header in self.shards.values() for name, entry in header.tensors.items()}

    @cached_property
    def shard_of(self) -> dict[str, str]:
        """The file that holds each tensor."""
        return {name: shard for shard, header in self.shards.items() for name in header.tensors}

    @property
    def name(self) -> str:
        """The last part of the folder's or repository's name."""
        return self.source.name.rsplit("/", 1)[-1] if self.commit is not None else folder_name(self.source.name)


def folder_name(path: str | Path) -> str:
    """What a folder is called: a link by its own name, a snapshot in the Hub's cache by its repository's."""
    here = Path(path).expanduser()
    if here.name in ("", ".."):
        here = here.resolve()
    repository = here.absolute().parent.parent.name
    if here.absolute().parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rsplit("--", 1)[-1]
    return here.name


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError if it is missing, or not one."""
    try:
        return read_object(path)
    except CheckpointError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise CheckpointError(f"{path.parent}: there is no {path.name}: is this a transformers checkpoint?") from None


def refuse_adapter(checkpoint: Checkpoint) -> None:
    """Raise FlashNormError for a model with an adapter at its side: transformers and peft load both as one."""
    if ADAPTER_CONFIG in checkpoint.others:
        raise FlashNormError(
            f"{checkpoint.source.name}: holds an adapter ({ADAPTER_CONFIG}) beside the model, and transformers applies "
            "it at once; it would not fit the folded weights. Move the adapter's files into a folder of their own, "
            'fold the model, then: `fold_adapter("<that folder>", base="<the folded model>")`'
        )


def refuse_folded(checkpoint: Checkpoint) -> None:
    """Raise FlashNormError for a checkpoint that says it has been folded already."""
    has_record = (checkpoint.folder / RECORD).exists()
    flags = flags_of(checkpoint.config)
    name = checkpoint.source.name
    if has_record or is_ours(checkpoint.config):
        raise FlashNormError(
            f"{name}: is folded already ({RECORD if has_record else CONFIG} says so); folding twice would do nothing "
            "good. Fold its source instead"
        )
    if flags:
        raise FlashNormError(
            f"{name}: is folded already, by another tool ({CONFIG} has {in_words(flags)}); fold its source instead, or "
            f'check this one and give it a record: `verify({name!r}, source="<its source>", adopt=True)`'
        )
