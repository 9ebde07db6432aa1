"""What every part of an adapter's plan looks at: its config and tensors, and the folded base."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from flashnorm_cli.adapters.base import FoldedModel
from flashnorm_cli.adapters.edits import Edit, Scale
from flashnorm_cli.adapters.kinds import AdapterError
from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Context:
    """An adapter (content of adapter_config.json, header entries of its weights) and the base that it is to fit."""

    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    folded: FoldedModel

    @property
    def kind(self) -> str:
        return str(self.config["peft_type"])

    @property
    def model_name(self) -> str:
        return type(self.folded.model).__name__

    def original_name(self, name: str) -> str:
        """A name without what peft puts into it, in the layers of the source."""
        name = re.sub(r"\.(base_layer|original_module|ln_tuning_layers|token_adapter)(?=\.|$)", "", name)
        # `layer_replication` repeats ranges of layers: which layer of the source each one is.
        replicas = [i for start, end in self.config.get("layer_replication") or [] for i in range(start, end)]
        found = re.match(r"((?:model\.)*(?:layers|h|bert\.encoder\.layer))\.(\d+)(\..*)", name) if replicas else None
        if found and int(found[2]) < len(replicas):
            return f"{found[1]}.{replicas[int(found[2])]}{found[3]}"
        return name

    def scale(self, key: str, dim: int, factor: torch.Tensor) -> Edit:
        """Multiply a tensor of the adapter by a gain along `dim`. Raises AdapterError where that does not fit."""
        shape = self.tensors[key].shape
        if len(shape) <= dim or shape[dim] != len(factor):
            raise AdapterError(
                f"{key}: has shape {list(shape)}, but the base reads {len(factor)} channels there; is this the "
                "adapter of another model?"
            )
        return self.checked(key, Scale(dim, factor))

    def checked(self, key: str, edit: Edit) -> Edit:
        """The edit, if the tensor's dtype can take it."""
        dtype = self.tensors[key].dtype
        if dtype not in TORCH_DTYPE:
            raise AdapterError(f"{key}: is stored as {dtype}, which cannot take a gain")
        return edit

    def hint(self) -> str:
        """Why the model may lack what the adapter names."""
        if not self.config.get("task_type"):
            return "; if it was trained for another task, task_type in adapter_config.json must say so, e.g. SEQ_CLS"
        return "; is this the adapter of another model?"
