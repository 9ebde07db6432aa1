"""The model card of a fold, from eight kinds of source cards: whole texts, compared with tests/cards/*.card.md.

After a change that is meant: FLASHNORM_UPDATE_CARDS=1 pytest tests/hub/test_card.py, and look at the difference.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from huggingface_hub import ModelCard, ModelInfo
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flashnorm_cli.errors import CheckpointError, FlashNormError
from flashnorm_cli.hub.card import NOT_AUTO, SOURCE_CARD, CardFacts, build_card
from flashnorm_cli.hub.headings import below
from flashnorm_cli.hub.licence import check_licence, gate_of, terms
from flashnorm_cli.hub.published import Base, published_command, published_record, without_paths
from flashnorm_cli.hub.source_card import check_metadata, read_card
from flashnorm_cli.proof.result import Verification
from flashnorm_cli.report.page import render

CARDS = Path(__file__).parent / "cards"
BASE = Base("org/base-model", "0123456789abcdef0123456789abcdef01234567")


def load(name: str) -> dict[str, Any]:
    """A record that a fold and a verification of a tiny model have written."""
    return json.loads((CARDS / f"{name}.json").read_text())


def facts(source: str | None, record: str = "gemma3", **more: Any) -> CardFacts:
    said = load(record)
    base = BASE if said["commit"] else None
    new = published_record(said, "me/model-FlashNorm", base, verified=more.get("unverified") is None)
    plain = {
        "repo_id": "me/model-FlashNorm",
        "record": new,
        "config": {},
        "base": base,
        "verification": Verification.from_record(new, "me/model-FlashNorm") if new["verify"] else None,
        "unverified": None,
        "sizes": (1_000_000, 1_016_400),
        "source_card": (CARDS / f"{source}.md").read_bytes().decode() if source else None,
        "source_data": {},
    }
    return CardFacts(**{**plain, **more})


CASES = {
    "none": {"source": None},
    "plain": {"source": "plain"},
    "gated": {"source": "gated"},
    "eval_results": {"source": "eval_results"},
    "non_english": {"source": "non_english"},
    "licence_link": {"source": "licence_link", "config": {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}},
    "no_metadata": {"source": "no_metadata", "config": {"architectures": []}},
    "dropped": {"source": "plain", "record": "llama", "sizes": (1_000_000, 999_000)},
    "unverified": {"source": "plain", "record": "llama", "sizes": (9, 9), "unverified": "its verification is void"},
}


@pytest.mark.parametrize("name", CASES)
def test_card(name: str) -> None:
    case: dict[str, Any] = dict(CASES[name])
    given = facts(**case)
    card = build_card(given)
    expected = CARDS / f"{name}.card.md"
    if os.environ.get("FLASHNORM_UPDATE_CARDS"):
        expected.write_text(card)
    assert card == expected.read_text()
    # A card of a card is the same card: somebody downloads what was pushed and pushes it again.
    source = read_card(given.source_card or "").data.to_dict()
    assert build_card(CardFacts(**{**given.__dict__, "source_card": card, "source_data": source})) == card
    # One title, and what to do with the model comes before what was done to it.
    text = read_card(card).text
    assert re.findall("^# .*", text, re.MULTILINE) == ["# model-FlashNorm"]
    assert re.findall("^## .*", text, re.MULTILINE)[:2] == ["## How to load it", "## What was done"]
    assert "`" not in re.sub("`[^`]+`|```[^`]+```", "", text.split(SOURCE_CARD)[0])
    # What the source's authors have said stays, letter for letter, below our headings.
    if given.source_card is not None:
        text = read_card(given.source_card).text.replace("\r\n", "\n").strip()
        assert card.endswith(f"{SOURCE_CARD}\n\n{text.replace('# ', '### ', 1)}\n")
        kept = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag", "widget")
        data = ModelCard(card).data.to_dict()
        keys = [key for key in source if key in kept or key.startswith("extra_gated")]
        assert {key: data[key] for key in keys} == {key: source[key] for key in keys}


def test_what_a_card_claims() -> None:
    data = yaml.safe_load((CARDS / "eval_results.card.md").read_text().split("---")[1])
    assert data["base_model"] == BASE.repo_id
    assert data["base_model_relation"] == "quantized"
    assert {"model-index", "new_version", "eval_results"} & set(data) == set()  # measured on another model
    assert "| Text Generation | ARC \\| Challenge | normalized accuracy | 61.3 |" in build_card(facts("eval_results"))
    assert data["tags"] == ["weightless-rmsnorm", "flashnorm"]
    local = yaml.safe_load((CARDS / "dropped.card.md").read_text().split("---")[1])
    assert "base_model" not in local and "base_model_relation" not in local


HEADINGS = {
    "# A\n## B\n\ntext # no\n": "### A\n#### B\n\ntext # no\n",
    "## A\n###### B": "### A\n###### B",
    "### A\n#### B": "### A\n#### B",
    "no heading": "no heading",
    "A title\n=======\n\nAnother\nlong one\n---\n\n---\n": "### A title\n\n#### Another long one\n\n---\n",
    "# A\n```bash\n# a comment\n```\n    # code": "### A\n```bash\n# a comment\n```\n    # code",
    "# A\n~~~\n# x\n": "### A\n~~~\n# x\n",
    "<h1 align='center'>A</h1>\n\n<H2>B</H2>": "<h3 align='center'>A</h3>\n\n<H4>B</H4>",
    "<div>\n<h2>B</h2></div>\n\n# A": "<div>\n<h4>B</h4></div>\n\n### A",
    "> # A\n\n- # B\n": "> ### A\n\n- ### B\n",
    "| a |\n|---|\n| # b |\n\n# A #\n": "| a |\n|---|\n| # b |\n\n### A #\n",
    "# A\r\n<!--\n# no\n-->\n`<h1>`": "### A\n<!--\n# no\n-->\n`<h1>`",
}


@pytest.mark.parametrize("text", HEADINGS)
def test_headings_of_the_source_are_below_ours(text: str) -> None:
    assert below(text, 3) == HEADINGS[text]
    assert below(below(text, 3), 3) == below(text, 3)


def python(card: str) -> list[str]:
    return re.findall("```python\n(.*?)```", card, re.DOTALL)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ["AutoModelForCausalLM", 'tokenizer("', "generate("]),
        ({"chat": True}, ["apply_chat_template", "generate("]),
        ({"files": frozenset()}, ["torch.tensor(", "generate("]),
        ({"config": {"auto_map": {"AutoModel": "m.M"}}}, ["AutoModel.from", "trust_remote_code", "model(**inputs)"]),
    ],
)  # fmt: skip
def test_the_code_of_a_card(more: dict[str, Any], words: list[str]) -> None:
    transformers_code, ours = python(build_card(facts("plain", **more)))
    for code in (transformers_code, ours):
        compile(code, "card", "exec")
    assert all(word in transformers_code for word in words), transformers_code
    assert ("AutoTokenizer" in transformers_code) == ("files" not in more)
    assert ours.startswith("from flashnorm_cli import from_pretrained\n")


def test_a_card_says_what_made_it() -> None:
    card = build_card(facts("plain", project="https://example.org/it"))
    assert "by [flashnorm](https://example.org/it) (`flashnorm-cli" in card and "pip install flashnorm-cli" in card
    assert "by flashnorm (`flashnorm-cli" in build_card(facts("plain"))


def test_parent_of_a_local_source_is_kept() -> None:
    data = ModelCard(build_card(facts("eval_results", record="llama"))).data
    assert (data["base_model"], data["base_model_relation"]) == ("org/grandparent", "finetune")


@pytest.mark.parametrize("text", ["---\n- a list\n---\n# A card\n", "---\nlicense: [mit\n---\n# A card\n"])
def test_broken_metadata(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"README\.md: its metadata cannot be read .*; correct the block"):
        build_card(facts(None, source_card=text))


def test_the_auto_class_knows_every_architecture_that_it_is_named_for() -> None:
    known = {
        name
        for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for name in ([value] if isinstance(value, str) else value)
    }
    sources = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    classes = {name for path in sources for name in re.findall(r"^class (\w+ForCausalLM)\(", path.read_text(), re.M)}
    parts = {"AutoModelForCausalLM", "ClvpForCausalLM", "CsmDepthDecoderForCausalLM"}  # no checkpoints of their own
    parts |= {"Kosmos2TextForCausalLM", "Kosmos2_5TextForCausalLM"}
    assert classes - known - parts <= set(NOT_AUTO)


# ---- the record as it is published -----------------------------------------------------------------------------------


def test_published_record_tells_nothing_of_this_machine() -> None:
    record = load("llama")
    record["source"] = "/home/alice/secret-project/llama"
    entry = record["verify"]
    entry["source"]["name"] = "../secret-project/llama"
    entry["environment"]["command"] = (
        "flashnorm verify /home/alice/out --source=/home/alice/secret-project/llama --level weights --level=logits "
        "--text /home/alice/mail.txt --report ~/r.html --cache-dir /mnt/cache --workers 3 --trust-remote-code --json"
    )
    logits = entry["levels"]["logits"]
    logits["figures"]["text"] = "/home/alice/mail.txt"
    logits["figures"]["greedy"] = [{"prompt": "Dear Bob", "source": "x", "folded": "x", "same": 1, "tokens": 1}]
    logits["notes"] = ["read ../secret-project/llama/config.json and /home/alice/mail.txt; see https://example.org/a/b"]
    new = published_record(record, "me/out", None, verified=True)
    text = json.dumps(new) + render(Verification.from_record(new, "me/out"))
    for word in ("alice", "secret-project", "/mnt", "Dear Bob", "r.html"):
        assert word not in text
    assert new["source"] == new["verify"]["source"]["name"] == "llama"
    assert new["verify"]["environment"]["command"] == (
        "flashnorm verify me/out --source '<the model it was made from>' --level weights --level logits "
        "--text mail.txt --trust-remote-code"
    )
    assert new["verify"]["levels"]["logits"]["notes"] == [
        "read llama/config.json and mail.txt; see https://example.org/a/b"
    ]
    assert {key: new[key] for key in ("norms", "readers", "source_files")} == {
        key: record[key] for key in ("norms", "readers", "source_files")
    }
    assert new["verify"]["files"] == entry["files"]


def test_published_record_of_a_hub_source() -> None:
    record = load("gemma3")
    new = published_record(record, "me/out", BASE, verified=True)
    command = new["verify"]["environment"].pop("command")
    assert command == "flashnorm verify me/out"
    record["verify"]["environment"].pop("command")
    assert new == record
    assert published_record(record, "me/out", BASE, verified=False)["verify"] is None


@pytest.mark.parametrize(
    ("typed", "levels", "published"),
    [
        ("flashnorm verify out", ["weights", "layers", "logits"], "flashnorm verify me/out"),
        ("flashnorm verify out --level weights", ["weights"], "flashnorm verify me/out --level weights"),
        ("flashnorm demo", ["weights", "layers", "logits"], "flashnorm verify me/out"),
        ("", ["weights"], "flashnorm verify me/out --level weights"),
        ("flashnorm verify 'out", [], "flashnorm verify me/out"),
    ],
)
def test_published_command(typed: str, levels: list[str], published: str) -> None:
    assert published_command(typed, "me/out", BASE, levels) == published


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://huggingface.co/org/name", "https://huggingface.co/org/name"),
        ("org/name", "org/name"),
        ("1 / 2 and/or 3", "1 / 2 and/or 3"),
        ("/a/b c/d.txt", "b c/d.txt"),
        ("see '/var/x y'", "see 'x y'"),
        ("~/models/llama/", "llama"),
    ],
)
def test_without_paths(text: str, clean: str) -> None:
    assert without_paths({"k": [text]}) == {"k": [clean]}


# ---- the licence -----------------------------------------------------------------------------------------------------

GATED = ModelInfo(id="org/base", sha="abc", gated="manual", private=False, siblings=[])
OPEN = ModelInfo(id="org/base", sha="abc", gated=False, private=False, siblings=[])
LINKED = {"license": "other", "license_name": "x-1.0", "license_link": "LICENSE"}


@pytest.mark.parametrize(
    ("ours", "theirs", "files", "info", "words"),
    [
        ({"license": "mit"}, {"license": "mit"}, (), OPEN, None),
        ({}, {}, (), OPEN, None),
        ({}, {}, (), None, None),
        ({"license": "mit"}, {}, (), None, None),  # the publisher added what the source has forgotten
        ({"license": "mit"}, {"license": "cc-by-nc-4.0"}, (), OPEN, "license is 'cc-by-nc-4.0', .* says 'mit'"),
        ({}, {"license": "cc-by-nc-4.0"}, (), OPEN, "says nothing: .*hf download org/base README.md --revision abc"),
        ({"license": "other"}, LINKED, (), None, "the source's license_name is 'x-1.0'"),
        (LINKED, LINKED, (), OPEN, "in the file LICENSE, which out does not hold"),
        (LINKED, LINKED, ("LICENSE",), OPEN, None),
        ({}, {}, (), GATED, "is gated, but README.md in out names no licence"),
        ({"license": "a"}, {"license": "a", "extra_gated_prompt": "x"}, (), GATED, "has lost its extra_gated_prompt"),
    ],
)  # fmt: skip
def test_licence(ours: dict, theirs: dict, files: tuple, info: ModelInfo | None, words: str | None) -> None:
    if words is None:
        check_licence(ours, theirs, files, info, "out")
    else:
        with pytest.raises(FlashNormError, match=words):
            check_licence(ours, theirs, files, info, "out")


def test_gate_and_terms() -> None:
    assert [gate_of({}, info) for info in (GATED, OPEN, None)] == ["manual", False, False]
    assert gate_of({"extra_gated_prompt": "x"}, None) == "auto"
    assert terms({"license": "cc-by-nc-sa-4.0"}) == "cc-by-nc-sa-4.0 (non-commercial)"
    assert terms({"license": ["mit", "apache-2.0"]}) == "mit, apache-2.0"
    assert terms({"license": "other", "license_name": "research-only-1.0"}) == "research-only-1.0 (non-commercial)"
    assert terms({"license": "llama3.2"}) == "llama3.2"
    assert terms({}) == "none named"


# ---- cards as input --------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
    for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
STRANGE = {
    "10 MB of tags": ("tags:\n" + "- a tag\n" * 1_250_000, "metadata have 10,000,005 characters"),
    "billions of values": (LAUGHS, "too many or too deeply nested"),
    "no end": ("a: &a [*a]\n", "too many or too deeply nested"),
    "deep": ("a: " + "[" * 3000 + "]" * 3000 + "\n", "too many or too deeply nested|cannot be read"),
    "tags are one word": ("tags: a tag\n", "`tags` .* not a list of words"),
    "tags are lists": ("tags: [[a], [b]]\n", "`tags` .* not a list of words"),
    "a licence of its own": ("license: {name: mit}\n", "`license` .* not a word or a list"),
    "a licence list of lists": ("license: [[mit]]\n", "`license` .* not a word or a list"),
    "a link that is a list": ("license_link: [a]\n", "`license_link` .* not a text"),
    "a name that is a number": ("license_name: 3\n", "`license_name` .* not a text"),
    "a base that is an object": ("base_model: {a: b}\n", "`base_model` .* not a word"),
    "a key that is a list": ("? [a]\n: b\n", "cannot be read"),
    "a key that is a number": ("1: b\n", "has|have the key 1"),
    "control characters": ("license: \x00\n", "cannot be read"),
    "escapes in what it says": ("license: [\x9b31m\n", "cannot be read"),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_metadata(name: str) -> None:
    """One line, at once, that can be printed."""
    block, words = STRANGE[name]
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=words) as caught:
        build_card(facts(None, source_card=f"---\n{block}---\n# A card\n"))
    assert time.monotonic() - started < 15
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500


def test_strange_metadata_of_the_source() -> None:
    with pytest.raises(CheckpointError, match=r"the source's card: `tags` .* not a list of words"):
        build_card(facts("plain", source_data={"tags": {"a": 1}}))
    with pytest.raises(CheckpointError, match="too many"):
        build_card(facts(None, source_data={"tags": ["a"] * 1_000_000}))


METADATA = [
    "license: mit\ntags: [1, 2.5, true, 2020-01-01]\n",
    "license: 2020-01-01\n",
    "model-index: 3\n",
    "model-index:\n- name: x\n  results: [1]\n",
    "model-index:\n- {results: {}}\n",
    "eval_results: [1]\nmodel_name: x\n",
    "tags: null\nlanguage: [null]\n".replace("[null]", "null"),
    "base_model: [a/b, c/d]\nbase_model_relation: merge\n",
    "new_version: x/y\nlicense: [mit, apache-2.0]\n",
    "extra_gated_fields: {Name: text}\n",
]


@pytest.mark.parametrize("block", METADATA)
def test_metadata_that_are_unusual(block: str) -> None:
    card = build_card(facts(None, source_card=f"---\n{block}---\n# A card\n"))
    assert ModelCard(card).data.to_dict()["tags"][-2:] == ["weightless-rmsnorm", "flashnorm"]
    terms(read_card(card).data.to_dict())


def test_a_long_card() -> None:
    with pytest.raises(CheckpointError, match="more than 10,485,760 are not read"):
        read_card("x" * (11 << 20))
    assert check_metadata({}) == {}
    started = time.monotonic()
    build_card(facts(None, source_card="\n" * 3_000_000 + "---\nlicense: mit\n---\n" + " \n---" * 500_000))
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("level", ["weights", "logits"])
@pytest.mark.parametrize("value", [None, [], "much"])
def test_a_verification_without_figures_is_none(level: str, value: Any) -> None:
    record = load("llama")
    record["verify"]["levels"][level]["figures"] = value
    with pytest.raises(CheckpointError, match="holds no verification"):
        Verification.from_record(record, "me/out")
    record["verify"]["levels"][level]["figures"] = {"greedy": value, "text": "mail.txt"}
    new = published_record(record, "me/out", None, verified=True)
    assert "much" not in json.dumps(new["verify"]["levels"]["logits"])
