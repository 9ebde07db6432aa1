"""Weight files beside a checkpoint's shards: a copy of its tensors, an adapter, or somebody who reads the model.

Told by what the files hold. Of a pickle (`.bin`, `.pt`) the opcodes are read and nothing is run; names and shapes
stand in them, and the values in other parts of the file.
"""

from __future__ import annotations

import io
import pickletools
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import CheckpointError

Shapes = dict[str, tuple[int, ...]]

MAX_PICKLE = 64 << 20  # bytes: without values, the pickle of a large model is a few MB
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# What training leaves behind: states of optimizers and the like, by the names that trainers give them.
_TRAINING = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|training_args|trainer_state|random_states|zero_|bf16_zero|mp_rank)"
    r"[\w.-]*\.(bin|pt|pth)|.*_optim_states\.pt"
)
# Copies of the checkpoint by the names that libraries write them under; for files that are not on this disk. A shard
# that the index does not name is no copy.
_COPIES = re.compile(
    r"(?!model-\d+-of-)(pytorch_model|consolidated|model|tf_model|flax_model)([.-][\w-]*)*\.(safetensors|bin|pt|pth)"
)
_ADAPTER = re.compile(r"\.(lora_|lokr_|hada_|oft_|boft_|vera_|ia3_|modules_to_save|dora_|ran_|adapter)|^base_model\.")
_NO_READER = re.compile(r"norm|bias|running_|inv_freq|position|embed_tokens|rotary")


@dataclass(frozen=True)
class WeightFile:
    """A weight file that is no copy of the checkpoint.

    `reader` names a tensor in it that may read the model's hidden states ("" where the file could not be looked
    into); `adapts` the modules that an adapter changes, by their names in the checkpoint (None: no adapter, empty: an
    adapter of modules that are not known).
    """

    name: str
    reader: str | None = None
    adapts: tuple[str, ...] | None = None


def weight_files(checkpoint: Checkpoint) -> Iterator[WeightFile]:
    """Weight files of a checkpoint, beside its shards, that are neither copies of it nor leftovers of training."""
    groups: dict[str, list[str]] = {}
    for name in (*checkpoint.others, *(each.name for each in checkpoint.left_out)):
        if name.endswith(SUFFIXES) and not _TRAINING.fullmatch(name.rsplit("/", 1)[-1]):
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    for names in groups.values():
        shapes: dict[str, Shapes | None] = {name: _shapes(checkpoint.folder / name) for name in names}
        together = {tensor: shape for some in shapes.values() for tensor, shape in (some or {}).items()}
        if together and _is_copy(together, checkpoint):
            continue
        for name, some in shapes.items():
            if (found := _judge(name, some, checkpoint)) is not None:
                yield found


def _judge(name: str, shapes: Shapes | None, checkpoint: Checkpoint) -> WeightFile | None:
    last = name.rsplit("/", 1)[-1]
    if shapes is None:
        if last.startswith("adapter"):
            return WeightFile(name, adapts=())
        return None if _COPIES.fullmatch(last) else WeightFile(name, reader="")
    if any(_ADAPTER.search(tensor) for tensor in shapes):
        return WeightFile(name, adapts=_adapted(shapes, checkpoint))
    own = {_plain(tensor) for tensor in checkpoint.tensors}
    widths = {entry.shape[0] for entry in checkpoint.tensors.values() if len(entry.shape) == 1 and entry.shape[0] > 1}
    full_copy = sum(_plain(tensor) in own for tensor in shapes) * 2 > len(own)
    for tensor, shape in shapes.items():
        if _plain(tensor) in own or _NO_READER.search(tensor.lower()):
            continue
        if full_copy and tensor.endswith("lm_head.weight"):  # a tied head, written out
            continue
        if any(size in widths for size in shape):
            return WeightFile(name, reader=tensor)
    return None


def _plain(tensor: str) -> str:
    """A name without the wrappers' prefixes that differ between libraries."""
    while (
        shorter := re.sub(r"^(module|_orig_mod|pretrained_model|base_model|model|transformer)\.", "", tensor)
    ) != tensor:
        tensor = shorter
    return tensor


def _is_copy(shapes: Shapes, checkpoint: Checkpoint) -> bool:
    """Whether a file holds the checkpoint's matrices once more, maybe under other names, and nothing else."""
    own = {_plain(name) for name in checkpoint.tensors}
    if all(_plain(name) in own for name in shapes):
        return True
    if sum(_plain(name) in own for name in shapes) * 2 > len(shapes):
        return False  # the same names and more: what is more may be a reader
    mine = Counter(tuple(sorted(e.shape)) for e in checkpoint.tensors.values() if len(e.shape) > 1)
    there = Counter(tuple(sorted(shape)) for shape in shapes.values() if len(shape) > 1)
    return sum((mine & there).values()) >= 0.9 * sum(mine.values()) and sum((there - mine).values()) == 0


def _adapted(shapes: Shapes, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The modules that an adapter changes, or none where one of them is not found."""
    modules = {_plain(name).rsplit(".", 1)[0]: name.rsplit(".", 1)[0] for name in checkpoint.tensors}
    found = []
    for tensor in shapes:
        parts = _plain(tensor).split(".")
        known = (modules.get(".".join(parts[:n])) for n in range(len(parts), 0, -1))
        module = next((name for name in known if name), None)
        if module is None and len(shapes[tensor]) > 1:
            return ()
        if module is not None:
            found.append(module)
    return tuple(dict.fromkeys(found))


# ---- names and shapes ------------------------------------------------------------------------------------------------


def _shapes(path: Path) -> Shapes | None:
    """Names and shapes of the tensors in a file; None where it is not on this disk, or cannot be read."""
    try:
        if path.suffix == ".safetensors":
            return {name: entry.shape for name, entry in read_header(path).tensors.items()}
        with path.open("rb") as file:
            return _pickled(file)
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointError, zipfile.BadZipFile):
        return None


def _pickled(file: BinaryIO) -> Shapes:
    """Tensors of a file of `torch.save`, of either of its formats."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            inner = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if inner is None:
                return {}
            with archive.open(inner) as member:
                return _from_opcodes(io.BytesIO(member.read(MAX_PICKLE)))
    file.seek(0)
    start = io.BytesIO(file.read(MAX_PICKLE))
    found: Shapes = {}
    for _ in range(4):  # magic number, protocol, system, and the object
        found.update(_from_opcodes(start))
    return found


def _from_opcodes(file: BinaryIO) -> Shapes:
    """A tensor is a name, a persistent id (its storage), an offset, and a tuple of sizes, in this order."""
    found: Shapes = {}
    name, storage = "", False
    numbers: list[int] = []
    for opcode, value, _ in pickletools.genops(file):
        if isinstance(value, str) and "UNICODE" in opcode.name:
            if re.search(r"[A-Za-z_]", value) and value not in ("storage", "cpu") and not value.startswith("cuda"):
                name = value
        elif opcode.name in ("BINPERSID", "PERSID"):
            numbers, storage = [], True
        elif storage and opcode.name in ("BININT", "BININT1", "BININT2", "LONG1", "INT"):
            numbers.append(int(value or 0))
        elif storage and opcode.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE"):
            found[name], storage = tuple(numbers[1:]), False
    return found
