"""What a comparison shard by shard proves, as flashnorm.json holds it: files as planned, and nothing was run."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers

from flashnorm_cli._version import __version__
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.hub.journal import Uploaded
from flashnorm_cli.hub.published import same_fold
from flashnorm_cli.hub.standing import NOT_RUN
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof.files import hashed_files

WHY_NOT_RUN = "folded from Hub to Hub, where neither model is on one disk"


def shard_entry(
    record: dict[str, Any],
    held: Any,
    plan: Plan,
    folded: Checkpoint,
    hashes: Mapping[str, tuple[str, str]],
    uploads: Mapping[str, Uploaded],
    command: Sequence[str],
) -> dict[str, Any]:
    """The `verify` entry of a fold whose shards were compared before they went out.

    What the repository holds already of these very files (`held` is its flashnorm.json) stays, for it may say more.
    """
    files = {name: hashes[name][0] for name in hashed_files(folded)}
    known = held.get("verify") if same_fold(record, held) else None
    if isinstance(known, dict) and known.get("files") == files and known.get("equivalent") is not False:
        return known
    if isinstance(known, dict) and known.get("files") == files and known.get("verdict") == NOT_RUN:
        return known
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    compared = sum(upload.compared for upload in uploads.values())
    figures = {
        "tensors": compared,
        "changed": len(plan.readers) + len(plan.folded) * (record.get("layout") != "dropped"),
        "identical": compared,
        "rounded_otherwise": 0,
        "differing": 0,
        "bytes_read": sum(upload.size for upload in uploads.values())
        + sum(fact["size"] for name, fact in record["source_files"].items() if name in folded.shards),
        "layout": record.get("layout"),
        "folded": len(plan.folded),
        "kept": len(plan.kept),
    }
    return {
        "verdict": NOT_RUN,
        "equivalent": False,
        "levels": {
            "weights": {"status": "passed", "figures": figures, "seconds": 0.0, "date": now},
            **{level: {"status": "skipped", "reason": WHY_NOT_RUN, "date": now} for level in ("layers", "logits")},
        },
        "thresholds": {},
        "environment": {
            "flashnorm": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": f"cpu ({platform.machine()})",
            "date": now,
            "command": " ".join(command),
        },
        "source": {"name": record["source"], "commit": record["commit"], "files": record["source_files"]},
        "files": files,
    }
