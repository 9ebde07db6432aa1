"""Level users: what a checkpoint is used for besides its logits, computed by source and fold and compared.

Files and config announce users (`checkpoint/users.py`): a pooling of sentence-transformers, a value or draft head, a
pipeline, an adapter. They read hidden states, which are compared in the reference dtype, before any rounding of the
fold's; sentence-transformers is run itself, on the folded files. A class with a `generate()` of its own, a second
decoder behind the first say, is asked to generate, whatever is announced. What cannot be run is said, and leaves the
verdict open.
"""

from __future__ import annotations

import inspect
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flashnorm_cli.checkpoint.model import Checkpoint, Progress
from flashnorm_cli.checkpoint.users import ANY, INPUTS, User, announced_users
from flashnorm_cli.proof import models
from flashnorm_cli.proof.figures import UserFigures, UsersFigures
from flashnorm_cli.proof.models import ModelError, Setting
from flashnorm_cli.proof.options import DTYPES, VerifyOptions
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.prompts import PROMPTS, drawn_afresh
from flashnorm_cli.proof.result import Finding, LevelResult

SHAKEN = 1e-6  # of each weight
CHAOS = 0.1  # of the tokens: how far two runs of a chaotic generate() may be apart
ROWS, TOKENS, NEW_TOKENS = 4, 16, 8  # prompts, their length, and how far generate() goes
MODULES = "modules.json"  # of sentence-transformers
# Arguments that make second decoders greedy too, where a model's generate() knows them.
GREEDY = {"depth_decoder_do_sample": "depth_decoder_config"}


@dataclass(frozen=True)
class _Read:
    """What one model computed: last hidden states, inputs of modules by name, and what it generated."""

    hidden: torch.Tensor | None
    inputs: dict[str, torch.Tensor]
    generated: torch.Tensor | None
    why_not: str  # generate() did not run


def check_users(pair: Pair, options: VerifyOptions, report: Progress) -> LevelResult | None:
    """Compare what users read; None where nobody but readers of logits is to be seen. figures: `UsersFigures`."""
    dtype = DTYPES[options.dtype] if options.dtype else models.own_dtype(pair.source)
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    with TemporaryDirectory() as scratch, models.deterministic():
        setting = Setting.of(pair, wide, options.device, options.trust_remote_code, Path(scratch))
        users = announced_users(pair.source, own_code=setting.cls.__module__.startswith("transformers_modules"))
        generates = _own_generate(setting.cls)
        if not users and not generates:
            return None
        if hasattr(setting.config, "quantization_config") or setting.from_disk:
            why = "it takes the float32 model in memory"
            return LevelResult("users", "skipped", reason=f"{_names(users, generates)}: not compared, {why}")
        report(0, 0, "Comparing what users of hidden states read")
        comparison = _Comparison(setting, users, generates, wide, options)
        rows, findings, missing = comparison.run()
    figures = UsersFigures(tuple(rows))
    if findings:
        return LevelResult("users", "failed", figures, tuple(findings), tuple(missing))
    if missing:
        return LevelResult("users", "skipped", figures, reason="; ".join(missing))
    return LevelResult("users", "passed", figures)


def _names(users: tuple[User, ...], generates: bool) -> str:
    return ", ".join([*dict.fromkeys(user.seen for user in users), *(["generate()"] if generates else [])])


def _own_generate(cls: Any) -> bool:
    """Whether a class generates in its own way, rather than by transformers' common one."""
    from transformers import GenerationMixin

    own = getattr(cls, "generate", None)
    return own is not None and inspect.unwrap(own) is not inspect.unwrap(GenerationMixin.generate)


