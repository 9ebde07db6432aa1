"""The Hub on loopback against the real client: what huggingface_hub sends is understood, by LFS and by Xet."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import HubServer

TOKEN = "hf_writer"
CLIENT = """
import sys, json
from pathlib import Path
from huggingface_hub import CommitOperationDelete, HfApi, snapshot_download, whoami
api = HfApi()
exec(sys.stdin.read())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import numpy

    folder = tmp_path_factory.mktemp("folder")
    random = numpy.random.default_rng(0)
    (folder / "a.safetensors").write_bytes(random.bytes(700_000))
    (folder / "b.safetensors").write_bytes(random.bytes(300_000))
    (folder / "config.json").write_text("{}\n")
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [x]\n---\nHello\n")
    return folder


@pytest.fixture(params=["xet", "lfs", "parts"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "hub", multipart_from=5 << 30) as server:
        server.add_user("me", TOKEN, orgs=("team",))
        server.add_user("other", "hf_other")
        server.add_user("me", "hf_reader", role="read")
        yield server


def client(hub: HubServer, home: Path, code: str, way: str = "lfs", token: str = TOKEN) -> str:
    """Runs code against the server in a process of its own, since huggingface_hub reads its settings once."""
    hub.multipart_from = 250_000 if way == "parts" else 5 << 30
    env = hub.client_env(home, HF_TOKEN=token, HF_HUB_DISABLE_XET="0" if way == "xet" else "1")
    done = subprocess.run([sys.executable, "-c", CLIENT], env=env, input=code, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def test_round_trip(hub: HubServer, folder: Path, tmp_path: Path, way: str) -> None:
    code = f"""
print(whoami()["name"], api.create_repo("me/model").repo_id, api.create_repo("me/model", exist_ok=True).repo_id)
info = api.upload_folder(repo_id="me/model", folder_path={str(folder)!r}, commit_message="first")
print(api.model_info("me/model").sha == info.oid, info.oid)
print(snapshot_download("me/model", cache_dir={str(tmp_path / "cache")!r}))
"""
    lines = client(hub, tmp_path / "home", code, way).splitlines()
    assert lines[0] == "me me/model me/model"
    path = Path(lines[2])
    assert (lines[1], path.name) == (f"True {hub.repos['me/model'].refs['main']}", lines[1].split()[1])
    expected = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {file.name: file.read_bytes() for file in path.iterdir() if file.name in expected} == expected
    assert hub.files("me/model") == {**expected, ".gitattributes": hub.gitattributes}
    assert hub.received("PUT /lfs/") == (0 if way == "xet" else 1_000_000)
    read_by_xet = any("xet-read-token" in request.path for request in hub.log)
    assert read_by_xet == (way == "xet")
    # The same files again: nothing to send, no empty commit, and they can be read without Xet.
    again = f'print(api.upload_folder(repo_id="me/model", folder_path={str(folder)!r}).oid)'
    assert client(hub, tmp_path / "home2", again, way) == lines[1].split()[1]
    assert hub.received("PUT /lfs/") == (0 if way == "xet" else 1_000_000)
    plain = f'print(snapshot_download("me/model", cache_dir={str(tmp_path / "cache2")!r}))'
    path = Path(client(hub, tmp_path / "home3", plain))
    assert (path / "a.safetensors").read_bytes() == expected["a.safetensors"]


def test_branches_pull_requests_and_parents(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    code = f"""
api.create_repo("team/model", private=True)
api.create_branch("team/model", branch="dev")
api.upload_folder(repo_id="team/model", folder_path={str(folder)!r}, revision="dev")
from huggingface_hub import CommitOperationAdd
add = CommitOperationAdd("new.txt", b"new")
pr = api.create_commit("team/model", [add], commit_message="A pull request", create_pr=True)
print(pr.pr_url, pr.pr_revision)
add = CommitOperationAdd("c.txt", b"c")
one = api.create_commit("team/model", [add, CommitOperationDelete(".gitattributes")], commit_message="one")
add = CommitOperationAdd("d.txt", b"d")
try:
    api.create_commit("team/model", [add], commit_message="two", parent_commit="0" * 40)
except Exception as error:
    print(error.response.status_code, "A commit has happened since" in str(error))
print(api.list_repo_files("team/model"), api.list_repo_files("team/model", revision=pr.pr_revision))
"""
    lines = client(hub, tmp_path / "home", code).splitlines()
    assert lines[0] == f"{hub.url}/team/model/discussions/1 refs/pr/1"
    assert lines[1] == "412 True"
    assert lines[2] == "['c.txt'] ['.gitattributes', 'new.txt']"
    assert set(hub.files("team/model", "dev")) == {*(path.name for path in folder.iterdir()), ".gitattributes"}
    assert [ref for ref, _, _ in hub.repos["team/model"].history] == ["main", "dev", "refs/pr/1", "main"]


@pytest.mark.parametrize(
    ("token", "code", "words"),
    [
        ("hf_other", 'api.create_repo("me/new")', "don't have the rights to create a model under the namespace"),
        ("hf_reader", 'api.create_repo("me/new")', "don't have the rights"),
        ("hf_nobody", 'api.create_repo("me/new")', "Invalid credentials in Authorization header"),
        (TOKEN, 'api.create_repo("me/model")', "You already created this model repo"),
        ("hf_other", 'api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="me/model")', "rights to write"),
        ("hf_other", 'api.model_info("me/closed")', "Repository Not Found"),
    ],
)
def test_refusals(hub: HubServer, folder: Path, tmp_path: Path, token: str, code: str, words: str) -> None:
    hub.add_repo("me/model", folder)
    hub.add_repo("me/closed", folder, private=True)
    commits = len(hub.repos["me/model"].history)
    env = hub.client_env(tmp_path / "home", HF_TOKEN=token)
    done = subprocess.run([sys.executable, "-c", CLIENT], env=env, input=code, capture_output=True, text=True)
    assert done.returncode == 1
    assert words in done.stderr
    assert len(hub.repos["me/model"].history) == commits


def test_faults(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    """A retried upload sends its bytes again; what was reset half way left nothing."""
    hub.add_repo("me/model")
    hub.repos["me/model"].commit({})
    reset = hub.fail("PUT /lfs/", received=100_000, times=1)
    busy = hub.fail("POST .*/preupload/", status=503, times=1, headers={"Retry-After": "0"})
    slow = hub.fail("POST .*/verify", delay=0.01, times=1)
    code = f'api.upload_folder(repo_id="me/model", folder_path={str(folder)!r}); print("done")'
    assert client(hub, tmp_path / "home", code) == "done"
    assert [fault.times for fault in (reset, busy, slow)] == [0, 0, 0]
    assert reset.reached.is_set()
    assert hub.received("PUT /lfs/") == 1_000_000 + 100_000
    assert not list(hub.root.glob("put-*"))
    assert set(hub.files("me/model")) == {path.name for path in folder.iterdir()}
