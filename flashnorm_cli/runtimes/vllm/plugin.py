"""vLLM runs the norms of a folded checkpoint without their weight, and loads layout dropped.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins`). Where it is a vLLM that this was
not written for, `register` says one line and changes nothing. A checkpoint without our record goes through vLLM's own
code and classes; of a folded one the loader does two things more:

- What layout dropped left out is handed to the model as if it were in the files.
- After the weights are there, each norm that the record names and whose loaded weight is the identity is told to pass
  none: `RMSNorm.pass_weight` and `pass_weight_add` of vLLM #44109, and the like for `GemmaRMSNorm`, which has no such
  switch. The parameter stays where it is, for the code that reads it without calling the norm.

Importing this module imports neither torch nor vLLM.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.model import RECORD
from flashnorm_cli.errors import one_line, shown
from flashnorm_cli.record.read import Record, left_out, read_record
from flashnorm_cli.runtimes.vllm.norms import KERNEL, State, is_identity, log, norms_of

if TYPE_CHECKING:
    from torch import Tensor

# The formats of vLLM's DefaultModelLoader in which a checkpoint of transformers is loaded.
FORMATS = ("auto", "hf", "safetensors", "fastsafetensors", "instanttensor")
# Passes of vLLM's compiler that hand a norm's weight to another kernel. They match a norm without one as well, and
# pass None on to kernels that cannot do without (seen in 0.32).
PASSES_WITH_WEIGHTS = ("fuse_norm_quant", "fuse_allreduce_rms", "fuse_act_padding", "fuse_mla_dual_rms_norm")


def register() -> None:
    """The plugin: what vLLM calls. Never raises; may be called again."""
    steps = {_register_loader: "norms keep their weights", _register_kernels: "it cannot use this project's kernels"}
    for step, otherwise in steps.items():
        try:
            step()
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            reason = one_line(" ".join(str(error).split()))
            log.warning("flashnorm: this vLLM is not known here, so %s (%s)", otherwise, reason)
            return


# ---- the norms of a model --------------------------------------------------------------------------------------------


@dataclass
class _Watch:
    """Keeps the norms of one model as its weights ask, each time that weights are loaded."""

    model: Any
    record: Record
    config: Any  # vLLM's VllmConfig
    blocked: str | None  # why norms keep their weights
    settled: bool = False
    deferred: dict[str, Any] = field(default_factory=dict)  # what came of running norms inside linears, if asked for
    lies: list[str] = field(default_factory=list)  # tensors that the record names, but that are no identity

    def settle(self) -> None:
        """Read the loaded weights and run the norms accordingly."""
        from vllm.config import CompilationMode, CUDAGraphMode

        compilation = self.config.compilation_config
        eager = compilation.mode == CompilationMode.NONE and compilation.cudagraph_mode == CUDAGraphMode.NONE
        # A compiled or captured forward does not look at a norm again, nor does a linear that norms for itself.
        fixed = self.settled and not (eager and "norms" not in self.deferred)
        told_apart = isinstance(self.config.additional_config, dict)  # compiled graphs, by their key
        changed: dict[State, list[str]] = {"without": [], "ones": [], "own": []}
        for name, norm, kind in norms_of(self.model):
            identity = is_identity(norm.weight, kind.identity)
            wanted: State = "own"
            if identity and self.record.may_name(name):
                wanted = "without" if not self.blocked else "ones" if told_apart else "own"
            if fixed and kind.state(norm) != "own" and not identity:
                raise RuntimeError(
                    f"flashnorm: {name} was compiled or merged without its weight, and cannot take one now; restart "
                    "the engine with the new checkpoint, or with --enforce-eager"
                )
            if not fixed and kind.state(norm) != wanted:
                kind.run(norm, wanted)
            changed[kind.state(norm)].append(name)
        if not self.settled:
            self._report(changed["without"], changed["ones"])
            self._defer(changed["without"])
            self._key_of_cached_graphs(changed["without"], changed["ones"])
        self.settled = True

    def _defer(self, without: list[str]) -> None:
        """Run norms inside the linears behind them, where the user asks for it."""
        if not asks_for_deferred(self.config):
            return
        from flashnorm_cli.runtimes.vllm.deferred import defer

        self.deferred = self.model._flashnorm_deferred = defer(self.model, self.config, without)
        if reason := self.deferred.get("why_not"):
            log.warning("flashnorm: norms are not run inside linears: %s", reason)
        else:
            log.info(
                "flashnorm: %(norms)d norm(s), %(activations)d activation(s) and %(adds)d residual add(s) run inside "
                "linears",
                self.deferred,
            )

    def _report(self, without: list[str], ones: list[str]) -> None:
        if self.lies:
            log.warning(
                "flashnorm: the checkpoint's record names %d norm(s) as folded that are not the identity, the first is "
                "%s: they keep their weights (AWQ and SmoothQuant put scales there: take flashnorm and "
                "flashnorm_folded out of config.json then)",
                len(self.lies),
                shown(self.lies[0]),
            )
        if self.blocked:
            log.warning("flashnorm: norms keep their weights: %s", self.blocked)
            if ones:
                log.info("flashnorm: %d norm(s) hand on ones of their activations' dtype instead of 1 + w", len(ones))
        else:
            log.info("flashnorm: %d norm(s) run without a weight", len(without))
        if self.config.lora_config is not None:
            log.warning(
                "flashnorm: this checkpoint is folded: a LoRA adapter that was trained on its source does not fit, "
                "unless flashnorm fold-adapter has folded it as well"
            )

    def _key_of_cached_graphs(self, without: list[str], ones: list[str]) -> None:
        """vLLM finds compiled graphs again by its config, which knows nothing of weights: tell it what was found."""
        if (without or ones) and isinstance(self.config.additional_config, dict):
            key = hashlib.sha256("\n".join([*without, str(self.deferred), *ones]).encode()).hexdigest()
            self.config.additional_config.setdefault("flashnorm_graphs", {})[self.config.model_config.model] = key


def asks_for_deferred(config: Any) -> bool:
    """Whether norms are to run inside linears: a folded model, and the user's word in a VllmConfig."""
    more = config.additional_config
    asked = more.get("flashnorm") if isinstance(more, dict) else None
    if not (isinstance(asked, dict) and asked.get("deferred")):
        return False
    model = config.model_config
    return read_record(model.hf_config, model.hf_text_config, warn=log.warning) is not None


