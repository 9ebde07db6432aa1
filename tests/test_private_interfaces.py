"""Private interfaces of other libraries: where each is touched, and that it is still there.

A new version of a library fails here first. What the code reaches for that is not listed here fails, too.
"""

import ast
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "flashnorm_cli"
LIBRARIES = ("accelerate", "cupy", "huggingface_hub", "peft", "safetensors", "torch", "transformers", "vllm")
# What is private, by its dotted name, and the folders that touch it.
PRIVATE = {
    "torch._C.DisableTorchFunction": {"trace"},
    "torch.utils._python_dispatch.TorchDispatchMode": {"trace"},
    "torch.utils._python_dispatch._disable_current_modes": {"trace"},
    "torch.utils._pytree.tree_map": {"trace"},
    "torch._C._AutoDispatchBelowAutograd": {"norms"},
    "torch._C._functorch.peek_interpreter_stack": {"norms"},
    "torch._C._get_tracing_state": {"norms"},
    "torch._C._len_torch_dispatch_stack": {"norms"},
    "torch._C._dynamo.guards.TensorGuards": {"cuda"},
    "torch._C._cuda_getCurrentRawStream": {"cuda"},
    "torch._dynamo.reset": {"bench"},
    "torch._inductor.pattern_matcher.CallFunctionVarArgs": {"runtimes"},
    "torch._inductor.pattern_matcher.Match": {"runtimes"},
    "torch._inductor.pattern_matcher.PatternMatcherPass": {"runtimes"},
    "torch._inductor.pattern_matcher.register_graph_pattern": {"runtimes"},
    "huggingface_hub.utils._http": {"checkpoint"},  # and its _GLOBAL_CLIENT_FACTORY
    "huggingface_hub.utils._runtime.is_xet_available": {"hub"},
}
# Only on a machine with the library; named here, looked at there.
ELSEWHERE = {"vllm._custom_ops": {"bench"}, "torch.ops._C": {"bench"}}


def touched() -> dict[str, set[str]]:
    """Private names of the libraries, as imports and dotted expressions name them, with the folders."""
    found: dict[str, set[str]] = {}

    def note(name: str, path: Path) -> None:
        parts = name.split(".")
        if parts[0] in LIBRARIES and any(p.startswith("_") and not p.startswith("__") for p in parts):
            found.setdefault(name, set()).add(path.relative_to(PACKAGE).parts[0])

    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    note(f"{node.module}.{alias.name}", path)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    note(alias.name, path)
            elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).replace(".", "").isidentifier():
                note(name, path)
    # `torch._C` is on the way to `torch._C.X`
    return {n: where for n, where in found.items() if not any(other.startswith(f"{n}.") for other in found)}


def test_private_names_are_touched_in_one_folder_each():
    known = PRIVATE | ELSEWHERE
    strange = {
        name: folders
        for name, folders in touched().items()
        if not any(name == k or name.startswith(f"{k}.") for k in known)
    }
    assert strange == {}
    for name, folders in touched().items():
        allowed = next(known[k] for k in known if name == k or name.startswith(f"{k}."))
        assert folders <= allowed, name


@pytest.mark.parametrize("name", PRIVATE)
def test_it_is_still_there(name):
    if name.endswith("_cuda_getCurrentRawStream"):
        pytest.importorskip("cupy", reason="torch without CUDA has no streams")
    parts = name.split(".")
    for n in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            value = getattr(value, part)
        if name == "huggingface_hub.utils._http":
            assert callable(value._GLOBAL_CLIENT_FACTORY)
        return
    pytest.fail(f"{name}: no such module")
