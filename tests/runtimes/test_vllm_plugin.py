"""The part of the vLLM plugin that needs no vLLM: what a record names, what was left out, what an identity is.

The rest is run by docs/experiments/vllm_engine.py, where vLLM is installed; docs/vllm.md holds what was seen.
"""

import json
import logging
import subprocess
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import families
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from flashnorm_cli import fold
from flashnorm_cli.record.read import Record, left_out, read_record
from flashnorm_cli.runtimes.vllm import plugin as vllm_plugin

FAMILIES = ("qwen3", "gemma3", "mixtral")  # norms kept beside folded ones; 1 + w in a multimodal model; experts


@pytest.fixture(scope="module", params=FAMILIES)
def folded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `source`, and folded as `identity` and as `dropped`."""
    folder = tmp_path_factory.mktemp(request.param)
    model = families.build(request.param, seed=0)
    families.randomize_gains(model, seed=1)
    families.save(model, folder / "source")
    for layout in ("identity", "dropped"):
        fold(str(folder / "source"), folder / layout, layout=layout)
    return folder


def plan_of(folder: Path) -> dict:
    return json.loads((folder / "flashnorm.json").read_text())


def record_of(folder: Path) -> Record:
    record = read_record(AutoConfig.from_pretrained(folder))
    assert record is not None
    return record


def test_vllm_finds_the_plugin() -> None:
    (found,) = (e for e in entry_points(group="vllm.general_plugins") if e.name == "flashnorm")
    assert found.load() is vllm_plugin.register


def test_importing_it_imports_neither_torch_nor_vllm() -> None:
    heavy = "sys.exit(bool({'torch', 'vllm', 'transformers'} & {*sys.modules}))"
    code = f"import sys, flashnorm_cli.runtimes.vllm.plugin; {heavy}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
@pytest.mark.parametrize("another", [False, True])
def test_another_vllm_is_left_alone(another: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    if another:  # a loader by the same name, but norms that know no weightless way
        layers = tmp_path / "vllm" / "model_executor" / "layers"
        loader = tmp_path / "vllm" / "model_executor" / "model_loader"
        for package in (layers, loader):
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("")
        methods = "".join(f"    def {n}(self): pass\n" for n in ("load_model", "load_weights", "get_all_weights"))
        (loader / "__init__.py").write_text(f"class DefaultModelLoader:\n{methods}")
        (layers / "layernorm.py").write_text("class RMSNorm:\n    def __init__(self, size): self.weight = size\n")
        monkeypatch.syspath_prepend(tmp_path)
    with caplog.at_level(logging.WARNING):
        vllm_plugin.register()
    for name in [n for n in sys.modules if n.split(".")[0] == "vllm"]:
        del sys.modules[name]
    (line,) = caplog.messages
    assert "norms keep their weights" in line
    assert ("pass_weight" if another else "No module named 'vllm'") in line


def test_a_record_names_the_folded_norms_and_no_others(folded: Path) -> None:
    record = record_of(folded / "identity")
    named = {name for name in load_file(folded / "identity" / "model.safetensors") if record.names(name)}
    assert named == {norm["tensor"] for norm in plan_of(folded / "identity")["norms"] if norm["folded"]}
    assert named
    assert record.may_name("language_model.model.layers.3.input_layernorm")
    assert record.may_name("model.norm")
    assert not record.may_name("model.layers.3.self_attn.q_norm")
    assert read_record(AutoConfig.from_pretrained(folded / "source")) is None


def test_a_nested_config_has_the_record_as_well(folded: Path) -> None:
    config = AutoConfig.from_pretrained(folded / "dropped")
    assert read_record(SimpleNamespace(), config.get_text_config()) == read_record(config)


@pytest.mark.parametrize("change", [{"format": 2}, {"folded": "norm.weight"}, {"folded": [1]}, {"kept": None}])
def test_a_record_that_is_not_known_is_no_record(change: dict, caplog: pytest.LogCaptureFixture) -> None:
    known = {"format": 1, "layout": "identity", "folded": ["norm.weight"], "kept": {}, "lm_head": "folded"}
    assert read_record(SimpleNamespace(flashnorm=known)) == Record(
        "identity", frozenset(["norm.weight"]), frozenset(), "folded"
    )
    assert not caplog.messages
    for value in (known | change, "yes"):
        assert read_record(SimpleNamespace(flashnorm=value)) is None
        assert "norms keep their weights" in caplog.messages[-1]


def test_left_out_is_what_layout_identity_holds(folded: Path) -> None:
    there, whole = (load_file(folded / layout / "model.safetensors") for layout in ("dropped", "identity"))
    found = left_out(record_of(folded / "dropped"), plan_of(folded / "dropped"), there)
    assert {name for name, _, _ in found} == whole.keys() - there.keys()
    for name, shape, value in found:
        assert torch.equal(torch.full(shape, value), whole[name])
    assert not left_out(record_of(folded / "dropped"), plan_of(folded / "dropped"), whole)


def test_only_what_config_json_names_is_made_up() -> None:
    norm = {"shape": [4], "scale": 1.0, "offset": 1.0, "folded": True}
    plan = {"norms": [norm | {"tensor": "a.0.norm.weight"}, norm | {"tensor": "b.0.norm.weight"}]}
    record = Record("dropped", frozenset(["a.*.norm.weight"]), frozenset(), "none")
    assert left_out(record, plan, []) == [("a.0.norm.weight", (4,), 0.0)]


@pytest.mark.parametrize("plan", [None, {}, {"norms": [{"tensor": "norm.weight"}]}, {"norms": 3}, []])
def test_without_a_plan_nothing_is_made_up(plan: object) -> None:
    with pytest.raises(ValueError, match=r"flashnorm\.json.*layout identity"):
        left_out(Record("dropped", frozenset(), frozenset(), "none"), plan, [])


def test_a_lie_is_found_by_its_name(folded: Path) -> None:
    record = record_of(folded / "identity")
    tensors = load_file(folded / "identity" / "model.safetensors")

    def lies() -> list[str]:
        found: list[str] = []
        passed = dict(vllm_plugin._with_left_out(tensors.items(), record, None, found))
        assert passed == tensors  # the very same tensors, none of them changed
        return found

    assert not lies()
    name = next(n for n in tensors if record.names(n))
    tensors[name][-1] += 0.5
    assert lies() == [name]
    for other in tensors:
        if not record.names(other):
            tensors[other] = tensors[other] + 0.5
    assert lies() == [name]


def test_identity() -> None:
    nearly = torch.ones(8)
    nearly[3] += 1e-6
    assert vllm_plugin.is_identity(torch.ones(8, dtype=torch.bfloat16), 1.0)
    assert vllm_plugin.is_identity(torch.zeros(8), 0.0)
    for weight, value in [
        (nearly, 1.0),
        (torch.ones(8), 0.0),
        (torch.zeros(8), 1.0),
        (torch.full((8,), float("nan")), 1.0),
        (torch.ones(8, device="meta"), 1.0),
        (torch.ones(0), 1.0),
    ]:
        assert not vllm_plugin.is_identity(weight, value)


def settings(mode: int, quantization: str | None = None, extra: object = None, **passes: bool) -> SimpleNamespace:
    compilation = SimpleNamespace(mode=mode, pass_config=SimpleNamespace(**passes))
    model = SimpleNamespace(quantization=quantization)
    return SimpleNamespace(compilation_config=compilation, model_config=model, additional_config=extra or {})


def test_passes_that_need_weights_get_them() -> None:
    why = vllm_plugin.why_weights_are_needed
    assert why(settings(3)) is None
    assert why(settings(3, fuse_norm_quant=True)) is None  # nothing to fuse with
    assert "fuse_norm_quant" in why(settings(3, "fp8", fuse_norm_quant=True))
    assert "fuse_allreduce_rms" in why(settings(3, fuse_allreduce_rms=True))
    assert why(settings(0, "fp8", fuse_norm_quant=True, fuse_allreduce_rms=True)) is None  # eager: no pass runs
    assert "additional_config" in why(settings(3, extra=object()))


@pytest.mark.parametrize(
    ("runner", "head", "tokens", "refused"),
    [
        ("pooling", "folded", None, True),
        ("pooling", "untied", None, True),
        ("pooling", "kept", None, False),
        ("pooling", "none", None, False),
        ("pooling", "folded", ["no", "yes"], False),
        ("generate", "folded", None, False),
    ],
)
def test_a_pooling_model_needs_its_final_norm(runner: str, head: str, tokens: object, refused: bool) -> None:
    text = SimpleNamespace(classifier_from_token=tokens)
    model = SimpleNamespace(model="folder", runner_type=runner, hf_config=SimpleNamespace(), hf_text_config=text)
    record = Record("identity", frozenset(), frozenset(), head)
    if refused:
        with pytest.raises(ValueError, match="--final-norm keep"):
            vllm_plugin._refuse_pooling(record, model)
    else:
        vllm_plugin._refuse_pooling(record, model)
