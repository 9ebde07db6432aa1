"""Bad calls and broken checkpoints: each ends with its own one line, its exit code, and nothing changed on disk.

The table `BAD` maps the name of a row to what is done to the folder `model` before, the call, the exit code, and
the line on stderr; `...` in a line stands for anything.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import resource
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from documents import document
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM

import flashnorm_cli
from flashnorm_cli.checkpoint.header import read_header
from flashnorm_cli.cli import main

FIRST, SECOND, LAST = (f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3))
INDEX = "model/model.safetensors.index.json"
CONFIG = "model/config.json"
NORM = "model.layers.0.input_layernorm.weight"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny checkpoints that the rows start from; `llama` has three shards."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES))
    for parameter in llama.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.4, 1.8)
    llama.to(torch.float16).save_pretrained(folder / "llama", max_shard_size="20KB")
    assert {p.name for p in (folder / "llama").glob("*.safetensors")} == {FIRST, SECOND, LAST}
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=96)).save_pretrained(folder / "gpt2")
    OlmoForCausalLM(OlmoConfig(**SIZES)).save_pretrained(folder / "olmo")
    return folder


# ---- what is done to the checkpoint, in the current folder ------------------------------------------------


def nothing() -> None:
    pass


def replace(name: str) -> Callable[[], None]:
    """Start from another of the checkpoints."""

    def change() -> None:
        shutil.rmtree("model")
        shutil.copytree(Path(os.environ["TINY_MODELS"]) / name, "model")

    return change


def remove(*names: str) -> Callable[[], None]:
    return lambda: [Path("model", name).unlink() for name in names] and None


def write(path: str, content: str | bytes = "x") -> Callable[[], None]:
    def change() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def both(*changes: Callable[[], None]) -> Callable[[], None]:
    return lambda: [change() for change in changes] and None


def edit_json(path: str, edit: Callable[[Any], Any]) -> None:
    value = json.loads(Path(path).read_text())
    edit(value)
    Path(path).write_text(json.dumps(value, indent=2))


def config(**changes: Any) -> Callable[[], None]:
    """Set keys of config.json; `...` takes a key out."""

    def edit(value: dict[str, Any]) -> None:
        value.update(changes)
        for key in [k for k, v in changes.items() if v is ...]:
            del value[key]

    return lambda: edit_json(CONFIG, edit)


def weight_map(**changes: Any) -> Callable[[], None]:
    """Set where the index says that tensors are; `__` in a key stands for a dot."""
    named = {key.replace("__", "."): shard for key, shard in changes.items()}
    return lambda: edit_json(INDEX, lambda value: value["weight_map"].update(named))


def cut(name: str, size: int) -> Callable[[], None]:
    """Truncate a shard to `size` bytes, or by that many where it is negative."""
    path = Path("model", name)
    return lambda: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def patch(name: str, offset: int, content: bytes) -> Callable[[], None]:
    def change() -> None:
        with Path("model", name).open("r+b") as file:
            file.seek(offset, os.SEEK_END if offset < 0 else os.SEEK_SET)
            file.write(content)

    return change


def header(edit: Callable[[dict[str, Any]], Any], name: str = FIRST) -> Callable[[], None]:
    """Change the JSON of a shard's header."""

    def change() -> None:
        path = Path("model", name)
        raw = path.read_bytes()
        size = 8 + int.from_bytes(raw[:8], "little")
        fields = json.loads(raw[8:size])
        edit(fields)
        text = json.dumps(fields).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[size:])

    return change


def entry(**changes: Any) -> Callable[[], None]:
    """Change the header entry of the first shard's last tensor, the last in the file."""
    return header(lambda fields: fields[max(fields, key=end_of(fields))].update(changes))


def end_of(fields: dict[str, Any]) -> Callable[[str], int]:
    return lambda name: fields[name].get("data_offsets", [0, 0])[1]


def shift_last(by: int) -> Callable[[], None]:
    def edit(fields: dict[str, Any]) -> None:
        last = fields[max(fields, key=end_of(fields))]
        last["data_offsets"] = [n + by for n in last["data_offsets"]]

    return header(edit)


