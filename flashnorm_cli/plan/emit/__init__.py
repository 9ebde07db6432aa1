"""The plan as other tools read it: `flashnorm plan MODEL --emit TOOL`. docs/plan_as_data.md says what is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.plan.emit import auto_round, llm_compressor, quark
from flashnorm_cli.plan.emit.modules import Modules, modules_of
from flashnorm_cli.plan.planner import TracedPlan

_WRITERS: dict[str, tuple[str, Callable[[Modules], dict[str, Any]]]] = {
    "llm-compressor": (llm_compressor.TRIED_WITH, llm_compressor.settings),
    "auto-round": (auto_round.TRIED_WITH, auto_round.settings),
    "quark": (quark.TRIED_WITH, quark.settings),
}
TOOLS = tuple(_WRITERS)


def emit(tool: str, checkpoint: Checkpoint, traced: TracedPlan) -> dict[str, Any]:
    """What a tool needs to fuse the norms of a model and rotate its residual stream, as plain JSON values.

    Args:
        tool: one of TOOLS.
        checkpoint, traced: from `open_checkpoint` and `plan_checkpoint`.
    Raises:
        PlanError: the stream cannot be rotated, or the tool has no words for this model; with the reason.
    """
    tried_with, settings = _WRITERS[tool]
    plan = traced.plan
    return {
        "tool": tool,
        "tried_with": tried_with,
        "source": plan.source,
        "commit": plan.commit,
        "architecture": plan.architecture,
        "transformers": plan.transformers,
        **settings(modules_of(tool, checkpoint, traced)),
    }
