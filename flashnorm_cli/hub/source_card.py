"""A README.md as input: whoever wrote it may have written anything."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

from flashnorm_cli.checkpoint.hub_errors import first_line
from flashnorm_cli.errors import CheckpointError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

# Bytes. YAML is parsed at 100 kB/s, and the largest cards there are hold some hundred kB of evaluation results.
LARGEST_CARD, LARGEST_METADATA = 10 << 20, 1 << 20
MOST_VALUES, DEEPEST = 200_000, 50
WORDS = ("license_name", "license_link", "library_name", "pipeline_tag", "model_name", "new_version")
LISTS = ("license", "tags", "base_model", "language", "datasets", "metrics")
SCALARS = (str, int, float, bool, datetime.date)


def read_card(text: str) -> ModelCard:
    """A card from its text. Raises CheckpointError where it is too large, or its metadata are broken."""
    from huggingface_hub import ModelCard
    from huggingface_hub.repocard import REGEX_YAML_BLOCK
    from huggingface_hub.utils import logging

    if len(text) > LARGEST_CARD:
        raise CheckpointError(f"README.md: has {len(text):,} characters, and more than {LARGEST_CARD:,} are not read")
    text = text.lstrip("\ufeff")
    block = REGEX_YAML_BLOCK.search(text)
    if block and len(block[2]) > LARGEST_METADATA:
        raise CheckpointError(
            f"README.md: its metadata have {len(block[2]):,} characters, and more than {LARGEST_METADATA:,} are not "
            "read; shorten the block between the ---"
        )
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a card without metadata is no reason to warn
    try:
        if block:
            _check_yaml(block[2])
        return ModelCard(text, ignore_metadata_errors=True)
    except CheckpointError:
        raise
    except Exception as error:  # whatever the YAML parser raises
        why = first_line(" ".join(str(error).split()) or type(error).__name__)
        raise CheckpointError(
            f"README.md: its metadata cannot be read ({why}); correct the block between the ---"
        ) from error
    finally:
        logging.set_verbosity(level)


def _check_yaml(block: str) -> None:
    import yaml  # type: ignore[import-untyped]

    data = yaml.safe_load(block)
    if isinstance(data, dict):  # ModelCard says what is wrong with anything else
        check_metadata(data)


def check_metadata(data: dict[Any, Any], where: str = "README.md") -> dict[str, Any]:
    """Metadata whose values are what they are used as. Raises CheckpointError with the key that is not."""
    _check_size(data, where)
    for key in data:
        if not isinstance(key, str):
            raise CheckpointError(f"{where}: its metadata have the key {first_line(repr(key))}, which is not a word")
    for key in WORDS:
        if data.get(key) is not None and not isinstance(data[key], str):
            raise CheckpointError(f"{where}: `{key}` in its metadata is not a text; correct the block between the ---")
    for key in LISTS:
        value = data.get(key)
        several = value if isinstance(value, list) else [] if value is None else [value]
        kinds = str if key == "base_model" else SCALARS  # the Hub is asked for it by that name
        if not all(isinstance(item, kinds) for item in several) or (key == "tags" and isinstance(value, SCALARS)):
            what = "a list of words" if key == "tags" else "a word or a list of words"
            raise CheckpointError(f"{where}: `{key}` in its metadata is not {what}; correct the block between the ---")
    return data


def _check_size(data: Any, where: str) -> None:
    """YAML's anchors make values from a few bytes that take years to walk through, or have no end."""
    seen, waiting = 0, [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or depth > DEEPEST:
            raise CheckpointError(f"{where}: its metadata are too many or too deeply nested to be read")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for inner in value.values()]
        elif isinstance(value, (list, tuple)):
            waiting += [(inner, depth + 1) for inner in value]
