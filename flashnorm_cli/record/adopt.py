"""The record and the flags of a checkpoint that another tool has folded."""

from __future__ import annotations

from typing import Any

from flashnorm_cli.checkpoint.folded import FLAGS, flags_of
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
    own = {key: value for key, value in folded.config.items() if key not in FLAGS}  # the record says it all
    if "architectures" in flags_of(folded.config):  # a class that no runtime knows: its model is the source's
        own["architectures"] = source.config.get("architectures")
    config = write.folded_config(own, plan, layout)
    if config != folded.config:
        text = write.dump_like(config, text)
    return {**write.full_record(source, plan, layout, {}), "adopted": True}, text
