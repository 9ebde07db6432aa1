"""The model card of a folded checkpoint, made from its source's.

The metadata stay the source's: licence, gating, language, tags, datasets. What changes is what the page would otherwise
get wrong: `base_model` becomes the source, and evaluation results of the source are no longer claimed as this model's.

The Hub knows four relations to a base model: finetune, adapter, merge, quantized. A fold is none of them. It is
published as `quantized`, the one for the same model in another form (conversions to GGUF, ONNX and MLX use it, at any
precision); `finetune` would say that somebody trained it. The card says in words that nothing was quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.hub.headings import below
from flashnorm_cli.hub.published import Base
from flashnorm_cli.hub.source_card import check_metadata, read_card
from flashnorm_cli.plan import quantized, wording
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof.result import Verification
from flashnorm_cli.report import formats, page
from flashnorm_cli.report.project import INSTALL

if TYPE_CHECKING:
    from huggingface_hub import CardData
    from jinja2 import Template

RELATION = "quantized"
TAGS = ("weightless-rmsnorm", "flashnorm")  # the first one is that of the collection of such models
REPORT, PICTURE = "flashnorm-verification.html", "flashnorm-plan.svg"
# Between our words and the source's card, so that a card of ours can be made again from itself.
SOURCE_CARD = "<!-- The source's own card begins here. -->"
SOURCE_HEADINGS = 3  # the level of its highest ones: the card has one title, and "The source's card" is above them
# Classes that transformers' AutoModelForCausalLM does not know, whatever they are called.
NOT_AUTO = ("Mistral4ForCausalLM",)
PAPER = "https://arxiv.org/abs/2407.09577"
# Of a repository that AutoTokenizer can load something from.
TOKENIZERS = frozenset(
    (
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
        "spiece.model",
        "tekken.json",
    )
)
# Classes by the ends of their names that write text with `generate`.
WRITE = ("ForCausalLM", "ForSeq2SeqLM", "ForConditionalGeneration", "ForImageTextToText", "LMHeadModel")


@dataclass(frozen=True)
class CardFacts:
    """What a card speaks of.

    `record` and `config` are the published flashnorm.json and config.json. `verification` is None where there is no
    valid one. `ran` says that both models were run in it, and came out equivalent; else `unverified` says why nobody
    knows that. `sizes` are the bytes of all shards, of source and fold. `source_card` is
    the text of the source's README.md, or an earlier card of ours; `source_data` are the source's own metadata as the
    Hub or its folder gives them, as far as they are known. `files` are the names of all files, `chat` says that the
    tokenizer has a chat template, and `project` is the address of this project, if it has one.
    """

    repo_id: str
    record: dict[str, Any]
    config: dict[str, Any]
    base: Base | None
    verification: Verification | None
    unverified: str | None
    sizes: tuple[int, int]
    source_card: str | None
    source_data: dict[str, Any]
    ran: bool = True
    files: frozenset[str] = TOKENIZERS
    chat: bool = False
    project: str | None = None

    @property
    def equivalent(self) -> bool:
        """Whether both models were run, and shown to compute the same."""
        return self.verification is not None and self.ran


def build_card(facts: CardFacts) -> str:
    """The text of README.md. It depends on `facts` alone: the same fold gives the same card."""
    from huggingface_hub import ModelCardData

    card = read_card(facts.source_card or "")
    check_metadata(facts.source_data, "the source's card")
    known: CardData = ModelCardData(**facts.source_data, ignore_metadata_errors=True)
    if facts.source_card is None:
        card.data = known
    elif SOURCE_CARD not in card.text:  # the source's own card, not one of ours
        known = card.data
    data, text = card.data, below(card.text.split(SOURCE_CARD)[-1].strip(), SOURCE_HEADINGS)
    parents, results = known.get("base_model"), _results(known)
    for claim in ("eval_results", "model_name", "model-index", "new_version"):
        data[claim] = None
    if facts.base is not None:
        data["base_model"] = facts.base.repo_id
        data["base_model_relation"] = RELATION
    data["library_name"] = data.get("library_name", "transformers")
    data["tags"] = [*(tag for tag in data.get("tags") or [] if tag not in TAGS), *TAGS]
    known_parents = parents if isinstance(parents, list) else [parents] if parents else []
    source_facts = {
        "licence": _licence(data),
        "gated": any(key.startswith("extra_gated_") for key in data.to_dict()),
        "parents": known_parents if facts.base is not None and parents != facts.base.repo_id else [],
        "results": results,
        "text": text,
    }
    card.text = _template().render(**_figures(facts), **source_facts)
    return str(card).replace("\r\n", "\n").rstrip() + "\n"


def _results(known: CardData) -> list[Any]:
    """The evaluation results of a card, as far as huggingface_hub could read them."""
    from huggingface_hub import EvalResult

    found = known.get("eval_results")
    return [result for result in found if isinstance(result, EvalResult)] if isinstance(found, list) else []


@cache
def _template() -> Template:
    import jinja2

    place = jinja2.PackageLoader("flashnorm_cli.hub", ".")
    environment = jinja2.Environment(loader=place, undefined=jinja2.StrictUndefined)
    environment.filters.update(cell=_cell, code=_code, line=_line, sentence=_sentence, size=wording.size)
    return environment.get_template("card.md.jinja")


def _figures(facts: CardFacts) -> dict[str, Any]:
    """What the template shows of the fold and of its verification."""
    plan, result = Plan.from_json(facts.record), facts.verification
    before, after = facts.sizes
    change = (
        "the same" if before == after else f"{wording.size(abs(after - before))} {'more' if after > before else 'less'}"
    )
    if plan.bytes_added:
        change += f"; {wording.size(plan.bytes_added)} are the output head's own copy of the embedding, scaled"
    found: dict[str, Any] = {
        "facts": facts,
        "plan": plan,
        "result": result,
        "page": page,
        "wording": wording,
        "formats": formats,
        "count": _count,
        "name": facts.repo_id.rsplit("/", 1)[-1],
        "tool": facts.record.get("tool", "flashnorm"),
        "source": _source(facts),
        "source_at": _source(facts, commit=True),
        "dropped": facts.record.get("layout") == "dropped",
        "zeros": any(norm.identity == 0 for norm in plan.folded),
        "not_traced": list(dict.fromkeys(map(pattern_of, plan.not_traced))),
        "change": change,
        "transformers": "\n".join(_transformers(facts, plan)),
        "install": INSTALL,
        "paper": PAPER,
        "picture": PICTURE,
        "report": REPORT,
        "relation": RELATION,
        "quantizing": quantized.card_line(plan.rotation is not None),
        "mark": SOURCE_CARD,
    }
    if result is not None:
        made = {k: result.environment[k] for k in ("torch", "transformers", "device") if k in result.environment}
        found["with_what"] = ", ".join(f"{key} {value}" if key != "device" else value for key, value in made.items())
        found["rows"] = _rows(result)
        for status in ("passed", "skipped"):
            titles = [page.title_of(level).lower() for level in result.levels if level.status == status]
            found[status] = titles
    return found


def _rows(result: Verification) -> list[tuple[str, str, str]]:
    """The table of the verification: (what, how much, beside what)."""
    rows = [(each.what, each.much, each.beside) for each in page.highlights(result)]
    logits = result.level("logits")
    figures = logits.figures if logits else {}
    folded, source = figures.get("folded"), figures.get("source")
    ours, theirs = (side.get("perplexity") if isinstance(side, Mapping) else None for side in (folded, source))
    if ours and theirs:
        beside = f"the source: {formats.perplexity(theirs)}"
        if figures.get("reference_perplexity"):
            beside += f", in {figures.get('reference')}: {formats.perplexity(figures['reference_perplexity'])}"
        rows.append(("Perplexity", formats.perplexity(ours), f"{beside}; on {figures.get('text')}"))
    skipped = [level for level in result.levels if level.status == "skipped"]
    return [*rows, *((page.title_of(level), "not run", level.reason or "") for level in skipped)]


def _transformers(facts: CardFacts, plan: Plan) -> list[str]:
    """Load it with the class of this architecture, an auto class where there is one, and use it."""
    trust = ", trust_remote_code=True" if _own_code(facts) else ""
    names = [_model_class(facts, plan), *(["AutoTokenizer"] if facts.files & TOKENIZERS else [])]
    lines = [f"from transformers import {', '.join(sorted(names))}", ""]
    lines.append(f'model = {names[0]}.from_pretrained("{facts.repo_id}", dtype="auto"{trust})')
    return [*lines, *_use(facts, plan)]


def _model_class(facts: CardFacts, plan: Plan) -> str:
    auto_map = facts.config.get("auto_map")
    if isinstance(auto_map, dict):
        return next((key for key in auto_map if key.startswith("AutoModelFor")), "AutoModel")
    causal = plan.architecture.endswith("ForCausalLM") and plan.architecture not in NOT_AUTO
    return "AutoModelForCausalLM" if causal else plan.architecture


def _own_code(facts: CardFacts) -> bool:
    return isinstance(facts.config.get("auto_map"), dict)


def _use(facts: CardFacts, plan: Plan) -> list[str]:
    """What to do with `model`: let it write where it can, else call it."""
    writes = _model_class(facts, plan).endswith(WRITE)
    if not facts.files & TOKENIZERS:
        ids = ["import torch", "", "input_ids = torch.tensor([[1, 2, 3]])  # of your tokenizer: none is in here"]
        return [*ids, "print(model.generate(input_ids, max_new_tokens=40))" if writes else "print(model(input_ids))"]
    trust = ", trust_remote_code=True" if _own_code(facts) else ""
    lines = [f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo_id}"{trust})']
    if writes and facts.chat:
        lines += [
            'messages = [{"role": "user", "content": "What is a norm?"}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("It was a truth", return_tensors="pt")')
    if not writes:
        return [*lines, "print(model(**inputs))"]
    lines.append("output = model.generate(**inputs, max_new_tokens=40)")
    return [*lines, "print(tokenizer.decode(output[0], skip_special_tokens=True))"]


def _licence(data: CardData) -> str:
    licence, name, link = (data.get(key) for key in ("license", "license_name", "license_link"))
    if not licence:
        return "Its card names no licence, so this one names none either: ask its authors."
    shown = ", ".join(map(str, licence)) if isinstance(licence, list) else str(name or licence)
    return f"The licence is the source's: {f'[{shown}]({link})' if link else shown}."


# ---- words -----------------------------------------------------------------------------------------------------------


def _source(facts: CardFacts, commit: bool = False) -> str:
    if facts.base is None:
        return f"the local checkpoint `{facts.record.get('source')}`" if commit else f"`{facts.record.get('source')}`"
    link = f"[{facts.base.repo_id}](https://huggingface.co/{facts.base.repo_id})"
    return f"{link} at commit `{facts.base.commit[:12]}`" if commit else link


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _line(text: str) -> str:
    return " ".join(text.split())


def _code(name: str) -> str:
    """A name as code, whatever characters it is made of."""
    plain = _line(name).replace("`", "'").replace("|", "/")
    return f"`{plain}`"


def _cell(value: Any) -> str:
    """Text that stays inside its cell of a table, and is no markup."""
    return re.sub(r"([|<])", r"\\\1", " ".join(str(value).replace(formats.SPACE, " ").split()))
