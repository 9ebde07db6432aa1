"""Both models, loaded and run."""

from __future__ import annotations

import copy
import gc
import inspect
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE
from flashnorm_cli.modeling import build
from flashnorm_cli.modeling.quiet import quiet_transformers
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.prompts import Prompts

BATCH_TOKENS = 256  # in one forward


LARGE = 256 << 20  # bytes of a model whose memory is worth a search for what is not used any more


@dataclass
class _Run:
    """Settings of the four models."""

    pair: Pair
    cls: Any
    trust_remote_code: bool
    device: str
    device_map: Any
    offload: str | None
    prompts: Prompts
    large: bool
    reference: list[torch.Tensor] = field(default_factory=list)

    def free(self) -> None:
        """Give back the memory of models that are not used any more: they hold themselves, by cycles.

        Looking for cycles walks through all of transformers, which takes longer than to run a small model.
        """
        if self.large:
            gc.collect()


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's float weights are stored in."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.dtype in TORCH_DTYPE:
            sizes[entry.dtype] += math.prod(entry.shape)
    return TORCH_DTYPE[sizes.most_common(1)[0][0]] if sizes else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _memory(device: str) -> float:
    """Bytes that are free on a device."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return math.inf


@contextmanager
def _deterministic() -> Iterator[None]:
    """float32 products in float32, and no gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _load(run: _Run, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    more = {"offload_folder": run.offload} if run.offload else {}
    run.free()
    with quiet_transformers():
        return run.cls.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            device_map=run.device_map,
            trust_remote_code=run.trust_remote_code,
            experts_implementation="eager",  # the others know no float64
            **more,
        ).eval()


@contextmanager
def _weightless(model: Any, device: str) -> Iterator[int]:
    """On a GPU, run the model's norms on this project's kernels, and their readers with them; yields how many norms."""
    if not device.startswith("cuda"):
        yield 0
        return
    from flashnorm_cli.runtimes.transformers.deferred import defer, undefer
    from flashnorm_cli.runtimes.transformers.swap import norms_replaced

    with norms_replaced(model) as names:
        defer(model, measure=False)
        try:
            yield len(names)
        finally:
            undefer(model)


def _fold_in_memory(run: _Run, config: Any, dtype: torch.dtype) -> Any:
    """The source, folded in the reference dtype without rounding to its own."""
    from safetensors import safe_open

    pair, state = run.pair, {}
    for shard in pair.source.shards:
        with safe_open(pair.source.folder / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name in pair.gains:
                    tensor = torch.full_like(tensor, pair.norms[name].identity)
                state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, reader in pair.readers.items():
        factor = pair.factor(reader).to(dtype)
        origin = state[reader.values_from or name]
        state[name] = origin * factor.view([-1 if d == reader.dim else 1 for d in range(origin.ndim)])
    config = copy.deepcopy(config)
    if pair.plan.untie and pair.expected_added:
        build.set_tie(config, False)
    with quiet_transformers():
        return run.cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            device_map=run.device_map,
            experts_implementation="eager",
        ).eval()


def _batches(prompts: Prompts) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Neighbouring prompts of the same length, so that nothing has to be padded."""
    for _, same in groupby(prompts.ids, key=len):
        rows = list(same)
        step = max(BATCH_TOKENS // len(rows[0]), 1)
        for i in range(0, len(rows), step):
            yield tuple(rows[i : i + step])


def _logits(run: _Run, model: Any) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Each prompt with its logits, on the CPU: (tokens, vocabulary)."""
    for rows in _batches(run.prompts):
        tokens = torch.tensor(rows, device=_device_of(run, model))
        accepted = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "decoder_input_ids": tokens,
            "use_cache": False,
        }
        output = model(**{name: value for name, value in inputs.items() if name in accepted})
        found = (output.logits if "logits" in output else output.last_hidden_state).cpu()
        yield from zip(rows, found, strict=True)


def _device_of(run: _Run, model: Any) -> torch.device:
    """Where a model takes its input: the weights of one that is spread over devices may not be there yet."""
    return torch.device(run.device) if model.device.type == "meta" else model.device
