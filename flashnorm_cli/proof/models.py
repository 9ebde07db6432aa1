"""Both models, loaded and run."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import resource
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, float32_products
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.modeling import build
from flashnorm_cli.modeling.quiet import first_line, quiet_transformers
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.prompts import Prompts
from flashnorm_cli.proof.rotation import rotated

BATCH_TOKENS = 256  # in one forward
FROM_DISK_TOKENS = 4096  # the same, where each forward reads the whole model from the disk
LARGE = 256 << 20  # bytes of a model whose memory is worth a search for what is not used any more
SPARE = 1.2  # what a forward takes besides the weights


class ModelError(FlashNormError):
    """A model could not be loaded or called: its own code, or transformers, raised. The message is its first line."""


@dataclass(frozen=True)
class Setting:
    """What all models of a comparison have in common.

    `scratch` is a folder for what does not fit into memory; `from_disk` says that the models do not.
    """

    pair: Pair
    cls: Any
    config: Any
    trust_remote_code: bool
    device: str
    scratch: Path
    need: float  # bytes of the widest of the models
    from_disk: bool

    @classmethod
    def of(cls, pair: Pair, wide: torch.dtype, device: str, trust_remote_code: bool, scratch: Path) -> Setting:
        """Raises PlanError for an architecture that cannot be built."""
        config = build.load_config(pair.source.folder, trust_remote_code)
        model = build.model_class(config, pair.source.folder, trust_remote_code)
        sizes = (math.prod(e.shape) for e in pair.source.tensors.values() if e.dtype in TORCH_DTYPE)
        need = float(sum(sizes) * wide.itemsize)
        from_disk = need * SPARE >= memory(device)
        return cls(pair, model, config, trust_remote_code, device, scratch, need, from_disk)

    def free(self) -> None:
        """Give back the memory of models that are not used any more: they hold themselves, by cycles.

        Looking for cycles walks through all of transformers, which takes longer than to run a small model.
        """
        if self.need > LARGE or self.from_disk:
            gc.collect()

    def placement(self) -> dict[str, Any]:
        """Where the weights go. On a GPU that is too small, accelerate spreads them; without, all stay on the disk."""
        if not self.from_disk:
            return {"device_map": {"": self.device}}
        on_disk = "auto" if self.device.startswith("cuda") else {"": "disk"}
        return {"device_map": on_disk, "offload_folder": str(self.scratch / "offload")}


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's float weights are stored in."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.dtype in TORCH_DTYPE:
            sizes[entry.dtype] += math.prod(entry.shape)
    return TORCH_DTYPE[sizes.most_common(1)[0][0]] if sizes else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def memory(device: str) -> float:
    """Bytes that are free on a device: of the machine, and of what this process and its control group may take."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    found = [math.inf]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024)
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        for limit, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
            if (soft := resource.getrlimit(limit)[0]) != resource.RLIM_INFINITY:
                found.append(soft - float(status[used].split()[0]) * 1024)
        group = Path("/sys/fs/cgroup")
        limit_text = (group / "memory.max").read_text().strip()
        if limit_text != "max":
            used_here = float((group / "memory.current").read_text())
            cache = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            found.append(float(limit_text) - used_here + float(cache.get("inactive_file", 0)))
    except (OSError, StopIteration, ValueError, KeyError):
        pass  # what this system does not tell is no limit
    return max(min(found), 0.0)


@contextmanager
def deterministic() -> Iterator[None]:
    """float32 products in float32, and no gradients."""
    with float32_products(), torch.inference_mode():
        yield


@contextmanager
def its_own_errors() -> Iterator[None]:
    """ModelError for whatever a model raises. Only loading and calling a model belongs in here: no code of ours."""
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # a model's own code may raise anything
        raise ModelError(first_line(error)) from error


def load(setting: Setting, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    """A checkpoint as its class, ready to run. Raises ModelError."""
    setting.free()
    with its_own_errors():
        return setting.cls.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            trust_remote_code=setting.trust_remote_code,
            experts_implementation="eager",  # the others know no float64
            **setting.placement(),
        ).eval()


@contextmanager
def weightless(model: Any, device: str) -> Iterator[int]:
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


def fold_in_memory(setting: Setting, dtype: torch.dtype) -> Any:
    """The source, folded in the reference dtype without rounding to its own. Raises ModelError."""
    from safetensors import safe_open

    setting.free()
    pair, state = setting.pair, {}
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
    if (rotation := pair.plan.rotation) is not None:
        for name, dims in rotation.tensors.items():
            state[name] = rotated(rotation, state[name].double(), dims).to(dtype)
    config = copy.deepcopy(setting.config)
    if pair.untied:
        build.set_tie(config, False)
    with its_own_errors():
        return setting.cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            experts_implementation="eager",
            **setting.placement(),
        ).eval()


def _batches(prompts: Prompts, tokens: int) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Neighbouring prompts of the same length, so that nothing has to be padded."""
    for _, same in groupby(prompts.ids, key=len):
        rows = list(same)
        step = max(tokens // len(rows[0]), 1)
        for i in range(0, len(rows), step):
            yield tuple(rows[i : i + step])


def logits_of(setting: Setting, model: Any, prompts: Prompts) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Each prompt with its logits, on the CPU: (tokens, vocabulary). Raises ModelError."""
    for rows in _batches(prompts, FROM_DISK_TOKENS if setting.from_disk else BATCH_TOKENS):
        found = call(setting, model, torch.tensor(rows))
        yield from zip(rows, found, strict=True)


def call(setting: Setting, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """A model's logits, or its last hidden states where it has none, on the CPU. Raises ModelError."""
    output = outputs(setting, model, tokens)
    with its_own_errors():
        found: torch.Tensor = (output.logits if "logits" in output else output.last_hidden_state).cpu()
    return found


def outputs(setting: Setting, model: Any, tokens: torch.Tensor, **more: Any) -> Any:
    """Everything that a model's forward gives for token ids of shape (rows, length). Raises ModelError."""
    tokens = tokens.to(input_device(setting, model))
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "decoder_input_ids": tokens,
        "use_cache": False,
    }
    with its_own_errors():
        return model(**{name: value for name, value in inputs.items() if name in accepted}, **more)


def input_device(setting: Setting, model: Any) -> torch.device:
    """Where a model takes its input: the weights of one that is spread over devices may not be there yet."""
    found: torch.device = model.device
    return torch.device(setting.device) if found.type == "meta" else found
