"""llm-compressor: arguments of its SpinQuantModifier, SmoothQuantModifier and AWQModifier.

Sources: llmcompressor/modifiers/transform/{spinquant,smoothquant,awq}, llmcompressor/modeling/{fuse,offset_norm}.py and
compressed_tensors/transform.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.plan.emit.modules import Modules

TRIED_WITH = "llmcompressor 0.14.0.1, compressed-tensors 0.19.0"
# `oneshot` replaces these by norms that multiply with `weight`, and puts `weight - 1` back (offset_norm.py).
ONE_PLUS = (
    "GemmaRMSNorm",
    "Gemma2RMSNorm",
    "Gemma3RMSNorm",
    "Qwen3NextRMSNorm",
    "Qwen3_5RMSNorm",
    "Qwen3_5MoeRMSNorm",
)
NOTHING = "re:(?!)"  # a pattern that no name matches


def settings(modules: Modules) -> dict[str, Any]:
    """Keyword arguments by the name of the modifier. Raises PlanError where the tool cannot express the model."""
    for name in (*modules.writers, *modules.readers):
        if modules.kind(name) not in (nn.Linear, nn.Embedding):  # it asks for the type itself, not for a subclass
            raise modules.refusal(
                f"`{pattern_of(name)}`, which lies in the residual stream, is a {modules.kind(name).__name__}, and the "
                "tool rotates torch.nn.Linear and torch.nn.Embedding alone"
            )
    for fusion in (*modules.fusions, *modules.smoothings):
        if fusion.offset != (1.0 if fusion.class_name in ONE_PLUS else 0.0):
            raise modules.refusal(
                f"the gain of `{pattern_of(fusion.norm)}` is `{fusion.offset:g} + weight`, and the tool multiplies by "
                f"the weight of a {fusion.class_name}"
            )
    return {
        "SpinQuantModifier": _spinquant(modules),
        "SmoothQuantModifier": {"mappings": [[[*f.linears], f.norm] for f in modules.smoothings]},
        "AWQModifier": {
            "mappings": [{"smooth_layer": f.norm, "balance_layers": [*f.linears]} for f in modules.smoothings]
        },
    }


def _spinquant(modules: Modules) -> dict[str, Any]:
    """Rotation R1 as a transform config: without one, the tool takes its own mappings whatever it is given.

    With one, all that it takes from `mappings` is the embedding, to subtract each row's mean from it; that is exact
    before LayerNorm alone, and so nothing is named there.
    """
    power_of_two = modules.size & (modules.size - 1) == 0
    apply = [
        {"targets": [*modules.writers], "location": "weight_output"},
        {"targets": [*modules.readers], "location": "weight_input", "inverse": True},
    ]
    parts = ("embedding", "attn", "attn_q", "attn_k", "attn_v", "attn_o", "lm_head")
    return {
        "rotations": ["R1"],
        "norm_mappings": [{"norm": f.norm, "linears": [*f.linears]} for f in modules.fusions],
        "mappings": {**dict.fromkeys(parts, NOTHING), "mlp_in": [NOTHING], "mlp_out": [NOTHING]},
        "transform_config": {
            "config_groups": {"R1": {"type": "hadamard" if power_of_two else "random-hadamard", "apply": apply}}
        },
    }
