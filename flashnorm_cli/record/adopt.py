"""The record and the flags of a checkpoint that another tool has folded."""

from __future__ import annotations

from typing import Any

from flashnorm_cli.checkpoint.model import CONFIG, Checkpoint
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.record import write


def adopted(source: Checkpoint, folded: Checkpoint, plan: Plan, layout: str) -> tuple[dict[str, Any], str]:
    """flashnorm.json and the text of config.json that the files of `folded` deserve.

    Args:
        plan: of the norms that the files fold; the others are kept in it, with a reason.
        layout: "identity" or "dropped".
    """
    text = (folded.folder / CONFIG).read_text(encoding="utf-8")
    config = write.folded_config(folded.config, plan, layout)
    if config != folded.config:
        text = write.dump_like(config, text)
    return {**write.full_record(source, plan, layout, {}), "adopted": True}, text
