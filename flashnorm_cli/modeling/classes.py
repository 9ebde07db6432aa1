"""The class of a model whose config names none that transformers knows: what its auto classes would take."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from flashnorm_cli.errors import PlanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# How names of classes end, and the mapping of the auto class for that task; what ends otherwise is a language model.
TASKS = {
    "ForSequenceClassification": ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",),
    "ForTokenClassification": ("MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",),
    "ForQuestionAnswering": ("MODEL_FOR_QUESTION_ANSWERING_MAPPING",),
    "ForMaskedLM": ("MODEL_FOR_MASKED_LM_MAPPING",),
    "ForConditionalGeneration": (
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
        "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
        "MODEL_FOR_CAUSAL_LM_MAPPING",
    ),
    "ForCausalLM": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "LMHeadModel": ("MODEL_FOR_CAUSAL_LM_MAPPING",),
    "Model": ("MODEL_MAPPING",),
}
WRAPPED = re.compile(r"^(FSDP|HSDP|DDP)(?=[A-Z])")  # torch's fully_shard and replicate rename the class


def auto_class(config: PretrainedConfig) -> Any:
    """What AutoModelForCausalLM and its like make of a config, for the task that the unknown name ends in.

    Raises PlanError where config.json names something else of transformers, and where the auto classes have nothing.
    """
    import transformers

    names = config.architectures or []
    version = f"transformers {transformers.__version__}"
    if names and hasattr(transformers, names[0]):
        raise PlanError(f"{version} has no model class {names[0]}; a newer one may")
    task = next((t for t in TASKS if names and names[0].endswith(t)), "ForCausalLM")
    for mapping in TASKS[task]:
        known = getattr(transformers, mapping, {})
        if type(config) in known:
            found = known[type(config)]
            return found[0] if isinstance(found, tuple) else found
    if not names:
        raise PlanError("config.json names no architecture, and its model_type has no language model")
    raise PlanError(
        f"{version} has no model class {names[0]}, and its auto classes nothing of that kind for "
        f"model_type {config.model_type}; a newer one may"
    )


def unknown_name(config: PretrainedConfig) -> tuple[str, bool] | None:
    """The class that config.json names and that nothing here knows, and whether it may be more than another spelling.

    Torch's wrappers (`FSDPLlamaForCausalLM`), other capitals (`LLaMAForCausalLM`) and `LlamaFlashNorm` of early
    FlashNorm tools are the class that the auto classes take. Any other may read norms in a way of its own.
    """
    import transformers

    names = config.architectures or []
    code = {str(v).rsplit(".", 1)[-1] for v in (getattr(config, "auto_map", None) or {}).values()}
    if not names or any(hasattr(transformers, name) or name in code for name in names):
        return None
    cls = auto_class(config)

    def plain(name: str) -> str:
        return re.sub(r"[^a-z0-9]", "", WRAPPED.sub("", name).lower())

    same = {plain(cls.__name__), plain(config.model_type + "FlashNorm"), plain(cls.__name__ + "FlashNorm")}
    return names[0], plain(names[0]) not in same
