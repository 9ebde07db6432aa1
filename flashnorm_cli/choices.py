"""The words that options take, for type checkers, functions and the command line alike."""

from __future__ import annotations

from typing import Literal

FinalNorm = Literal["auto", "keep", "untie"]
Layout = Literal["identity", "dropped"]
Rotation = Literal["hadamard", "random"]
Level = Literal["weights", "layers", "logits"]
Runtime = Literal["vllm", "gguf"]
Dtype = Literal["float32", "bfloat16", "float16"]
LmHead = Literal["folded", "untied", "kept", "none"]
# Nothing is called equivalent that was not run.
Verdict = Literal["equivalent", "as planned, not run", "not equivalent"]
