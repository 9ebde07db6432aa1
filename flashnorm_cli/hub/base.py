"""The source on the Hub that a fold was made from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.hub import listed_ids
from flashnorm_cli.checkpoint.hub_errors import status_of, with_retry
from flashnorm_cli.checkpoint.model import CONFIG, Source
from flashnorm_cli.checkpoint.open import open_checkpoint
from flashnorm_cli.errors import FlashNormError, UsageError
from flashnorm_cli.hub.origin import Origin
from flashnorm_cli.hub.published import Base, same_fold

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo


def recorded_base(record: dict[str, Any], has_proof: bool) -> Base | None:
    """The source on the Hub that was folded, or verified against where that verification still counts."""
    entry = record.get("verify")
    verified = entry.get("source") if isinstance(entry, dict) and has_proof else None
    named = [(record.get("source"), record.get("commit"))]
    named += [(verified.get("name"), verified.get("commit"))] if isinstance(verified, dict) else []
    return next((Base(str(name), str(commit)) for name, commit in named if name and commit), None)


def find_base(
    api: HfApi, folded: str, record: dict[str, Any], has_proof: bool, wanted: str | None, held: Any, origin: Origin
) -> Base | None:
    """The source on the Hub: the recorded one, the one that the caller names, the one that the page names already, or
    one that the source's files name, if it holds the very files that were folded.

    `held` is the flashnorm.json of the repository that will be written. Raises UsageError where the caller names
    another one than was folded, FlashNormError where its files are not those.
    """
    known = recorded_base(record, has_proof)
    if known is not None:
        if wanted not in (None, known.repo_id):
            raise UsageError(f"`base_model={wanted!r}`: this checkpoint was made from {known.repo_id}")
        return known
    if wanted is None and same_fold(record, held) and held.get("commit"):
        wanted = held["source"]
    if wanted is not None:
        return _same_on_hub(api, folded, record, Source(wanted, token=api.token), origin.sha256)
    for name in origin.names:
        if Path(name).exists():  # a folder here of that name
            continue
        with suppress(FlashNormError):  # it is not there, not for this token, or another model
            return _same_on_hub(api, folded, record, Source(name, origin.commit, api.token), origin.sha256)
    return None


def _same_on_hub(api: HfApi, folded: str, record: dict[str, Any], source: Source, noted: Mapping[str, str]) -> Base:
    """The Hub repository of a local source, if it holds the very files that were folded.

    `noted` are the sha256 of shards that a download noted; the record holds those of small ones.
    """
    name, theirs = source.name, open_checkpoint(source, weights=False)
    if theirs.commit is None:
        raise UsageError(f"`base_model={name!r}`: is a folder; name a repository on the Hub")
    facts: dict[str, Any] = record.get("source_files") or {}
    on_hub = listed_ids(theirs.source, theirs.commit, list(theirs.shards))
    for shard, header in theirs.shards.items():
        fact, known = facts.get(shard, {}), on_hub.get(shard, ("",))[0]
        if fact.get("header_sha256") != hashlib.sha256(header.raw).hexdigest():
            raise FlashNormError(f"`base_model={name!r}`: its {shard} is not the one that was folded")
        ours = fact.get("sha256", noted.get(shard))
        if ours is None or len(known) != 64:
            raise FlashNormError(
                f"`base_model={name!r}`: whether its {shard} is the one that was folded cannot be told from hashes; "
                f"`verify({folded!r}, source={name!r})` compares them, and names it in the record"
            )
        if ours != known:
            raise FlashNormError(f"`base_model={name!r}`: its {shard} is not the one that was folded")
    config = hashlib.sha256((theirs.folder / CONFIG).read_bytes()).hexdigest()
    if facts.get(CONFIG, {}).get("sha256") != config:
        raise FlashNormError(f"`base_model={name!r}`: its {CONFIG} is not the one that was folded")
    return Base(name, theirs.commit)


def base_info(api: HfApi, base: Base | None) -> ModelInfo | None:
    """What the Hub says of the source: its gate, its licence. None where it is not there, or not for this token."""
    if base is None:
        return None
    try:
        return with_retry(lambda: api.model_info(base.repo_id, revision=base.commit))
    except Exception as error:  # of the Hub or of the network: which answers mean "not there" is asked here
        if status_of(error) not in (401, 403, 404):
            raise
        return None
