"""The model card of a folded checkpoint, made from its source's.

The metadata stay the source's: licence, gating, language, tags, datasets. What changes is what the page would otherwise
get wrong: `base_model` becomes the source, and evaluation results of the source are no longer claimed as this model's.

The Hub knows four relations to a base model: finetune, adapter, merge, quantized. A fold is none of them. It is
published as `quantized`, the one for the same model in another form (conversions to GGUF, ONNX and MLX use it, at any
precision); `finetune` would say that somebody trained it. The card says in words that nothing was quantized.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.hub.published import Base
from flashnorm_cli.hub.source_card import check_metadata, read_card
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof.result import Verification
from flashnorm_cli.report import formats, page

if TYPE_CHECKING:
    from huggingface_hub import CardData

RELATION = "quantized"
TAGS = ("weightless-rmsnorm", "flashnorm")  # the first one is that of the collection of such models
REPORT = "flashnorm-verification.html"
# Between our words and the source's card, so that a card of ours can be made again from itself.
SOURCE_CARD = "<!-- The source's own card begins here. -->"
# Classes that transformers' AutoModelForCausalLM does not know, whatever they are called.
NOT_AUTO = ("Mistral4ForCausalLM",)
AS_PLANNED = "the files hold what the fold asks for; whether the model computes the same was not tried"
PAPER = "https://arxiv.org/abs/2407.09577"


@dataclass(frozen=True)
class CardFacts:
    """What a card speaks of.

    `record` and `config` are the published flashnorm.json and config.json. `verification` is None where there is no
    valid one. `ran` says that both models were run in it, and came out equivalent; else `unverified` says why nobody
    knows that. `sizes` are the bytes of all shards, of source and fold. `source_card` is
    the text of the source's README.md, or an earlier card of ours; `source_data` are the source's own metadata as the
    Hub or its folder gives them, as far as they are known.
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
    data, text = card.data, card.text.split(SOURCE_CARD)[-1].strip()
    parents, results = known.get("base_model"), _results(known)
    for claim in ("eval_results", "model_name", "model-index", "new_version"):
        data[claim] = None
    if facts.base is not None:
        data["base_model"] = facts.base.repo_id
        data["base_model_relation"] = RELATION
    data["library_name"] = data.get("library_name", "transformers")
    data["tags"] = [*(tag for tag in data.get("tags") or [] if tag not in TAGS), *TAGS]
    plan = Plan.from_json(facts.record)
    sections = [
        *_head(facts, plan),
        *_what_was_done(facts, plan),
        *_proof(facts),
        *_loading(facts, plan),
        *_origin(facts, data, parents, results),
    ]
    sections += ["## The source's card", "", SOURCE_CARD, "", text] if text else [SOURCE_CARD]
    card.text = "\n" + "\n".join(sections)
    return str(card).replace("\r\n", "\n").rstrip() + "\n"


def _results(known: CardData) -> list[Any]:
    """The evaluation results of a card, as far as huggingface_hub could read them."""
    from huggingface_hub import EvalResult

    found = known.get("eval_results")
    return [result for result in found if isinstance(result, EvalResult)] if isinstance(found, list) else []


# ---- sections --------------------------------------------------------------------------------------------------------


def _head(facts: CardFacts, plan: Plan) -> list[str]:
    name = facts.repo_id.rsplit("/", 1)[-1]
    computes = "computes" if facts.equivalent else "is meant to compute"
    lines = [
        f"# {name}",
        "",
        f"{_source(facts)} with the weights of its RMSNorms folded into the linear layers that read them, by "
        f"`{facts.record.get('tool', 'flashnorm')}`. It {computes} the same function; what it no longer needs are "
        f"{_count(len(plan.folded), 'norm weight')}. Nothing was trained or quantized.",
        "",
    ]
    if facts.verification is None:
        lines += [
            f"> **Not verified:** {facts.unverified}. Nobody has checked that it computes what its source does.",
            "",
        ]
    elif not facts.ran:
        lines += [
            "> **As planned, not run:** every tensor was compared with what the fold asks for, but neither this model "
            "nor its source was run. Nobody has checked that they compute the same; "
            f"`flashnorm verify {facts.repo_id}` does.",
            "",
        ]
    return lines