@dataclass(frozen=True)
class _Comparison:
    """One comparison of everything that users read."""

    setting: Setting
    users: tuple[User, ...]
    generates: bool
    wide: torch.dtype
    options: VerifyOptions

    def run(self) -> tuple[list[UserFigures], list[Finding], list[str]]:
        """Rows of figures, what differs, and what could not be compared."""
        rows: list[UserFigures] = []
        findings: list[Finding] = []
        missing: list[str] = []
        try:
            source, folded = self._read(0)
        except ModelError as error:
            return rows, findings, [f"{_names(self.users, self.generates)}: not compared: {error}"]
        for user in self.users:
            row = self._row(user, source, folded)
            if isinstance(row, str):
                missing.append(f"{user.seen}: {row}")
                continue
            rows.append(row)
            if row.error is None or not row.error <= self.options.max_algebra:
                findings.append(self._finding(user.line, row))
        if self.generates:
            self._compare_generated(source, folded, rows, findings, missing)
        if MODULES in self.setting.pair.source.others:
            self._compare_embeddings(rows, findings, missing)
        return rows, findings, missing

    def _finding(self, line: str, row: UserFigures) -> Finding:
        error = math.inf if row.error is None else row.error
        return Finding(row.user, f"{line}: {row.compared} is off by {error:.2e} (relative)", error)

    def _read(self, seed: int) -> tuple[_Read, _Read]:
        """What source and fold compute in the reference dtype. Raises ModelError."""
        tokens = self._tokens(seed)

        def read(model: Any) -> _Read:
            with _inputs_of(model, self._modules()) as inputs:
                hidden = _hidden_states(self.setting, model, tokens)
            generated, why = None, ""
            if self.generates:
                try:
                    generated = _generated(self.setting, model, tokens)
                except ModelError as error:
                    why = str(error)
            return _Read(hidden, dict(inputs), generated, why)

        return (
            read(models.load(self.setting, self.setting.pair.source, self.wide)),
            read(models.fold_in_memory(self.setting, self.wide)),
        )

    def _tokens(self, seed: int) -> torch.Tensor:
        prompts = drawn_afresh(self.setting.pair.source, 0, seed)
        return torch.tensor([list(ids[:TOKENS]) for ids in prompts.ids[:ROWS]])

    def _generated_when_shaken(self, seed: int) -> torch.Tensor:
        """What the source generates with each weight off by one millionth. Raises ModelError."""
        model = models.load(self.setting, self.setting.pair.source, self.wide)
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    parameter.mul_(1 + SHAKEN * torch.randn_like(parameter))
        return _generated(self.setting, model, self._tokens(seed))

    def _modules(self) -> tuple[str, ...]:
        return tuple(name for user in self.users if user.reads == INPUTS for name in user.modules)

    def _row(self, user: User, source: _Read, folded: _Read) -> UserFigures | str:
        """A user's figures, or why there are none."""
        if user.reads == ANY and self.setting.pair.gains:
            return (
                "code that was not run may read the output of any norm; `trust_remote_code=True` runs a class of its "
                "own"
            )
        if user.reads == INPUTS:
            names = [name for name in user.modules if name in source.inputs and name in folded.inputs]
            if len(names) < len(user.modules):
                return "the modules whose inputs it reads were not found in the model that ran"
            pairs = [(source.inputs[name], folded.inputs[name]) for name in names]
            worst = max((_relative(b, a) for a, b in pairs), default=0.0)
            return UserFigures(user.seen, "the inputs of its modules", sum(a.numel() for a, _ in pairs), worst)
        if source.hidden is None or folded.hidden is None:
            return "the model gives no hidden states to compare"
        error = _relative(folded.hidden, source.hidden)
        return UserFigures(user.seen, "the last hidden state", source.hidden.numel(), error)

    def _compare_generated(
        self,
        source: _Read,
        folded: _Read,
        rows: list[UserFigures],
        findings: list[Finding],
        missing: list[str],
    ) -> None:
        """Greedy output has to be the same; where one token differs, chance is given a second try on other prompts.

        Some generate() is chaotic (block diffusion commits many tokens at once, by their order): there the fold may
        differ as much as the source differs from itself when its weights are off by one millionth.
        """
        if source.generated is None or folded.generated is None:
            missing.append(f"generate(): did not run: {source.why_not or folded.why_not}")
            return
        share = _same(source.generated, folded.generated)
        allowed = 1.0
        if share < 1:
            seed = secrets.randbits(63)
            source, folded = self._read(seed)
            if source.generated is not None and folded.generated is not None:
                share = max(share, _same(source.generated, folded.generated))
                if share < 1:
                    allowed = _same(source.generated, self._generated_when_shaken(seed))
        number = 0 if source.generated is None else source.generated.numel()
        what = "greedy output in the reference dtype"
        if allowed < 1:
            what += f" (the source's own changes by {1 - allowed:.1%} when its weights are off by 1e-6)"
        rows.append(UserFigures("generate()", what, number, 1 - share))
        if share < 1 and (allowed == 1 or share < allowed - CHAOS):
            message = f"{self.setting.cls.__name__}.generate() gives {1 - share:.1%} other tokens or codes, greedily"
            findings.append(Finding("generate()", message, 1 - share))

    def _compare_embeddings(self, rows: list[UserFigures], findings: list[Finding], missing: list[str]) -> None:
        """sentence-transformers on both folders, against its own noise floor."""
        if find_spec("sentence_transformers") is None:
            missing.append("sentence-transformers is not installed, so its embeddings were not compared")
            return
        pair, dtype = self.setting.pair, models.own_dtype(self.setting.pair.source)
        try:
            reference = self._embeddings(pair.source, torch.float32)
            floor = 0.0 if dtype == torch.float32 else _relative(self._embeddings(pair.source, dtype), reference)
        except ModelError as error:
            missing.append(f"sentence-transformers does not run the source: {error}")
            return
        allowed = max(self.options.max_algebra, self.options.max_ratio * floor)
        try:
            error_found = _relative(self._embeddings(pair.folded, dtype), reference)
        except ModelError as error:
            findings.append(Finding(MODULES, f"sentence-transformers does not run the folded checkpoint: {error}"))
            return
        rows.append(UserFigures(MODULES, "sentence-transformers' embeddings", reference.numel(), error_found))
        if not error_found <= allowed:
            message = (
                f"sentence-transformers' embeddings are off by {error_found:.2e} (relative; {allowed:.2e} allowed)"
            )
            findings.append(Finding(MODULES, message, error_found))

    def _embeddings(self, checkpoint: Checkpoint, dtype: torch.dtype) -> torch.Tensor:
        """Embeddings of the built-in text, float64 of shape (sentences, width). Raises ModelError."""
        sentences = [line for line in PROMPTS.read_text(encoding="utf-8").splitlines() if line.strip()]
        with models.its_own_errors():
            from sentence_transformers import SentenceTransformer

            model = SentenceTransformer(
                str(checkpoint.folder),
                device=self.options.device,
                model_kwargs={"dtype": dtype},
                trust_remote_code=self.options.trust_remote_code,
                local_files_only=True,
            )
            found = model.encode(sentences, convert_to_tensor=True, show_progress_bar=False)
        return found.double().cpu()


