"""LoRA and its relatives: the matrix that reads a folded norm takes the gain; DoRA's magnitudes follow."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from flashnorm_cli.adapters.base import FoldedModel, Target
from flashnorm_cli.adapters.context import Context
from flashnorm_cli.adapters.edits import Edit, Scale
from flashnorm_cli.adapters.kinds import AdapterError
from flashnorm_cli.checkpoint.progress import Steps
from flashnorm_cli.checkpoint.tensors import read_tensor


@dataclass(frozen=True)
class LoraModule:
    """A module whose update `scaling * B A` reads a folded norm. `a`, `b`, `magnitude` are tensors of the adapter.

    `edited` is the one of `a` and `b` that takes the gain, by `edit`. For the stacked weights of experts `scaling` is
    not theirs, and there is no magnitude.
    """

    name: str
    target: Target
    a: str
    b: str
    scaling: float
    edited: str
    edit: Edit
    magnitude: str | None = None


def lora_module(context: Context, path: str, parts: dict[str, str]) -> LoraModule | None:
    """One adapted module, by the tensors of its parts. None where it reads no folded norm.

    The matrices hold the input dimension in `A` (LoHa: in `w1_b`), the output in `B`.
    """
    folded, name = context.folded, context.original_name(path)
    if "lora_embedding_A" in parts:
        if folded.target(f"{name}.weight") is None:
            raise AdapterError(f"{parts['lora_embedding_A']}: the model has no {name}")
        return None  # an embedding reads no norm; the head that shared its weight has tensors of its own
    reads, writes = _matrices(context, parts)
    depth = len(re.findall(r"\.base_layer(?=\.|$)", path))
    parameter = _wrapped_parameter(context, name, depth, reads)
    target = folded.target(parameter or f"{name}.weight")
    if target is None:
        if folded.is_untouched(name):
            return None  # attention of an image tower, say, whose weights peft knows by other names
        raise AdapterError(f"{reads}: the model {context.model_name} has no {name}{context.hint()}")
    if target.factor is None:
        return None
    key, dim = (reads, 1) if _input_dim(folded, name, parameter, target) == target.dim else (writes, 0)
    if key == writes and parameter is None:
        raise AdapterError(f"{reads}: {name} reads its norm along dimension {target.dim}, where LoRA writes")
    shape = context.tensors[key].shape
    if len(shape) != 2 or "hada_t1" in parts:
        raise AdapterError(f"{key}: has shape {list(shape)}; only adapters of linear layers can be folded")
    edit = context.scale(key, dim, target.factor)
    scaling = _scaling(context, path, context.tensors[reads].shape[0])
    return LoraModule(path, target, reads, writes, scaling, key, edit, parts.get("lora_magnitude_vector"))


def _matrices(context: Context, parts: dict[str, str]) -> tuple[str, str]:
    """The tensors that read the module's input and write its output."""
    wanted = ("hada_w1_b", "hada_w1_a") if context.kind == "LOHA" else ("lora_A", "lora_B")
    reads, writes = (parts.get(part) for part in wanted)
    if reads is None or writes is None:
        raise AdapterError(f"{next(iter(parts.values()))}: its other half is missing")
    return reads, writes


def _wrapped_parameter(context: Context, module: str, depth: int, key: str) -> str | None:
    """The parameter that LoRA is applied to by `target_parameters`, None for a module's weight.

    peft wraps a module once for each of its parameters in their order, so the innermost is the first (0.21,
    `BaseTuner._inject_parameters`).
    """
    wanted = context.config.get("target_parameters") or []
    owner = context.folded.modules.get(module)
    if owner is None or not wanted:
        return None
    names = [f"{module}.{name}" for name, _ in owner.named_parameters(recurse=False)]
    matching = [n for n in names if any(n == t or n.endswith(f".{t}") for t in wanted)]
    if not matching:
        return None
    if depth >= len(matching):
        raise AdapterError(f"{key}: {module} has fewer parameters in target_parameters than this is deep")
    return matching[len(matching) - 1 - depth]


def _input_dim(folded: FoldedModel, name: str, parameter: str | None, target: Target) -> int:
    """The dimension of the weight that LoRA's A reads (peft 0.21, `ParamWrapper.update_layer`)."""
    owner = folded.modules.get(name)
    if parameter is not None and len(target.shape) == 3:
        return 1 if getattr(owner, "is_transposed", False) else 2
    is_conv1d = type(owner).__name__ == "Conv1D"
    return 0 if is_conv1d and parameter is None else 1


def _scaling(context: Context, path: str, rank: int) -> float:
    """`lora_alpha / r` of a module, or `lora_alpha / sqrt(r)` (peft 0.21, `LoraLayer.update_layer`)."""
    alpha = context.config.get("lora_alpha", 8)
    for pattern, value in (context.config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if context.config.get("use_rslora") else rank)


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def magnitude_edits(
    context: Context,
    modules: list[LoraModule],
    read: Callable[[str], torch.Tensor],
    report: Callable[[int, int, str], None],
) -> Mapping[str, Edit]:
    """Scale each magnitude by how the length of its row changes, by tensor."""
    edits = {}
    with_magnitude = [(module, module.magnitude) for module in modules if module.magnitude]
    for i, (module, key) in enumerate(with_magnitude):
        report(i, len(with_magnitude), Steps("Reading weights for DoRA"))
        if module.target.disk is None:
            raise AdapterError(f"{key}: DoRA's magnitude depends on the weight, which lies on disk in other pieces")
        a, b = read(module.a), read(module.b)
        before, after = _row_lengths(context.folded, module, a, module.edit.apply(a), b)
        ratio = torch.where(before == 0, torch.ones_like(before), after / before)
        shape = context.tensors[key].shape
        if shape != tuple(ratio.shape):
            raise AdapterError(f"{key}: has shape {list(shape)} instead of {list(ratio.shape)}")
        edits[key] = context.checked(key, Scale(0, ratio))
    return edits


def _row_lengths(
    folded: FoldedModel, module: LoraModule, a: torch.Tensor, a_folded: torch.Tensor, b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lengths over the inputs of each output row of `W + s B A`, in source and base: float64 of shape (outputs,)."""
    lengths = []
    names = module.target.disk or ("", "")
    for checkpoint, name, matrix in ((folded.source, names[0], a), (folded.base, names[1], a_folded)):
        weight = read_tensor(checkpoint, name)
        weight = weight if module.target.dim == 1 else weight.T
        squares = [
            (part.double() + module.scaling * (b[start : start + len(part)].double() @ matrix.double())).square().sum(1)
            for start, part in _blocks(weight)
        ]
        lengths.append(torch.cat(squares).sqrt())
    return lengths[0], lengths[1]


def _blocks(weight: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
    """Rows in groups, so that float64 copies stay small."""
    step = max(1, 2**22 // max(weight.shape[1], 1))
    return [(start, weight[start : start + step]) for start in range(0, weight.shape[0], step)]
