"""A plan is told in one wording: on the terminal, on the report page and on the model card."""

import dataclasses
import html
import json
import re

import pytest

from flashnorm_cli.cli.plan import norm_lines
from flashnorm_cli.hub.card import CardFacts, build_card
from flashnorm_cli.plan import wording
from flashnorm_cli.plan.model import LM_HEADS, Norm, Plan
from flashnorm_cli.proof.result import LevelResult, Verification
from flashnorm_cli.report.page import render

WHY = "`model.layers.3.mlp.router` reads it, and adds it to the stream"


def norm(name: str, *readers: str, offset: float = 0.0, reason: str | None = None) -> Norm:
    return Norm(name, (8,), 1.0, offset, readers, reason)


def layer(i: int) -> list[Norm]:
    at = f"model.layers.{i}"
    return [
        norm(f"{at}.input_layernorm.weight", f"{at}.attn.q_proj.weight", f"{at}.attn.k_proj.weight"),
        norm(f"{at}.post_norm.weight", f"{at}.mlp.up.weight", offset=1.0),
        norm(f"{at}.moe_norm.weight", f"{at}.mlp.experts.7.up.weight", reason=WHY.replace("3", str(i))),
    ]


def plan(lm_head: str = "untied") -> Plan:
    norms = (*layer(0), *layer(1), norm("model.norm.weight", "lm_head.weight"))
    return Plan(
        "someone/source", "c" * 40, "LlamaForCausalLM", "llama", (), "5.24", norms, (), lm_head, False, {}, True,
        ("vision.norms.0.weight", "vision.norms.1.weight"), (), (), 1_234_567, 999_960, 0,
    )  # fmt: skip


ROWS = [
    ("model.layers.*.input_layernorm", 2, "into q_proj, k_proj"),
    ("model.layers.*.post_norm", 2, "into up"),
    ("model.layers.*.moe_norm", 2, WHY.replace("3", "*")),
    ("model.norm", 1, "into lm_head"),
]


def page_of(what: Plan) -> str:
    level = LevelResult("weights", "passed", {})
    result = Verification("folded", "someone/source", None, False, what, (level,), {}, {})
    return html.unescape(re.sub(r"<[^>]+>", "", render(result)))


def card_of(what: Plan) -> str:
    record = json.loads(json.dumps(what.to_json())) | {"layout": "identity"}
    return build_card(CardFacts("me/folded", record, {}, None, None, "it was not verified", (1, 1), None, {}))


def test_kinds() -> None:
    found = wording.kinds(plan().norms)
    assert [(k.name.removesuffix(".weight"), k.number, k.fate) for k in found] == ROWS
    assert [k.gain for k in found] == ["", "1 + w", "", ""]


def test_everybody_says_the_same() -> None:
    lines, page, card = "\n".join(norm_lines(plan())), page_of(plan()), card_of(plan())
    for name, number, fate in ROWS:
        at, why = re.escape(name), re.escape(fate)
        assert re.search(rf"^(kept|folded) +{at}( \(1 \+ w\))? +{number} x +{why}$", lines, re.M)
        shown = why.replace("`", "")  # names stand out there by themselves
        assert re.search(rf"^{number}\u00a0\u00d7 {at}\.weight {shown}$", page, re.M)
        assert re.search(rf"^\| `{at}\.weight` \| {number} \| (folded|kept:) {why} \|$", card, re.M)


@pytest.mark.parametrize("lm_head", LM_HEADS)
def test_the_head_has_one_sentence(lm_head: str) -> None:
    words = wording.HEADS[lm_head]
    told = plan(lm_head)
    assert words in wording.sentences(told)[0]
    assert words in page_of(told)
    assert words[1:] in card_of(told)


def test_fewer_lines_after_a_fold() -> None:
    assert [line.split()[1] for line in norm_lines(plan(), kept_only=True)] == ["model.layers.*.moe_norm"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_960, "1.0 MB"), (1_234_567, "1.2 MB"),
     (16e9, "16.0 GB"), (1.2345e12, "1.2 TB"), (1.2345e15, "1,234.5 TB")],
)  # fmt: skip
def test_bytes_for_people(number: float, words: str) -> None:
    assert wording.size(number) == words


def test_bytes_are_worded_once() -> None:
    told = dataclasses.replace(plan(), bytes_changed=999_960)
    assert "1.0 MB change" in wording.sentences(told)[1]
    assert "1.0\u00a0MB changed" in page_of(told)


def test_a_flag_that_is_false_is_explained() -> None:
    false = dataclasses.replace(plan(), folded_flag=False)
    line = next(line for line in wording.sentences(false) if line.startswith("flashnorm_folded is false: "))
    assert "and model.layers.*.moe_norm still needs its own" in line
    assert not any("is false: " in line for line in wording.sentences(plan()))


@pytest.mark.parametrize(("added", "told"), [(100_000, False), (123_456, False), (247_000, True)])
def test_an_untied_head_that_costs_much_names_the_way_out(added: int, told: bool) -> None:
    untied = dataclasses.replace(plan(), untie=True, bytes_added=added)
    lines = [line for line in wording.sentences(untied) if 'final_norm="keep"' in line]
    assert bool(lines) is told
    assert not told or "makes the model 20% larger" in lines[0]