def _prepare_compiler(config: Any) -> None:
    """Before the model is built: it takes its compiler's settings along."""
    if asks_for_deferred(config):
        from flashnorm_cli.runtimes.vllm.many_rows import compile_apart

        compile_apart(config)


def why_weights_are_needed(config: Any) -> str | None:
    """Why the norms of a folded model keep their weights under a VllmConfig, or None."""
    if not config.compilation_config.mode:  # CompilationMode.NONE
        return None
    if not isinstance(config.additional_config, dict):
        return "additional_config is not a dictionary, so that compiled graphs could not be told apart"
    passes = config.compilation_config.pass_config
    quantized = config.model_config.quantization is not None
    for name in PASSES_WITH_WEIGHTS:
        # Without quantized linears there is nothing that a norm could be fused with.
        if getattr(passes, name, False) and (quantized or name != "fuse_norm_quant"):
            return f"the compiler pass {name} hands them to kernels that need them"
    return None


# ---- what vLLM is told -----------------------------------------------------------------------------------------------


def _register_loader() -> None:
    from vllm.model_executor import model_loader
    from vllm.model_executor.layers.layernorm import RMSNorm

    default = model_loader.DefaultModelLoader
    for name in ("load_model", "load_weights", "get_all_weights"):
        if not callable(getattr(default, name, None)):
            raise AttributeError(f"its DefaultModelLoader has no {name}")
    if "pass_weight" not in RMSNorm.__init__.__code__.co_names:
        raise AttributeError("its RMSNorm has no pass_weight, which came with vLLM #44109")

    class FlashNormModelLoader(default):  # type: ignore[misc, valid-type]
        """vLLM's default loader; for folded checkpoints, see this module."""

        def load_model(self, vllm_config: Any, *arguments: Any, **more: Any) -> Any:
            self._flashnorm_config = vllm_config
            _prepare_compiler(vllm_config)
            return super().load_model(vllm_config, *arguments, **more)

        def load_weights(self, model: Any, model_config: Any) -> None:
            record = read_record(model_config.hf_config, model_config.hf_text_config, warn=log.warning)
            if record is None:
                super().load_weights(model, model_config)
                return
            _refuse_pooling(record, model_config)
            config = getattr(self, "_flashnorm_config", None)
            if config is None:
                from vllm.config import get_current_vllm_config

                config = get_current_vllm_config()
            self._flashnorm_watch = _Watch(model, record, config, why_weights_are_needed(config))
            model.load_weights = _then(model.load_weights, self._flashnorm_watch.settle)
            super().load_weights(model, model_config)

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[tuple[str, Tensor]]:
            weights = super().get_all_weights(model_config, model)
            record = read_record(model_config.hf_config, model_config.hf_text_config, warn=log.warning)
            if record is None:
                yield from weights
                return
            watch = getattr(self, "_flashnorm_watch", None)
            lies = watch.lies if watch is not None else []
            yield from _with_left_out(weights, record, model_config, lies)

    with _quiet("vllm.model_executor.model_loader"):
        for load_format in FORMATS:
            # Where somebody else has put another loader, it stays.
            if model_loader._LOAD_FORMAT_TO_MODEL_LOADER.get(load_format) is default:
                model_loader.register_model_loader(load_format)(FlashNormModelLoader)


def _with_left_out(
    weights: Iterable[tuple[str, Tensor]], record: Record, model_config: Any, lies: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, then those that layout dropped left out; `lies` collects names that hold no identity."""
    import torch

    seen = set()
    for name, tensor in weights:
        seen.add(name)
        if record.names(name) and not (bool((tensor == 1).all()) or bool((tensor == 0).all())):
            lies.append(name)
        yield name, tensor
    if record.layout == "dropped":
        from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

        plan = get_hf_file_to_dict(RECORD, model_config.model, model_config.revision)
        for name, shape, value in left_out(record, plan, seen):
            yield name, torch.full(shape, value, dtype=model_config.dtype)


def _refuse_pooling(record: Record, model_config: Any) -> None:
    """Embeddings are the final norm's output, which has lost its weight to the head that they do not pass through."""
    if model_config.runner_type == "pooling" and record.lm_head in ("folded", "untied"):
        configs = (model_config.hf_config, model_config.hf_text_config)
        if not any(getattr(c, "classifier_from_token", None) for c in configs):  # these do go through the head
            raise ValueError(
                f"{model_config.model}: its final norm is folded into the output head, so that what a pooling model "
                "returns would lack the norm's weight; fold the source again with --final-norm keep"
            )


def _then(load: Callable[..., Any], after: Callable[[], None]) -> Callable[..., Any]:
    def load_weights(*arguments: Any, **more: Any) -> Any:
        loaded = load(*arguments, **more)
        after()
        return loaded

    return load_weights


def _register_kernels() -> None:
    """Offer this project's kernels. vLLM uses them where --ir-op-priority asks for them."""
    from vllm import ir

    if KERNEL not in ir.ops.rms_norm.impls:
        import flashnorm_cli.runtimes.vllm.kernels  # noqa: F401


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """vLLM warns of every loader that is replaced."""
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)
