"""What happens to each tensor of a PEFT adapter when its base is folded.

A folded base computes `W diag(g)` on the normalised activations where the source computes `W` on `diag(g)` times them.
An adapter that reads the same activations has to take the same gain:

- LoRA adds `s B A`: `A` takes the gain along its input, `A diag(g)`. So does a full copy of a reader
  (modules_to_save).
- A full copy of a norm holds a gain `g'` of its own. Its readers in the base hold `g` already, so it becomes `g' / g`.
- DoRA divides each output row of `W + s B A` by its length and multiplies it by a magnitude `m`. The rows' lengths
  change with the fold, and nothing else does: `m` times the length after, divided by the length before, is exact.
- IA3 scales inputs or outputs channel by channel, and prompts are put before the first norm: they stay as they are.

Where a gain goes is found as for the checkpoint itself, by tracing the model's forward (`trace.py`); which norms are
folded is what the base's record says. Names in adapters are those of peft 0.21 (`utils/save_and_load.py`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from flashnorm_cli.adapters.base import FoldedModel, Target
from flashnorm_cli.adapters.edits import Edit, Ratio, Scale
from flashnorm_cli.adapters.kinds import INSTEAD, PROMPT_TYPES, AdapterError
from flashnorm_cli.checkpoint.header import Header, TensorEntry
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, read_tensor

if TYPE_CHECKING:
    pass

PREFIX = "base_model.model."
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|"
    r"lora_velora_embed|ranknum|hada_w[12]_[ab]|hada_t[12]|ia3_l|trainable_tokens_delta)"
    r"(\.weight|(?P<bias>\.bias))?"
)


# ---- what is done to a tensor ----------------------------------------------------------------------------------------


@dataclass
class AdapterPlan:
    """Edits by tensor of the adapter; `added` are new tensors as (name of the one to start from, edit or None).

    `config` are keys of adapter_config.json that change. `modules` are the LoRA modules whose input is scaled, for
    the check afterwards.
    """

    edits: dict[str, Edit] = field(default_factory=dict)
    added: dict[str, tuple[str, Edit | None]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    modules: list[LoraModule] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, int]:
        """How many tensors take a gain, a ratio of gains, or a new magnitude."""
        edits = [*self.edits.items(), *((name, edit) for name, (_, edit) in self.added.items() if edit)]
        magnitudes = sum("lora_magnitude_vector" in name for name, _ in edits)
        ratios = sum(isinstance(edit, Ratio) for _, edit in edits)
        return {"gain": len(edits) - magnitudes - ratios, "ratio": ratios, "magnitude": magnitudes}


@dataclass(frozen=True)
class LoraModule:
    """A module whose update `scaling * B A` reads a folded norm. `a`, `b`, `magnitude` are tensors of the adapter.

    For the stacked weights of experts `scaling` is not theirs, and there is no magnitude.
    """

    name: str
    target: Target
    a: str
    b: str
    scaling: float
    magnitude: str | None = None


# ---- the model that adapter and base share ---------------------------------------------------------------------------


# ---- the plan --------------------------------------------------------------------------------------------------------


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
    return _Planner(config, header, folded, read, report).plan()


class _Planner:
    def __init__(
        self,
        config: dict[str, Any],
        header: Header,
        folded: FoldedModel,
        read: Callable[[str], torch.Tensor],
        report: Callable[[int, int, str], None],
    ) -> None:
        self.config, self.folded, self.read, self.report = config, folded, read, report
        self.kind = str(config["peft_type"])
        self.tensors = header.tensors
        self.result = AdapterPlan()
        self.replicas = _replicas(config.get("layer_replication"))
        self.lora: dict[str, dict[str, str]] = {}  # module with its `.base_layer`s -> part -> tensor

    def plan(self) -> AdapterPlan:
        if self.kind in PROMPT_TYPES:
            self._check_prompts()
            return self.result
        for key, entry in self.tensors.items():
            name = key.removeprefix(PREFIX)
            if name == key:
                raise AdapterError(f"{key}: does not begin with {PREFIX!r}, as peft's tensors of {self.kind} do")
            found = _PART.fullmatch(name)
            if found is None:
                self._plain(key, entry, self._original(name))
            elif found["part"].startswith(("lora_", "hada_")):
                part = found["part"] + (found["bias"] or "")
                self.lora.setdefault(found["module"], {})[part] = key
            elif found["part"] == "trainable_tokens_delta":
                self._tokens(key, entry, self._original(found["module"]))
        for module, parts in self.lora.items():
            self._lora(module, parts)
        self._untie()
        self._magnitudes()
        return self.result

    def _check_prompts(self) -> None:
        wide = max((norm.gain.numel() for norm in self.folded.norms.values()), default=0)
        inner = next((n for n, norm in self.folded.norms.items() if norm.gain.numel() != wide), None)
        if self.kind == "PREFIX_TUNING" and inner:
            raise AdapterError(
                f"peft type PREFIX_TUNING: it supplies keys and values, and {inner}, which is folded, may stand "
                f"between what the model caches and the layer that reads it; {INSTEAD}"
            )

    def _original(self, name: str) -> str:
        """A name without what peft puts into it, in the layers of the source."""
        name = re.sub(r"\.(base_layer|original_module|ln_tuning_layers|token_adapter)(?=\.|$)", "", name)
        if self.replicas:
            found = re.match(r"((?:model\.)*(?:layers|h|bert\.encoder\.layer))\.(\d+)(\..*)", name)
            if found and int(found[2]) < len(self.replicas):
                return f"{found[1]}.{self.replicas[int(found[2])]}{found[3]}"
        return name

    # ---- full copies

    def _plain(self, key: str, entry: TensorEntry, name: str) -> None:
        """A full copy of a parameter: modules_to_save, a bias, an embedding, LN tuning."""
        target = self.folded.target(name)
        if target is None:
            module, _, leaf = name.rpartition(".")
            owner = self.folded.target(f"{module}.weight")
            if leaf == "bias" and owner is not None and owner.norm is None:
                return  # added behind the layer
            if name in self.folded.model.state_dict():
                return  # a buffer
            raise AdapterError(f"{key}: the model {type(self.folded.model).__name__} has no such weight{self._hint()}")
        module = name.rpartition(".")[0]
        if name.endswith(".bias") and f"{module}.weight" in self.folded.norms:
            raise AdapterError(f"{key}: is the bias of a norm that is folded; {INSTEAD}")
        if target.norm is not None:
            norm = target.norm
            if entry.shape != tuple(norm.gain.shape):
                raise AdapterError(f"{key}: has shape {list(entry.shape)}, the source's norm {list(norm.gain.shape)}")
            self._edit(key, entry, Ratio(norm.gain, norm.scale, norm.offset))
        elif target.factor is not None:
            self._scale(key, entry, target.dim, target.factor)

    def _hint(self) -> str:
        if not self.config.get("task_type"):
            return "; if it was trained for another task, task_type in adapter_config.json has to say so (SEQ_CLS, say)"
        return "; is this the adapter of another model?"

    def _tokens(self, key: str, entry: TensorEntry, module: str) -> None:
        target = self.folded.target(f"{module}.weight")
        if target is None:
            raise AdapterError(f"{key}: the model {type(self.folded.model).__name__} has no {module}")
        if target.factor is not None:
            self._scale(key, entry, target.dim, target.factor)

    # ---- LoRA and its relatives

    def _lora(self, path: str, parts: dict[str, str]) -> None:
        """One module. Its matrices hold the input dimension in `A` (LoHa: in `w1_b`), the output in `B`."""
        depth = len(re.findall(r"\.base_layer(?=\.|$)", path))
        name = self._original(path)
        if "lora_embedding_A" in parts:
            target = self.folded.target(f"{name}.weight")
            if target is None:
                raise AdapterError(f"{parts['lora_embedding_A']}: the model has no {name}")
            return  # an embedding reads no norm; the head that shared its weight has tensors of its own
        if self.kind == "LOHA":
            reads, writes = parts.get("hada_w1_b"), parts.get("hada_w1_a")
        else:
            reads, writes = parts.get("lora_A"), parts.get("lora_B")
        if reads is None or writes is None:
            raise AdapterError(f"{next(iter(parts.values()))}: its other half is missing")
        parameter = self._wrapped_parameter(name, depth, reads)
        target = self.folded.target(parameter or f"{name}.weight")
        if target is None and self.folded.is_untouched(name):
            return  # attention of an image tower, say, whose weights peft knows by other names
        if target is None:
            raise AdapterError(f"{reads}: the model {type(self.folded.model).__name__} has no {name}{self._hint()}")
        if target.factor is None:
            return
        key, dim = (reads, 1) if self._input_dim(name, parameter, target) == target.dim else (writes, 0)
        if key == writes and parameter is None:
            raise AdapterError(f"{reads}: {name} reads its norm along dimension {target.dim}, where LoRA writes")
        entry = self.tensors[key]
        if len(entry.shape) != 2 or "hada_t1" in parts:
            raise AdapterError(f"{key}: has shape {list(entry.shape)}; only adapters of linear layers can be folded")
        self._scale(key, entry, dim, target.factor)
        if self.kind == "LORA":
            scaling = self._scaling(path, self.tensors[reads].shape[0])
            magnitude = parts.get("lora_magnitude_vector")
            self.result.modules.append(LoraModule(path, target, reads, writes, scaling, magnitude))

    def _wrapped_parameter(self, module: str, depth: int, key: str) -> str | None:
        """The parameter that LoRA is applied to by `target_parameters`, None for a module's weight.

        peft wraps a module once for each of its parameters in their order, so the innermost is the first (0.21,
        `BaseTuner._inject_parameters`).
        """
        wanted = self.config.get("target_parameters") or []
        owner = self.folded.modules.get(module)
        if owner is None or not wanted:
            return None
        names = [f"{module}.{name}" for name, _ in owner.named_parameters(recurse=False)]
        matching = [n for n in names if any(n == t or n.endswith(f".{t}") for t in wanted)]
        if not matching:
            return None
        if depth >= len(matching):
            raise AdapterError(f"{key}: {module} has fewer parameters in target_parameters than this is deep")
        return matching[len(matching) - 1 - depth]

    def _input_dim(self, name: str, parameter: str | None, target: Target) -> int:
        """The dimension of the weight that LoRA's A reads (peft 0.21, `ParamWrapper.update_layer`)."""
        owner = self.folded.modules.get(name)
        if parameter is not None and len(target.shape) == 3:
            return 1 if getattr(owner, "is_transposed", False) else 2
        is_conv1d = type(owner).__name__ == "Conv1D"
        return 0 if is_conv1d and parameter is None else 1

    def _scaling(self, path: str, rank: int) -> float:
        """`lora_alpha / r` of a module, or `lora_alpha / sqrt(r)` (peft 0.21, `LoraLayer.update_layer`)."""
        alpha = self.config.get("lora_alpha", 8)
        for pattern, value in (self.config.get("alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def _magnitudes(self) -> None:
        """DoRA: scale each magnitude by how the length of its row changes."""
        todo = [module for module in self.result.modules if module.magnitude]
        for i, module in enumerate(todo):
            self.report(i, len(todo), "Reading weights for DoRA")
            if module.target.disk is None:
                raise AdapterError(
                    f"{module.magnitude}: DoRA's magnitude depends on the weight, which lies on disk in other pieces"
                )
            a, b = self.read(module.a), self.read(module.b)
            before, after = _row_lengths(self.folded, module, a, self.result.edits[module.a].apply(a), b)
            ratio = torch.where(before == 0, torch.ones_like(before), after / before)
            key = module.magnitude or ""
            entry = self.tensors[key]
            if entry.shape != tuple(ratio.shape):
                raise AdapterError(f"{key}: has shape {list(entry.shape)} instead of {list(ratio.shape)}")
            self._edit(key, entry, Scale(0, ratio))

    # ---- the head that shared its weight with the embedding

    def _untie(self) -> None:
        """The source's head is the embedding, the base's is not: what spoke of both needs tensors for each."""
        folded, config = self.folded, self.config
        if not folded.untied:
            return
        head, embedding = folded.head, folded.embedding
        if head is None or embedding is None:
            return
        factor = folded.target(f"{head}.weight")
        edit = Scale(factor.dim, factor.factor) if factor is not None and factor.factor is not None else None
        both = bool(config.get("ensure_weight_tying"))
        if both:
            self.result.config["ensure_weight_tying"] = False
        delta = f"{PREFIX}{embedding}.token_adapter.trainable_tokens_delta"
        tokens = config.get("trainable_token_indices")
        if self.kind == "TRAINABLE_TOKENS":
            raise AdapterError(
                "peft type TRAINABLE_TOKENS: the source ties its output head to the embedding, so the tokens count in "
                f"both, and the base has a head of its own; {INSTEAD}"
            )
        if delta in self.tensors and tokens is not None:
            by_layer = tokens if isinstance(tokens, dict) else {embedding: tokens}
            mine = next((v for k, v in by_layer.items() if embedding.endswith(k)), None)
            theirs = next((v for k, v in by_layer.items() if head.endswith(k)), None)
            if mine is not None and (theirs is None or theirs == mine):
                self.result.added[f"{PREFIX}{head}.token_adapter.trainable_tokens_delta"] = (delta, edit)
                rest = {k: v for k, v in by_layer.items() if not head.endswith(k)}
                self.result.config["trainable_token_indices"] = {**rest, head: mine}
        saved = [k for k in config.get("modules_to_save") or [] if embedding.endswith(k)]
        own = f"{PREFIX}{embedding}.weight"
        if both and saved and own in self.tensors:
            self.result.config["modules_to_save"] = [*config["modules_to_save"], head]
            self._add(f"{PREFIX}{head}.weight", own, edit)
        elif own in self.tensors and not saved:  # it was resized, and the head with it
            self._add(f"{PREFIX}{head}.weight", own, edit)
        if f"{PREFIX}{embedding}.lora_embedding_A" in self.tensors:
            base_layer = f"{PREFIX}{embedding}.base_layer.weight"
            if both:
                if f"{PREFIX}{head}.lora_A.weight" not in self.tensors:
                    raise AdapterError(
                        f"{PREFIX}{head}.lora_A.weight: is missing; ensure_weight_tying says that the head has it"
                    )
                targets = config.get("target_modules")
                self.result.config["target_modules"] = (
                    rf"(?:{targets}|^{re.escape(head)}$)" if isinstance(targets, str) else [*(targets or []), head]
                )
            elif (
                base_layer in self.tensors
                and self.tensors[base_layer].shape != folded.parameters[folded.first[f"{embedding}.weight"]].shape
            ):
                self._add(f"{PREFIX}{head}.weight", base_layer, edit)
        if self.result.added or both:
            self.result.notes.append(
                f"{head} is not tied to {embedding} in the base: what the adapter said of both it now says of each"
            )

    def _add(self, name: str, origin: str, edit: Edit | None) -> None:
        if name not in self.tensors:
            self.result.added[name] = (origin, edit)

    # ---- edits

    def _scale(self, key: str, entry: TensorEntry, dim: int, factor: torch.Tensor) -> None:
        if len(entry.shape) <= dim or entry.shape[dim] != len(factor):
            raise AdapterError(
                f"{key}: has shape {list(entry.shape)}, but the base reads {len(factor)} channels there; is this the "
                "adapter of another model?"
            )
        self._edit(key, entry, Scale(dim, factor))

    def _edit(self, key: str, entry: TensorEntry, edit: Edit) -> None:
        if entry.dtype not in TORCH_DTYPE:
            raise AdapterError(f"{key}: is stored as {entry.dtype}, which cannot take a gain")
        self.result.edits[key] = edit


def _replicas(replication: Any) -> list[int]:
    """Layer of the source for each layer that `layer_replication` makes."""
    return [i for start, end in replication or [] for i in range(start, end)]


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
