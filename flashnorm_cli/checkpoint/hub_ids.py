"""What people paste for a model: its page's URL, an hf:// address; as the Hub id and the revision that they name."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

from flashnorm_cli.errors import UsageError, shown

_HOST = r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/"
_ADDRESS = re.compile(rf"(?:hf|https?)://|{_HOST}", re.IGNORECASE)
# An old id without a user, which huggingface_hub takes for a user's page: t5-small.
_BARE = re.compile(rf"(?:hf://|{_HOST})([\w.-]+)(?:@|/tree/|/(?=$)|$)([^/]*)/?", re.IGNORECASE)


def hub_id(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The Hub id and the revision that an address names; a path or an id stays as it is.

    Taken are pages of models on the Hub and on the endpoint that HF_ENDPOINT names, `/tree/REVISION` at their end
    included, and `hf://user/name@revision`.

    Raises UsageError for an address of something else, or one whose revision is not the one that is asked for, too.
    """
    if not _ADDRESS.match(name) or Path(name).exists():
        return name, revision
    address = re.sub(r"[?#].*", "", name)
    if bare := _BARE.fullmatch(address):
        found_id, found_revision = bare[1], unquote(bare[2]) or None
    else:
        found_id, found_revision = _parsed(name, address)
    if None not in (revision, found_revision) and revision != found_revision:
        raise UsageError(f"{shown(name)}: names revision {found_revision}, and {revision} is asked for; name one")
    return found_id, revision or found_revision


def _parsed(name: str, address: str) -> tuple[str, str | None]:
    from huggingface_hub import constants, parse_hf_uri
    from huggingface_hub.errors import HfUriError

    address = re.sub(r"^(hf|https?)://(www\.)?", lambda found: f"{found[1].lower()}://", address, flags=re.IGNORECASE)
    address = re.sub(r"/commit/(\w+)$", r"/tree/\1", address).removesuffix("/").removesuffix(".git")
    try:
        found = parse_hf_uri(address, endpoint=constants.ENDPOINT)
    except HfUriError as error:
        raise UsageError(f"{shown(name)}: names no model on the Hub: {getattr(error, 'msg', error)}") from None
    if found.type != "model":
        raise UsageError(f"{shown(name)}: is a {found.type}, not a model")
    if found.path_in_repo:
        at = f" `revision={found.revision!r}`" if found.revision not in (None, "main") else ""
        raise UsageError(f"{shown(name)}: names {shown(found.path_in_repo)} inside a model; name it: {found.id}{at}")
    return found.id, found.revision


def repository_id(name: str) -> str:
    """A repository that is written to, or named as a base, by its id or address. Raises UsageError as `hub_id`."""
    found, revision = hub_id(name)
    if revision not in (None, "main"):
        raise UsageError(f"{shown(name)}: names revision {revision}; name the repository alone: {found}")
    return found
