"""`flashnorm push-to-hub` over real HTTP, against tests/support/hub_server.py: round trips, refusals, faults, kills."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from documents import document
from hub_server import Fault, HubServer

import flashnorm_cli
from flashnorm_cli.checkpoint.output import work_folder
from flashnorm_cli.errors import FlashNormError
from flashnorm_cli.hub.card import PICTURE, REPORT
from flashnorm_cli.hub.progress import watched
from flashnorm_cli.hub.published import without_paths
from flashnorm_cli.hub.push import push_to_hub

ROOT = Path(flashnorm_cli.__file__).parents[1]
MODEL = Path(flashnorm_cli.__file__).parent / "demo_model"
SOURCE, TARGET, TOKEN = "jane/austen", "me/austen-FlashNorm", "hf_me_secret"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
PROMPTS = [[72, 101, 108, 108, 111, 32, 119, 111, 114, 108, 100, 44, 32, 105, 116]] * 5


# A process that runs one command after the other: what takes time is to import huggingface_hub.
WORKER = """
import contextlib, io, json, os, sys
from flashnorm_cli.cli import main
for line in sys.stdin:
    job = json.loads(line)
    os.environ.update(job["env"])
    sys.argv[1:] = job["arguments"]
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(job["arguments"])
        except SystemExit as error:
            code = error.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
LFS, XET = {"HF_HUB_DISABLE_XET": "1"}, {"HF_HUB_DISABLE_XET": "0"}


@dataclass
class Client:
    """Runs `flashnorm` in an empty folder with an empty cache: by LFS and with a token, unless told otherwise."""

    hub: HubServer
    tmp: Path
    worker: subprocess.Popen[str] | None = None

    def environment(self, **more: str) -> dict[str, str]:
        plain = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_TOKEN": TOKEN, **LFS}
        return self.hub.client_env(self.tmp / "home", **{**plain, **more})

    def start(self, *arguments: object, **env: str) -> subprocess.Popen[str]:
        """The command in a process of its own, still running."""
        return self._process([sys.executable, "-m", "flashnorm_cli", *map(str, arguments)], env)

    def run(self, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
        """The command, at its end; in the worker, unless huggingface_hub has to be imported with other settings."""
        command = [*map(str, arguments)]
        if set(env) <= {"HF_TOKEN"}:
            if self.worker is None:
                self.worker = self._process([sys.executable, "-c", WORKER], {})
            job = {"arguments": command, "env": {"HF_TOKEN": TOKEN, **env}}
            self.worker.stdin.write(json.dumps(job) + "\n")
            self.worker.stdin.flush()
            result = subprocess.CompletedProcess(command, *json.loads(self.worker.stdout.readline()))
        else:
            with self.start(*command, **env) as process:
                out, err = process.communicate(timeout=120)
            result = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert TOKEN not in result.stdout + result.stderr
        return result

    def stop(self) -> None:
        if self.worker is not None:
            self.worker.stdin.close()
            self.worker.wait(30)
            self.worker.stdout.close()
            self.worker.stderr.close()

    def _process(self, command: list[str], env: dict[str, str]) -> subprocess.Popen[str]:
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)

        def listen() -> None:  # a shell lets what it runs in the background ignore Ctrl-C, and children inherit that
            signal.signal(signal.SIGINT, signal.SIG_DFL)

        env = self.environment(**env)
        return subprocess.Popen(command, cwd=self.tmp, env=env, text=True, preexec_fn=listen, **pipes)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    tmp = tmp_path_factory.mktemp("client")
    with HubServer(tmp / "hub") as server:
        client = Client(server, tmp)
        yield client
        client.stop()


def reset(hub: HubServer) -> None:
    """An empty Hub with the source, and with somebody who may write."""
    hub.faults.clear()
    for stored in (hub.repos, hub.tokens, hub.users, hub.log):
        stored.clear()
    while hub.root.exists():
        # A request of a client that was killed may still be clearing up there.
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(hub.root)
    (hub.root / "blobs").mkdir(parents=True)
    hub.add_repo(SOURCE, MODEL)
    hub.add_user("me", TOKEN, orgs=("team",))


@pytest.fixture(scope="module")
def folded(client: Client) -> Path:
    """The demo model, folded from the Hub and verified."""
    reset(client.hub)
    ids = client.tmp / "ids.json"
    ids.write_text(json.dumps(PROMPTS))
    done(client.run("fold", SOURCE, "out", "--quiet"))
    done(
        client.run("verify", "out", "--token-ids", ids, "--cache-dir", client.tmp / "home/hub", "--token", TOKEN, "-q")
    )
    return client.tmp / "out"


@pytest.fixture(scope="module")
def expected(client: Client, folded: Path) -> dict[str, bytes]:
    """What a push without any trouble leaves on the Hub."""
    reset(client.hub)
    done(client.run("push-to-hub", folded, TARGET))
    return visible(client.hub)


@pytest.fixture
def hub(client: Client, folded: Path, expected: dict[str, bytes]) -> HubServer:
    reset(client.hub)
    return client.hub


