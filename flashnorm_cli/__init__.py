"""Fold RMSNorm gains into the linear layers that read them, and prove that the model stays the same.

    from flashnorm_cli import fold, verify

    result = fold("./Llama-3.2-1B", "./out")
    verify(result.output).raise_for_failure()

The public names are loaded when they are first used: torch and transformers take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashnorm_cli._version import __version__

if TYPE_CHECKING:
    from flashnorm_cli.adapters.fold import AdapterResult, fold_adapter
    from flashnorm_cli.checkpoint.model import Checkpoint, LeftOut, Source
    from flashnorm_cli.checkpoint.open import open_checkpoint
    from flashnorm_cli.errors import (
        CheckpointError,
        FlashNormError,
        GainOverflowError,
        GainUnderflowError,
        NotRunError,
        PlanError,
        UsageError,
        VerificationError,
    )
    from flashnorm_cli.folding.fold import FoldResult, fold
    from flashnorm_cli.folding.in_memory import fold_model_
    from flashnorm_cli.hub.fold_to_hub import StreamResult, fold_to_hub
    from flashnorm_cli.hub.publish import PushResult
    from flashnorm_cli.hub.push import push_to_hub
    from flashnorm_cli.plan.model import Norm, Plan, Reader
    from flashnorm_cli.plan.planner import make_plan
    from flashnorm_cli.proof.result import Finding, LevelResult, Verification
    from flashnorm_cli.proof.verify import verify
    from flashnorm_cli.runtimes.transformers.weightless import (
        deferred_modules,
        from_pretrained,
        weighted,
        weightless,
        weightless_norms,
    )

__all__ = [
    "AdapterResult",
    "Checkpoint",
    "CheckpointError",
    "Finding",
    "FlashNormError",
    "FoldResult",
    "GainOverflowError",
    "GainUnderflowError",
    "LeftOut",
    "LevelResult",
    "Norm",
    "NotRunError",
    "Plan",
    "PlanError",
    "PushResult",
    "Reader",
    "Source",
    "StreamResult",
    "UsageError",
    "Verification",
    "VerificationError",
    "__version__",
    "deferred_modules",
    "fold",
    "fold_adapter",
    "fold_model_",
    "fold_to_hub",
    "from_pretrained",
    "make_plan",
    "open_checkpoint",
    "push_to_hub",
    "verify",
    "weighted",
    "weightless",
    "weightless_norms",
]

_NAMES = {
    "adapters.fold": "AdapterResult fold_adapter",
    "checkpoint.model": "Checkpoint LeftOut Source",
    "checkpoint.open": "open_checkpoint",
    "errors": "CheckpointError FlashNormError GainOverflowError GainUnderflowError NotRunError PlanError UsageError "
    "VerificationError",
    "folding.fold": "FoldResult fold",
    "folding.in_memory": "fold_model_",
    "hub.fold_to_hub": "StreamResult fold_to_hub",
    "hub.publish": "PushResult",
    "hub.push": "push_to_hub",
    "plan.model": "Norm Plan Reader",
    "plan.planner": "make_plan",
    "proof.result": "Finding LevelResult Verification",
    "proof.verify": "verify",
    "runtimes.transformers.weightless": "deferred_modules from_pretrained weighted weightless weightless_norms",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}

if not TYPE_CHECKING:  # a checker reads the imports above, and so knows a name that is not there

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
