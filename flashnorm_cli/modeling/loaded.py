"""What transformers' loader says of a checkpoint's names and shapes: what it would not load refuses the fold."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.errors import PlanError
from flashnorm_cli.modeling.disk_names import loader_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Modules that training tools wrap around a model, and how its weights are had without them.
WRAPPERS = {
    "module": ("torch's DataParallel or DistributedDataParallel", "save `model.module`"),
    "_orig_mod": ("torch.compile", "save `model._orig_mod`"),
    "_fsdp_wrapped_module": ("FSDP", "save FSDP's full state dict (`accelerate merge-weights` for sharded ones)"),
    "_forward_module": ("Lightning Fabric", "save the module inside"),
    "_checkpoint_wrapped_module": ("torch's activation checkpointing", "save the module inside"),
    "base_model.model": ("PEFT", "save `model.merge_and_unload()`"),
    "pretrained_model": ("TRL's value head wrapper", "save `model.pretrained_model`"),
}


def refuse_wrapped_names(checkpoint: Checkpoint, model: PreTrainedModel, missing: set[str]) -> None:
    """Raise PlanError where the files hold the model's tensors under the names of a wrapper, which nothing loads."""
    if not missing:
        return
    for parts in _candidates(checkpoint.tensors):
        within = re.compile(rf"(^|(?<=\.))({'|'.join(map(re.escape, parts))})\.")
        wrapped = [name for name in checkpoint.tensors if within.search(name)]
        bare = {within.sub("", name): name for name in wrapped}
        found = {target for target, _ in loader_names(model, list(bare)).values()} & missing
        if not found or 2 * len(found) < len(missing):
            continue
        begins = all(within.match(name) for name in wrapped)
        whose, what = WRAPPERS.get(parts[0], ("a wrapper around the model", "save the model inside it"))
        count = "all" if len(wrapped) == len(checkpoint.tensors) else f"{len(wrapped)}"
        shown = ", ".join(f"`{part}.`" for part in parts)
        raise PlanError(
            f"{checkpoint.source.name}: {count} tensors have names that {'begin with' if begins else 'contain'} "
            f"{shown} ({whose}): {type(model).__name__} loads none of them. Load it as it was trained and {what}, or "
            f"rename them (`{wrapped[0]}` to `{within.sub('', wrapped[0])}`)"
        )


def _candidates(names: Iterable[str]) -> list[tuple[str, ...]]:
    """What may be a wrapper's parts of names: what every name begins with, known ones anywhere, and all of those."""
    names = list(names)
    parts = {part for name in names for part in name.split(".")}
    known = [part for part in WRAPPERS if part.split(".")[0] in parts]
    first = names[0].split(".")
    common = [".".join(first[:i]) for i in range(1, len(first))]
    common = [part for part in common if part not in WRAPPERS and all(name.startswith(f"{part}.") for name in names)]
    return [
        *((part,) for part in known),
        *([tuple(known)] if len(known) > 1 else []),
        *((p,) for p in reversed(common)),
    ]


def refuse_other_shapes(checkpoint: Checkpoint, model: PreTrainedModel, mismatched: Iterable[Any]) -> None:
    """Raise PlanError for a float tensor that the loader would not load because of its shape.

    Args:
        mismatched: (parameter, shape that the files make of it, shape that the config asks for), as transformers
            reports it. Of a packed tensor, which is no float, the plan says more.
    """
    shapes = {name: (tuple(found), tuple(wanted)) for name, found, wanted in mismatched}
    if not shapes:
        return
    disk: dict[str, list[str]] = {}
    for name, (target, _) in loader_names(model, list(checkpoint.tensors)).items():
        disk.setdefault(target, []).append(name)
    for parameter in (name for name in model.state_dict() if name in shapes):
        found, wanted = shapes[parameter]
        names = disk.get(parameter, [parameter])
        entries = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
        if all(entry.dtype in TORCH_DTYPE for entry in entries):
            name = names[0] if len(names) == 1 else parameter
            raise PlanError(f"{name} has shape {list(found)} on disk, but the config asks for {list(wanted)}")
