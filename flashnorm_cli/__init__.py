"""Fold RMSNorm gains into the linear layers that read them, and prove that the model stays the same.

The public names are loaded when they are first used: torch and transformers take seconds to import.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flashnorm_cli.adapter import AdapterResult, fold_adapter
    from flashnorm_cli.checkpoint import Checkpoint, Source, open_checkpoint
    from flashnorm_cli.errors import FlashNormError
    from flashnorm_cli.folding import FoldResult, fold
    from flashnorm_cli.hub.push import PushResult, push_to_hub
    from flashnorm_cli.in_memory import fold_model_
    from flashnorm_cli.plan import Plan, make_plan
    from flashnorm_cli.proof.result import Verification
    from flashnorm_cli.proof.verify import verify
    from flashnorm_cli.weightless_model import from_pretrained, weighted, weightless, weightless_norms

__version__ = "0.1.0"
__all__ = [
    "AdapterResult",
    "Checkpoint",
    "FlashNormError",
    "FoldResult",
    "Plan",
    "PushResult",
    "Source",
    "Verification",
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
    "AdapterResult": "adapter",
    "fold_adapter": "adapter",
    "Checkpoint": "checkpoint",
    "Source": "checkpoint",
    "open_checkpoint": "checkpoint",
    "FlashNormError": "errors",
    "FoldResult": "folding",
    "fold": "folding",
    "Plan": "plan",
    "make_plan": "plan",
    "PushResult": "hub.push",
    "push_to_hub": "hub.push",
    "Verification": "proof.result",
    "verify": "proof.verify",
    "fold_model_": "in_memory",
    "from_pretrained": "weightless_model",
    "weighted": "weightless_model",
    "weightless": "weightless_model",
    "weightless_norms": "weightless_model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