def _what_was_done(facts: CardFacts, plan: Plan) -> list[str]:
    lines = [
        "## What was done",
        "",
        "RMSNorm computes `x / rms(x) * g`, and a linear layer behind it `W @ .`, so `W @ (x / rms(x) * g)` is "
        f"`(W * g) @ (x / rms(x))`: exact in real arithmetic ([FlashNorm]({PAPER})). Each product was computed in "
        "float32 and rounded once to the tensor's dtype.",
        "",
        "| norm | how many | |",
        "|--|--|--|",
        *(f"| `{name}` | {number} | folded into {into} |" for name, number, into in page.folded_rows(plan)),
        *(f"| `{name}` | {number} | kept: {_cell(why)} |" for name, number, why in page.kept_rows(plan)),
        "",
        f"{_sentence(page.HEADS.get(plan.lm_head, plan.lm_head))} {_layout(facts)}",
        "",
    ]
    if plan.not_traced:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(map(pattern_of, plan.not_traced)))
        lines += [f"Not reached by a text forward, and as in the source: {names}.", ""]
    if plan.notes:
        lines += [*(f"- {_sentence(note)}" for note in plan.notes), ""]
    before, after = facts.sizes
    change = "the same" if before == after else f"{_size(abs(after - before))} {'more' if after > before else 'less'}"
    if plan.bytes_added:
        change += f"; {_size(plan.bytes_added)} are the output head's own copy of the embedding, scaled"
    return [*lines, f"Size of the weights: {_size(before)} before, {_size(after)} after ({change}).", ""]


def _layout(facts: CardFacts) -> str:
    if facts.record.get("layout") == "dropped":
        return (
            "Layout `dropped`: the folded norms' tensors are left out, so that only runtimes that know of it can load "
            "this checkpoint; see below."
        )
    return (
        "Layout `identity`: every tensor has its name, shape, dtype and shard of the source, and folded norms hold "
        "the value that scales by one."
    )


def _proof(facts: CardFacts) -> list[str]:
    result = facts.verification
    if result is None:
        return []
    sentence = page.verdict(result).sentence if facts.ran else f"{_sentence(AS_PLANNED)} {_not_run(result)}"
    lines = ["## Is it the same model?", "", sentence, "", "| | | |", "|--|--|--|"]
    lines += [f"| {what} | {_cell(much)} | {_cell(beside)} |" for what, much, beside in page.highlights(result)]
    logits = result.level("logits")
    figures = logits.figures if logits else {}
    folded, source = figures.get("folded"), figures.get("source")
    if isinstance(folded, dict) and isinstance(source, dict) and folded.get("perplexity") and source.get("perplexity"):
        beside = f"the source: {formats.perplexity(source['perplexity'])}"
        if figures.get("reference_perplexity"):
            beside += f", in {figures.get('reference')}: {formats.perplexity(figures['reference_perplexity'])}"
        lines.append(
            f"| Perplexity | {formats.perplexity(folded['perplexity'])} | {beside}; on {figures.get('text')} |"
        )
    for level in result.levels:
        if level.status == "skipped":
            lines.append(f"| {page.title_of(level)} | not run | {_cell(level.reason or '')} |")
    made = {key: result.environment[key] for key in ("torch", "transformers", "device") if key in result.environment}
    with_what = ", ".join(f"{key} {value}" if key != "device" else value for key, value in made.items())
    lines += [
        "",
        f"Checked on {formats.date(result.environment.get('date'))} with {with_what}, against "
        f"{_source(facts, commit=True)}. `flashnorm.json` holds every figure and the hash of every file; "
        f"[{REPORT}]({REPORT}) shows them on a page (download it: the Hub does not display HTML). To check it again:",
        "",
        "```bash",
        str(result.environment.get("command") or f"flashnorm verify {facts.repo_id}"),
        "```",
        "",
    ]
    return lines


def _not_run(result: Verification) -> str:
    ran = [page.title_of(level).lower() for level in result.levels if level.status == "passed"]
    left_out = [page.title_of(level).lower() for level in result.levels if level.status == "skipped"]
    return f"Passed: {', '.join(ran) or 'nothing'}. Not run: {', '.join(left_out) or 'either model'}."