def twice_in_header() -> None:
    path = Path("model", FIRST)
    raw = path.read_bytes()
    size = 8 + int.from_bytes(raw[:8], "little")
    text = b'{"__metadata__":{},' + raw[9:size]
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[size:])


def drop(tensor: str) -> Callable[[], None]:
    """Leave a tensor out of its shard and the index: its bytes are given to a new name that nothing reads."""

    def edit_index(value: dict[str, Any]) -> None:
        shard = value["weight_map"].pop(tensor)
        value["weight_map"]["unrelated"] = shard
        header(lambda fields: fields.update(unrelated=fields.pop(tensor)), shard)()

    return lambda: edit_json(INDEX, edit_index)


def fill(pattern: str, value: float) -> Callable[[], None]:
    """Set all elements of the tensors whose name ends with `pattern`."""

    def change() -> None:
        bits = torch.tensor(value, dtype=torch.float16).numpy().tobytes()
        for path in Path("model").glob("*.safetensors"):
            found = read_header(path)
            with path.open("r+b") as file:
                for each in found.tensors.values():
                    if each.name.endswith(pattern):
                        file.seek(found.data_start + each.start)
                        file.write(bits * (each.nbytes // 2))

    return change


def quantize(fields: dict[str, Any]) -> None:
    for name, value in fields.items():
        if name.endswith("proj.weight") or name.startswith("lm_head"):
            value["dtype"] = "I16"


def only_bin() -> None:
    remove(FIRST, SECOND, LAST, INDEX.partition("/")[2])()
    write("model/pytorch_model.bin")()


def only_odd_names() -> None:
    remove(SECOND, LAST, INDEX.partition("/")[2])()
    Path("model", FIRST).rename("model/weights.safetensors")


def tensor_in_two_shards() -> None:
    """The same norm, under the same name, in the first and in the second shard."""
    raw = Path("model", FIRST).read_bytes()
    name = next(iter(read_header(Path("model", FIRST)).tensors))
    assert raw
    second = next(n for n in read_header(Path("model", SECOND)).tensors)
    header(lambda fields: fields.update({name: fields.pop(second)}), SECOND)()
    edit_json(INDEX, lambda value: value["weight_map"].pop(second))


def checkpoint_as_output() -> None:
    shutil.copytree("model", "out")


def link(path: str, target: str) -> Callable[[], None]:
    return lambda: Path(path).symlink_to(target)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
RAISES_IN_INIT = """
    def __init__(self, config):
        raise RuntimeError("no luck\\nwith this")
"""
RAISES_IN_FORWARD = """
    def forward(self, *args, **kwargs):
        raise KeyError("no luck")
"""


def remote(code: str = "", **auto_map: str) -> Callable[[], None]:
    """A checkpoint whose architecture is in its own modeling_own.py."""
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    return both(
        write("model/modeling_own.py", REMOTE + code),
        config(model_type="own", architectures=["OwnForCausalLM"], auto_map=auto_map or classes),
    )


FOLD = "fold model out"
TRUST = FOLD + " --trust-remote-code"
FOREIGN = (
    "model: is folded already, by another tool (config.json has {}); fold its source instead, or check this one and "
    "give it a record: flashnorm verify model --source <its source> --adopt"
)
ALREADY = "is folded already ({} says so); folding twice would do nothing good. Fold its source instead"

BAD: dict[str, tuple[Callable[[], object], str, int, str]] = {
    # the call
    "unknown command": (nothing, "melt model", 2, "No such command 'melt'. See: flashnorm --help"),
    "misspelt option": (
        nothing,
        FOLD + " --overwite",
        2,
        "No such option: --overwite (Possible options: --no-private, --overwrite, --verify). "
        "See: flashnorm fold --help",
    ),
    "missing argument": (nothing, "fold", 2, "Missing argument 'model'. See: flashnorm fold --help"),
    "too many arguments": (
        nothing,
        FOLD + " more",
        2,
        "Got unexpected extra argument(s) (more). See: flashnorm fold --help",
    ),
    "option without value": (nothing, FOLD + " --layout", 2, "Option '--layout' requires an argument. See: ..."),
    "bad layout": (
        nothing,
        FOLD + " --layout gone",
        2,
        "Invalid value for '--layout': ...'gone' is not one of 'identity', 'dropped'. See: flashnorm fold --help",
    ),
    "bad final norm": (
        nothing,
        FOLD + " --final-norm no",
        2,
        "Invalid value for '--final-norm': ...'no' is not one of 'auto', 'keep', 'untie'. See: ...",
    ),
    "no workers": (
        nothing,
        FOLD + " --workers 0",
        2,
        "Invalid value for '--workers': ...greater than or equal to 1...",
    ),
    "negative workers": (
        nothing,
        FOLD + " --workers -1",
        2,
        "Invalid value for '--workers': ...greater than or equal to 1...",
    ),
    "workers in words": (nothing, FOLD + " --workers x", 2, "Invalid value for '--workers': ...valid integer..."),
    # the source
    "no such folder": (nothing, "fold ./nowhere out", 2, "./nowhere: no such folder"),
    "no such absolute folder": (nothing, "fold /nowhere/at/all out", 2, "/nowhere/at/all: no such folder"),
    "not in the cache": (nothing, "fold nobody/nothing out --local-files-only --cache-dir .", 1, "nobody/nothing: ..."),
    "a file": (
        nothing,
        f"fold model/{FIRST} out",
        2,
        f"model/{FIRST}: is a file; name the folder that holds config.json and the shards",
    ),
    "empty folder": (
        lambda: Path("empty").mkdir(),
        "fold empty out",
        1,
        "empty: there is no config.json: is this a transformers checkpoint?",
    ),
    "no config": (remove("config.json"), FOLD, 1, "model: there is no config.json: is this a transformers checkpoint?"),
    "config is a folder": (
        both(remove("config.json"), lambda: Path(CONFIG).mkdir()),
        FOLD,
        1,
        "model/config.json: ...Is a directory...",
    ),
    "config not JSON": (write(CONFIG, "{,}"), FOLD, 1, "model/config.json: cannot be read as JSON: ..."),
    "config not UTF-8": (write(CONFIG, b'{"\xff": 1}'), FOLD, 1, "model/config.json: cannot be read as JSON: ..."),
    "config a list": (write(CONFIG, "[]"), FOLD, 1, "model/config.json: holds no JSON object"),
    "no model_type": (config(model_type=...), FOLD, 1, "model: transformers cannot read config.json: ...model_type..."),
    "unknown model_type": (
        config(model_type="lama"),
        FOLD,
        1,
        "model: transformers cannot read config.json: ...model type `lama`...",
    ),
    "architectures no list": (config(architectures="LlamaForCausalLM"), FOLD, 1, "...architectures..."),
    "no architecture": (
        config(model_type="vit", architectures=...),
        FOLD,
        1,
        "config.json names no architecture, and its model_type has no language model",
    ),
    "unknown architecture": (
        config(architectures=["LamaForMaskedLM"]),
        FOLD,
        1,
        "transformers ... has no model class LamaForMaskedLM, and its auto classes nothing of that kind for model_type "
        "llama; a newer one may",
    ),
    "not a model": (
        config(architectures=["LlamaConfig"]),
        FOLD,
        1,
        "transformers ... has no model class LlamaConfig; ...",
    ),
    "impossible config": (config(num_attention_heads=0), FOLD, 1, "...config.json: ..."),
    "config of the wrong type": (
        config(hidden_size="large"),
        FOLD,
        1,
        "model: transformers cannot read config.json: ...hidden_size...int...",
    ),
    "more layers than tensors": (
        config(num_hidden_layers=3),
        FOLD,
        1,
        "model.layers.2.input_layernorm.weight is not in the checkpoint; ...",
    ),
    "other sizes": (
        config(intermediate_size=65),
        FOLD,
        1,
        "model.layers.0.mlp.gate_proj.weight has shape [64, 32] on disk, but the config asks for [65, 32]",
    ),
    "other width": (
        config(hidden_size=48, head_dim=8),
        FOLD,
        1,
        "...weight has shape [...32] on disk, but the config asks for [...48]",
    ),
    # the weights' files
    "only .bin weights": (
        only_bin,
        FOLD,
        1,
        'model: holds no safetensors, only .bin weights; convert it first: python -c "from transformers import '
        "LlamaForCausalLM as M; M.from_pretrained('model', dtype='auto').save_pretrained('model-safetensors')\"",
    ),
    "no weights": (
        remove(FIRST, SECOND, LAST, "model.safetensors.index.json"),
        FOLD,
        1,
        "model: there are no safetensors weights (model.safetensors or model.safetensors.index.json)",
    ),
    "odd names": (
        only_odd_names,
        FOLD,
        1,
        "model: there is neither model.safetensors nor model.safetensors.index.json, only weights.safetensors",
    ),
    "empty shard": (cut(SECOND, 0), FOLD, 1, f"model/{SECOND}: truncated: 0 bytes cannot hold a safetensors header"),
    "cut in the length": (
        cut(SECOND, 5),
        FOLD,
        1,
        f"model/{SECOND}: truncated: 5 bytes cannot hold a safetensors header",
    ),
    "cut in the header": (
        cut(SECOND, 100),
        FOLD,
        1,
        f"model/{SECOND}: truncated: the header takes ... bytes, the file has 100",
    ),
    "cut in the data": (
        cut(LAST, -100),
        FOLD,
        1,
        f"model/{LAST}: truncated: tensor '...' ends at byte ... of ... data bytes",
    ),
    "cut by one byte": (cut(LAST, -1), FOLD, 1, f"model/{LAST}: truncated: tensor '...' ends at byte ..."),
    "a byte too many": (
        lambda: write(f"model/{LAST}", Path("model", LAST).read_bytes() + b"x")(),
        FOLD,
        1,
        f"model/{LAST}: 1 bytes after the last tensor",
    ),
    "a page of nothing instead of a shard": (
        write("model/" + FIRST, b"<!DOCTYPE html><html>Not found</html>"),
        FOLD,
        1,
        f"model/{FIRST}: not safetensors: its header would be ... bytes long",
    ),
    "a pointer of git lfs": (
        write("model/" + FIRST, "version https://git-lfs.github.com/spec/v1\n"),
        FOLD,
        1,
        f"model/{FIRST}: ...Git LFS...",
    ),
    "absurd header length": (
        patch(FIRST, 0, b"\xff" * 8),
        FOLD,
        1,
        f"model/{FIRST}: not safetensors: its header would be 18446744073709551615 bytes long",
    ),
    "header not JSON": (patch(FIRST, 8, b"\0\0\0\0"), FOLD, 1, f"model/{FIRST}: the header is not JSON: ..."),
    "header a list": (
        write("model/" + FIRST, (2).to_bytes(8, "little") + b"[]"),
        FOLD,
        1,
        f"model/{FIRST}: the header is not a JSON object",
    ),
    "name twice in a header": (twice_in_header, FOLD, 1, f"model/{FIRST}: '__metadata__' occurs twice in the header"),
    "overlap": (
        shift_last(-2),
        FOLD,
        1,
        f"model/{FIRST}: tensor '...' overlaps the tensor before it: it starts at ...",
    ),
    "hole": (shift_last(2), FOLD, 1, f"model/{FIRST}: tensor '...' has a hole before it: it starts at ..."),
    "unknown dtype": (entry(dtype="BF17"), FOLD, 1, f"model/{FIRST}: tensor '...' has the unknown dtype 'BF17'"),
    "dtype of another size": (
        entry(dtype="F32"),
        FOLD,
        1,
        f"model/{FIRST}: tensor '...' takes ... bytes, but F32 [...] are ... bytes",
    ),
    "shape of another size": (
        entry(shape=[3]),
        FOLD,
        1,
        f"model/{FIRST}: tensor '...' takes ... bytes, but F16 [3] are 6 bytes",
    ),
    "negative shape": (entry(shape=[-1]), FOLD, 1, f"model/{FIRST}: tensor '...' has the shape [-1]"),
    "shard missing": (
        remove(SECOND),
        FOLD,
        1,
        f"model: model.safetensors.index.json names {SECOND}, which is not there",
    ),
    "shard a folder": (
        both(remove(SECOND), lambda: Path("model", SECOND).mkdir()),
        FOLD,
        1,
        f"model/{SECOND}: Is a directory",
    ),
    "shard a broken link": (
        both(remove(SECOND), link("model/" + SECOND, "/nowhere")),
        FOLD,
        1,
        f"model...{SECOND}...",
    ),
    "index not JSON": (write(INDEX, "{"), FOLD, 1, f"{INDEX}: cannot be read as JSON: ..."),
    "index without weight_map": (write(INDEX, "{}"), FOLD, 1, f"{INDEX}: has no weight_map"),
    "index with an empty weight_map": (write(INDEX, '{"weight_map": {}}'), FOLD, 1, f"{INDEX}: has no weight_map"),
    "index names a number": (
        weight_map(lm_head__weight=1),
        FOLD,
        1,
        f"{INDEX}: lm_head.weight is said to be in 1, which is no safetensors file",
    ),
    "index leaves the folder": (
        weight_map(lm_head__weight="../x.safetensors"),
        FOLD,
        1,
        f"{INDEX}: lm_head.weight is said to be in '../x.safetensors', outside the checkpoint's folder",
    ),
    "index leaves for the root": (
        weight_map(lm_head__weight="/elsewhere/x.safetensors"),
        FOLD,
        1,
        f"{INDEX}: lm_head.weight is said to be in '/elsewhere/x.safetensors', outside the checkpoint's folder",
    ),
    "index names a tensor that is not there": (
        weight_map(more__weight=FIRST),
        FOLD,
        1,
        f"model: model.safetensors.index.json says that more.weight is in {FIRST}, but it is in no shard",
    ),
    "index names another shard": (
        weight_map(lm_head__weight=SECOND),
        FOLD,
        1,
        f"model: model.safetensors.index.json says that lm_head.weight is in {SECOND}, but it is in ...",
    ),
    "tensor in two shards": (tensor_in_two_shards, FOLD, 1, f"model: ... is both in {FIRST} and in {SECOND}"),
    "broken link": (link("model/notes.md", "/nowhere"), FOLD, 1, "model/notes.md: ..."),
    "pipe": (lambda: os.mkfifo("model/pipe"), FOLD, 1, "model/pipe: ..."),
    # the output
    "output exists": (checkpoint_as_output, FOLD, 2, "out: exists already; add --overwrite to replace it"),
    "output exists, with other things": (
        write("out/letter.txt"),
        FOLD,
        2,
        "out: exists already; add --overwrite to replace it",
    ),
    "default output exists": (
        lambda: shutil.copytree("model", "model-FlashNorm"),
        "fold model",
        2,
        "model-FlashNorm: exists already; add --overwrite to replace it",
    ),
    "overwrite no checkpoint": (
        write("out/letter.txt"),
        FOLD + " --overwrite",
        2,
        "out: is not a checkpoint (no config.json), so it will not be overwritten",
    ),
    "output a file": (write("out"), FOLD + " --overwrite", 2, "out: exists and is not a folder"),
    "output a link to a folder": (both(write("other/x"), link("out", "other")), FOLD, 2, "out: ..."),
    "output below a file": (write("file"), "fold model file/out", 2, "file/out: cannot write in ...file"),
    "output inside the source": (
        nothing,
        "fold model model/out",
        2,
        "model/out: overlaps with the source model; choose another output folder",
    ),
    "output deep inside the source": (
        nothing,
        "fold model model/a/b/out",
        2,
        "model/a/b/out: overlaps with the source model; choose another output folder",
    ),
    "source inside the output": (
        nothing,
        "fold model . --overwrite",
        2,
        ".: overlaps with the source model; choose another output folder",
    ),
    "output is the source": (
        nothing,
        "fold model model --overwrite",
        2,
        "model: overlaps with the source model; choose another output folder",
    ),
    "output is the source behind a link": (
        link("link", "model"),
        "fold link model --overwrite",
        2,
        "model: overlaps with the source link; choose another output folder",
    ),
    "output is a link to the source": (link("link", "model"), "fold model link --overwrite", 2, "link: ..."),
    "output inside the source behind a link": (
        link("link", "model"),
        "fold model link/out",
        2,
        "link/out: overlaps with the source model; choose another output folder",
    ),
    # what cannot be folded
    "folded, by its record": (
        write("model/flashnorm.json", "{}"),
        FOLD,
        1,
        "model: " + ALREADY.format("flashnorm.json"),
    ),
    "folded, by the flag of runtimes": (
        config(flashnorm_folded=True),
        FOLD,
        1,
        FOREIGN.format("flashnorm_folded true"),
    ),
    "folded by nano-vllm": (config(flash_norm=True), FOLD, 1, FOREIGN.format("flash_norm true")),
    "folded by transformer-tricks": (
        config(flashnorm=True, flashnorm_mode="compat"),
        FOLD,
        1,
        FOREIGN.format("flashnorm true, flashnorm_mode compat"),
    ),
    "folded, by its class": (
        config(architectures=["LlamaFlashNorm"]),
        FOLD,
        1,
        FOREIGN.format("architectures LlamaFlashNorm"),
    ),
    "folded, by its object": (config(flashnorm={"format": 1}), FOLD, 1, "model: " + ALREADY.format("config.json")),
    "folded, by both": (
        both(config(flashnorm_folded=True), write("model/flashnorm.json", "{}")),
        FOLD,
        1,
        "model: " + ALREADY.format("flashnorm.json"),
    ),
    "identity norms": (
        fill("norm.weight", 1.0),
        FOLD,
        1,
        "model: there is nothing to fold: every norm that could be holds the identity already",
    ),
    "LayerNorm": (replace("gpt2"), FOLD, 1, "model: there is nothing to fold: ..."),
    "norms without weights": (
        replace("olmo"),
        FOLD,
        1,
        "model: there is nothing to fold: it has no norm with a weight",
    ),
    "quantized": (
        both(*(header(quantize, name) for name in (FIRST, SECOND, LAST))),
        FOLD,
        1,
        "model: there is nothing to fold: `model.layers.*...`, which reads it, is quantized on disk (I16)...",
    ),
    "inf in a norm": (fill(NORM, torch.inf), FOLD, 1, f"{NORM}: holds inf or NaN; this checkpoint is broken"),
    "NaN in a norm": (fill(NORM, torch.nan), FOLD, 1, f"{NORM}: holds inf or NaN; this checkpoint is broken"),
    "overflow": (
        both(fill(NORM, 3.0), fill("0.self_attn.k_proj.weight", -6e4)),
        FOLD,
        1,
        "tensor 'model.layers.0.self_attn.k_proj.weight': a weight of -60000 times its gain is beyond the largest F16 "
        "value, 65504",
    ),
    "norm missing": (
        drop(NORM),
        FOLD,
        1,
        f"{NORM} is not in the checkpoint; where norms were left out, it was folded already",
    ),
    "reader missing": (
        drop("model.layers.1.mlp.up_proj.weight"),
        FOLD,
        1,
        "model.layers.1.mlp.up_proj.weight, which reads model.layers.1.post_attention_layernorm.weight, is not in the "
        "checkpoint",
    ),
    # the checkpoint's own code
    "own code": (remote(), FOLD, 1, "model: needs its own Python code to run; read it, then add --trust-remote-code"),
    "own code missing": (both(remote(), remove("modeling_own.py")), TRUST, 1, "model: ...modeling_own.py..."),
    "own code does not compile": (remote("x ="), TRUST, 1, "...invalid syntax..."),
    "own code raises in __init__": (
        remote(RAISES_IN_INIT),
        TRUST,
        1,
        "OwnForCausalLM cannot be built from config.json: no luck",
    ),
    "own code raises in forward": (
        remote(RAISES_IN_FORWARD),
        TRUST,
        1,
        "the forward of OwnForCausalLM cannot be traced: ...no luck...",
    ),
}

# ---- running them ------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, bytes | str]]:
    """Every path below the folder with its mode and content."""
    found: dict[str, tuple[int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = ""
        if stat.S_ISLNK(status.st_mode):
            content = str(path.readlink())
        elif stat.S_ISREG(status.st_mode):
            content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = (status.st_mode, content)
    return found


def assert_line(expected: str, code: int, got: int, stdout: str, stderr: str) -> None:
    assert stdout == ""
    assert "Traceback" not in stderr
    pattern = ".*".join(re.escape(part) for part in ("flashnorm: " + expected + "\n").split("..."))
    assert re.fullmatch(pattern, stderr), f"\nexpected {expected}\ngot      {stderr}"
    assert got == code


@pytest.fixture
def place(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Path]:
    """An own current folder with the Llama checkpoint as `model`."""
    shutil.copytree(models / "llama", tmp_path / "here" / "model")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TINY_MODELS", str(models))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    # transformers copies a checkpoint's own code here before it imports it
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        monkeypatch.delitem(sys.modules, name)
    # What transformers logs goes to the stderr of its import, and conftest.py turns it down: let the test see it.
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [logging.StreamHandler()])
    transformers.logging.set_verbosity_warning()
    yield tmp_path / "here"
    transformers.logging.set_verbosity_error()


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a call in this process."""
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(arguments))
    captured = capsys.readouterr()
    return int(exit.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize(("change", "arguments", "code", "line"), BAD.values(), ids=BAD)
def test_one_line_and_nothing_written(
    place: Path, capsys: pytest.CaptureFixture[str], change: Callable[[], object], arguments: str, code: int, line: str
) -> None:
    change()
    before = tree(place)
    got = run(arguments, capsys)
    assert_line(line, code, *got)
    assert tree(place) == before


# ---- disks and permissions -----------------------------------------------------------------------------------


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Without the rights of root, for whom nothing is unreadable."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(65534, 65534, 0)
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)


@pytest.fixture
def open_place(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`place`, where everybody may go: pytest's own folders are for their owner only."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        shutil.copytree(place, folder, dirs_exist_ok=True)
        for path in Path(folder, "model").iterdir():
            path.chmod(0o644)
        Path(folder).chmod(0o777)
        monkeypatch.chdir(folder)
        yield Path(folder)


# name: (path, its mode, call, exit code, line)
DENIED = {
    "shard": (f"model/{SECOND}", 0, FOLD, 1, f"model/{SECOND}: Permission denied"),
    "config": (CONFIG, 0, FOLD, 1, "model/config.json: ...Permission denied..."),
    "index": (INDEX, 0, FOLD, 1, f"{INDEX}: ...Permission denied..."),
    "tokenizer": ("model/tokenizer.json", 0, FOLD, 1, "model/tokenizer.json: ..."),
    "source": ("model", 0, FOLD, 1, "model...Permission denied..."),
    "parent of the output": ("locked", 0o555, "fold model locked/out", 2, "locked/out: cannot write in ...locked"),
    "above the output": ("locked", 0o555, "fold model locked/a/out", 2, "locked/a/out: cannot write in ...locked"),
    "closed parent": ("locked", 0, "fold model locked/out", 2, "locked/out: ..."),
    "output to overwrite": ("locked", 0, "fold model locked --overwrite", 2, "...locked...not readable..."),
}


@pytest.mark.parametrize(("path", "mode", "arguments", "code", "line"), DENIED.values(), ids=DENIED)
def test_no_permission(
    open_place: Path, capsys: pytest.CaptureFixture[str], path: str, mode: int, arguments: str, code: int, line: str
) -> None:
    write("model/tokenizer.json", "{}")()
    Path("locked").mkdir()
    before = tree(open_place)
    usual = Path(path).stat().st_mode
    Path(path).chmod(mode)
    try:
        with as_nobody():
            got = run(arguments, capsys)
    finally:
        Path(path).chmod(usual)
    assert_line(line, code, *got)
    assert tree(open_place) == before


@pytest.fixture
def small_disk(place: Path) -> Iterator[Path]:
    """An empty disk of 32 KiB, which is enough for one shard."""
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a disk here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_too_little_space(place: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(place)
    got = run("fold model disk/out", capsys)
    assert_line("...disk: 5...,... bytes are to be written, but only ... are free there", 1, *got)
    assert tree(place) == before


def test_disk_full_then_resumed(
    place: Path, small_disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else takes the space meanwhile: finished shards stay, for the run after some space was made."""
    before = tree(place / "model")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    got = run("fold model disk/out", capsys)
    assert_line("...No space left on device; free some space and run ...again", 1, *got)
    assert [p.name for p in small_disk.iterdir()] == [".out.partial"]
    assert [p.name for p in small_disk.rglob("*.safetensors*")] == [FIRST]
    assert tree(place / "model") == before
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    code, out, err = run("fold model disk/out --json", capsys)
    assert (code, err) == (0, "")
    assert document(out)["resumed_shards"] == [FIRST]
    assert [p.name for p in small_disk.iterdir()] == ["out"]
    assert tree(place / "model") == before


def test_file_too_large(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(place)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        got = run(FOLD, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_line(f"...{FIRST}...: File too large", 1, *got)
    assert tree(place) == before


# ---- as a real process ---------------------------------------------------------------------------------------


OWN_HEAD = """
from transformers import LlamaForSequenceClassification
class OwnScorer(LlamaForSequenceClassification):
    pass
"""


def test_the_advice_for_bin_weights_keeps_what_they_hold(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Followed as it is printed: a score head is neither lost nor replaced by an output head."""
    folder = "it's $HOME"
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    made = transformers.LlamaForSequenceClassification(config)
    made.save_pretrained(folder)
    Path(folder, "model.safetensors").rename(Path(folder, "pytorch_model.bin"))
    assert "import LlamaForSequenceClassification as M" in run(f"fold {shlex.quote(folder)} out", capsys)[2]
    Path(folder, "modeling_own.py").write_text(OWN_HEAD)
    content = json.loads(Path(folder, "config.json").read_text())
    content |= {
        "architectures": ["OwnScorer"],
        "auto_map": {"AutoModelForSequenceClassification": "modeling_own.OwnScorer"},
    }
    Path(folder, "config.json").write_text(json.dumps(content))
    expected = {name: tensor.clone() for name, tensor in made.state_dict().items()}
    torch.save(expected, Path(folder, "pytorch_model.bin"))
    code, _, err = run(f"fold {shlex.quote(folder)} out", capsys)
    assert code == 1
    advice = err.split("convert it first: python ", 1)[1].rstrip("\n")
    subprocess.run(["sh", "-c", f"{shlex.quote(sys.executable)} {advice}"], check=True, capture_output=True)
    found = load_file(f"{folder}-safetensors/model.safetensors")
    assert {name for name in expected if not torch.equal(found[name], expected[name])} == set()
    assert found.keys() == expected.keys()


@pytest.mark.parametrize("name", ["misspelt option", "cut in the data", "own code raises in forward"])
def test_real_process(place: Path, name: str) -> None:
    """Nothing but the line comes from the process as a whole, as from imports, warnings and logs."""
    change, arguments, code, line = BAD[name]
    change()
    before = tree(place)
    done = subprocess.run(
        [sys.executable, "-m", "flashnorm_cli", *shlex.split(arguments)],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(place.parent / "modules"),
            "PYTHONPATH": str(Path(flashnorm_cli.__file__).parents[1]),  # also where it is not installed
        },
    )
    assert_line(line, code, done.returncode, done.stdout, done.stderr)
    assert tree(place) == before


@pytest.mark.parametrize(
    ("package", "code", "why"),
    [
        ("safetensors", "raise RuntimeError('operator torchvision::nms does not exist')", "RuntimeError: operator"),
        ("transformers", "import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("torch", "raise OSError('libcudart.so.13: cannot open shared object file')", "OSError: libcudart.so.13"),
    ],
)
def test_a_package_that_cannot_be_imported(place: Path, package: str, code: str, why: str) -> None:
    """Wheels of different builds side by side are no bug of ours, and are told as what they are."""
    (place.parent / "broken" / package).mkdir(parents=True)
    (place.parent / "broken" / package / "__init__.py").write_text(code)
    paths = [str(place.parent / "broken"), str(Path(flashnorm_cli.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", "flashnorm_cli", "plan", "model"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    line = f"a package that flashnorm needs cannot be imported ({why}...): install flashnorm in a new environment"
    assert_line(line, 1, done.returncode, done.stdout, done.stderr)
