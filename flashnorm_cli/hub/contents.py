"""What is to be published: the checkpoint's own files, and card, record and report as readers get them."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.hub import content_id
from flashnorm_cli.checkpoint.model import CONFIG, RECORD, Checkpoint, LeftOut, Progress
from flashnorm_cli.checkpoint.places import local_paths, without_places
from flashnorm_cli.hub.card import PICTURE, REPORT, CardFacts, build_card
from flashnorm_cli.hub.licence import check_licence, gate_of, terms
from flashnorm_cli.hub.published import Base, dump, published_record
from flashnorm_cli.hub.repository import Upload
from flashnorm_cli.hub.source_card import read_card
from flashnorm_cli.hub.standing import Standing
from flashnorm_cli.plan.model import Plan
from flashnorm_cli.proof.files import EVAL_RESULTS_DIR
from flashnorm_cli.proof.result import Verification
from flashnorm_cli.report.page import render
from flashnorm_cli.report.plan_svg import plan_svg
from flashnorm_cli.report.project import address

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

README, ATTRIBUTES = "README.md", ".gitattributes"
LARGEST_JSON = 1 << 20  # bytes; larger ones are vocabularies
Hashes = Mapping[str, tuple[str, str]]


@dataclass(frozen=True)
class Fold:
    """A folded checkpoint and what is known of it; `name` is what the user calls it.

    From Hub to Hub the folder holds all files but the shards.
    """

    checkpoint: Checkpoint
    record: dict[str, Any]
    name: str
    standing: Standing


@dataclass(frozen=True)
class Contents:
    """What a repository will hold; `gate` is what its source asks of readers, `licence` its terms in a few words."""

    uploads: tuple[Upload, ...]
    card: str
    record: dict[str, Any]
    base: Base | None
    gate: str | bool
    licence: str
    standing: Standing
    shards: frozenset[str]
    left_out: tuple[LeftOut, ...]
    notes: tuple[str, ...]


def make_contents(fold: Fold, repo_id: str, base: Base | None, info: ModelInfo | None, hashes: Hashes) -> Contents:
    """Everything to publish as `repo_id`.

    Args:
        fold: the folded checkpoint.
        repo_id: where it will be; card and record name it.
        base: the source on the Hub, and `info` what the Hub says of it.
        hashes: (sha256, id in git) of every file of the checkpoint.
    Raises:
        FlashNormError: the card would lose the source's licence or gate, or its metadata cannot be read.
    """
    folder = fold.checkpoint.folder
    cleaned, notes = _cleaned(fold.checkpoint, hashes)
    clean = {name: hashlib.sha256(data).hexdigest() for name, data in cleaned.items()}
    if fold.standing.has_proof:
        Verification.from_record(fold.record, repo_id)  # raises for one that nobody can read
    record = published_record(fold.record, repo_id, base, fold.standing.has_proof, clean)
    result = Verification.from_record(record, repo_id) if fold.standing.has_proof else None
    readme = folder / README
    text = readme.read_bytes().decode("utf-8", "replace") if readme.is_file() else None
    theirs = _source_data(fold.record, base, info)
    ours = theirs if text is None else read_card(text).data.to_dict()
    check_licence(ours, theirs, {*fold.checkpoint.others}, info, fold.name)
    card = build_card(
        CardFacts(
            repo_id=repo_id,
            record=record,
            config=fold.checkpoint.config,
            base=base,
            verification=result,
            unverified=fold.standing.why,
            ran=fold.standing.verified,
            sizes=(
                sum(fact["size"] for name, fact in record["source_files"].items() if name.endswith(".safetensors")),
                sum(header.file_size for header in fold.checkpoint.shards.values()),
            ),
            source_card=text,
            source_data=theirs,
            files=frozenset(fold.checkpoint.others),
            chat=_chats(fold.checkpoint),
            project=address(),
        )
    )
    record["card_sha256"] = hashlib.sha256(card.encode()).hexdigest()
    picture = plan_svg(Plan.from_json(record)).encode()
    made = {**cleaned, README: card.encode(), RECORD: dump(record), PICTURE: picture}
    if result is not None:
        made[REPORT] = render(result).encode()
    return Contents(
        uploads=(*_own_files(fold.checkpoint, hashes, made), *(_made(name, data) for name, data in made.items())),
        card=card,
        record=record,
        base=base,
        gate=gate_of(ours, info),
        licence=terms(read_card(card).data.to_dict()),
        standing=fold.standing,
        shards=frozenset(fold.checkpoint.shards),
        left_out=fold.checkpoint.left_out,
        notes=notes,
    )


def _chats(checkpoint: Checkpoint) -> bool:
    """Whether the tokenizer has a chat template, in a file of its own or in its config."""
    if {"chat_template.jinja", "chat_template.json"} & {*checkpoint.others}:
        return True
    path = checkpoint.folder / "tokenizer_config.json"
    return path.name in checkpoint.others and b'"chat_template"' in path.read_bytes()


def file_hashes(checkpoint: Checkpoint, workers: int, report: Progress) -> dict[str, tuple[str, str]]:
    """(sha256, id in git) of every file of the checkpoint."""
    names = [CONFIG, *([checkpoint.index_name] if checkpoint.index else []), *checkpoint.shards, *checkpoint.others]
    names = [name for name in names if name != RECORD]
    total, done, lock = sum((checkpoint.folder / name).stat().st_size for name in names), 0, threading.Lock()

    def on_bytes(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            report(done, total, "Hashing files")

    def digest(name: str) -> tuple[str, str]:
        found = content_id(checkpoint.folder / name, on_bytes)
        return found.sha256, found.oid

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def _own_files(checkpoint: Checkpoint, hashes: Hashes, made: Collection[str]) -> list[Upload]:
    """The checkpoint's files, byte for byte."""
    found = []
    for name, (sha256, oid) in hashes.items():
        if name not in (*made, REPORT, ATTRIBUTES) and not name.startswith(EVAL_RESULTS_DIR):
            shard, path = checkpoint.shards.get(name), checkpoint.folder / name
            found.append(Upload(name, path, shard.file_size if shard else path.stat().st_size, sha256, oid))
    return found


def _made(name: str, data: bytes) -> Upload:
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    return Upload(name, data, len(data), hashlib.sha256(data).hexdigest(), oid)


def _cleaned(checkpoint: Checkpoint, names: Collection[str]) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """JSON files that name a folder of this machine as the place where they came from, without it; and what to say."""
    found = {}
    for name in names:
        path = checkpoint.folder / name
        if not name.endswith(".json") or name == checkpoint.index_name or path.stat().st_size > LARGEST_JSON:
            continue
        text = path.read_bytes().decode("utf-8", "surrogateescape")
        if (short := without_places(text)) != text:
            found[name] = short.encode("utf-8", "surrogateescape")
    notes = []
    if found:
        notes.append(f"{', '.join(found)}: named a folder of this machine, and is published without it")
    if elsewhere := local_paths(checkpoint.config):
        keys = ", ".join(dict.fromkeys(elsewhere))
        notes.append(f"{CONFIG} names paths of a machine ({keys}), and is published with them")
    return found, tuple(notes)


def _source_data(record: dict[str, Any], base: Base | None, info: ModelInfo | None) -> dict[str, Any]:
    """The metadata of the source's card where it is: on the Hub, or in its folder if that is still there."""
    if info is not None:
        return info.card_data.to_dict() if info.card_data else {}
    path = Path(str(record.get("source"))).expanduser() / README
    if base is None and path.is_file():
        return read_card(path.read_text(encoding="utf-8", errors="replace")).data.to_dict()
    return {}
