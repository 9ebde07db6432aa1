"""AMD Quark: its RotationConfig.

Sources: quark/torch/algorithm/rotation/{rotation,rotation_utils}.py, quark/torch/quantization/config/config.py and
quark/torch/algorithm/utils/utils.py.
"""

from __future__ import annotations

from typing import Any

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.plan.emit.modules import Modules

TRIED_WITH = "amd-quark 0.13"
# The classes of which it knows that their gain is `1 + weight` (utils.py, UNIT_OFFSET_NORM_CLASSES).
ONE_PLUS = (
    "GemmaRMSNorm",
    "Gemma2RMSNorm",
    "Gemma3RMSNorm",
    "RecurrentGemmaRMSNorm",
    "VaultGemmaRMSNorm",
    "T5GemmaRMSNorm",
    "T5Gemma2RMSNorm",
    "Qwen3_5RMSNorm",
    "Qwen3_5MoeRMSNorm",
)


def settings(modules: Modules) -> dict[str, Any]:
    """The fields of a RotationConfig. Raises PlanError where the tool cannot express the model.

    Each norm is a group: it is fused into its linears, they are rotated, and so are the writers that run between the
    norm before it and itself. All groups are named for the first layer, so that layers may differ from each other.
    """
    for fusion in modules.fusions:
        if fusion.offset != (1.0 if fusion.class_name in ONE_PLUS else 0.0):
            raise modules.refusal(
                f"the gain of `{pattern_of(fusion.norm)}` is `{fusion.offset:g} + weight`, and the tool does not take "
                f"that of a {fusion.class_name} for it"
            )
    read = {linear for fusion in modules.fusions for linear in fusion.linears}
    bare = next((name for name in modules.readers if name not in read), None)
    if bare is not None:
        raise modules.refusal(
            f"`{pattern_of(bare)}` reads the residual stream with no norm's weight in between, and the tool rotates "
            "what a norm with a weight feeds"
        )
    groups = [
        {"prev_modules": writers, "norm_module": fusion.norm, "next_modules": [*fusion.linears]}
        for fusion, writers in zip(modules.fusions, _shares(modules), strict=True)
    ]
    return {
        "RotationConfig": {
            "name": "rotation",
            "r1": True,
            "r2": False,
            "r3": False,
            "r4": False,
            "online_r1_rotation": False,
            "rotation_size": None,
            "model_decoder_layers": modules.layers,
            "scaling_layers": {"first_layer": groups, "middle_layers": [], "last_layer": []},
        }
    }


def _shares(modules: Modules) -> list[list[str]]:
    """Which writers are rotated with which norm: those that run before it and after the one before it.

    The tool passes over a group without writers. When a writer is rotated makes no difference, so such a group takes
    one of another's. None may be beside itself as a reader: the tool rotates a module once a group.
    """
    last = len(modules.fusions) - 1
    shares: list[list[str]] = [[] for _ in modules.fusions]
    for writer in modules.writers:
        shares[min(modules.before[writer], last)].append(writer)
    for number, (fusion, share) in enumerate(zip(modules.fusions, shares, strict=True)):
        for other in (*shares[number + 1 :], *shares[:number]):
            if not share and len(other) > 1 and other[0] not in fusion.linears:
                share.append(other.pop(0))
        if not share or {*share} & {*fusion.linears}:
            raise modules.refusal(f"no writer of the residual stream is left for `{pattern_of(fusion.norm)}`")
    return shares
