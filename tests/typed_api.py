"""What a type checker sees of the public names. mypy reads this file; nothing runs it.

A line with `type: ignore` has to be wrong: where it is not, mypy (warn_unused_ignores) says so.
"""

from typing import Literal, assert_type

import flashnorm_cli
from flashnorm_cli import FoldResult, Plan, Verification, fold, make_plan, verify


def right() -> None:
    assert_type(fold("model", final_norm="keep", layout="dropped", rotate="hadamard"), FoldResult)
    assert_type(make_plan("model", "untie"), Plan)
    found = verify("folded", levels=["weights", "logits"], runtimes=("vllm",), dtype="bfloat16")
    verify("folded", levels="weights", runtimes=["gguf"], tasks=("arc_easy",))
    assert_type(found.raise_for_failure(), Verification)
    assert_type(found.verdict, Literal["equivalent", "as planned, not run", "not equivalent"])


def wrong() -> None:
    flashnorm_cli.fodl("model")  # type: ignore[attr-defined]
    fold("model", final_norm="kept")  # type: ignore[arg-type]
    fold("model", layout="drop")  # type: ignore[arg-type]
    fold("model", rotate="spin")  # type: ignore[arg-type]
    make_plan("model", final_norm="no")  # type: ignore[arg-type]
    verify("folded", levels=["bits"])  # type: ignore[list-item]
    verify("folded", runtimes=["onnx"])  # type: ignore[list-item]
    verify("folded", dtype="int8")  # type: ignore[arg-type]
