"""Weight files beside a checkpoint's shards: a copy of its tensors, an adapter, or somebody who reads the model.

Told by what the files hold (`formats.look`, which runs nothing), and by what `belongs.py` has decided: a copy of the
checkpoint does not travel with a fold.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flashnorm_cli.checkpoint.files import open_file
from flashnorm_cli.checkpoint.formats import look
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import FolderError

Shapes = dict[str, tuple[int, ...]]

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


def files_beside(checkpoint: Checkpoint) -> list[str]:
    """Every file of a checkpoint but config, index and shards, whether or not it travels with a fold."""
    return [*checkpoint.others, *(each.name for each in checkpoint.left_out)]


def weight_files(checkpoint: Checkpoint) -> Iterator[WeightFile]:
    """Weight files of a checkpoint, beside its shards, that are neither copies of it nor leftovers of training."""
    left_out = {each.name for each in checkpoint.left_out}
    groups: dict[str, list[str]] = {}
    for name in files_beside(checkpoint):
        if name.endswith(SUFFIXES) and not _TRAINING.fullmatch(name.rsplit("/", 1)[-1]):
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    for names in groups.values():
        shapes: dict[str, Shapes | None] = {name: _shapes(checkpoint.folder / name) for name in names}
        together = {tensor: shape for some in shapes.values() for tensor, shape in (some or {}).items()}
        if together and left_out.issuperset(names) and _is_nothing_else(together, checkpoint):
            continue
        for name, some in shapes.items():
            if (found := _judge(name, some, checkpoint, name in left_out)) is not None:
                yield found


def _judge(name: str, shapes: Shapes | None, checkpoint: Checkpoint, left_out: bool) -> WeightFile | None:
    last = name.rsplit("/", 1)[-1]
    if shapes is None:
        if last.startswith("adapter"):
            return WeightFile(name, adapts=())
        return None if _COPIES.fullmatch(last) else WeightFile(name, reader="")
    if any(_ADAPTER.search(tensor) for tensor in shapes):
        return WeightFile(name, adapts=_adapted(shapes, checkpoint))
    own = {_plain(tensor) for tensor in checkpoint.tensors}
    widths = {entry.shape[0] for entry in checkpoint.tensors.values() if len(entry.shape) == 1 and entry.shape[0] > 1}
    full_copy = left_out and sum(_plain(tensor) in own for tensor in shapes) * 2 > len(own)
    for tensor, shape in shapes.items():
        # A file that travels is no copy: a draft head's layer 0 may be called like the model's.
        if (left_out and _plain(tensor) in own) or _NO_READER.search(tensor.lower()):
            continue
        if full_copy and tensor.endswith("lm_head.weight"):  # a tied head, written out
            continue
        if any(size in widths for size in shape):
            return WeightFile(name, reader=tensor)
    return None


def _plain(tensor: str) -> str:
    """A name without the wrappers' prefixes that differ between libraries."""
    while (
        shorter := re.sub(
            r"^((model_)?state_dict|module|_orig_mod|pretrained_model|base_model|model|transformer)\.", "", tensor
        )
    ) != tensor:
        tensor = shorter
    return tensor


def _is_nothing_else(shapes: Shapes, checkpoint: Checkpoint) -> bool:
    """Whether files that stay behind as a copy, maybe under other names, hold no matrix beyond the checkpoint's."""
    own = {_plain(name) for name in checkpoint.tensors}
    known = sum(_plain(name) in own for name in shapes)
    if known * 2 > len(shapes):
        return known == len(shapes)  # what is more may be a reader
    if any(_ADAPTER.search(name) for name in shapes):
        return False
    matrices = Counter(tuple(sorted(e.shape)) for e in checkpoint.tensors.values() if len(e.shape) > 1)
    there = Counter(tuple(sorted(shape)) for shape in shapes.values() if len(shape) > 1)
    return there <= matrices


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


def _shapes(path: Path) -> Shapes | None:
    """Names and shapes of the tensors in a file; None where it is not on this disk, or cannot be read."""
    try:
        with open_file(path) as file:
            found = look(file, path.stat().st_size, path.name)
    except (OSError, FolderError):
        return None
    return dict(found.entries) if found is not None and found.entries is not None else None
