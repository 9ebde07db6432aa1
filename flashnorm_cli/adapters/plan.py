"""What happens to each tensor of a PEFT adapter when its base is folded.

A folded base computes `W diag(g)` on the normalised activations where the source computes `W` on `diag(g)` times them.
An adapter that reads the same activations has to take the same gain:

- LoRA adds `s B A`: `A` takes the gain along its input, `A diag(g)`. So does a full copy of a reader
  (modules_to_save).
- A full copy of a norm holds a gain `g'` of its own. Its readers in the base hold `g` already, so it becomes `g' / g`.
- DoRA divides each output row of `W + s B A` by its length and multiplies it by a magnitude `m`. The rows' lengths
  change with the fold, and nothing else does: `m` times the length after, divided by the length before, is exact.
- IA3 scales inputs or outputs channel by channel, and prompts are put before the first norm: they stay as they are.

Where a gain goes is found as for the checkpoint itself, by tracing the model's forward (`trace/`); which norms are
folded is what the base's record says. Names in adapters are those of peft 0.21 (`utils/save_and_load.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from flashnorm_cli.adapters.base import FoldedModel
from flashnorm_cli.adapters.context import PREFIX, Context
from flashnorm_cli.adapters.copies import edit_copy, edit_tokens
from flashnorm_cli.adapters.edits import Edit, Ratio
from flashnorm_cli.adapters.kinds import MERGE_HINT, PROMPT_TYPES, AdapterError
from flashnorm_cli.adapters.lora import LoraModule, lora_module, magnitude_edits
from flashnorm_cli.adapters.untied_head import untie
from flashnorm_cli.checkpoint.header import Header

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|"
    r"lora_velora_embed|ranknum|hada_w[12]_[ab]|hada_t[12]|ia3_l|trainable_tokens_delta)"
    r"(\.weight|(?P<bias>\.bias))?"
)


@dataclass(frozen=True)
class AdapterPlan:
    """Edits by tensor of the adapter; `added` are new tensors as (name of the one to start from, edit or None).

    `config` are keys of adapter_config.json that change. `modules` are the LoRA modules whose input is scaled, for
    the check afterwards.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, tuple[str, Edit | None]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    modules: tuple[LoraModule, ...] = ()
    notes: tuple[str, ...] = ()

    def kinds(self) -> dict[str, int]:
        """How many tensors take a gain, a ratio of gains, or a new magnitude."""
        edits = [*self.edits.items(), *((name, edit) for name, (_, edit) in self.added.items() if edit)]
        magnitudes = sum("lora_magnitude_vector" in name for name, _ in edits)
        ratios = sum(isinstance(edit, Ratio) for _, edit in edits)
        return {"gain": len(edits) - magnitudes - ratios, "ratio": ratios, "magnitude": magnitudes}


def plan_adapter(
    config: dict[str, Any],
    header: Header,
    folded: FoldedModel,
    read: Callable[[str], torch.Tensor],
    report: Callable[[int, int, str], None],
) -> AdapterPlan:
    """Decide about every tensor of an adapter.

    Args:
        config: content of adapter_config.json, one that `refuse_unfoldable` lets pass.
        header: of adapter_model.safetensors.
        folded: the base.
        read: returns a tensor of the adapter by its name; only DoRA needs values.
        report: told (done, all, what is going on); DoRA reads weights.
    Raises:
        AdapterError: something cannot be folded exactly; nothing is guessed.
    """
    context = Context(config, header.tensors, folded)
    if context.kind in PROMPT_TYPES:
        _check_prompts(context)
        return AdapterPlan()
    copies, by_module = _sorted_tensors(context)
    found = [lora_module(context, path, parts) for path, parts in by_module.items()]
    modules = [module for module in found if module is not None]
    edits = {**copies, **{module.edited: module.edit for module in modules}}
    untied = untie(context)
    if context.kind != "LORA":
        return AdapterPlan(edits, untied.added, untied.config, (), untied.notes)
    edits |= magnitude_edits(context, modules, read, report)
    return AdapterPlan(edits, untied.added, untied.config, tuple(modules), untied.notes)


def _check_prompts(context: Context) -> None:
    norms = context.folded.norms
    wide = max((norm.gain.numel() for norm in norms.values()), default=0)
    inner = next((n for n, norm in norms.items() if norm.gain.numel() != wide), None)
    if context.kind == "PREFIX_TUNING" and inner:
        raise AdapterError(
            f"peft type PREFIX_TUNING: it supplies keys and values, and {inner}, which is folded, may stand "
            f"between what the model caches and the layer that reads it; {MERGE_HINT}"
        )


def _sorted_tensors(context: Context) -> tuple[dict[str, Edit], dict[str, dict[str, str]]]:
    """Edits of full copies by tensor; and of LoRA and its relatives the tensors, by module and part.

    Modules keep their `.base_layer`s: LoRA can be stacked.
    """
    edits: dict[str, Edit] = {}
    by_module: dict[str, dict[str, str]] = {}
    for key in context.tensors:
        name = key.removeprefix(PREFIX)
        if name == key:
            raise AdapterError(f"{key}: does not begin with {PREFIX!r}, as peft's tensors of {context.kind} do")
        found = _PART.fullmatch(name)
        edit = None
        if found is None:
            edit = edit_copy(context, key, context.original_name(name))
        elif found["part"].startswith(("lora_", "hada_")):
            part = found["part"] + (found["bias"] or "")
            by_module.setdefault(found["module"], {})[part] = key
        elif found["part"] == "trainable_tokens_delta":
            edit = edit_tokens(context, key, context.original_name(found["module"]))
        if edit is not None:
            edits[key] = edit
    return edits, by_module