@dataclass(frozen=True)
class Push:
    """Runs `flashnorm push-to-hub FOLDED me/austen-FlashNorm ARGUMENTS`."""

    client: Client
    folded: Path

    def __call__(
        self, *more: object, folder: Path | None = None, repo: str = TARGET, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return self.client.run("push-to-hub", folder or self.folded, repo, *more, **env)

    def start(self, *more: str, **env: str) -> subprocess.Popen[str]:
        """The same, still running."""
        return self.client.start("push-to-hub", self.folded, TARGET, *more, **env)


@pytest.fixture
def push(client: Client, hub: HubServer, folded: Path) -> Push:
    return Push(client, folded)


def done(result: subprocess.CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")


def fails(result: subprocess.CompletedProcess[str], words: str, code: int = 1) -> None:
    """One line that says what is wrong and what to do."""
    assert re.fullmatch(rf"flashnorm: {words}\n", result.stderr), result.stderr
    assert (result.returncode, result.stdout) == (code, "")


def visible(hub: HubServer, repo: str = TARGET, revision: str = "main") -> dict[str, bytes]:
    """What a reader sees of a repository, besides the file that every new one has."""
    if repo not in hub.repos:
        return {}
    return {name: data for name, data in hub.files(repo, revision).items() if name != ".gitattributes"}


LOAD = f"""
import re, sys, torch
from transformers import AutoModelForCausalLM
models = [AutoModelForCausalLM.from_pretrained(name) for name in sys.argv[1:]]
with torch.inference_mode():
    print(torch.equal(*(model(torch.tensor({PROMPTS})).logits for model in models)))
first, second = re.findall("```python\\n(.*?)```", sys.stdin.read(), re.DOTALL)
exec(first)
exec(second)
exec(first.split("\\n", 3)[3])  # the rest is as above
"""


# ---- round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["xet", "lfs"])
def test_round_trip(
    hub: HubServer, push: Push, folded: Path, expected: dict[str, bytes], tmp_path: Path, way: str
) -> None:
    env = XET if way == "xet" else {}
    result = push(**env)
    done(result)
    assert result.stdout.startswith("Published 12 files, 3.1 MB, in one commit.\n")
    assert (
        "\n  licence    apache-2.0\n  base model jane/austen\n  proof      a verification that passed" in result.stdout
    )
    assert result.stdout.endswith(f"\n{hub.url}/{TARGET}\n")
    assert visible(hub) == expected
    assert len(hub.repos[TARGET].history) == 2  # the repository's first commit, and ours
    own = [name for name in visible(hub) if name not in ("README.md", "flashnorm.json", REPORT, PICTURE)]
    assert {name: (folded / name).read_bytes() for name in own} == {name: expected[name] for name in own}
    assert set(own) == {path.name for path in folded.iterdir()} - {"README.md", "flashnorm.json"}

    # The picture of the plan is where the card shows it.
    card = expected["README.md"].decode()
    assert f"]({PICTURE})" in card and expected[PICTURE].startswith(b'<svg xmlns="http://www.w3.org/2000/svg"')
    assert b"jane/austen" in expected[PICTURE]

    # Into an empty cache, loaded by its id: the same bits, and the same logits; and what the card says to do works.
    copy = tmp_path / "copy"
    code = f"from huggingface_hub import snapshot_download; snapshot_download({TARGET!r}, local_dir={str(copy)!r})"
    subprocess.run([sys.executable, "-c", code], env=push.client.environment(**env), check=True, capture_output=True)
    assert {path.name: path.read_bytes() for path in copy.iterdir() if path.name in expected} == expected
    assert any("xet-read-token" in request.path for request in hub.log) == (way == "xet")
    assert hub.received("PUT /lfs/") == (0 if way == "xet" else sum(len(expected[name]) for name in SHARDS))
    if way == "xet":
        load = [sys.executable, "-c", LOAD, TARGET, str(folded)]
        wrote = subprocess.check_output(load, env=push.client.environment(**env), text=True, input=card).splitlines()
        assert wrote[0] == "True"
        assert wrote[1].startswith("It was a truth ") and wrote[1:] == 2 * wrote[1 : len(wrote) // 2 + 1]

    # Verified again, from the Hub id and in the downloaded copy: the published record is still a valid one.
    result = push.client.run("verify", TARGET, "--level", "weights", "--json", "--cache-dir", tmp_path / "cache")
    said = document(result.stdout)
    assert (result.returncode, said["source"]["name"], said["verdict"]) == (4, SOURCE, "as planned, not run")
    assert said["notes"] == [] and "README.md" not in result.stdout  # a page of its own is nothing to note
    levels = json.loads(expected["flashnorm.json"])["verify"]["levels"]
    assert {name: level["status"] for name, level in levels.items()} == dict.fromkeys(
        ("weights", "layers", "logits"), "passed"
    )
    # Pushing the copy somewhere else publishes the same model, with the same proof.
    done(push(folder=copy, repo="team/copy"))
    copied = visible(hub, "team/copy")
    assert {name: copied[name] for name in own} == {name: expected[name] for name in own}
    assert (
        copied["README.md"].decode().replace("team/copy", TARGET).replace("copy", "austen-FlashNorm")
        == expected["README.md"].decode()
    )


def test_nothing_of_this_machine_is_published(expected: dict[str, bytes], folded: Path) -> None:
    text = b"".join(data for name, data in expected.items() if not name.endswith(".safetensors")).decode()
    for secret in (TOKEN, str(folded.parent), folded.parent.name, str(Path.home()), "--cache-dir"):
        assert secret not in text
    command = json.loads(expected["flashnorm.json"])["verify"]["environment"]["command"]
    assert command == f"flashnorm verify {TARGET} --token-ids ids.json"
    assert f"<pre><code><span>flashnorm</span> <span>verify</span> <span>{TARGET}</span>" in expected[REPORT].decode()


def test_again_sends_nothing(hub: HubServer, push: Push, folded: Path) -> None:
    done(push())
    sent = hub.received("PUT /lfs/")
    assert sent == sum((folded / name).stat().st_size for name in SHARDS)
    again = push()
    done(again)
    assert "nothing was committed" in again.stdout
    assert hub.received("PUT /lfs/") == sent
    assert len(hub.repos[TARGET].history) == 2
    # A new card alone: one commit with what changed, and the base model stays.
    assert document(push("--json").stdout)["published"]["base_model"] == "jane/austen"


def test_dry_run_changes_nothing(hub: HubServer, push: Push, expected: dict[str, bytes]) -> None:
    result = push("--dry-run")
    done(result)
    assert result.stdout.startswith(f"Would upload to {hub.url}/{TARGET}:\n")
    assert all(name in result.stdout for name in expected)
    assert result.stdout.endswith(f"The card:\n\n{expected['README.md'].decode()}")
    assert TARGET not in hub.repos
    assert {request.method for request in hub.log} <= {"GET", "HEAD", "POST"}
    assert not [request for request in hub.log if request.method == "POST" and "paths-info" not in request.path]
    # Without a token nobody is asked, and that is said.
    seen = len(hub.log)
    result = push("--dry-run", HF_TOKEN=" ")
    done(result)
    assert "Note: not logged in, so the Hub was not asked" in result.stdout
    assert len(hub.log) == seen
    assert push("--dry-run", "--quiet").stdout == ""


# ---- options ---------------------------------------------------------------------------------------------------------


def test_private_revision_message(hub: HubServer, push: Push, expected: dict[str, bytes]) -> None:
    result = push(
        "--private", "--revision", "folded", "--commit-message", "First", "--json", "--token", TOKEN, HF_TOKEN=""
    )
    done(result)
    printed = document(result.stdout)
    said, repo = printed["published"], hub.repos[TARGET]
    assert (said["revision"], said["private"], said["created"]) == ("folded", True, True)
    assert said["commit"] == repo.refs["folded"]
    assert repo.private
    assert visible(hub) == {}
    assert visible(hub, revision="folded") == expected
    assert repo.history[-1][2] == "First"
    assert {file["name"] for file in printed["sent"]} == {*expected} and printed["unchanged"] == []


def test_pull_request(hub: HubServer, push: Push, expected: dict[str, bytes]) -> None:
    hub.add_user("bob", "hf_bob")
    hub.add_repo("bob/model").commit({})
    # A lost answer, and a second run: still one pull request.
    lost = hub.fail("POST .*/commit/", after=0, times=1)
    for _ in range(2):
        result = push("--create-pr", repo="bob/model")
        done(result)
        assert result.stdout.endswith(f"{hub.url}/bob/model/discussions/1\n")
    assert lost.times == 0
    assert hub.repos["bob/model"].pull_requests == {1: "Upload folded checkpoint"}
    assert visible(hub, "bob/model") == {}
    assert set(visible(hub, "bob/model", "refs/pr/1")) == set(expected)
    fails(push(repo="bob/model"), r"bob/model: the Hub forbids it: .*--create-pr proposes the files .*")


def test_gate_and_privacy_of_the_source_are_kept(hub: HubServer, push: Push) -> None:
    hub.repos[SOURCE].gated = "manual"
    result = push()
    done(result)
    assert "everyone who accepts the terms (gated: manual)" in result.stdout
    assert hub.repos[TARGET].gated == "manual"
    source = hub.repos[SOURCE]
    source.private, source.gated = True, False
    source.tokens.add(TOKEN)
    fails(push(repo="me/other"), rf"the source {SOURCE} is private; say --private, or --no-private to publish it")
    assert "me/other" not in hub.repos
    done(push("--private", repo="me/other"))


def test_licence_must_not_be_lost(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folded, tmp_path / "out")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    fails(
        push(folder=folder),
        r"the source's license is 'apache-2.0', and README.md in \S+/out says 'mit': put the source's README.md into "
        r"\S+/out again: hf download jane/austen README.md --revision \w+ --local-dir \S+/out",
    )
    # Without a card in the folder, the source's is asked for on the Hub.
    (folder / "README.md").unlink()
    done(push(folder=folder))
    assert b"\nlicense: apache-2.0\n" in visible(hub)["README.md"]


def test_local_source(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    """Folded from a local copy: the base model is named if its files on the Hub are the ones that were folded."""
    folder = shutil.copytree(folded, tmp_path / "out")
    record = json.loads((folder / "flashnorm.json").read_text())
    record.update(source=str(MODEL), commit=None)
    record["verify"]["source"].update(name=str(MODEL), commit=None)
    (folder / "flashnorm.json").write_text(json.dumps(record))
    other = shutil.copytree(MODEL, tmp_path / "other")
    data = bytearray((other / SHARDS[0]).read_bytes())
    data[-1] ^= 1
    (other / SHARDS[0]).write_bytes(data)
    hub.add_repo("jane/other", other)
    why = rf"--base-model jane/other: its {SHARDS[0]} is not the one that was folded"
    fails(push("--base-model", "jane/other", folder=folder), why)
    result = push(folder=folder)
    done(result)
    assert "--base-model <Hub id> names it" in result.stdout
    assert str(MODEL).encode() not in visible(hub)["flashnorm.json"]
    done(push("--base-model", SOURCE, folder=folder))
    assert json.loads(visible(hub)["flashnorm.json"])["commit"] == hub.repos[SOURCE].refs["main"]
    done(push(folder=folder))  # not said again, and not forgotten
    assert b"\nbase_model: jane/austen\n" in visible(hub)["README.md"]


NAMES = {
    "the folder's name": ("novel", "A copy of jane/novel."),
    "an address": ("novel", "See https://hub.example/jane/novel-2 and https://hub.example/jane/novel/tree/main."),
    "code": ("model", 'Run `AutoModel.from_pretrained("jane/novel")`.'),
    "base_model": ("model", "base_model: jane/novel"),
    "config": ("model", ""),
}


@pytest.fixture(scope="module")
def download(client: Client, folded: Path) -> Path:
    """What huggingface_hub leaves in a folder that it has downloaded a repository into."""
    reset(client.hub)
    place = client.tmp / "downloaded"
    client.hub.add_repo("jane/novel", MODEL)
    code = f"from huggingface_hub import snapshot_download; snapshot_download('jane/novel', local_dir={str(place)!r})"
    subprocess.run([sys.executable, "-c", code], env=client.environment(), check=True, capture_output=True)
    return place


def folded_from(folded: Path, source: Path, text: str, place: Path) -> Path:
    """The fold, as it were made of a folder with large shards whose card is `text`."""
    folder = shutil.copytree(folded, place)
    record = json.loads((folder / "flashnorm.json").read_text())
    record.update(source=str(source), commit=None)
    record["verify"]["source"].update(name=str(source), commit=None)
    for name in SHARDS:
        del record["source_files"][name]["sha256"]  # too large to be hashed for nothing
    (folder / "flashnorm.json").write_text(json.dumps(record))
    data = text if text.startswith("base_model") else ""
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n{data}\n---\n# Mine\n\n{'' if data else text}\n")
    return folder


@pytest.mark.parametrize("how", NAMES)
def test_base_model_of_a_download(
    hub: HubServer, push: Push, folded: Path, download: Path, tmp_path: Path, how: str
) -> None:
    """The repository that a source was downloaded from: found by names, proven by the notes of the download."""
    name, text = NAMES[how]
    source = shutil.copytree(download, tmp_path / name)
    repo = hub.add_repo("jane/novel", MODEL)
    commit = repo.refs["main"]
    config = json.loads((MODEL / "config.json").read_text())
    if how == "config":
        data = json.dumps({**config, "_name_or_path": "jane/novel"}).encode()
        commit = repo.commit({**repo.commits[commit], "config.json": hub.store("config.json", data)})
    # Others of that name, and what the repository became later, are not it.
    other = dict(repo.commits[commit])
    other[SHARDS[0]] = hub.store(SHARDS[0], (MODEL / SHARDS[0]).read_bytes()[:-1] + b"x")
    hub.add_repo("eve/novel").commit(other)
    if how != "config":
        repo.commit(other)
    folder = folded_from(folded, source, f"eve/novel {text}" if how == "the folder's name" else text, tmp_path / "out")
    if how == "config":
        record = json.loads((folder / "flashnorm.json").read_text())
        record["source_files"]["config.json"]["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / "flashnorm.json").write_text(json.dumps(record))
        folded_config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**folded_config, "_name_or_path": "jane/novel"}))
        for note in source.rglob("*.metadata"):
            note.write_text("\n".join([commit, *note.read_text().split("\n")[1:]]))
    result = push("--unverified", "--json", folder=folder)
    done(result)
    said = document(result.stdout)
    assert (said["published"]["base_model"], said["notes"]) == ("jane/novel", [])
    assert json.loads(visible(hub)["flashnorm.json"])["commit"] == commit


def test_base_model_that_cannot_be_told(
    hub: HubServer, push: Push, folded: Path, download: Path, tmp_path: Path
) -> None:
    hub.add_repo("jane/novel", MODEL)
    source = shutil.copytree(download, tmp_path / "novel")

    def note(text: str) -> str:
        folder = folded_from(folded, source, text, tmp_path / "out")
        result = push("--dry-run", "--unverified", "--json", folder=folder)
        done(result)
        shutil.rmtree(folder)
        said = document(result.stdout)
        assert said["published"]["base_model"] is None
        return said["notes"][0]

    downloaded = r"its source was downloaded from the Hub \(commit \w{12}\), but none of its files names a repository"
    assert re.match(rf"{downloaded}.*; --base-model <Hub id> names it", note("Nothing is said."))
    assert re.match(downloaded, note("By eve/novel, nobody/novel, a/novel, b/novel, c/novel; jane/novel is the sixth."))
    changed = source / SHARDS[0]
    os.utime(changed, (time.time() + 60, time.time() + 60))  # written to since
    assert re.match(downloaded, note("A copy of jane/novel."))
    shutil.rmtree(source / ".cache")
    assert note("A copy of jane/novel.").startswith("its source is a local folder")
    shutil.rmtree(source)
    assert note("A copy of jane/novel.").startswith("its source is a local folder")


def test_something_else(hub: HubServer, push: Push, expected: dict[str, bytes], tmp_path: Path) -> None:
    repo = hub.add_repo(TARGET)
    mine = {name: hub.store(name, name.encode()) for name in (".gitattributes", "README.md", "old.safetensors")}
    before = repo.commit(mine)
    fails(push(), rf"{TARGET} holds something else \(README.md, old.safetensors\); --overwrite replaces it")
    assert repo.refs["main"] == before
    done(push("--overwrite"))
    assert visible(hub) == expected
    # A card that was edited on the Hub is not replaced unasked.
    files = repo.commits[repo.refs["main"]]
    repo.commit({**files, "README.md": hub.store("README.md", b"---\nlicense: apache-2.0\n---\n# By hand\n")})
    fails(push(), rf"{TARGET}: README.md was edited on the Hub since it was pushed; --overwrite replaces it .*")
    done(push("--overwrite"))
    assert visible(hub) == expected


def test_eval_results_of_the_source_are_not_claimed(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    """Scores in `.eval_results/` are shown by the Hub as the repository's own; a fold has not been measured."""
    folder = shutil.copytree(folded, tmp_path / "out")
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "scores.yaml").write_text("- value: 1\n")
    done(push(folder=folder))
    assert not any(name.startswith(".eval_results") for name in visible(hub))


# ---- what is not fit to be published ---------------------------------------------------------------------------------


def _record(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "flashnorm.json").read_text())
        change(record)
        (folder / "flashnorm.json").write_text(json.dumps(record))

    return apply


def _flip(folder: Path) -> None:
    data = bytearray((folder / SHARDS[1]).read_bytes())
    data[-1] ^= 1
    (folder / SHARDS[1]).write_bytes(data)


def _fail_layers(record: dict[str, Any]) -> None:
    record["verify"]["levels"]["layers"]["status"] = "failed"


UNFIT: dict[str, tuple[Callable[[Path], object], str]] = {
    "never verified": (_record(lambda r: r.update(verify=None)), "has not been verified. Verify it first: `verify"),
    "failed": (_record(_fail_layers), r"its verification failed \(level layers\)"),
    "not every tensor": (_record(lambda r: r["verify"]["levels"].pop("weights")), "left out level weights"),
    "a bit of a shard": (_flip, rf"its verification is void: {SHARDS[1]} changed since"),
    "config": (lambda f: (f / "config.json").write_text((f / "config.json").read_text() + " "), "config.json changed"),
    "a new file": (lambda f: (f / "chat_template.jinja").write_text("{{ x }}"), "chat_template.jinja changed since"),
    "a lost file": (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json changed since"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_unfit(folded: Path, tmp_path: Path, case: str) -> None:
    folder = shutil.copytree(folded, tmp_path / "out")
    damage, words = UNFIT[case]
    damage(folder)
    with pytest.raises(FlashNormError, match=words) as error:
        push_to_hub(folder, TARGET)
    assert f"`verify('{folder}')` (or publish it with `unverified=True`" in str(error.value)


def test_unverified_is_said(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(folded, tmp_path / "out")
    (folder / "generation_config.json").write_text("{}")
    result = push("--unverified", folder=folder)
    done(result)
    assert "proof      NOT VERIFIED" in result.stdout
    files = visible(hub)
    assert b"> **Not verified:** its verification is void: generation_config.json changed" in files["README.md"]
    assert json.loads(files["flashnorm.json"])["verify"] is None
    assert REPORT not in files


def test_a_proof_is_not_lost_by_the_way(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    """The same fold, verified on the Hub and no longer here."""
    done(push())
    before = visible(hub)
    folder = shutil.copytree(folded, tmp_path / "out")
    record = json.loads((folder / "flashnorm.json").read_text())
    (folder / "flashnorm.json").write_text(json.dumps({**record, "verify": None}))
    result = push("--unverified", folder=folder)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "holds this fold with its verification; --overwrite replaces it" in result.stderr
    assert visible(hub) == before
    done(push("--unverified", "--overwrite", folder=folder))
    assert REPORT in before and REPORT not in visible(hub)


def test_no_folder_to_publish(folded: Path, tmp_path: Path) -> None:
    def refused(folder: Path, words: str, repo: str = TARGET, **more: Any) -> None:
        with pytest.raises(FlashNormError, match=words):
            push_to_hub(folder, repo, **more)

    out = shutil.copytree(folded, tmp_path / "out")
    refused(tmp_path / "nowhere", "nowhere: no such folder; name one that `flashnorm fold` has written")
    refused(out / "config.json", "is a file; name the folder")
    refused(Path(TARGET), "is a folder; the folder comes first", repo=str(out))
    refused(out, "`create_pr` and `revision` exclude each other", create_pr=True, revision="x")
    refused(out, "`workers` has to be at least 1", workers=0)
    refused(tmp_path / ".out.partial" / "checkpoint", "out: its fold is not finished; run the same")
    with work_folder(tmp_path / "gone", "0", ()) as work:  # a fold that has begun
        refused(
            tmp_path / "gone", r"gone: its fold is not finished: .*/.gone.partial \([\d,]+ bytes\) is the work folder"
        )
        assert work.path.exists()
    refused(MODEL, "has no flashnorm.json: it is not a fold by flashnorm. Fold the model first: `fold")
    (out / SHARDS[0]).unlink()
    refused(out, "names model-00001-of-00002.safetensors, which is not there")


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    hub.add_user("me", "hf_reader", role="read")
    with HubServer(tmp_path / "down") as server:
        down = server.url
    name = "the Hub does not take this name; it looks like user/name .*"
    later = "what is uploaded stays uploaded: run the same command again later, and it goes on"
    fails(push(HF_TOKEN=" "), "there is no Hub token: log in with `hf auth login`, or pass --token .*")
    fails(push(HF_TOKEN="hf_wrong"), rf"{TARGET}: the Hub does not accept the token: .* `hf auth login`, .*")
    fails(push(HF_TOKEN="hf_reader"), rf"{TARGET}: the Hub forbids it: .* needs the role `write` .*")
    fails(
        push(repo="nobody/x"), r"nobody/x: the Hub forbids it: You don't have the rights to create .*settings/tokens.*"
    )
    fails(push(repo="me/a/b"), f"me/a/b: {name}", code=2)
    fails(push(repo="me/-x"), f"me/-x: {name}", code=2)
    fails(push(repo="me/_x-" + "y" * 95), f"me/_x-y+: {name}", code=2)
    fails(push(HF_ENDPOINT=down), rf"{TARGET}: the Hub could not be reached: .*refused.*; {later}")
    fails(push(HF_HUB_OFFLINE="1"), r"the network is off \(HF_HUB_OFFLINE is set\): unset it to publish")
    assert TARGET not in hub.repos
    assert not hub.received("PUT /lfs/")
    fails(push("--revision", "a b"), rf"{TARGET}: the Hub answered 400: Invalid reference for a branch")
    done(push())  # the bad branch was found out when its repository was there already
    fails(push("--privat"), r"No such option: --privat.* See: flashnorm push-to-hub --help", code=2)


def test_progress_of_an_upload(tmp_path: Path) -> None:
    """What huggingface_hub has read of a file is seen from outside, whoever reads it."""
    path, seen = tmp_path / "shard", []
    path.write_bytes(bytes(1000))
    with watched(path, 1000, seen.append), path.open("rb", buffering=0) as file:
        file.read(300)
        for _ in range(100):
            time.sleep(0.05)
            if seen:
                break
    assert seen[0] == 300


def test_card_that_the_hub_rejects(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    """Before gigabytes are uploaded, and before a repository is there."""
    folder = shutil.copytree(folded, tmp_path / "out")
    for path in (folder, hub.root / "x"):
        path.mkdir(exist_ok=True)
        (path / "README.md").write_text("---\nlicense: my own\n---\n")
    source = hub.repos[SOURCE]
    files = source.commits[source.refs["main"]]
    files["README.md"] = hub.store("README.md", (folder / "README.md").read_bytes())
    fails(
        push(folder=folder), r'the Hub does not take the card\'s metadata: "license" must be one of .*; mend them in .*'
    )
    assert TARGET not in hub.repos


# ---- faults ----------------------------------------------------------------------------------------------------------

SOON = {"Retry-After": "0"}
# What passes without a word: (what the server does, by Xet).
PASSING: dict[str, tuple[list[dict[str, Any]], bool]] = {
    "500 and 503, with and without Retry-After": (
        [
            {"pattern": "whoami", "status": 500, "times": 1},
            {"pattern": "repos/create", "status": 503, "times": 2, "headers": SOON},
            {"pattern": "validate-yaml", "status": 502, "times": 1, "headers": SOON},
            {"pattern": "preupload", "status": 503, "times": 1, "headers": SOON},
            {"pattern": "objects/batch", "status": 500, "times": 1, "headers": SOON},
            {"pattern": "PUT /lfs/", "status": 500, "times": 1, "headers": SOON},
            {"pattern": "POST .*/commit/", "status": 503, "times": 1, "headers": SOON},
        ],
        False,
    ),
    "429": (
        [{"pattern": p, "status": 429, "times": 1, "headers": SOON} for p in ("/tree/", "verify", "commit/")],
        False,
    ),
    "connection reset in the middle of a shard": ([{"pattern": "PUT /lfs/", "received": 900_000, "times": 1}], False),
    "the commit's answer is lost": ([{"pattern": "POST .*/commit/", "after": 0, "times": 1}], False),
    "slow link": ([{"pattern": "PUT /lfs/", "delay": 0.02, "times": 2}], False),
    "500 for a Xet token": ([{"pattern": "xet-write-token", "status": 500, "times": 1}], True),
}


@pytest.mark.parametrize("case", PASSING)
def test_passing_trouble(hub: HubServer, push: Push, expected: dict[str, bytes], case: str) -> None:
    what, by_xet = PASSING[case]
    faults = [hub.fail(**fault) for fault in what]
    done(push(**(XET if by_xet else {})))
    assert [fault.times for fault in faults] == [0] * len(faults)
    assert visible(hub) == expected
    assert len(hub.repos[TARGET].history) == 2


LATER = r".*; what is uploaded stays uploaded: run the same command again later, and it goes on"
# What does not pass: (the fault, the words, by Xet).
LASTING: dict[str, tuple[dict[str, Any], str, bool]] = {
    "401": ({"pattern": "repos/create", "status": 401}, r".*does not accept the token.*hf auth login.*", False),
    "403": ({"pattern": "preupload", "status": 403}, r".*the Hub forbids it.*", False),
    "403 in a shard": ({"pattern": "PUT /lfs/", "status": 403}, r".*the Hub forbids it.*", False),
    "403 by Xet": ({"pattern": "xet-write-token", "status": 403}, r".*the Hub forbids it.*", True),
    "409": ({"pattern": "commit/", "status": 409}, r".*a conflict.*run the same command again", False),
    "429": ({"pattern": "commit/", "status": 429, "headers": SOON}, rf".*takes no more requests{LATER}", False),
    "500": ({"pattern": "commit/", "status": 500, "headers": SOON}, rf".*it answered 500{LATER}", False),
    "503": ({"pattern": "whoami", "status": 503, "headers": SOON}, rf".*it answered 503{LATER}", False),
    "reset": ({"pattern": "commit/", "received": 1000}, rf".*could not be reached{LATER}", False),
}


@pytest.mark.parametrize("case", LASTING)
def test_lasting_trouble(hub: HubServer, push: Push, folded: Path, expected: dict[str, bytes], case: str) -> None:
    fault, words, by_xet = LASTING[case]
    env = XET if by_xet else {}
    hub.fail(**fault)
    fails(push(**env), words)
    assert visible(hub) == {}
    hub.faults.clear()
    before = hub.received("PUT /lfs/")
    done(push(**env))
    assert visible(hub) == expected
    if fault["pattern"] == "commit/":  # everything was there but the commit
        assert hub.received("PUT /lfs/") == before == sum((folded / name).stat().st_size for name in SHARDS)


def test_somebody_else_commits_meanwhile(hub: HubServer, push: Push) -> None:
    """412: what was committed in between is not overwritten, and not lost."""
    done(push())
    repo = hub.repos[TARGET]
    files = {**repo.commits[repo.refs["main"]], "flashnorm.json": hub.store("flashnorm.json", b"{}")}
    del files[SHARDS[1]]
    repo.commit(files)
    hold = hub.fail("POST .*/commit/", hold=True, times=1)
    with push.start("--overwrite") as client:
        assert hold.reached.wait(60)
        theirs = repo.commit({**files, "theirs.txt": hub.store("theirs.txt", b"theirs")})
        hold.release.set()
        _, said = client.communicate(timeout=60)
    assert client.returncode == 1
    assert re.fullmatch(
        rf"flashnorm: {TARGET}: somebody else committed to it meanwhile; nothing was published.*\n", said
    )
    assert repo.refs["main"] == theirs


def test_a_file_that_changes_while_it_is_uploaded(hub: HubServer, push: Push, folded: Path, tmp_path: Path) -> None:
    """What was verified is published, or nothing."""
    folder = shutil.copytree(folded, tmp_path / "out")
    hold = hub.fail("POST .*/preupload/", hold=True, times=1)
    with push.client.start("push-to-hub", folder, TARGET) as client:
        assert hold.reached.wait(60)
        data = bytearray((folder / SHARDS[1]).read_bytes())
        data[-1] ^= 1
        (folder / SHARDS[1]).write_bytes(data)
        hold.release.set()
        _, said = client.communicate(timeout=60)
    assert said == f"flashnorm: {SHARDS[1]}: changed while it was uploaded; nothing was published\n"
    assert visible(hub) == {}


# ---- killed ----------------------------------------------------------------------------------------------------------


KILLED: dict[str, dict[str, Any]] = {
    "before the repository": {"pattern": "repos/create"},
    "repository made, answer not read": {"pattern": "repos/create", "after": 0},
    "asking what to upload": {"pattern": "preupload"},
    "in the middle of a shard": {"pattern": "PUT /lfs/", "received": 800_000},
    "a shard there, not confirmed": {"pattern": "objects/verify"},
    "by Xet": {"pattern": "xet-write-token"},
    "before the commit": {"pattern": "commit/"},
    "in the commit": {"pattern": "commit/", "received": 5000},
    "committed, answer not read": {"pattern": "commit/", "after": 0},
}


@pytest.mark.parametrize("phase", KILLED)
def test_killed(hub: HubServer, push: Push, expected: dict[str, bytes], phase: str) -> None:
    env = XET if phase == "by Xet" else {}
    hold: Fault = hub.fail(**KILLED[phase], hold=True, times=1)
    with push.start(**env) as client:
        assert hold.reached.wait(60)
        client.send_signal(signal.SIGKILL)
        client.communicate(timeout=60)
    hold.release.set()
    assert visible(hub) in ({}, expected)
    assert (visible(hub) == expected) == (phase == "committed, answer not read")
    done(push(**env))
    assert visible(hub) == expected
    assert len(hub.repos[TARGET].history) == 2


def test_interrupted(hub: HubServer, push: Push) -> None:
    hold = hub.fail("PUT /lfs/", received=800_000, hold=True, times=1)
    with push.start() as client:
        assert hold.reached.wait(60)
        client.send_signal(signal.SIGINT)
        _, said = client.communicate(timeout=60)
    hold.release.set()
    assert (client.returncode, said) == (130, "flashnorm: interrupted; the same command goes on where it stopped\n")


# ---- folders of this machine -----------------------------------------------------------------------------------------


def test_local_paths_in_configs(push: Push, hub: HubServer, tmp_path: Path) -> None:
    """They say where the files came from; the page does not, and its verification is valid all the same."""
    source = shutil.copytree(MODEL, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config |= {"_name_or_path": "/home/jane/secret-client/austen", "vision": {"_name_or_path": r"C:\Users\jane\secret"}}
    (source / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer = {"name_or_path": "../secret-client/austen", "special_tokens_map_file": "~/secret-client/x.json"}
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (source / "other.json").write_text('{"name_or_path": "jane/austen", "x": 1.50}')
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(PROMPTS))
    done(push.client.run("fold", source, tmp_path / "out", "--quiet"))
    done(push.client.run("verify", tmp_path / "out", "--source", source, "--token-ids", ids, "--quiet"))
    result = push("--private", folder=tmp_path / "out")
    done(result)
    assert "config.json, tokenizer_config.json: named a folder of this machine" in result.stdout
    files = visible(hub)
    text = b"".join(data for name, data in files.items() if not name.endswith(".safetensors")).decode()
    for secret in ("secret-client", "C:", "/home/jane", str(tmp_path), "~/"):
        assert secret not in text
    assert json.loads(files["config.json"])["_name_or_path"] == "austen"
    assert files["other.json"] == (source / "other.json").read_bytes()
    # The published checkpoint is still the verified one: for `verify`, and for who pushes a copy of it.
    copy = tmp_path / "copy"
    for name, data in files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(data)
    result = push.client.run("verify", copy, "--source", source, "--level", "weights", "--json")
    assert (result.returncode, document(result.stdout)["notes"]) == (4, [])  # this time nothing was run
    done(push(folder=copy, repo="team/copy"))


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("see /home/me/a/b.txt", "see b.txt"),
        ("error:/home/me/b", "error:b"),
        ("file:///home/me/b", "b"),
        (r"C:\Users\me\b", "b"),
        ("C:/Users/me/b", "b"),
        (r"\\server\share\b", "b"),
        ("https://huggingface.co/a/b", "https://huggingface.co/a/b"),
        ("layers/0 and a/b", "layers/0 and a/b"),
        ("x=~/b/c", "x=c"),
    ],
)
def test_paths(text: str, short: str) -> None:
    assert without_paths(text) == short


# ---- what was run, and what was not ----------------------------------------------------------------------------------


def test_as_planned_not_run(push: Push, hub: HubServer, folded: Path, tmp_path: Path) -> None:
    """A verification that compared files only does not publish a promise."""
    folder = shutil.copytree(folded, tmp_path / "out")
    record = json.loads((folder / "flashnorm.json").read_text())
    record["verify"]["verdict"], record["verify"]["equivalent"] = "as planned, not run", False
    record["verify"]["levels"]["logits"] = {"status": "skipped", "reason": "no room for it"}
    (folder / "flashnorm.json").write_text(json.dumps(record))
    why = (
        rf"{folder}: its files are as planned, but neither model was run, so nothing shows yet that it computes .* "
        r"Run them: flashnorm verify .* \(or publish it with --unverified: the card says what was not run\)"
    )
    fails(push(folder=folder), why)
    assert TARGET not in hub.repos
    result = push("--unverified", folder=folder)
    done(result)
    assert "models NOT RUN, in the card's first lines" in result.stdout
    files = visible(hub)
    card = files["README.md"].decode()
    assert "**As planned, not run:**" in card and "It is meant to compute the same function" in card
    assert "computes the same function" not in card and "the same model as its source" not in card
    assert "Passed: weights, layers. Not run: logits." in card
    assert json.loads(files["flashnorm.json"])["verify"]["verdict"] == "as planned, not run"
    # One that says "not equivalent" stays out altogether, whatever its levels say; --unverified says "not verified".
    record["verify"]["verdict"] = "not equivalent"
    (folder / "flashnorm.json").write_text(json.dumps(record))
    fails(push(folder=folder, repo="me/bad"), r".*its verification failed.*")
    # Records from before there were verdicts have a flag only.
    del record["verify"]["verdict"]
    record["verify"]["equivalent"] = True
    (folder / "flashnorm.json").write_text(json.dumps(record))
    done(push(folder=folder, repo="me/old"))


@pytest.mark.parametrize("way", ["commit", "pull request"])
def test_verify_on_the_hub(push: Push, hub: HubServer, folded: Path, tmp_path: Path, way: str) -> None:
    """From Hub to Hub, and verified there: the page gets what was found, and no weight is sent."""
    folder = shutil.copytree(folded, tmp_path / "out")
    record = json.loads((folder / "flashnorm.json").read_text())
    (folder / "flashnorm.json").write_text(json.dumps({**record, "verify": None}))
    done(push("--unverified", folder=folder))
    assert "Not verified" in visible(hub)["README.md"].decode()
    sent, commits = hub.received("PUT /lfs/"), len(hub.repos[TARGET].history)
    more = ["--create-pr"] if way == "pull request" else []
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(PROMPTS))
    cache = tmp_path / "cache"
    options = ["--token-ids", ids, "--cache-dir", cache, "--publish", "--json", *more]
    result = push.client.run("verify", TARGET, *options)
    assert (result.returncode, result.stderr) == (0, "")
    said = document(result.stdout)
    assert said["folded"] == TARGET and said["published"]["url"].startswith(hub.url)
    assert hub.received("PUT /lfs/") == sent
    assert len(hub.repos[TARGET].history) == commits + 1
    files = visible(hub, revision="refs/pr/1" if way == "pull request" else "main")
    card = files["README.md"].decode()
    assert "It computes the same function" in card and "Not verified" not in card
    entry = json.loads(files["flashnorm.json"])["verify"]
    assert entry["environment"]["command"] == f"flashnorm verify {TARGET} --token-ids ids.json"
    assert str(tmp_path) not in files["flashnorm.json"].decode() + card
    assert not list(cache.glob("models--*/flashnorm-*"))
    # A fold that is not right changes nothing.
    repo = hub.repos[TARGET]
    shard = bytearray(visible(hub)[SHARDS[0]])
    shard[-1] ^= 1
    repo.commit({**repo.commits[repo.refs["main"]], SHARDS[0]: hub.store(SHARDS[0], bytes(shard))})
    commits = len(repo.history)
    result = push.client.run("verify", TARGET, "--level", "weights", *options)
    assert (result.returncode, document(result.stdout)["published"], len(repo.history)) == (3, None, commits)
    # What cannot be published is said before the work.
    fails(push.client.run("verify", folder, "--publish"), rf"{folder}: is a folder; --publish is for .*", code=2)
    fails(push.client.run("verify", TARGET, "--create-pr"), "--create-pr needs --publish", code=2)
