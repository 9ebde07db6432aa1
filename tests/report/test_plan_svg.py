"""The picture of a plan: that it shows the whole plan, that it stays small, and that nothing in it can act.

`python tests/report/test_plan_svg.py` writes docs/plan.svg.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

import flashnorm_cli
from flashnorm_cli.cli import main
from flashnorm_cli.plan.model import Norm, Plan, PlannedRotation, Reader, Run
from flashnorm_cli.report.plan_svg import WIDTH, plan_drawing, plan_svg
from flashnorm_cli.report.strips import strips

SVG = "{http://www.w3.org/2000/svg}"
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&`{{ 7 * 7 }}\x00\x1b\u202e\ud800" + "long_" * 200
DOC = Path(__file__).parents[2] / "docs" / "plan.svg"


def plan_of(
    norms: list[tuple[str, list[str] | str]], offset: float = 0.0, added: tuple[str, ...] = (), **more: Any
) -> Plan:
    """A plan from (norm, its readers, or the reason why it is kept)."""
    readers = [name for _, into in norms if isinstance(into, list) for name in into]
    found = {
        "source": "org/model",
        "commit": "0060bc56",
        "architecture": "LlamaForCausalLM",
        "model_type": "llama",
        "text_config": (),
        "transformers": "5",
        "norms": tuple(
            Norm(
                f"{name}.weight",
                (8,),
                1.0,
                offset,
                () if isinstance(into, str) else tuple(f"{reader}.weight" for reader in into),
                into if isinstance(into, str) else None,
            )
            for name, into in norms
        ),
        "readers": tuple(Reader(f"{name}.weight", 1, (Run(None, 0, 8),)) for name in readers),
        "lm_head": "folded",
        "untie": False,
        "added": {f"{name}.weight": ("F32", (1,)) for name in added},
        "folded_flag": True,
        "not_traced": (),
        "unread": (),
        "notes": (),
        "bytes_total": 1,
        "bytes_changed": 1,
        "bytes_added": 0,
    }
    return Plan(**{**found, **more})


def dense(layers: int) -> list[tuple[str, list[str] | str]]:
    """A dense model, in the order of its files: layer 10 before layer 2."""
    found: list[tuple[str, list[str] | str]] = []
    for i in sorted(range(layers), key=str):
        at = f"model.layers.{i}"
        found.append((f"{at}.input_layernorm", [f"{at}.self_attn.{p}_proj" for p in "qkv"]))
        found.append((f"{at}.post_norm", f"its output is added in `{at}`"))
    return [*found, ("model.norm", ["lm_head"])]


def moe(layers: int, experts: int) -> list[tuple[str, list[str] | str]]:
    """The first three layers dense, then experts."""
    found: list[tuple[str, list[str] | str]] = []
    for i in range(layers):
        at = f"model.layers.{i}.mlp"
        into = [f"{at}.{p}_proj" for p in ("gate", "up")]
        if i > 2:
            into = [f"{at}.experts.{e}.{p}_proj" for e in range(experts) for p in ("gate", "up")] + [f"{at}.gate"]
        found.append((f"model.layers.{i}.norm", into))
    return [*found, ("model.norm", ["lm_head"])]


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}text")]


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}title")]


def test_layers_that_are_alike_are_one_strip() -> None:
    plan = plan_of(dense(126))
    svg = plan_svg(plan)
    assert len(svg) < 6000
    said = texts(svg)
    assert said[:2] == ["org/model", "LlamaForCausalLM: 127 of 253 norms are folded into 379 tensors"]
    assert "model.layers 0\u2013125" in said and "126 layers" in said
    assert [leaf for leaf in said if leaf in ("q_proj", "k_proj", "v_proj", "lm_head")] == [
        "q_proj", "k_proj", "v_proj", "lm_head",
    ]  # fmt: skip
    assert "kept: its output is added in model.layers.*" in " ".join(said)
    hints = titles(svg)
    assert "model.layers.0.self_attn.q_proj.weight and 125 more\nscaled along dimension 1" in hints
    kept = next(hint for hint in hints if "post_norm" in hint)
    assert kept.endswith(" and 125 more\n8 elements, gain w\nkept: its output is added in model.layers.0")


def test_experts_are_one() -> None:
    plan = plan_of(moe(61, 256))
    svg = plan_svg(plan)
    assert len(svg) < 8000
    said = texts(svg)
    assert "mlp.experts.0\u2013255." in said and "3 of 61 layers" in said and "58 of 61 layers" in said
    assert "model.layers.3.mlp.experts.0.gate_proj.weight and 14,847 more\nscaled along dimension 1" in titles(svg)
    assert [(s.name, len(s.numbers), len(s.every)) for s in strips(plan)] == [
        ("model.layers", 3, 61), ("model.layers", 58, 61), ("", 0, 0),
    ]  # fmt: skip


def test_nothing_of_a_plan_is_lost() -> None:
    """Every norm is in a strip, every reader is in it, in whatever way layers alternate."""
    norms = [*dense(7), *moe(9, 4), ("encoder.final_norm", "returned")]
    for i in range(5):
        at = f"decoder.block.{i}.layer"
        norms += [(f"{at}.{j}.norm", [f"{at}.{j}.{'qkv'[i % 3]}"]) for j in (0, 1)]
    norms += [("0.norm", ["0.fc.0", "0.fc.1"]), ("4.norm", ["0.fc.2"]), ("odd.7", "it is odd")]
    plan = plan_of(norms)
    rows = [row for strip in strips(plan) for row in strip.rows]
    assert sorted(norm.tensor for row in rows for norm in row.norms) == sorted(norm.tensor for norm in plan.norms)
    for row in rows:
        mine = {name for _, targets in row.into for target in targets for name in target.tensors}
        assert mine == {reader for norm in row.norms for reader in norm.readers}
        assert (row.reason is None) == all(norm.folded for norm in row.norms)
    plan_svg(plan)


def test_layers_that_differ_in_one_thing_are_apart() -> None:
    base = ("l.0.norm", ["l.0.q", "l.0.k"])
    for other in (["l.1.q"], ["l.1.k", "l.1.q"], ["l.1.q", "l.0.k"], "a reason"):
        assert len(strips(plan_of([base, ("l.1.norm", other)]))) == 2
    assert len(strips(plan_of([base, ("l.1.norm", ["l.1.q", "l.1.k"])]))) == 1
    assert len(strips(plan_of([base, ("l.1.norm", ["l.1.q", "l.1.k"])], added=("l.1.q",)))) == 2
    plan = plan_of([("l.0.norm", "a"), ("l.1.norm", "a")])
    shifted = dataclasses.replace(plan.norms[1], offset=1.0)
    assert len(strips(dataclasses.replace(plan, norms=(plan.norms[0], shifted)))) == 2


def test_what_else_is_said() -> None:
    rotation = PlannedRotation("hadamard", 64, 3, {"a": (0,), "b": (1,)})
    plan = plan_of(
        [("norm", ["lm_head"])], 1.0, added=("lm_head",), rotation=rotation, unread=("mtp.0.a", "mtp.1.a"),
        not_traced=tuple(f"vision.{i}.norm.weight" for i in range(27)), source="/home/me/secret/model", commit=None,
    )  # fmt: skip
    said = " ".join(texts(plan_svg(plan)))
    for words in (
        "norm (1 + w)", "lm_head (new)", "model LlamaForCausalLM", "(hadamard, 64 channels, seed 3) in 2 tensors",
        "left alone: vision.*.norm (27)", "read by the model, left alone: mtp.*.a (2)",
    ):  # fmt: skip
        assert words in said
    assert "secret" not in plan_svg(plan)
    assert "then it is 0" in "".join(titles(plan_svg(plan)))


def test_a_model_whose_layers_all_differ_stays_small() -> None:
    norms = [(f"model.layers.{i}.norm", [f"model.layers.{i}.mlp.p{j}" for j in range(i + 1)]) for i in range(200)]
    svg = plan_svg(plan_of(norms))
    assert "160 more kinds of layers are not drawn" in texts(svg)
    assert len(svg) < 400_000


@pytest.mark.parametrize("width", [320, WIDTH, 864])
def test_everything_is_within_the_picture(width: int) -> None:
    """Long names, by the widest advance of a letter that a monospace font has."""
    long = "a_rather_long_name_" * 8
    norms = [
        *moe(61, 256),
        (f"m.layers.0.{long}", f"because `{long}` " * 9),
        (f"m.{long}.norm", [f"m.{long}.{long}", "x"]),
    ]
    drawn = ET.fromstring(plan_drawing(plan_of(norms, not_traced=(long,)), width, "wide"))
    right, bottom = (float(v) for v in drawn.get("viewBox", "").split()[2:])
    assert right == width
    for rect in drawn.iter(f"{SVG}rect"):
        x, y, w, h = (float(rect.get(key, "nan")) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= right + 0.1 and y + h <= bottom + 0.1
    for text in drawn.iter(f"{SVG}text"):
        advance = 7.42 if "code" in text.get("class", "") else 6.6
        wide = len(text.text or "") * advance
        start = float(text.get("x", "nan")) - {"middle": wide / 2, "end": wide}.get(text.get("text-anchor", ""), 0)
        assert start >= 0 and start + wide <= right + 0.1, text.text
        assert float(text.get("y", "nan")) < bottom


def test_hostile_names_stay_text() -> None:
    plan = plan_of([*dense(3), (EVIL, [EVIL]), (f"x.0.{EVIL}.norm", f"why `{EVIL}`")], source=EVIL, not_traced=(EVIL,))
    plan = dataclasses.replace(plan, architecture=EVIL, rotation=PlannedRotation(EVIL, 1, 1, {}))
    plain = {element.tag for element in ET.fromstring(plan_svg(plan_of(dense(3)))).iter()}
    for svg in (plan_svg(plan), plan_drawing(plan, 320, "narrow")):
        assert svg.isascii() and "<script" not in svg and "`" not in svg
        assert {element.tag for element in ET.fromstring(svg).iter()} <= plain
        assert not re.search("[\x00\x1b\u202e\ud800]", svg)


def test_it_acts_on_nothing_and_is_the_same_each_time() -> None:
    svg = plan_svg(plan_of(dense(3)))
    assert svg == plan_svg(plan_of(dense(3))) and svg.endswith("</svg>\n")
    assert "url(" not in svg and "@import" not in svg and "href" not in svg
    assert svg.count("http") == 1  # its namespace
    assert "prefers-color-scheme:dark" in svg
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and "2 tensors" not in str(root.get("aria-label"))
    assert (root.get("width"), root.get("viewBox")) == (str(WIDTH), f"0 0 {WIDTH} {root.get('height')}")
    assert not [name for element in root.iter() for name in element.attrib if name.startswith("on")]


def test_no_norms() -> None:
    assert texts(plan_svg(plan_of([])))[0] == "org/model"


# ---- the command -----------------------------------------------------------------------------------------------------


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(Path(flashnorm_cli.__file__).parent / "demo_model"), *map(str, arguments)])
    return int(stopped.value.code or 0)


def test_the_command_draws_the_picture_in_the_docs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.svg"
    path.write_text("before")
    assert command("--svg", path) == 0
    said = capsys.readouterr().out
    assert said.endswith(f"Picture: {path}\n") and "9 of 9 norms" in said
    assert path.read_text() == DOC.read_text(), f"docs/plan.svg is old: python {Path(__file__).name} writes it"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.svg"]
    assert command("--svg", "-", "--quiet") == 0
    assert capsys.readouterr().out == path.read_text()


def test_a_picture_that_has_no_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words, code in (
        (["--svg", tmp_path], "is a folder; name a file", 2),
        (["--svg", tmp_path / "no" / "p.svg"], "there is no folder", 2),
        (["--svg", "-", "--json"], "--svg - and --json exclude each other", 2),
    ):
        assert command(*arguments) == code
        said = capsys.readouterr()
        assert words in said.err and said.err.count("\n") == 1 and "<svg" not in said.out
    assert [*tmp_path.iterdir()] == []


if __name__ == "__main__":
    sys.exit(main(["plan", str(Path(flashnorm_cli.__file__).parent / "demo_model"), "--svg", str(DOC)]))
