"""Folds published from Hub to Hub: what the tests of them share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from hub_server import HubServer
from transformers import LlamaConfig, LlamaForCausalLM

TOKEN = "hf_writer"


README = "---\nlicense: mit\nlanguage: de\n---\n# Ein Modell\n"
SOURCE, TARGET = "them/model", "me/folded"


def save(folder: Path, **more: object) -> Path:
    """Five shards, each larger than what reading a header takes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 192, "intermediate_size": 640, "num_hidden_layers": 3, "vocab_size": 1600}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **more))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.4, 1.8)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="1MB")
    (folder / "README.md").write_text(README)
    (folder / "more").mkdir()
    (folder / "more" / "notes.md").write_text("notes")
    (folder / "pytorch_model.bin").write_bytes(b"x" * 1000)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def shards_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".safetensors")}


def assert_published(hub: HubServer, expected: dict[str, bytes], revision: str = "main") -> None:
    """The local fold's bytes, but for the card with its picture and for where the record says that it is from."""
    files = hub.files(TARGET, revision)
    papers = {"README.md", "flashnorm.json", "flashnorm-plan.svg", ".gitattributes"}
    assert {n: d for n, d in files.items() if n not in papers} == {n: d for n, d in expected.items() if n not in papers}
    card = files["README.md"].decode()
    assert "language: de" in card
    assert SOURCE.encode() in files["flashnorm-plan.svg"]
    assert "Not verified" in card
    assert f"flashnorm verify {TARGET}" in card
    mine, local = json.loads(files["flashnorm.json"]), json.loads(expected["flashnorm.json"])
    commit = hub.repos[SOURCE].refs["main"]
    del mine["card_sha256"]
    assert mine == {**local, "source": SOURCE, "commit": commit}


def downloaded(hub: HubServer) -> dict[str, int]:
    """Bytes sent of each whole shard, by name."""
    sent: dict[str, int] = {}
    for request in hub.log:
        if request.host == "cdn" and request.method == "GET" and request.range is None:
            name = request.path.rsplit("filename=", 1)[-1]
            sent[name] = sent.get(name, 0) + request.sent
    return sent
