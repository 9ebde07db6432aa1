"""What an error means to a user: what a model's own code says is passed on, what torch's insides say is not."""

from __future__ import annotations

import re
from pathlib import Path

import torch

_TORCH = Path(torch.__file__).parent
_OURS = Path(__file__).parents[1]
_INSIDE = re.compile(
    r"\bmeta\b|aten::|\bATen\b|\bc10\b|FakeTensor|TorchScript|TORCH_|torch::|data-dependent|dispatch|symbolic|"
    r"storage|__torch_function__|negative dimension|INTERNAL ASSERT",
    re.I,
)
_CALL = re.compile(r"missing \d+ required|unexpected keyword argument")


def model_words(error: BaseException) -> str | None:
    """The first line of an error that a model's code, a config class or transformers raised, or None.

    None is for errors from within torch: raised by a call that this package's modes passed on, in torch's own files,
    or in words about its machinery. The error itself stays the cause of what is raised instead: --debug shows it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    if isinstance(error, TypeError) and _CALL.search(text):
        return text  # of a forward that wants more than token ids: torch's Module.__call__ is the last to be run
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    if where is not None and not isinstance(error, ImportError):
        path = Path(where.tb_frame.f_code.co_filename)
        if _OURS in path.parents or _TORCH in path.parents:
            return None
    return None if _INSIDE.search(text) else text
