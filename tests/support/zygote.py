"""Runs of `flashnorm` that cost a fraction of a second each.

    with Zygote(env) as zygote:
        run = zygote.start("plan", "user/name", cwd=folder)
        run.wait()          # exit code, or minus the signal that ended it
        run.out, run.err

huggingface_hub reads its settings when it is imported, so a run against a Hub on loopback needs a process of its own,
and importing torch and transformers takes seconds. Here one process with the right environment imports everything,
and forks for each run.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

IMPORTS = """
import torch, transformers, huggingface_hub, huggingface_hub.hf_api
import flashnorm_cli.cli, flashnorm_cli.folding.fold, flashnorm_cli.hub.fold_to_hub, flashnorm_cli.proof.verify
import transformers.models.llama.modeling_llama, transformers.loss.loss_utils
"""


class Run:
    """One run; a process that can be waited for, and killed by its `pid`."""

    def __init__(self, zygote: Zygote, number: int, pid: int) -> None:
        self.zygote, self.number, self.pid = zygote, number, pid

    def wait(self) -> int:
        return self.zygote.ask({"wait": self.pid})

    @property
    def out(self) -> str:
        return (self.zygote.folder / f"{self.number}.out").read_text()

    @property
    def err(self) -> str:
        return (self.zygote.folder / f"{self.number}.err").read_text()


class Zygote:
    """The process to fork from; a context manager."""

    def __init__(self, env: dict[str, str]) -> None:
        self.env, self.count = env, 0

    def __enter__(self) -> Zygote:
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = subprocess.Popen([sys.executable, __file__], env=self.env, text=True, bufsize=1, **pipes)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._folder.cleanup()

    def ask(self, question: dict[str, object]) -> int:
        self._process.stdin.write(json.dumps(question) + "\n")
        return int(self._process.stdout.readline())

    def start(self, *arguments: object, cwd: Path, **env: str) -> Run:
        self.count += 1
        log = str(self.folder / str(self.count))
        question = {"arguments": [str(a) for a in arguments], "cwd": str(cwd), "env": env, "log": log}
        return Run(self, self.count, self.ask(question))

    def run(self, *arguments: object, cwd: Path, **env: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a whole run."""
        run = self.start(*arguments, cwd=cwd, **env)
        return run.wait(), run.out, run.err


def serve() -> None:
    exec(IMPORTS)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            status = os.waitpid(question["wait"], 0)[1]
            answer = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        else:
            answer = os.fork() or child(**question)
        print(answer, flush=True)


def child(arguments: list[str], cwd: str, env: dict[str, str], log: str) -> int:
    code = 99
    try:
        import torch

        from flashnorm_cli.cli import main

        os.setpgid(0, 0)
        torch.set_num_threads(1)  # a pool of threads does not survive a fork
        os.chdir(cwd)
        os.environ.update(env)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, suffix in ((1, ".out"), (2, ".err")):
            os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        sys.stdout, sys.stderr = (os.fdopen(fd, "w") for fd in (1, 2))
        if "FAULTS" in env:  # tests/support/faults.c is preloaded
            roots, at, action, error, path = json.loads(env["FAULTS"])
            ctypes.CDLL(None).faults_arm(roots.encode(), ctypes.c_long(at), action, error, path.encode())
        try:
            main(arguments)
        except SystemExit as exit:
            code = int(exit.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve()
