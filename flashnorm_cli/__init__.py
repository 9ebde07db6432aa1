"""Fold RMSNorm gains into the linear layers that read them, and prove that the model stays the same.

The public names are loaded when they are first used: torch and transformers take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from flashnorm_cli._version import __version__

if TYPE_CHECKING:
    from flashnorm_cli.adapters.fold import AdapterResult, fold_adapter
    from flashnorm_cli.checkpoint.model import Checkpoint, Source
    from flashnorm_cli.checkpoint.open import open_checkpoint
    from flashnorm_cli.errors import FlashNormError
    from flashnorm_cli.folding.fold import FoldResult, fold
    from flashnorm_cli.folding.in_memory import fold_model_
    from flashnorm_cli.hub.publish import PushResult
    from flashnorm_cli.hub.push import push_to_hub
    from flashnorm_cli.plan.model import Plan
    from flashnorm_cli.plan.planner import make_plan
    from flashnorm_cli.proof.result import Verification
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
    "FlashNormError",
    "FoldResult",
    "Plan",
    "PushResult",
    "Source",
    "Verification",
    "__version__",
    "deferred_modules",
    "fold",
    "fold_adapter",
    "fold_model_",
    "from_pretrained",
    "make_plan",
    "open_checkpoint",
    "push_to_hub",
    "verify",
    "weighted",
    "weightless",
    "weightless_norms",
]

_HOME = {
    "AdapterResult": "adapters.fold",
    "fold_adapter": "adapters.fold",
    "Checkpoint": "checkpoint.open",
    "Source": "checkpoint.open",
    "open_checkpoint": "checkpoint.open",
    "FlashNormError": "errors",
    "FoldResult": "folding.fold",
    "fold": "folding.fold",
    "Plan": "plan.planner",
    "make_plan": "plan.planner",
    "PushResult": "hub.publish",
    "push_to_hub": "hub.push",
    "Verification": "proof.result",
    "verify": "proof.verify",
    "fold_model_": "folding.in_memory",
    "deferred_modules": "runtimes.transformers.weightless",
    "from_pretrained": "runtimes.transformers.weightless",
    "weighted": "runtimes.transformers.weightless",
    "weightless": "runtimes.transformers.weightless",
    "weightless_norms": "runtimes.transformers.weightless",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