def _loading(facts: CardFacts, plan: Plan) -> list[str]:
    dropped = facts.record.get("layout") == "dropped"
    name = facts.repo_id.rsplit("/", 1)[-1]
    vllm = f"vllm serve {facts.repo_id}"
    if "auto_map" in facts.config:
        vllm += " --trust-remote-code"
    weightless = (
        f'With flashnorm-cli, `flashnorm_cli.from_pretrained("{facts.repo_id}")` loads it so that its folded norms run '
        "without weights."
    )
    lines = ["## How to load it", "", "**transformers**", "", "```python", *_transformers(facts, plan), "```", ""]
    if dropped:
        missing = "zeros, for the model computes `1 + w`" if any(n.identity == 0 for n in plan.folded) else "ones"
        lines += [
            f"transformers reports the norms that are left out as missing, and fills in {missing}: that is right. "
            f"{weightless}",
            "",
            "**vLLM** loads it where flashnorm-cli is installed beside it, and its norms run without weights; without, "
            "it refuses:",
            "",
            *("```bash", vllm, "```", ""),
            "**llama.cpp** cannot load this layout: its converter writes a file that lacks the norms, and loading that "
            "file fails. Fold the source again with `--layout identity` for it.",
            "",
        ]
    else:
        lines += [
            weightless,
            "",
            "**vLLM** loads it as it loads the source, and multiplies by one; where flashnorm-cli is installed beside "
            "it, its norms run without weights:",
            "",
            *("```bash", vllm, "```", ""),
            "**llama.cpp**, if it knows the architecture, by its own converter:",
            "",
            "```bash",
            f"hf download {facts.repo_id} --local-dir {name}",
            f"python convert_hf_to_gguf.py {name} --outfile {name}.gguf",
            f'llama-cli -m {name}.gguf -p "Hello"',
            "```",
            "",
        ]
    if plan.lm_head in ("folded", "untied"):
        lines += [
            "Not for embeddings: the final norm's weight went into the output head, so what comes before that head "
            "(hidden states, pooling) is not what the source gives.",
            "",
        ]
    base = facts.base.repo_id if facts.base else "<the source>"
    return [
        *lines,
        "LoRA adapters that were trained on the source read the norm weights that are gone: fold them first, with "
        f"`flashnorm fold-adapter <adapter> --base {facts.repo_id}`; put on as they are, they compute something else "
        f"than on {base if facts.base else 'the source'}.",
        "",
    ]


def _transformers(facts: CardFacts, plan: Plan) -> list[str]:
    """The class that loads this architecture; an auto class where there is one."""
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{facts.repo_id}"'
    auto_map = facts.config.get("auto_map")
    if isinstance(auto_map, dict):
        auto = next((key for key in auto_map if key.startswith("AutoModelFor")), "AutoModel")
        trust = ", trust_remote_code=True)"
        return [
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("{facts.repo_id}", dtype="auto"{trust}',
            f"{tokenizer}{trust}",
        ]
    causal = plan.architecture.endswith("ForCausalLM") and plan.architecture not in NOT_AUTO
    cls = "AutoModelForCausalLM" if causal else plan.architecture
    return [
        f"from transformers import {', '.join(sorted((cls, 'AutoTokenizer')))}",
        "",
        f'model = {cls}.from_pretrained("{facts.repo_id}", dtype="auto")',
        f"{tokenizer})",
    ]


def _origin(facts: CardFacts, data: CardData, parents: Any, results: list[Any]) -> list[str]:
    lines = ["## Source and licence", "", f"Made from {_source(facts, commit=True)}. {_licence(data)}", ""]
    gate = [key for key in data.to_dict() if key.startswith("extra_gated_")]
    if gate:
        lines += ["The source is gated; its terms are those of this repository, too.", ""]
    if facts.base is not None:
        if parents and parents != facts.base.repo_id:
            names = parents if isinstance(parents, list) else [parents]
            links = ", ".join(f"[{name}](https://huggingface.co/{name})" for name in names)
            lines += [f"The source itself comes from {links}.", ""]
        lines += [
            f"`base_model_relation: {RELATION}` is the Hub's word for the same model in another form; nothing was "
            "quantized here.",
            "",
        ]
    if results:
        lines += [
            "The source's authors report these results of the source. They were not measured again on this model:",
            "",
            "| task | dataset | metric | value |",
            "|--|--|--|--|",
            *(
                f"| {_cell(result.task_name or result.task_type)} | {_cell(result.dataset_name)} | "
                f"{_cell(result.metric_name or result.metric_type)} | {_cell(result.metric_value)} |"
                for result in results
            ),
            "",
        ]
    return lines


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


def _size(n: int) -> str:
    return formats.size(n).replace(formats.SPACE, " ")


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _sentence(words: str) -> str:
    return f"{words[:1].upper()}{words[1:]}."


def _cell(value: Any) -> str:
    """Text that stays inside its cell of a table, and is no markup."""
    return re.sub(r"([|<])", r"\\\1", " ".join(str(value).replace(formats.SPACE, " ").split()))
