"""Do source with adapter, and folded base with folded adapter, compute the same? On random activations, in float64.

What is compared are the files: rows of both checkpoints, the adapter as it was and as it was written.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli.adapters.base import FoldedModel
from flashnorm_cli.adapters.lora import LoraModule
from flashnorm_cli.adapters.plan import AdapterPlan
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, read_tensor
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.plan.model import Reader

ROWS = 32  # of each weight: enough to tell, and a small ranged request on the Hub
SAMPLES = 32  # random activations
# Errors in units of eps of the coarser dtype: one rounding of each weight gives 0.3. A wrong gain gives dozens in
# bf16, millions in float32.
MAX_UNITS = 4.0


@dataclass(frozen=True)
class AdapterCheck:
    """Largest errors, in units of eps of what is stored.

    `base`: a layer of the base against the same layer of the source times the gain, one for each of `norms` folded
    norms. `update`: the adapter's update, and `layer`: layer and update together, over `modules` modules of the
    adapter that read a folded norm; None where there are none.
    """

    norms: int
    base: float
    modules: int
    update: float | None
    layer: float | None

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)


def check_base(model: FoldedModel) -> AdapterCheck:
    """Whether the base is a fold of this source: rows of one reader of each folded norm.

    Raises FlashNormError where it is not.
    """
    readers: dict[str, Reader] = {}
    for reader in model.plan.readers:
        tensor = reader.tensor
        if tensor in model.base.tensors and model.base.tensors[tensor].dtype in TORCH_DTYPE:
            for run in reader.runs:
                if run.norm in model.by_tensor:
                    readers.setdefault(str(run.norm), reader)

    def error(reader: Reader) -> float:
        name, dim = reader.tensor, reader.dim
        origin = reader.values_from or name
        shape = model.base.tensors[name].shape
        factor = model.factor_on_disk(reader)
        entry = model.source.tensors.get(origin)
        if entry is None or entry.shape != shape or entry.dtype not in TORCH_DTYPE:
            raise FlashNormError(f"{model.source.source.name}: its {origin} is not what {name} in the base is made of")
        rows = _some_rows(shape[0], ROWS if len(shape) == 2 else 1)
        before, after = read_tensor(model.source, origin, rows), read_tensor(model.base, name, rows)
        factor = factor[rows[0] : rows[1]] if dim == 0 else factor
        expected = before.double() * factor.double().view([-1 if d == dim else 1 for d in range(before.ndim)])
        return _units(after.double(), expected, after.dtype)

    with ThreadPoolExecutor(8) as pool:
        errors = dict(zip(readers, pool.map(error, readers.values()), strict=True))
    for norm, units in errors.items():
        if not units <= MAX_UNITS:
            raise FlashNormError(
                f"{model.base.source.name}: {readers[norm].tensor} does not hold what {model.source.source.name} "
                f"holds times {norm}: is that its source? `flashnorm verify` tells more"
            )
    return AdapterCheck(len(errors), max(errors.values(), default=0.0), 0, None, None)


def check_adapter(
    model: FoldedModel, plan: AdapterPlan, read: Callable[[str], torch.Tensor], written: Path, base: AdapterCheck
) -> AdapterCheck:
    """Compare every LoRA module that reads a folded norm, before and after. Raises FlashNormError at a difference."""
    from safetensors import safe_open

    with safe_open(written, framework="pt") as file, ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(lambda module: _errors(model, plan, module, read, file.get_tensor), plan.modules))
    for module, found in zip(plan.modules, errors, strict=True):
        for units in found:
            if units is not None and not units <= MAX_UNITS:
                raise FlashNormError(
                    f"{module.a}: folded, {module.name} computes something else, {units:.3g} eps away (a bug in "
                    "flashnorm, or a base that is no fold of its source: please run `flashnorm verify`)"
                )
    layers = [layer for _, layer in errors if layer is not None]
    return dataclasses.replace(
        base,
        modules=len(errors),
        update=max((update for update, _ in errors), default=None),
        layer=max(layers, default=None),
    )


def _errors(
    model: FoldedModel,
    plan: AdapterPlan,
    module: LoraModule,
    before: Callable[[str], torch.Tensor],
    after: Callable[[str], torch.Tensor],
) -> tuple[float, float | None]:
    """Errors of the update alone, and of the layer with it (None for weights that lie on disk in pieces)."""
    target = module.target
    gain = torch.ones(1) if target.factor is None else target.factor
    x = torch.randn(len(gain), SAMPLES, dtype=torch.float64)
    scaled = gain.double()[:, None] * x
    a, b, a_folded, b_folded = (f(name) for f in (before, after) for name in (module.a, module.b))
    dtype = a_folded.dtype
    if module.b in plan.edits:  # B holds the dimension that reads
        return _units(b_folded.double().T @ x, b.double().T @ scaled, dtype), None
    inner, inner_folded = a.double() @ scaled, a_folded.double() @ x
    update = _units(inner_folded, inner, dtype)
    if target.disk is None or len(target.shape) != 2:
        return update, None
    rows = _some_rows(target.shape[1 - target.dim])
    results = []
    for checkpoint, name, get, product, vectors in (
        (model.source, target.disk[0], before, inner, scaled),
        (model.base, target.disk[1], after, inner_folded, x),
    ):
        if target.dim == 1:
            weight = read_tensor(checkpoint, name, rows).double()
        else:
            weight = read_tensor(checkpoint, name)[:, rows[0] : rows[1]].T.double()
        part = get(module.b)[rows[0] : rows[1]].double()
        result = weight @ vectors + module.scaling * (part @ product)
        if module.magnitude:  # DoRA
            lengths = (weight + module.scaling * (part @ get(module.a).double())).norm(dim=1)
            result *= (get(module.magnitude)[rows[0] : rows[1]].double() / lengths)[:, None]
        results.append(result)
    stored = TORCH_DTYPE[model.base.tensors[target.disk[1]].dtype]
    coarser = max(dtype, stored, key=lambda d: torch.finfo(d).eps)
    return update, _units(results[1], results[0], coarser)


def _some_rows(count: int, most: int = ROWS) -> tuple[int, int]:
    start = random.randrange(max(count - most, 0) + 1)
    return start, min(start + most, count)


def _units(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> float:
    """Norm of the difference relative to that of what is expected, in eps of a dtype."""
    size = expected.norm()
    difference = (found - expected).norm()
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return float(difference / size / torch.finfo(dtype).eps)
