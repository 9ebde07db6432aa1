"""Who uses more of a checkpoint than its logits, as its files and its config announce it.

A fold keeps the logits. What the final norm puts out, `last_hidden_state` and `hidden_states[-1]`, comes out of a
folded model without the norm's gain: whoever reads that (an embedding's pooling, a value head, a draft model, an image
pipeline) computes something else. The forward that is planned from does not show such users; the files around the
weights do. Nothing here imports torch or runs the checkpoint's code; what that code shows is in `plan/readers.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flashnorm_cli.checkpoint.model import CONFIG, Checkpoint
from flashnorm_cli.checkpoint.own_code import only_wraps
from flashnorm_cli.checkpoint.weight_files import WeightFile, files_beside, weight_files

# What a user reads.
LAST = "last_hidden_state"  # the output of the norms outside of the numbered layers, the final norm's above all
INPUTS = "module inputs"  # the inputs of the linear layers that `modules` names
ANY = "any"  # not known: code that was not run may read any norm's output

# Kinds of users.
EMBEDDING = "embedding"
HEAD = "head"
DRAFT = "draft"
ADAPTER = "adapter"
CODE = "remote code"
CLASSES = "other classes"
PIPELINE = "pipeline"
GENERATION = "generation"
DECODER = "second decoder"

MAX_JSON = 1 << 20  # bytes; configs are small, and tokenizers that are larger announce nothing


@dataclass(frozen=True)
class User:
    """Somebody who reads more of the model than its logits.

    `kind` is one of the kinds above, `seen` the file (and key) or the code that announces it, `reads` is LAST,
    INPUTS or ANY, `line` says it to people and ends without a stop. `modules` are the modules on disk, without
    `.weight`, whose inputs are read (INPUTS only).
    """

    kind: str
    seen: str
    reads: str
    line: str
    modules: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "modules": list(self.modules)}


def announced_users(checkpoint: Checkpoint, own_code: bool = False) -> tuple[User, ...]:
    """What the files and the config of a checkpoint announce, each user once, the most telling first.

    Args:
        checkpoint: from `open_checkpoint`, with or without its weights.
        own_code: whether the class that is traced is the checkpoint's own (`auto_map`, with trust_remote_code).
    """
    files = _Files(checkpoint)
    found = [
        *_sentence_transformers(files),
        *_pooling_files(files),
        *_weights(checkpoint),
        *_announced_in_configs(files),
        *_speech(files),
        *_generation(files),
        *_own_code(files, own_code),
        *_other_classes(files),
        *_pipelines(files),
        *_card(files),
    ]
    return tuple(dict.fromkeys(found))


class _Files:
    """The small files of a checkpoint, by their paths relative to its folder."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.folder, self.config = checkpoint.folder, checkpoint.config
        self.names = files_beside(checkpoint)
        self.in_folder = "memory" not in checkpoint.shards  # a model in memory has no files

    def json(self, name: str) -> Any:
        """The value in a JSON file, or None where it holds none or is not there."""
        return _read_json(self.folder / name)

    def text(self, name: str) -> str:
        try:
            return (self.folder / name).read_text(encoding="utf-8", errors="replace")[:MAX_JSON]
        except OSError:
            return ""


def _read_json(path: Path) -> Any:
    try:
        if path.stat().st_size > MAX_JSON:
            return None
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def _sub(name: str) -> str:
    return name.rsplit("/", 1)[-1]


# ---- embeddings ------------------------------------------------------------------------------------------------------

# Tasks of sentence-transformers that end in logits, and its modules that start from them.
_LOGIT_TASKS = ("sequence-classification", "text-generation", "fill-mask")
_LOGIT_MODULES = ("MLMTransformer",)


