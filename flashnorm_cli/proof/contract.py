"""What a folded checkpoint has to say of itself: config, index, flag, record, and the files that travel along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flashnorm_cli.adapters.files import CONFIG as ADAPTER
from flashnorm_cli.checkpoint.folded import CLASS, FLAGS
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, read_json
from flashnorm_cli.checkpoint.names import pattern_of
from flashnorm_cli.checkpoint.places import same_but_places, without_places
from flashnorm_cli.errors import CheckpointError, PlanError, quoted
from flashnorm_cli.proof.expected import config_findings, index_findings, json_equal, levels, short, unequal
from flashnorm_cli.proof.files import CARD, EVAL_RESULTS_DIR, file_facts, is_documentation
from flashnorm_cli.proof.pairing import DROPPED, OTHER, SOURCE, Pair
from flashnorm_cli.proof.result import Finding

# What other tools write into a config without changing the model.
BOOKKEEPING = {
    *FLAGS, "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache",
    "_commit_hash", "_attn_implementation_autoset",
}  # fmt: skip


def check(pair: Pair) -> list[Finding]:
    """Everything besides the tensors that is not as it has to be."""
    findings = [*_flag(pair), *_tie(pair), *_other_files(pair)]
    if pair.foreign:
        return [
            *findings,
            *_config_by_meaning(pair),
            *_lost_record(pair),
            *(_source_files(pair) if pair.record else []),
        ]
    return [*findings, *config_findings(pair), *_shards(pair), *_record(pair), *_source_files(pair)]


def notes(pair: Pair) -> list[str]:
    """What is not wrong, but worth knowing."""
    found = []
    other = [name for name in _differing(pair) if is_documentation(name)]
    if told := [name for name in other if name != CARD]:  # a published fold has a card of its own
        found.append(f"differs from the source's: {', '.join(told)}")
    theirs = {each.name for each in pair.source.left_out}
    beside = [each.name for each in pair.folded.left_out if each.name not in theirs]
    beside += [
        name for name in pair.folded.others if name not in (*pair.source.others, RECORD) and not is_documentation(name)
    ]
    if beside:
        found.append(f"not in the source, and not looked at: {', '.join(beside)}")
    for name in _adapters_beside(pair):
        found.append(
            f"{name} is an adapter of the source's beside the folded weights: it does not fit them (and transformers "
            "loads it with the model, if it lies at the top); make it fit with `flashnorm fold-adapter`"
        )
    if pair.foreign:
        strange = [name for name in _differing(pair) if name not in other]
        if strange:
            found.append(f"written differently than in the source, compare them yourself: {', '.join(strange)}")
        missing = [name for name in pair.source.others if not (pair.folded.folder / name).is_file()]
        if missing:
            found.append(f"not carried over from the source: {', '.join(missing)}")
        if pair.record is not None:
            found.append("its record says that another tool folded it: rounding within two units is granted")
        if pair.gains and pair.record is None:
            found.append("it has no record of flashnorm; `adopt=True` writes one")
    return found


def _flag(pair: Pair) -> list[Finding]:
    """`flashnorm_folded` makes runtimes drop norms by their names: over a kept norm it would corrupt silently."""
    findings = []
    for where, config in levels(pair.folded.config, pair.plan.text_config):
        value = config.get("flashnorm_folded")
        if value is not None and not isinstance(value, bool):
            findings.append(Finding(CONFIG, f"{where}flashnorm_folded is {value!r}, neither true nor false"))
        if value is not True:
            continue
        kept = [n.tensor for n in pair.plan.folded if pair.states[n.tensor] == SOURCE and n.tensor not in pair.gains]
        kept += [n.tensor for n in pair.plan.folded if pair.states[n.tensor] == OTHER]
        if not pair.plan.folded_flag:
            kept += [n.tensor for n in pair.plan.kept]
        if kept:
            findings.append(
                Finding(
                    CONFIG,
                    f"{where}flashnorm_folded is true, but {pattern_of(kept[0])} keeps its weight: runtimes that read "
                    "the flag would drop it",
                )
            )
    return findings


def _tie(pair: Pair) -> list[Finding]:
    """An output head of its own is ignored as long as the config ties it to the embedding."""
    if not pair.untied or not pair.foreign:
        return []  # with our record the whole config is compared
    tied = [
        f"{where}tie_word_embeddings"
        for where, config in levels(pair.folded.config, pair.plan.text_config)
        if config.get("tie_word_embeddings", not where and "tie_word_embeddings" not in config)
    ]
    head = next(iter(pair.expected_added), "the head")
    return [Finding(CONFIG, f"{key} is true: runtimes may drop {head} and use the embedding") for key in tied]


# ---- with our record -------------------------------------------------------------------------------------------------


def _shards(pair: Pair) -> list[Finding]:
    """Every tensor stays in its shard, and the index follows."""
    findings = []
    last = list(pair.source.shards)[-1]
    for name, shard in pair.folded.shard_of.items():
        wanted = pair.source.shard_of.get(name, last)
        if shard != wanted:
            findings.append(Finding(name, f"is in {shard} instead of {wanted}"))
    findings += index_findings(pair)
    for shard, header in pair.source.shards.items():
        folded = pair.folded.shards.get(shard)
        if folded is None:
            findings.append(Finding(shard, "is missing"))
        elif folded.metadata != header.metadata:
            findings.append(Finding(shard, f"has the metadata {folded.metadata} instead of {header.metadata}"))
    return findings


def _record(pair: Pair) -> list[Finding]:
    """flashnorm.json has to tell the plan that is traced now."""
    findings: list[Finding] = []
    if pair.record is None:
        return [Finding(RECORD, "holds no plan")]
    wanted = pair.plan.to_json()
    for what, fields in (
        ("norms", ("shape", "scale", "offset", "folded")),
        ("readers", ("dim", "runs", "values_from")),
    ):
        entries = pair.record.entries(what)
        if entries is None:
            return [Finding(RECORD, "holds no plan")]
        recorded = {tensor: {f: e.get(f) for f in fields} for tensor, e in entries.items()}
        plan = {e["tensor"]: json.loads(json.dumps({f: e[f] for f in fields})) for e in wanted[what]}
        for tensor in dict.fromkeys([*plan, *recorded]):
            if not json_equal(recorded.get(tensor), plan.get(tensor)):
                findings.append(Finding(RECORD, f"{what}: {tensor} is not recorded as the source's forward says it is"))
    if not json_equal(pair.record.content.get("rotation"), json.loads(json.dumps(wanted.get("rotation")))):
        findings.append(Finding(RECORD, "rotation is not recorded as the source's forward says it is"))
    layout = pair.record.content.get("layout")
    if layout == "identity":
        left_out = [name for name in pair.gains if pair.states[name] == DROPPED]
        findings += [
            Finding(name, "is left out, but the record says that layout identity was written") for name in left_out
        ]
    if pair.gains and layout != pair.layout:
        findings.append(Finding(RECORD, f"says layout {quoted(layout)}, but the files hold layout {pair.layout!r}"))
    return findings


def _source_files(pair: Pair) -> list[Finding]:
    """The source has to be the one that was folded, as far as its headers and small files tell."""
    facts = (pair.record.source_files if pair.record else None) or {}
    findings = []
    if not set(facts) >= {CONFIG, *pair.source.shards}:
        findings.append(Finding(RECORD, "does not name the files of the source that it was made from"))
    for name, fact in facts.items():
        if name not in (CONFIG, pair.source.index_name, *pair.source.shards) or not fact:
            findings.append(Finding(RECORD, f"speaks of {name} of the source, which is not there"))
            continue
        path = pair.source.folder / name
        if not path.is_file():
            findings.append(Finding(RECORD, f"speaks of {name} of the source, which is not there"))
            continue
        header = pair.source.shards.get(name)
        now = file_facts(path, header.raw if header else None, pair.source.sha256.get(name))
        if any(fact.get(key) != now[key] for key in now if key in fact):
            findings.append(Finding(RECORD, f"was made from another {name} than this source's"))
    return findings


# ---- files that travel along -----------------------------------------------------------------------------------------


def _differing(pair: Pair) -> list[str]:
    """Files of the source that the folded checkpoint holds with other bytes."""
    found = []
    for name in pair.source.others:
        here, there = pair.folded.folder / name, pair.source.folder / name
        if here.is_file() and name != RECORD and not _same_bytes(here, there):
            if name.endswith(".json") and _same_json(here, there, pair.foreign):
                continue
            found.append(name)
    return found


def _other_files(pair: Pair) -> list[Finding]:
    if pair.foreign:
        return []
    wanted = [name for name in pair.source.others if not name.startswith(EVAL_RESULTS_DIR)]
    missing = [name for name in wanted if not (pair.folded.folder / name).is_file()]
    findings = [Finding(name, "is missing; the source has it") for name in missing]
    for name in _differing(pair):
        if not is_documentation(name):
            findings.append(Finding(name, "is not the source's file, byte for byte"))
    return findings


def _same_bytes(a: Path, b: Path) -> bool:
    return a.stat().st_size == b.stat().st_size and a.read_bytes() == b.read_bytes()


def _same_json(a: Path, b: Path, by_meaning: bool) -> bool:
    """Equal apart from where they came from; `by_meaning`, whatever else differs in how they are written."""
    try:
        texts = a.read_text(encoding="utf-8"), b.read_text(encoding="utf-8")
        if not by_meaning:
            return without_places(texts[0]) == without_places(texts[1])
        return same_but_places(*map(json.loads, texts))
    except (ValueError, RecursionError):
        return False


# ---- folded by something else ----------------------------------------------------------------------------------------


def _config_by_meaning(pair: Pair) -> list[Finding]:
    """The config as transformers reads it, without what tools add for their own use."""
    from flashnorm_cli.modeling import build

    def loaded(checkpoint: Checkpoint) -> dict[str, Any]:
        return _without(build.load_config(checkpoint.folder, False).to_dict())

    if "auto_map" in pair.source.config:  # its own config class: its code is not run for this
        found, wanted = _without(pair.folded.config), _without(pair.source.config)
    else:
        wanted = loaded(pair.source)
        try:
            found = loaded(pair.folded)
        except PlanError as error:
            return [Finding(CONFIG, str(error))]
    return [
        Finding(CONFIG, f"{key} is {short(now)}, but {short(was)} in the source")
        for key, now, was in unequal(found, wanted)
        if not (key.endswith("tie_word_embeddings") and now is False and pair.untied)
        and not (key == "architectures" and _renamed(now, was))
    ]


def _renamed(now: Any, was: Any) -> bool:
    """Whether another tool gave the class a name of its own, LlamaFlashNorm say, for the same model type."""
    return isinstance(now, list) and len(now) == 1 and CLASS in str(now[0]) and isinstance(was, list)


def _lost_record(pair: Pair) -> list[Finding]:
    """Without its record a fold of ours would be judged more mildly. One that was made in memory never had it."""
    ours = pair.folded.config.get("flashnorm")
    ours = ours if isinstance(ours, dict) and ours.get("in_memory") is not True else {}
    if pair.record is None and str(ours.get("tool", "")).startswith("flashnorm-cli"):
        return [Finding(RECORD, f"is missing: {CONFIG} says that flashnorm folded this checkpoint")]
    return []


def _without(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in BOOKKEEPING
    }


# ---- adapters --------------------------------------------------------------------------------------------------------


def _adapters_beside(pair: Pair) -> list[str]:
    """adapter_config.json of adapters in the folded checkpoint's folder that were made for another model."""
    found = []
    for name in pair.folded.others:
        path = pair.folded.folder / name
        if path.name != ADAPTER or (path.parent != pair.folded.folder and (path.parent / RECORD).exists()):
            continue
        try:
            made_for = read_json(path).get("base_model_name_or_path")
        except CheckpointError:
            made_for = None
        if made_for != pair.folded.source.name:
            found.append(name)
    return found
