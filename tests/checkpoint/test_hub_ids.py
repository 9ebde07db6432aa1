"""What people paste for a model, and what a folder is called."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from flashnorm_cli.checkpoint.hub_ids import hub_id, repository_id
from flashnorm_cli.checkpoint.model import Source, folder_name
from flashnorm_cli.errors import UsageError


@pytest.mark.parametrize(
    ("pasted", "meant"),
    [
        ("me/model", ("me/model", None)),
        ("./model", ("./model", None)),
        ("https://huggingface.co/me/model", ("me/model", None)),
        ("https://huggingface.co/me/model/", ("me/model", None)),
        ("HTTPS://HuggingFace.co/me/model?library=transformers#use", ("me/model", None)),
        ("https://www.huggingface.co/me/model.git", ("me/model", None)),
        ("hf.co/me/model", ("me/model", None)),
        ("huggingface.co/me/model/tree/v1.0", ("me/model", "v1.0")),
        ("https://huggingface.co/me/model/tree/main/", ("me/model", "main")),
        ("https://huggingface.co/me/model/tree/refs%2Fpr%2F3", ("me/model", "refs/pr/3")),
        ("https://huggingface.co/me/model/tree/refs/pr/3", ("me/model", "refs/pr/3")),
        ("https://huggingface.co/me/model/commit/0123abc", ("me/model", "0123abc")),
        ("https://huggingface.co/t5-small", ("t5-small", None)),
        ("https://huggingface.co/t5-small/tree/v2", ("t5-small", "v2")),
        ("hf://me/model", ("me/model", None)),
        ("hf://models/me/model@v1", ("me/model", "v1")),
        ("hf://me/model@refs%2Fpr%2F3", ("me/model", "refs/pr/3")),
        ("hf://t5-small@v1", ("t5-small", "v1")),
        ("https://hub.example.org/team/me/model/tree/v1", ("me/model", "v1")),  # HF_ENDPOINT
    ],
)
def test_addresses(pasted: str, meant: tuple[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.example.org/team")
    assert hub_id(pasted) == meant
    source = Source(pasted)
    assert (source.name, source.revision) == meant


@pytest.mark.parametrize(
    ("pasted", "says"),
    [
        ("https://huggingface.co/datasets/me/data", "is a dataset, not a model"),
        ("https://huggingface.co/spaces/me/app", "is a space"),
        (
            "https://huggingface.co/me/model/tree/v1/onnx",
            "names onnx inside a model; name it: me/model `revision='v1'`",
        ),
        ("https://huggingface.co/me/model/blob/main/config.json", "names config.json inside a model"),
        ("https://huggingface.co/me/model/discussions/3", "names no model"),
        ("https://example.com/me/model", "example.com"),
        ("https://huggingface.co/", "names no model"),
        ("hf://", "names no model"),
    ],
)
def test_addresses_of_something_else(pasted: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        Source(pasted)


def test_a_revision_is_named_once() -> None:
    page = "https://huggingface.co/me/model/tree/v1"
    assert hub_id(page, "v1") == hub_id("https://huggingface.co/me/model", "v1") == ("me/model", "v1")
    with pytest.raises(UsageError, match="names revision v1, and v2 is asked for"):
        hub_id(page, "v2")
    assert repository_id("https://huggingface.co/me/model/tree/main") == "me/model"
    with pytest.raises(UsageError, match="name the repository alone: me/model"):
        repository_id(page)


def test_a_folder_wins_over_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf.co" / "me" / "model").mkdir(parents=True)
    assert hub_id("hf.co/me/model") == ("hf.co/me/model", None)


def test_what_a_folder_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--me--some--model" / "snapshots" / "bc450d96"
    snapshot.mkdir(parents=True)
    (tmp_path / "mymodel").symlink_to(snapshot)
    assert folder_name(tmp_path / "mymodel") == "mymodel"
    assert folder_name(f"{tmp_path}/mymodel/") == "mymodel"
    assert folder_name(snapshot) == "model"
    monkeypatch.chdir(snapshot)
    assert folder_name(".") == "model"
    monkeypatch.chdir(tmp_path)
    assert folder_name(".") == tmp_path.name
