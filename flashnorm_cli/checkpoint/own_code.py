"""How far a checkpoint's own Python code differs from transformers' classes, as its text shows: read, never run."""

from __future__ import annotations

import ast
import re

_WHOLE_MODEL = re.compile(r"(Model|LM|For[A-Z]\w*)$")
# What reaches into a model: its layers, its norms.
_INNER = re.compile(r"(norm\d*|layers?|_ln|ln_\w+)$")


def only_wraps(code: str) -> bool:
    """Whether a file only builds whole models on imported ones, with layers as in transformers.

    A layer, an attention or a norm of its own may do anything with what it reads, and so may code that reaches into
    the layers of a model, imports more files of its own models, or changes classes of others.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError):
        return False
    nodes = list(ast.walk(tree))
    imported = {
        alias.asname or alias.name: alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("transformers")
        for alias in node.names
    }
    classes = [
        node for node in nodes if isinstance(node, ast.ClassDef) and not node.name.endswith(("Config", "Output"))
    ]
    return (
        bool(classes)
        and all(
            any(isinstance(base, ast.Name) and _WHOLE_MODEL.search(imported.get(base.id, "")) for base in node.bases)
            for node in classes
        )
        and not any(isinstance(node, ast.Attribute) and _INNER.search(node.attr) for node in nodes)
        and not any(_changes_others(node) for node in nodes)
    )


def _changes_others(node: ast.AST) -> bool:
    """An assignment to an attribute of something but `self`, or `setattr`."""
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in ("setattr", "exec", "eval")
    targets = node.targets if isinstance(node, ast.Assign) else ()
    return any(
        isinstance(target, ast.Attribute) and not (isinstance(target.value, ast.Name) and target.value.id == "self")
        for target in targets
    )
