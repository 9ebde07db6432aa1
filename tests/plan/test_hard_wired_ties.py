"""Families whose output head llama.cpp ties to the embedding whatever the files say: an untied head would be lost.

What the engine makes of such a fold is in docs/llama_cpp.md, run by docs/experiments/llama_cpp_engine.py.
"""

import json
from pathlib import Path

import pytest
from documents import document
from families import build, randomize_gains, save

from flashnorm_cli.cli import main
from flashnorm_cli.cli.wording import in_flags
from flashnorm_cli.plan.planner import HIDDEN_STATES


def fold(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(["fold", *(str(a) for a in arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("family", ["gemma", "gemma2", "cohere", "cohere2"])
def test_the_final_norm_is_kept_unless_it_is_forced(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build(family, seed=0)
    randomize_gains(model, seed=1)
    save(model, tmp_path / "source")

    lines = fold(capsys, tmp_path / "source", tmp_path / "kept").splitlines()
    (why,) = (line for line in lines if line.startswith("kept") and " model.norm " in line)
    assert "the output head is tied to the embedding, and runtimes tie it for" in why
    record = json.loads((tmp_path / "kept" / "flashnorm.json").read_text())
    assert (record["lm_head"], record["added"], record["folded_flag"]) == ("kept", {}, False)
    assert [norm["tensor"] for norm in record["norms"] if not norm["folded"] and norm["readers"]] == [
        "model.norm.weight"
    ]

    forced = document(fold(capsys, tmp_path / "source", tmp_path / "untied", "--final-norm", "untie", "--json"))
    assert forced["lm_head"] == "untied"
    note, about_hidden_states = forced["notes"]
    assert about_hidden_states == in_flags(HIDDEN_STATES)
    assert f"runtimes tie it for {family} whatever the files say" in note
    assert note.endswith("llama.cpp will drop the separate head and compute wrong logits")
