"""The token ids that both models are run on."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashnorm_cli.checkpoint.files import read_text
from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import FolderError, UsageError
from flashnorm_cli.modeling import build
from flashnorm_cli.modeling.quiet import quiet_transformers

PROMPTS = Path(__file__).parent / "prompts.txt"


# Many short prompts rather than a few long ones: what happens to one token is carried on to those that follow it.
PROMPT_TOKENS, ALL_TOKENS = 64, 1024
TEXT_PROMPT_TOKENS, TEXT_TOKENS = 256, 4096  # of a file that the user gives
MIN_TOKENS = 64
RANDOM_PROMPTS, RANDOM_TOKENS = 32, 16  # where there is no tokenizer
LENGTH_STEP = 16  # where each length costs a reading of the model


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, where they come from, and what turns them into text (None without a tokenizer).

    `random` ids have no continuation that would mean anything. `given` are the tokens of the user's text, all of them.
    """

    ids: tuple[tuple[int, ...], ...]
    origin: str
    tokenizer: Any = None
    random: bool = False
    given: int | None = None

    def in_words(self) -> str:
        """Where they come from; of a text of the user's also how much of it they are."""
        if self.given is None:
            return self.origin
        part = "all" if sum(map(len, self.ids)) == self.given else "the first"
        return f"{self.origin}, {part} of its {self.given:,} tokens"


def read_prompts(source: Checkpoint, text: Path | None, ids: Path | None, trust_remote_code: bool) -> Prompts:
    """The prompts: token ids from a JSON file, or a text of the user's or the built-in one, by the source's tokenizer.

    Without a tokenizer, random ids. Long texts are cut into prompts that the model's positions allow.
    """
    config = build.load_config(source.folder, trust_remote_code).get_text_config()
    vocabulary = int(getattr(config, "vocab_size", 0) or 256)
    positions = getattr(config, "max_position_embeddings", None)
    length, budget = (TEXT_PROMPT_TOKENS, TEXT_TOKENS) if text else (PROMPT_TOKENS, ALL_TOKENS)
    length = min(length, positions) if isinstance(positions, int) and positions > 0 else length
    if ids is not None:
        rows = _rows_of_ids(ids, vocabulary)
        _enough(rows, ids)
        return Prompts(tuple(tuple(row) for row in rows), str(ids), _tokenizer(source, trust_remote_code))
    tokenizer = _tokenizer(source, trust_remote_code)
    if tokenizer is None:
        if text is not None:
            raise UsageError("`text` needs a tokenizer, and the source has none; pass `token_ids` instead")
        return Prompts(
            _random_ids(source, vocabulary, RANDOM_PROMPTS, min(length, RANDOM_TOKENS), seed=0),
            "random token ids (there is no tokenizer)",
            random=True,
        )
    try:
        words = read_text(text or PROMPTS)
    except (OSError, UnicodeDecodeError, FolderError) as error:
        raise UsageError(f"{text}: cannot be read as text: {error}") from error
    with quiet_transformers():
        # The built-in text is made of paragraphs on different matters; a file of the user's is one text.
        parts = [words] if text else [p for p in words.split("\n\n") if p.strip()]
        rows = [tokenizer(part)["input_ids"] for part in parts]
    cut = [row[i : i + length] for row in rows for i in range(0, len(row), length)]
    kept: list[tuple[int, ...]] = []
    for row in cut:
        if len(row) > 1 and sum(map(len, kept)) < budget:
            kept.append(tuple(row[: budget - sum(map(len, kept))]))
    _enough(kept, text or PROMPTS)
    origin = str(text) if text else "the text that comes with flashnorm"
    return Prompts(tuple(kept), origin, tokenizer, given=sum(map(len, rows)) if text else None)


def drawn_afresh(source: Checkpoint, count: int, seed: int | None = None) -> Prompts:
    """Prompts of random token ids: `count` of them, or more. Without a seed no run before has seen them."""
    config = build.load_config(source.folder, "auto_map" in source.config).get_text_config()
    vocabulary = int(getattr(config, "vocab_size", 0) or 256)
    positions = getattr(config, "max_position_embeddings", None)
    length = min(RANDOM_TOKENS, positions) if isinstance(positions, int) and positions > 0 else RANDOM_TOKENS
    ids = _random_ids(
        source, vocabulary, max(2 * RANDOM_PROMPTS, count), length, secrets.randbits(63) if seed is None else seed
    )
    return Prompts(ids, "random token ids", random=True)


def in_few_lengths(prompts: Prompts) -> Prompts:
    """The prompts cut to multiples of `LENGTH_STEP` tokens and sorted by length: few batches hold them all."""
    cut = [ids[: len(ids) // LENGTH_STEP * LENGTH_STEP] for ids in prompts.ids]
    kept = sorted((ids for ids in cut if ids), key=len)
    return dataclasses.replace(prompts, ids=tuple(kept)) if kept else prompts


def _enough(rows: Sequence[Sequence[int]], path: Path) -> None:
    """A median over a handful of positions would call a right fold wrong."""
    if (tokens := sum(map(len, rows))) < MIN_TOKENS:
        raise UsageError(
            f"{path}: holds {tokens} tokens; at least {MIN_TOKENS} are needed to tell rounding from a mistake"
        )


def _rows_of_ids(path: Path, vocabulary: int) -> list[list[int]]:
    try:
        rows = json.loads(read_text(path))
    except (OSError, ValueError, FolderError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    if isinstance(rows, list) and rows and all(type(i) is int for i in rows):
        rows = [rows]
    good = isinstance(rows, list) and rows and all(isinstance(r, list) and r for r in rows)
    if not good or not all(type(i) is int and 0 <= i < vocabulary for r in rows for i in r):
        raise UsageError(f"{path}: holds no lists of token ids below {vocabulary}")
    return [list(row) for row in rows]


def _tokenizer(source: Checkpoint, trust_remote_code: bool) -> Any:
    """The source's tokenizer, or None where it has none."""
    names = {Path(name).name for name in source.others}
    if not names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"}:
        return None
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception:  # a tokenizer that this environment cannot load (a missing package, say): random ids do
        return None


def _random_ids(source: Checkpoint, vocabulary: int, count: int, length: int, seed: int) -> tuple[tuple[int, ...], ...]:
    """`count` prompts of ids without a special meaning: none that the config names."""
    special: set[int] = set()

    def collect(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(inner, str(name))
        elif isinstance(value, list) and "token" in key:
            for inner in value:
                collect(inner, key)
        elif type(value) is int and ("token" in key or key.endswith("_id")):
            special.add(value)

    collect(build.load_config(source.folder, False).to_dict() if "auto_map" not in source.config else source.config, "")
    plain = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(plain), (count, length), generator=generator)
    return tuple(tuple(row) for row in plain[picks].tolist())