def _sentence_transformers(files: _Files) -> Iterator[User]:
    """sentence-transformers pools the last hidden state, whatever class config.json names."""
    what = "sentence-transformers pools the final norm's output into an embedding"
    modules = files.json("modules.json") if "modules.json" in files.names else None
    if isinstance(modules, list):
        entries = [entry for entry in modules if isinstance(entry, dict)]
        first = entries[0] if entries else {}
        settings = files.json("/".join(filter(None, [str(first.get("path", "")), "sentence_bert_config.json"])))
        task = settings.get("transformer_task") if isinstance(settings, dict) else None
        if task in _LOGIT_TASKS or str(first.get("type", "")).endswith(_LOGIT_MODULES):
            return
        rest = ", ".join(str(entry.get("type", "?")).rsplit(".", 1)[-1] for entry in entries[1:])
        yield User(EMBEDDING, "modules.json", LAST, f"{what} (modules.json: Transformer{', ' if rest else ''}{rest})")
    elif "config_sentence_transformers.json" in files.names:
        content = files.json("config_sentence_transformers.json")
        if not (isinstance(content, dict) and content.get("model_type") == "CrossEncoder"):
            yield User(EMBEDDING, "config_sentence_transformers.json", LAST, what)
    elif "sentence_bert_config.json" in files.names:
        yield User(EMBEDDING, "sentence_bert_config.json", LAST, what)
    if "artifact.metadata" in files.names:
        yield User(
            EMBEDDING, "artifact.metadata", LAST, "ColBERT projects the final norm's output to one vector a token"
        )


_POOLING = re.compile(r"pooling(_(mode|type|method|strategy|tokens?)\w*)?|sentence_pooling\w*|emb_pooler\w*")


def _pooling_files(files: _Files) -> Iterator[User]:
    """A folder of a pooling or projection module (`1_Pooling/config.json`), with or without modules.json."""
    if "modules.json" in files.names:
        return
    for name in files.names:
        if "/" in name and _sub(name) == CONFIG and isinstance(content := files.json(name), dict):
            keys = [k for k in content if k == "word_embedding_dimension" or _POOLING.fullmatch(k)]
            if keys or {"in_features", "out_features"} <= content.keys():
                yield User(EMBEDDING, name, LAST, f"{name} describes a module that pools the final norm's output")


_EMBEDDING_TAGS = frozenset("feature-extraction sentence-similarity sentence-transformers colbert pylate".split())


def _card(files: _Files) -> Iterator[User]:
    """The model card's metadata, which the Hub offers the model by."""
    text = files.text("README.md") if "README.md" in files.names else ""
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    for line in front[1].splitlines() if front else ():
        found = re.match(r"(?:(?:pipeline_tag|library_name)\s*:|\s*-)\s*[\"']?([\w-]+)[\"']?\s*$", line)
        if found and found[1].lower() in _EMBEDDING_TAGS:
            yield User(EMBEDDING, "README.md", LAST, f"its card calls it a model for embeddings ({found[1]})")
            return


# ---- heads, draft heads and adapters in files of their own -----------------------------------------------------------


def _weights(checkpoint: Checkpoint) -> Iterator[User]:
    for file in weight_files(checkpoint):
        if file.adapts is not None:
            reads = INPUTS if file.adapts else ANY
            what = (
                "adapts layers to the gains that they read now" if file.adapts else "adapts layers that it cannot name"
            )
            yield User(ADAPTER, file.name, reads, f"{file.name} {what}", file.adapts)
        elif file.reader is not None:
            yield User(HEAD, file.name, LAST, _words(file))


def _words(file: WeightFile) -> str:
    if file.reader == "":
        return f"{file.name} holds weights that were not seen, and may read the final norm's output"
    return f"`{file.reader}` in {file.name} is not part of the traced model, and may read the final norm's output"


_DRAFTS = re.compile(
    r"(^|_)(mtp|nextn|medusa|eagle\d*|hydra|speculat[a-z]*|draft(er)?|dflash|future_tokens?|n_predict|lookahead)(_|$)"
)
_HEADS = re.compile(r"(^|_)(value|v|reward|critic|score)_head(_(config|type|path|layers?|hidden|dropout|class)\w*)?$")
_COUNTS = re.compile(r"(^|_)(num|n|number)_|_(layers|heads|modules)$")
_NO_SIGN = re.compile(r"loss|scal|coef|lambda|_dim$|_range$")


