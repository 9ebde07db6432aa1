"""Full copies of parameters in an adapter: modules_to_save, biases, embeddings, LN tuning, trained tokens."""

from __future__ import annotations

from flashnorm_cli.adapters.context import Context
from flashnorm_cli.adapters.edits import Edit, Ratio
from flashnorm_cli.adapters.kinds import MERGE_HINT, AdapterError


def edit_copy(context: Context, key: str, name: str) -> Edit | None:
    """What happens to the tensor `key`, a copy of the model's parameter `name`. None: it stays as it is."""
    folded = context.folded
    target = folded.target(name)
    module, _, leaf = name.rpartition(".")
    if target is None:
        owner = folded.target(f"{module}.weight")
        behind_the_layer = leaf == "bias" and owner is not None and owner.norm is None
        is_buffer = name in folded.model.state_dict()
        if behind_the_layer or is_buffer:
            return None
        raise AdapterError(f"{key}: the model {context.model_name} has no such weight{context.hint()}")
    if leaf == "bias" and f"{module}.weight" in folded.norms:
        raise AdapterError(f"{key}: is the bias of a norm that is folded; {MERGE_HINT}")
    if target.norm is not None:
        norm, shape = target.norm, context.tensors[key].shape
        if shape != tuple(norm.gain.shape):
            raise AdapterError(f"{key}: has shape {list(shape)}, the source's norm {list(norm.gain.shape)}")
        return context.checked(key, Ratio(norm.gain, norm.scale, norm.offset))
    return None if target.factor is None else context.scale(key, target.dim, target.factor)


def edit_tokens(context: Context, key: str, module: str) -> Edit | None:
    """What happens to the rows of single tokens that were trained in an embedding or in the head."""
    target = context.folded.target(f"{module}.weight")
    if target is None:
        raise AdapterError(f"{key}: the model {context.model_name} has no {module}")
    return None if target.factor is None else context.scale(key, target.dim, target.factor)