def _hidden_states(setting: Setting, model: Any, tokens: torch.Tensor) -> torch.Tensor | None:
    """What a model calls its last hidden state, on the CPU. Raises ModelError."""
    output = models.outputs(setting, model, tokens, output_hidden_states=True)
    for name in ("last_hidden_state", "decoder_hidden_states", "hidden_states"):
        found = output.get(name)
        found = found[-1] if isinstance(found, tuple) and found else found
        if isinstance(found, torch.Tensor):
            return found.cpu()
    return None


def _generated(setting: Setting, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """What `generate()` gives, greedily, for each row; shorter ones filled up with -1. Raises ModelError."""
    tokens = tokens.to(models.input_device(setting, model))
    more = {name: False for name, key in GREEDY.items() if hasattr(model.config, key)}
    rows = []
    for row in tokens:
        torch.manual_seed(0)
        with models.its_own_errors():
            found = model.generate(
                input_ids=row[None],
                attention_mask=torch.ones_like(row[None]),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
                **more,
            )
        found = found if isinstance(found, torch.Tensor) else found[0]
        rows.append(found.flatten().cpu())
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


@contextmanager
def _inputs_of(model: Any, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Collects what modules are given, by their names, while the context is open."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(_module: Any, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], torch.Tensor):
                found[name] = given[0].detach().cpu()

        return hook

    modules = dict(model.named_modules())
    hooks = [modules[name].register_forward_pre_hook(keep(name)) for name in names if name in modules]
    try:
        yield found
    finally:
        for each in hooks:
            each.remove()


def _relative(found: torch.Tensor, reference: torch.Tensor) -> float:
    if found.shape != reference.shape:
        return math.inf
    gap, size = (found.double() - reference.double()).norm(), reference.double().norm()
    error = (gap / size.clamp(min=torch.finfo(torch.float64).tiny)).item()
    return math.inf if math.isnan(error) else error


def _same(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a == b).double().mean().item() if a.shape == b.shape and a.numel() else float(a.shape == b.shape)