def _announced_in_configs(files: _Files) -> Iterator[User]:
    """Draft heads, value heads and poolings that a config names: `num_nextn_predict_layers`, `medusa_num_heads`."""
    configs: list[tuple[str, Any]] = [(CONFIG, files.config)]
    for name in files.names:
        last = _sub(name)
        if last.endswith(CONFIG) and name != CONFIG and not last.startswith(("tokenizer", "adapter")):
            configs.append((name, files.json(name)))
    for name, config in configs:
        pairs = list(_pairs(config))
        if key := _draft_key(pairs):
            line = f"{name} announces a draft or multi-token prediction head ({key}), which reads hidden states"
            yield User(DRAFT, f"{name}: {key}", LAST, line)
        for key, value in pairs:
            if value and _HEADS.search(_key(key)):
                yield User(HEAD, f"{name}: {key}", LAST, f"{name} announces a head of its own ({key})")
    for key, value in [*files.config.items(), *_text_config(files.config)]:
        if value and isinstance(value, (str, bool, dict)) and _POOLING.fullmatch(key):
            yield User(EMBEDDING, f"{CONFIG}: {key}", LAST, f"{CONFIG} announces a pooling of hidden states ({key})")
        elif (key == "is_causal" and value is False) or (key == "use_bidirectional_attention" and value is True):
            line = f"{CONFIG} says that it attends both ways ({key}), as models for embeddings do"
            yield User(EMBEDDING, f"{CONFIG}: {key}", LAST, line)


def _draft_key(pairs: list[tuple[str, Any]]) -> str | None:
    """The key that announces draft heads. A number of them decides: it may be 0, and other keys describe nothing."""
    kinds: dict[str, list[tuple[str, Any]]] = {}
    for key, value in pairs:
        if (found := _DRAFTS.search(_key(key))) and not _NO_SIGN.search(key):
            kinds.setdefault(found.group(2).replace("nextn", "mtp"), []).append((key, value))
    for same in kinds.values():
        counts = [pair for pair in same if _COUNTS.search(_key(pair[0]))]
        for key, value in counts or same:
            if value and value not in ("none", "None"):
                return key
    return None


