"""A command on a terminal of its own."""

import os
import pty
import subprocess
import sys


def on_a_terminal(command: list[str], **environment: str) -> str:
    leader, follower = pty.openpty()
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "COLUMNS", "LINES", "TERM", "CI")}
    env = plain | {"TERM": "xterm"} | environment
    with subprocess.Popen([sys.executable, *command], env=env, stdout=follower, stderr=subprocess.DEVNULL) as run:
        os.close(follower)
        data = b""
        try:
            while piece := os.read(leader, 4096):
                data += piece
        except OSError:  # how a terminal ends
            pass
        os.close(leader)
        run.wait()
    assert run.returncode == 0
    return data.decode().replace("\r\n", "\n")
