"""Readers that a model's code shows and a text forward does not enter: a second decoder behind `generate()`, say.

Read from the source text of the classes, never run.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.users import DECODER, GENERATION, LAST, User

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from flashnorm_cli.trace.result import Trace

# Code that all models share: what is read there is read of every model.
_SHARED = (
    "transformers.generation.",
    "transformers.modeling_",
    "transformers.utils",
    "transformers.integrations",
    "torch.",
)
# Inputs of a layer that are no sign of a second model behind the first one.
_OWN_HIDDEN = re.compile(r"^hidden_states?$|^(encoder|vision|image|video|audio|pixel|output|return)_")
_MEDIA = re.compile(r"image|video|vision|audio|speech|pixel")
_HIDDEN = re.compile(r"(^|_)last_hidden(_states?)?$|^hidden_states$")


def code_users(model: PreTrainedModel, trace: Trace) -> list[User]:
    """What the classes of a traced model read of its hidden states outside of the traced forward."""
    return [*_generation_code(type(model)), *_second_decoders(model, trace)]


def _generation_code(cls: type) -> Iterator[User]:
    """Methods that `forward` does not lead to (`generate()`, `encode()`), and that read hidden states."""
    methods = _methods(cls)
    for name in sorted(methods.keys() - _closure(methods, "forward")):
        if seen := _reads_hidden_states(methods[name]):
            line = f"{cls.__name__}.{name}() reads `{seen}`, the final norm's output, outside of the traced forward"
            yield User(GENERATION, f"{cls.__name__}.{name}", LAST, line)
            return


def _second_decoders(model: PreTrainedModel, trace: Trace) -> Iterator[User]:
    """Parts that no text forward entered, and that take hidden states as an input of theirs."""
    import torch

    entered = {name[:n] for name in trace.reached for n, character in enumerate(name) if character == "."}
    for path, module in model.named_modules():
        above = path.rpartition(".")[0]
        if not path or path in entered or (above and above not in entered):  # a part of a part is named with it
            continue
        if isinstance(module, (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)):
            entered.add(path)  # its members are parts by themselves
            continue
        takes = [
            name
            for name in inspect.signature(module.forward).parameters
            if "hidden" in name and not _OWN_HIDDEN.search(name)
        ]
        if takes and any(True for _ in module.parameters()):
            line = f"`{path}` was not reached by a text forward, and takes `{takes[0]}`"
            yield User(DECODER, path, LAST, line)


def reads_media(owner: type, part: str) -> bool:
    """Whether a class uses a part of it to make its input of images or audio (`get_image_features`)."""
    return any(
        _MEDIA.search(name) and any(isinstance(n, ast.Attribute) and n.attr == part for n in ast.walk(tree))
        for name, tree in _methods(owner).items()
    )


# ---- source text -----------------------------------------------------------------------------------------------------


@cache
def _methods(cls: type) -> dict[str, ast.AST]:
    """The methods of a class and of its bases, but for the code that all models share, as the class resolves them."""
    found: dict[str, ast.AST] = {}
    for base in cls.__mro__:
        if base.__module__.startswith(_SHARED) or base is object:
            continue
        for name, method in vars(base).items():
            function = method.__func__ if isinstance(method, (classmethod, staticmethod)) else method
            if name not in found and inspect.isfunction(function):
                tree = _tree(inspect.unwrap(function))
                if tree is not None:
                    found[name] = tree
    return found


def _tree(function: Any) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError, ValueError):  # typed at a prompt, or compiled
        return None


def _closure(methods: dict[str, ast.AST], first: str) -> set[str]:
    """A method and those that it leads to by `self.name`."""
    found: set[str] = set()
    todo = [first]
    while todo:
        name = todo.pop()
        if name in found or name not in methods:
            continue
        found.add(name)
        todo += [
            node.attr
            for node in ast.walk(methods[name])
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"
        ]
    return found


def _reads_hidden_states(tree: ast.AST) -> str | None:
    """What of a model's hidden states a method reads; what it only collects for the caller does not count."""
    collected = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "output_hidden_states" in ast.unparse(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in collected:
            continue
        if isinstance(node, ast.Attribute) and _HIDDEN.search(node.attr):
            if isinstance(node.ctx, ast.Load) and not _of_a_tower(node.value):
                return ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("get", "pop"):
            first = node.args[0] if node.args else None
            if isinstance(first, ast.Constant) and _HIDDEN.search(str(first.value)):
                return ast.unparse(node)
        elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = node.slice.value
            if isinstance(key, str) and _HIDDEN.search(key) and not _of_a_tower(node.value):
                return ast.unparse(node)
    return None


def _of_a_tower(value: ast.AST) -> bool:
    """`vision_outputs.last_hidden_state`: what a tower has made of an image or of audio."""
    return bool(re.search(rf"{_MEDIA.pattern}|encoder|qformer|query", ast.unparse(value)))