def _text_config(config: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    nested = config.get("text_config")
    return nested.items() if isinstance(nested, dict) else ()


def _key(key: str) -> str:
    """`numMtpLayers` and `num-mtp-layers` as `num_mtp_layers`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").lower()


def _pairs(config: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every key of a config with its value, nested configs included."""
    if isinstance(config, dict) and depth < 8:
        for key, value in config.items():
            yield str(key), value
            yield from _pairs(value, depth + 1)


# ---- generation ------------------------------------------------------------------------------------------------------


_SPEAKS = r"(speech|audio)_tokenizer|vocoder|talker|token2wav|code2wav|code_predictor|depth_decoder|tts"
_MAKES = re.compile(
    rf"({_SPEAKS}|(image|speech|audio|diffusion|flow|gen|generation)_(decoder|generator|head))(_config)?"
)


def _speech(files: _Files) -> Iterator[User]:
    """A second model that speaks or draws, announced by config, by the processor, or by a folder of its own."""
    found = [(f"{CONFIG}: {key}", key) for key, value in files.config.items() if isinstance(value, dict)]
    for name in files.names:
        processor = name in ("processor_config.json", "preprocessor_config.json")
        if processor and isinstance(content := files.json(name), dict):
            found += [(f"{name}: {key}", key) for key, value in content.items() if value]
        elif "/" in name:
            found.append((name, name.split("/")[0]))
    for seen, key in found:
        if _MAKES.fullmatch(_key(key)):
            line = f"{seen} announces another model that speaks or draws, and that may read hidden states"
            yield User(DECODER, seen, LAST, line)
            return


def _generation(files: _Files) -> Iterator[User]:
    """Ways to generate that read hidden states, as generation_config.json or code beside it set them."""
    content = files.json("generation_config.json") if "generation_config.json" in files.names else None
    for where, config in (("generation_config.json", content), (CONFIG, files.config)):
        if not isinstance(config, dict):
            continue
        if config.get("dola_layers"):  # the head reads hidden states of early layers, without the norm
            line = (
                f"{where} asks for DoLa (dola_layers), which applies the output head to hidden states without the norm"
            )
            yield User(GENERATION, f"{where}: dola_layers", LAST, line)
        if config.get("penalty_alpha"):
            line = f"{where} asks for contrastive search (penalty_alpha), which compares last hidden states"
            yield User(GENERATION, f"{where}: penalty_alpha", LAST, line)
    for name in files.names:
        if name.startswith("custom_generate/") and name.endswith(".py"):
            line = f"{name} generates by code of its own, which was not traced"
            yield User(GENERATION, name, LAST, line)
            break


# ---- code of the checkpoint's own, other classes ---------------------------------------------------------------------


def _own_code(files: _Files, traced_here: bool) -> Iterator[User]:
    """`auto_map`: the classes that are run with trust_remote_code, which are not those that were traced."""
    auto_map = files.config.get("auto_map")
    names = files.config.get("architectures") or []
    entries = [
        (str(auto), reference, reference.rsplit("--", 1)[-1].partition(".")[0])
        for auto, references in (auto_map.items() if isinstance(auto_map, dict) else ())
        for reference in (references if isinstance(references, list) else [references])
        if isinstance(reference, str) and str(auto).startswith("AutoModel")
    ]
    traced = {module for _, ref, module in entries if ref.rsplit(".", 1)[-1] in names} if traced_here else set()
    for auto, reference, module in entries:
        if traced_here and reference.rsplit(".", 1)[-1] in names:
            continue
        last = module in traced or only_wraps(files.text(f"{module}.py"))
        what = "the final norm's output" if last else "the output of any norm"
        line = f"auto_map names code of the checkpoint's own ({auto}: {reference}), which may read {what}: "
        if traced_here:
            line += "it stands beside the class that was traced"
        else:
            line += "transformers' own class was traced, not this; `trust_remote_code=True` traces it"
        yield User(CODE, f"{CONFIG}: auto_map", LAST if last else ANY, line)
    if files.config.get("custom_pipelines"):
        line = f"{CONFIG} names pipelines with code of their own (custom_pipelines), which may read hidden states"
        yield User(CODE, f"{CONFIG}: custom_pipelines", LAST, line)


def _other_classes(files: _Files) -> Iterator[User]:
    names = files.config.get("architectures") or []
    if len(dict.fromkeys(names)) > 1:
        line = f"{CONFIG} names several classes ({', '.join(names)}), and one was traced"
        yield User(CLASSES, f"{CONFIG}: architectures", LAST, line)


# ---- pipelines -------------------------------------------------------------------------------------------------------


def _pipelines(files: _Files) -> Iterator[User]:
    """A part of a diffusers pipeline: its text encoder's hidden states condition the images."""
    if not files.in_folder:
        return
    line = "is part of a pipeline ({}), which reads its hidden states"
    for name in files.names:
        if _sub(name) in ("model_index.json", "modular_model_index.json"):
            yield User(PIPELINE, name, LAST, f"the folder {line.format(name)}")
            return
    here = files.folder.absolute()
    for up, parent in enumerate(list(here.parents)[:2], 1):
        for name in ("model_index.json", "modular_model_index.json"):
            if (parent / name).is_file():
                where = "../" * up + name
                yield User(PIPELINE, where, LAST, f"the folder {line.format(where)}")
                return
    if beside := _diffusers_part(here):
        where = f"../{beside}"
        yield User(PIPELINE, where, LAST, f"the folder {line.format(where)}")


def _diffusers_part(here: Path) -> str | None:
    """A config of diffusers in a folder beside this one, where its pipeline's own file is missing."""
    for folder in ("scheduler", "transformer", "unet", "vae"):
        for name in ("scheduler_config.json", CONFIG):
            content = _read_json(here.parent / folder / name)
            if here.name != folder and isinstance(content, dict) and "_diffusers_version" in content:
                return f"{folder}/{name}"
    return None
