"""The head that shared its weight with the embedding: in the folded base it has a weight of its own.

What the adapter says of the shared weight needs tensors for each of the two.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from flashnorm_cli.adapters.context import PREFIX, Context
from flashnorm_cli.adapters.edits import Edit, Scale
from flashnorm_cli.adapters.kinds import MERGE_HINT, AdapterError


@dataclass(frozen=True)
class Untied:
    """New tensors as (name of the one to start from, edit or None), changed keys of the config, and notes."""

    added: dict[str, tuple[str, Edit | None]] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def untie(context: Context) -> Untied:
    """What an adapter needs beside its own tensors where the source's head is the embedding and the base's is not."""
    folded, config = context.folded, context.config
    head, embedding = folded.head, folded.embedding
    if not folded.untied or head is None or embedding is None:
        return Untied()
    if context.kind == "TRAINABLE_TOKENS":
        raise AdapterError(
            "peft type TRAINABLE_TOKENS: the source ties its output head to the embedding, so the tokens count in "
            f"both, and the base has a head of its own; {MERGE_HINT}"
        )
    target = folded.target(f"{head}.weight")
    edit = Scale(target.dim, target.factor) if target is not None and target.factor is not None else None
    both = bool(config.get("ensure_weight_tying"))
    added: dict[str, tuple[str, Edit | None]] = {}
    changed: dict[str, Any] = {"ensure_weight_tying": False} if both else {}
    for copies, keys in (
        _tokens(context, head, embedding),
        _saved_modules(context, head, embedding, both),
        _lora_of_the_embedding(context, head, embedding, both),
    ):
        added |= {name: (origin, edit) for name, origin in copies.items() if name not in context.tensors}
        changed |= keys
    note = f"{head} is not tied to {embedding} in the base: what the adapter said of both it now says of each"
    return Untied(added, changed, (note,) if added or both else ())


# Each returns the head's new tensors with the one that each is made from, and the config's keys that change.
_Copies = tuple[dict[str, str], dict[str, Any]]


def _tokens(context: Context, head: str, embedding: str) -> _Copies:
    """Rows of single tokens that were trained in the shared weight."""
    delta = f"{PREFIX}{embedding}.token_adapter.trainable_tokens_delta"
    tokens = context.config.get("trainable_token_indices")
    if delta not in context.tensors or tokens is None:
        return {}, {}
    by_layer = tokens if isinstance(tokens, dict) else {embedding: tokens}
    in_embedding = next((v for k, v in by_layer.items() if embedding.endswith(k)), None)
    in_head = next((v for k, v in by_layer.items() if head.endswith(k)), None)
    if in_embedding is None or (in_head is not None and in_head != in_embedding):
        return {}, {}
    rest = {k: v for k, v in by_layer.items() if not head.endswith(k)}
    name = f"{PREFIX}{head}.token_adapter.trainable_tokens_delta"
    return {name: delta}, {"trainable_token_indices": {**rest, head: in_embedding}}


def _saved_modules(context: Context, head: str, embedding: str, both: bool) -> _Copies:
    """A full copy of the shared weight: saved for both, or resized and the head with it."""
    own, copy = f"{PREFIX}{embedding}.weight", f"{PREFIX}{head}.weight"
    saved = context.config.get("modules_to_save") or []
    is_saved = any(embedding.endswith(k) for k in saved)
    if own not in context.tensors or (is_saved and not both):
        return {}, {}
    return {copy: own}, {"modules_to_save": [*saved, head]} if is_saved else {}


def _lora_of_the_embedding(context: Context, head: str, embedding: str, both: bool) -> _Copies:
    if f"{PREFIX}{embedding}.lora_embedding_A" not in context.tensors:
        return {}, {}
    if both:
        if f"{PREFIX}{head}.lora_A.weight" not in context.tensors:
            raise AdapterError(
                f"{PREFIX}{head}.lora_A.weight: is missing; ensure_weight_tying says that the head has it"
            )
        targets = context.config.get("target_modules")
        named = rf"(?:{targets}|^{re.escape(head)}$)" if isinstance(targets, str) else [*(targets or []), head]
        return {}, {"target_modules": named}
    resized, folded = f"{PREFIX}{embedding}.base_layer.weight", context.folded
    if resized not in context.tensors:
        return {}, {}
    if context.tensors[resized].shape == folded.parameters[folded.first[f"{embedding}.weight"]].shape:
        return {}, {}
    return {f"{PREFIX}{head}.weight": resized}, {}
