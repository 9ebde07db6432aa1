"""What `verify` found, written into the record."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, Progress
from flashnorm_cli.checkpoint.output import write_text
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof.files import changed_files, file_facts, hashed_files, sha256_of
from flashnorm_cli.proof.pairing import DROPPED, Pair
from flashnorm_cli.proof.result import EQUIVALENT, NOT_EQUIVALENT, Verification, level_json, verdict_of
from flashnorm_cli.record.adopt import adopted


def record_result(
    both: Pair,
    result: Verification,
    known: dict[str, str],
    workers: int,
    report: Progress,
    adopt: bool,
    wanted: bool,
) -> Verification:
    """Write the result into the folded checkpoint, where it has a record or gets one now.

    `known` are the sha256 of files that a level has read whole.
    """
    notes = []
    record = both.record.content if both.record else None
    hashes = _hashes(both.folded, known, workers, report)
    before = (record or {}).get("verify")
    if isinstance(before, dict) and (changed := changed_files(before, hashes)):
        environment = before.get("environment")
        when = environment.get("date") if isinstance(environment, dict) else "an earlier day"
        notes.append(f"the verification of {when} is void: {', '.join(changed[:3])} changed since")
    weights = result.level("weights")
    if adopt and record is not None:
        notes.append("nothing to adopt: it has a record already")
    elif adopt and (weights is None or weights.status != "passed" or result.verdict == NOT_EQUIVALENT):
        notes.append("not adopted: only a checkpoint that passes level weights gets a record")
    elif adopt and not both.gains:
        notes.append("not adopted: no norm of it is folded")
    elif adopt:
        record = _adopt(both)
        hashes[CONFIG] = sha256_of(both.folded.folder / CONFIG)
        notes.append(f"adopted: wrote {RECORD}, and the flag into {CONFIG}")
    recorded = None
    if record is not None and both.folded.commit is None and (wanted or adopt):
        entry = _entry(both, result, hashes, record.get("verify"))
        try:
            write_text(both.folded.folder / RECORD, json.dumps({**record, "verify": entry}, indent=2) + "\n")
            recorded = str(both.folded.folder / RECORD)
        except OSError as error:
            notes.append(f"not recorded: {both.folded.folder / RECORD}: {error.strerror}")
    return dataclasses.replace(result, notes=tuple(notes), recorded=recorded)


def _entry(both: Pair, result: Verification, hashes: dict[str, str], before: Any) -> dict[str, Any]:
    """What flashnorm.json keeps: this result, and levels of an earlier one if the files are still the same."""
    levels = {level.level: level_json(level) for level in result.levels}
    for entry in levels.values():
        entry["date"] = result.environment["date"]
    if isinstance(before, dict) and before.get("files") == hashes and isinstance(before.get("levels"), dict):
        # What ran before counts on; that it could not run again takes nothing away.
        known = before["levels"]
        now = {name: entry for name, entry in levels.items() if entry["status"] != "skipped" or name not in known}
        levels = {**known, **now}
    verdict = verdict_of({name: str(e.get("status")) for name, e in levels.items() if isinstance(e, dict)})
    headers = {name: header.raw for name, header in both.source.shards.items()}
    return {
        "verdict": verdict,
        "equivalent": verdict == EQUIVALENT,
        "levels": levels,
        "thresholds": result.thresholds,
        "environment": result.environment,
        "source": {
            "name": result.source,
            "commit": result.commit,
            "files": {
                name: file_facts(both.source.folder / name, headers.get(name), both.source.sha256.get(name))
                for name in (CONFIG, *both.source.shards)
            },
        },
        "files": hashes,
    }


def _hashes(folded: Checkpoint, known: dict[str, str], workers: int, report: Progress) -> dict[str, str]:
    """sha256 of every file that a verification speaks of; shards are only read if no level has."""
    names = hashed_files(folded)
    missing = [name for name in names if name not in known]
    found, done = dict(known), 0
    total = sum((folded.folder / name).stat().st_size for name in missing)
    with ThreadPoolExecutor(workers) as pool:
        for name, digest in zip(missing, pool.map(lambda n: sha256_of(folded.folder / n), missing), strict=True):
            found[name] = digest
            done += (folded.folder / name).stat().st_size
            report(done, total, "Hashing files")
    return {name: found[name] for name in names}


def _adopt(both: Pair) -> dict[str, Any]:
    """Give a checkpoint of another tool the flags and the record that its files deserve."""
    folded = both.folded
    why = "the tool that folded this checkpoint kept it"
    norms = tuple(
        dataclasses.replace(norm, reason=why) if norm.folded and norm.tensor not in both.gains else norm
        for norm in both.plan.norms
    )
    left = [norm for norm in both.plan.norms if norm.folded and norm.tensor not in both.gains]
    plan: Plan = dataclasses.replace(
        both.plan,
        norms=norms,
        readers=tuple(both.readers.values()),
        added=both.expected_added,
        untie=both.untied,
        folded_flag=both.plan.folded_flag and not left,
    )
    layout = "dropped" if any(both.states[name] == DROPPED for name in both.gains) else "identity"
    path = folded.folder / CONFIG
    record, text = adopted(both.source, folded, plan, layout)
    if text != path.read_text(encoding="utf-8"):
        write_text(path, text)
    return record
