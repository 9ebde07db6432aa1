"""The command line as a whole: what it imports, prints and promises. Wrong calls are in test_bad_input.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import run
from documents import document
from safetensors import safe_open

from flashnorm_cli import demo
from flashnorm_cli.cli import main
from flashnorm_cli.demo import MODEL

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["fold", "--help"], ["plan", "--help"], ["verify", "--help"], ["demo", "--help"], ["--version"]],
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom flashnorm_cli.cli import main\n"
        f"try: main({arguments})\n"
        "finally: print('HEAVY', {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "HEAVY set()" in done.stdout
    if arguments[-1] == "--help" and len(arguments) == 2:
        assert f"Examples:\n    flashnorm {arguments[0]}" in done.stdout


def test_ci_runs_the_readme_command() -> None:
    commands = [
        line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    python3")
    ]
    assert len(commands) == 2
    assert "flashnorm demo" in commands[0]
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For scripts into a folder, then for people into a temporary one: the same figures, and their story."""
    assert run("demo", tmp_path / "out", "--json") == 0
    first = document(capsys.readouterr().out)
    assert first["verdict"] == "equivalent"
    weights, layers, logits = (
        first["verification"]["levels"][level]["figures"] for level in ("weights", "layers", "logits")
    )
    assert (weights["folded"], weights["changed"]) == (9, 9 + 4 * 5 + 1)
    assert len(layers["norms"]) == 9
    assert first["text_source"] == first["text_folded"]
    assert logits["rounding_error"] > 1e-6  # the folded weights are not the source's: something was compared
    assert logits["source"]["perplexity"] < 6 > logits["folded"]["perplexity"]  # of 256: it has learned something
    with safe_open(tmp_path / "out" / "model-00001-of-00002.safetensors", "pt") as file:
        assert (file.get_tensor("model.layers.0.input_layernorm.weight") == 1).all()

    seen = []
    monkeypatch.setattr(demo, "run_demo", lambda output, real=demo.run_demo: seen.append(real(output)) or seen[-1])
    assert run("demo") == 0
    again = json.loads(json.dumps(seen[0].verification.to_json()))
    assert again["levels"]["logits"]["figures"] == logits
    shown = capsys.readouterr()
    for words in (
        "9 norms into the 21 linear layers",
        "perplexity",
        "the same text",
        "Equivalent.",
        "flashnorm fold <model>",
    ):
        assert words in shown.out
    assert shown.err == ""


def test_demo_model_is_small_and_trained() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4e6
    with safe_open(MODEL / "model-00001-of-00002.safetensors", "pt") as file:
        gain = file.get_tensor("model.layers.0.input_layernorm.weight").float()
    assert (gain - 1).abs().mean() > 0.2


def test_plan_for_people_and_for_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", MODEL) == 0
    text = capsys.readouterr().out
    assert "folded  model.layers.*.input_layernorm " in text
    assert "into k_proj, q_proj, v_proj" in text
    assert "9 of 9 norms are folded into 21 tensors" in text
    assert run("plan", MODEL, "--json", "--final-norm", "keep") == 0
    found = document(capsys.readouterr().out)
    plan, final = found["plan"], found["plan"]["norms"][-1]
    assert (final["tensor"], final["folded"], final["reason"]) == ("model.norm.weight", False, '`final_norm="keep"`')
    assert found["kept_norms"] == [{"tensor": "model.norm.weight", "reason": "--final-norm keep"}]
    assert plan["folded_flag"] is found["flashnorm_folded"] is False
    q_proj = next(r for r in plan["readers"] if r["tensor"] == "model.layers.0.self_attn.q_proj.weight")
    assert (q_proj["dim"], q_proj["runs"]) == (1, [["model.layers.0.input_layernorm.weight", 0, 192, 1]])
    assert run("plan", MODEL, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_bare_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 0 and "Commands:" in capsys.readouterr().out
