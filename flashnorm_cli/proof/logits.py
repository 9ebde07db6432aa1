"""Level logits: both models on the same prompts, judged against the noise floor.

Four models, one after the other in memory: the source in the reference dtype; the same with the fold made in that
dtype (is the algebra right?); the source in its own dtype (the noise floor: what rounding does to it anyway); the
folded checkpoint in its own dtype (how much more?). The reference is float32, or float64 for a float32 checkpoint.
"""

from __future__ import annotations

import copy
import gc
import inspect
import json
import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from flashnorm_cli.checkpoint.open import Checkpoint, Progress
from flashnorm_cli.errors import UsageError
from flashnorm_cli.folding.rewrite import TORCH_DTYPE
from flashnorm_cli.modeling import build
from flashnorm_cli.proof.pairing import Pair
from flashnorm_cli.proof.result import Finding, LevelResult

PROMPTS = Path(__file__).parent / "prompts.txt"
# Many short prompts rather than a few long ones: what happens to one token is carried on to those that follow it.
PROMPT_TOKENS, ALL_TOKENS = 64, 1024
TEXT_PROMPT_TOKENS, TEXT_TOKENS = 256, 4096  # of a file that the user gives
MIN_TOKENS = 64
DRAWS = 300
NEW_TOKENS, GREEDY_PROMPTS = 24, 2
BATCH_TOKENS = 256  # in one forward
RANDOM_PROMPTS, RANDOM_TOKENS = 32, 16  # where there is no tokenizer
LOGITS_BYTES = 512 << 20  # that the reference's logits may take
LARGE = 256 << 20  # bytes of a model whose memory is worth a search for what is not used any more


@dataclass(frozen=True)
class Prompts:
    """Token ids of each prompt, where they come from, and what turns them into text (None without a tokenizer).

    `random` ids have no continuation that would mean anything.
    """

    ids: tuple[tuple[int, ...], ...]
    origin: str
    tokenizer: Any = None
    random: bool = False


@dataclass
class _Score:
    """How one model's logits compare with the reference's, added up over prompts."""

    errors: list[list[float]] = field(default_factory=list)  # per prompt and position, relative
    kl: float = 0.0
    same_top: int = 0
    positions: int = 0
    loss: float = 0.0
    predicted: int = 0
    broken: int = 0  # positions with NaN or inf where the reference has none

    def error(self) -> float:
        """The median over positions.

        Where a router is nearly undecided, rounding sends a token to another expert: a leap at a few positions, in
        the source as in the fold, that would drown everything else in a mean. A wrong fold is wrong at most positions,
        because attention carries it on to all that follow.
        """
        return statistics.median(chain.from_iterable(self.errors)) if self.errors else math.nan

    def perplexity(self) -> float | None:
        return math.exp(min(self.loss / self.predicted, 700.0)) if self.predicted else None

    def figures(self) -> dict[str, Any]:
        return {
            "kl": self.kl / max(self.positions, 1),
            "top1": self.same_top / max(self.positions, 1),
            "perplexity": self.perplexity(),
        }


@dataclass
class _Run:
    """Settings of the four models."""

    pair: Pair
    cls: Any
    trust_remote_code: bool
    device: str
    device_map: Any
    offload: str | None
    prompts: Prompts
    large: bool
    reference: list[torch.Tensor] = field(default_factory=list)

    def free(self) -> None:
        """Give back the memory of models that are not used any more: they hold themselves, by cycles.

        Looking for cycles walks through all of transformers, which takes longer than to run a small model.
        """
        if self.large:
            gc.collect()


def check_logits(
    pair: Pair,
    prompts: Prompts,
    *,
    dtype: torch.dtype,
    device: str,
    max_algebra: float,
    max_ratio: float,
    trust_remote_code: bool,
    insist: bool,
    report: Progress,
) -> LevelResult:
    """Compare both models on prompts.

    Args:
        dtype: what both models run in; the noise floor is the source's error in it.
        device: "cpu", "cuda", "cuda:1", ... A model too large for it is spread by accelerate.
        insist: try although the memory may not suffice; otherwise such a model is skipped.

    On a GPU, the plain RMSNorms of the folded model run on this project's kernels, weightless where they are folded;
    the source runs as it is.

    figures: `reference`, `dtype`, `device`, `norms_on_kernels` (how many), `prompts`, `tokens`, `text`,
    `algebra_error` (None if not measured),
    `rounding_error`, `noise_floor` (errors relative to the norm of the reference's logits, the median over positions),
    `ratio` (None where the reference is the dtype itself, because the model does not run in float64),
    `certain_ratio` (what the ratio exceeds in 99 of 100 samples of the prompts: this is judged),
    `source` and `folded` (each `kl` in nats per position, `top1` agreement, `perplexity`), `reference_perplexity`,
    `greedy` (per prompt: `prompt`, `source`, `folded`, `same` of `tokens`).
    """
    wide = torch.float64 if dtype in (torch.float32, torch.float64) else torch.float32
    need = sum(math.prod(e.shape) for e in pair.source.tensors.values() if e.dtype in TORCH_DTYPE) * wide.itemsize
    room = _memory(device)
    fits = need * 1.2 < room
    if not fits and not insist:
        return LevelResult(
            "logits",
            "skipped",
            reason=f"the model takes {need / 1e9:.0f} GB in {_name(wide)}, {room / 1e9:.0f} GB are free on {device}; "
            "--level logits runs it all the same, spread over devices, memory and disk",
        )
    config = build.load_config(pair.source.folder, trust_remote_code)
    if hasattr(config, "quantization_config"):
        return LevelResult("logits", "skipped", reason="the checkpoint is quantized; its float32 self does not exist")
    cls = build.model_class(config, pair.source.folder, trust_remote_code)
    notes: list[str] = []
    with TemporaryDirectory() as offload, _deterministic():
        device_map = {"": device} if fits else "auto"
        run = _Run(pair, cls, trust_remote_code, device, device_map, None if fits else offload, prompts, need > LARGE)
        steps = 4

        try:
            report(0, steps, f"Logits of the source in {_name(wide)}")
            wide, baseline = _baseline(run, wide, dtype)
            report(1, steps, f"Logits of the source in {_name(dtype)}")
            model = _load(run, pair.source, dtype)
            floor = _score(run, model)
            greedy = _generate(run, model, notes)
            del model
        except Exception as error:  # a model's own code may raise anything
            why = f"the source itself cannot be run in {_name(dtype)}: {build.first_line(error)}"
            return LevelResult("logits", "skipped", reason=why)
        if not math.isfinite(floor.error()):
            why = f"the source itself computes NaN or inf in {_name(dtype)}; try another --dtype"
            return LevelResult("logits", "skipped", reason=why)
        algebra = None
        if fits:
            report(2, steps, f"Logits of the fold in {_name(wide)}")
            model = _fold_in_memory(run, config, wide)
            algebra = _score(run, model)
            del model
        else:
            notes.append("the algebra was not measured: the model is too large to be folded in memory")
        report(3, steps, f"Logits of the folded checkpoint in {_name(dtype)}")
        try:
            model = _load(run, pair.folded, dtype)
            with _weightless(model, device) as swapped:
                mine = _score(run, model)
                continued = _generate(run, model, notes)
            del model
        except Exception as error:  # it is the folded files that make the difference
            finding = Finding("logits", f"the folded checkpoint cannot be run: {build.first_line(error)}")
            return LevelResult("logits", "failed", findings=(finding,))
        run.free()
    least = torch.finfo(dtype).eps / 16
    ratio = None if wide == dtype else mine.error() / max(floor.error(), least)
    certain = None if wide == dtype else _certain_ratio(mine, floor, least)
    findings = _judge(algebra, mine, floor, ratio, certain, max_algebra, max_ratio, wide, dtype)
    figures = {
        "reference": _name(wide),
        "dtype": _name(dtype),
        "device": device,
        "norms_on_kernels": swapped,
        "prompts": len(prompts.ids),
        "tokens": sum(map(len, prompts.ids)),
        "text": prompts.origin,
        "algebra_error": algebra.error() if algebra else None,
        "rounding_error": mine.error(),
        "noise_floor": floor.error(),
        "ratio": ratio,
        "certain_ratio": certain,
        "source": floor.figures(),
        "folded": mine.figures(),
        "reference_perplexity": baseline.perplexity(),
        "greedy": _side_by_side(prompts, greedy, continued),
    }
    return LevelResult("logits", "failed" if findings else "passed", figures, findings, tuple(dict.fromkeys(notes)))


def _judge(
    algebra: _Score | None,
    mine: _Score,
    floor: _Score,
    ratio: float | None,
    certain: float | None,
    max_algebra: float,
    max_ratio: float,
    wide: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Finding, ...]:
    findings = []
    if algebra is not None and not algebra.error() <= max_algebra:
        findings.append(
            Finding(
                "logits",
                f"folded in {_name(wide)}, they are off by {algebra.error():.2e} (relative; {max_algebra:.0e} is "
                "allowed): this fold does not compute the same function",
                algebra.error(),
            )
        )
    if mine.broken > floor.broken:
        findings.append(
            Finding("logits", f"NaN or inf at {mine.broken} positions, and at {floor.broken} of the source")
        )
    elif ratio is None and not mine.error() <= max_algebra:
        findings.append(Finding("logits", f"off by {mine.error():.2e} (relative) in {_name(dtype)}", mine.error()))
    elif ratio is not None and certain is not None and not certain <= max_ratio:
        findings.append(
            Finding(
                "logits",
                f"off by {mine.error():.2e} (relative), {ratio:.3g} times the noise floor of {floor.error():.2e} that "
                f"{_name(dtype)} has anyway ({max_ratio:g} times is allowed)",
                mine.error(),
            )
        )
    return tuple(findings)


def _certain_ratio(mine: _Score, floor: _Score, least: float) -> float:
    """The first percentile of the ratio, if prompts are drawn again and again from these: what is no accident of them.

    Within a prompt, positions depend on each other (one token that changes its expert moves all that follow).
    """
    generator = random.Random(0)
    ratios = []
    for _ in range(DRAWS):
        drawn = generator.choices(range(len(mine.errors)), k=len(mine.errors))
        top, bottom = (statistics.median(chain.from_iterable(s.errors[i] for i in drawn)) for s in (mine, floor))
        ratios.append(top / max(bottom, least))
    return sorted(ratios)[DRAWS // 100]


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that most of a checkpoint's float weights are stored in."""
    sizes: Counter[str] = Counter()
    for entry in checkpoint.tensors.values():
        if entry.dtype in TORCH_DTYPE:
            sizes[entry.dtype] += math.prod(entry.shape)
    return TORCH_DTYPE[sizes.most_common(1)[0][0]] if sizes else torch.float32


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- prompts ---------------------------------------------------------------------------------------------------------


def read_prompts(source: Checkpoint, text: Path | None, ids: Path | None, trust_remote_code: bool) -> Prompts:
    """The prompts: token ids from a JSON file, or a text of the user's or the built-in one, by the source's tokenizer.

    Without a tokenizer, random ids. Long texts are cut into prompts that the model's positions allow.
    """
    config = build.load_config(source.folder, trust_remote_code).get_text_config()
    vocabulary = int(getattr(config, "vocab_size", 0) or 256)
    positions = getattr(config, "max_position_embeddings", None)
    length, budget = (TEXT_PROMPT_TOKENS, TEXT_TOKENS) if text else (PROMPT_TOKENS, ALL_TOKENS)
    length = min(length, positions) if isinstance(positions, int) and positions > 0 else length
    budget = max(min(budget, LOGITS_BYTES // (vocabulary * 8)), MIN_TOKENS)
    if ids is not None:
        rows = _rows_of_ids(ids, vocabulary)
        _enough(rows, ids)
        return Prompts(tuple(tuple(row) for row in rows), str(ids), _tokenizer(source, trust_remote_code))
    tokenizer = _tokenizer(source, trust_remote_code)
    if tokenizer is None:
        if text is not None:
            raise UsageError("--text needs a tokenizer, and the source has none; pass --token-ids instead")
        return Prompts(
            _random_ids(source, vocabulary, min(length, RANDOM_TOKENS)),
            "random token ids (there is no tokenizer)",
            random=True,
        )
    try:
        words = (text or PROMPTS).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{text}: cannot be read as text: {error}") from error
    with build.quiet_transformers():
        # The built-in text is made of paragraphs on different matters; a file of the user's is one text.
        parts = [words] if text else [p for p in words.split("\n\n") if p.strip()]
        rows = [tokenizer(part)["input_ids"] for part in parts]
    cut = [row[i : i + length] for row in rows for i in range(0, len(row), length)]
    kept: list[tuple[int, ...]] = []
    for row in cut:
        if len(row) > 1 and sum(map(len, kept)) < budget:
            kept.append(tuple(row[: budget - sum(map(len, kept))]))
    _enough(kept, text or PROMPTS)
    return Prompts(tuple(kept), str(text) if text else "the text that comes with flashnorm", tokenizer)


def _enough(rows: Sequence[Sequence[int]], path: Path) -> None:
    """A median over a handful of positions would call a right fold wrong."""
    if (tokens := sum(map(len, rows))) < MIN_TOKENS:
        raise UsageError(
            f"{path}: holds {tokens} tokens; at least {MIN_TOKENS} are needed to tell rounding from a mistake"
        )


def _rows_of_ids(path: Path, vocabulary: int) -> list[list[int]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON: {error}") from error
    if isinstance(rows, list) and rows and all(type(i) is int for i in rows):
        rows = [rows]
    good = isinstance(rows, list) and rows and all(isinstance(r, list) and r for r in rows)
    if not good or not all(type(i) is int and 0 <= i < vocabulary for r in rows for i in r):
        raise UsageError(f"{path}: holds no lists of token ids below {vocabulary}")
    return [list(row) for row in rows]


def _tokenizer(source: Checkpoint, trust_remote_code: bool) -> Any:
    """The source's tokenizer, or None where it has none."""
    names = {Path(name).name for name in source.others}
    if not names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"}:
        return None
    from transformers import AutoTokenizer

    try:
        with build.quiet_transformers():
            return AutoTokenizer.from_pretrained(source.folder, trust_remote_code=trust_remote_code)
    except Exception:  # a tokenizer that this environment cannot load (a missing package, say): random ids do
        return None


def _random_ids(source: Checkpoint, vocabulary: int, length: int) -> tuple[tuple[int, ...], ...]:
    """Ids without a special meaning: none that the config names."""
    special: set[int] = set()

    def collect(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                collect(inner, str(name))
        elif isinstance(value, list) and "token" in key:
            for inner in value:
                collect(inner, key)
        elif type(value) is int and ("token" in key or key.endswith("_id")):
            special.add(value)

    collect(
        build.load_config(source.folder, False).to_dict() if "auto_map" not in source.config else source.config, ""
    )
    plain = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(plain), (RANDOM_PROMPTS, length), generator=generator)
    return tuple(tuple(row) for row in plain[picks].tolist())


# ---- models ----------------------------------------------------------------------------------------------------------


def _memory(device: str) -> float:
    """Bytes that are free on a device."""
    if device.startswith("cuda"):
        return float(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return float(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return math.inf


@contextmanager
def _deterministic() -> Iterator[None]:
    """float32 products in float32, and no gradients."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _baseline(run: _Run, wide: torch.dtype, dtype: torch.dtype) -> tuple[torch.dtype, _Score]:
    """Run the source in the reference dtype. Some models mix float32 into float64 and fail: then float32 has to do."""
    try:
        return wide, _score(run, _load(run, run.pair.source, wide), keep=True)
    except RuntimeError:
        if wide != torch.float64 or dtype == torch.float64:
            raise
    run.reference.clear()
    return torch.float32, _score(run, _load(run, run.pair.source, torch.float32), keep=True)


def _load(run: _Run, checkpoint: Checkpoint, dtype: torch.dtype) -> Any:
    more = {"offload_folder": run.offload} if run.offload else {}
    run.free()
    with build.quiet_transformers():
        return run.cls.from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            device_map=run.device_map,
            trust_remote_code=run.trust_remote_code,
            experts_implementation="eager",  # the others know no float64
            **more,
        ).eval()


@contextmanager
def _weightless(model: Any, device: str) -> Iterator[int]:
    """On a GPU, run the model's norms on this project's kernels; yields how many."""
    if not device.startswith("cuda"):
        yield 0
        return
    from flashnorm_cli.norms.detect import norms_replaced

    with norms_replaced(model) as names:
        yield len(names)


def _fold_in_memory(run: _Run, config: Any, dtype: torch.dtype) -> Any:
    """The source, folded in the reference dtype without rounding to its own."""
    from safetensors import safe_open

    pair, state = run.pair, {}
    for shard in pair.source.shards:
        with safe_open(pair.source.folder / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                if name in pair.gains:
                    tensor = torch.full_like(tensor, pair.norms[name].identity)
                state[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, reader in pair.readers.items():
        factor = pair.factor(reader).to(dtype)
        origin = state[reader.values_from or name]
        state[name] = origin * factor.view([-1 if d == reader.dim else 1 for d in range(origin.ndim)])
    config = copy.deepcopy(config)
    if pair.plan.untie and pair.expected_added:
        build.set_tie(config, False)
    with build.quiet_transformers():
        return run.cls.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            device_map=run.device_map,
            experts_implementation="eager",
        ).eval()


def _batches(prompts: Prompts) -> Iterator[tuple[tuple[int, ...], ...]]:
    """Neighbouring prompts of the same length, so that nothing has to be padded."""
    for _, same in groupby(prompts.ids, key=len):
        rows = list(same)
        step = max(BATCH_TOKENS // len(rows[0]), 1)
        for i in range(0, len(rows), step):
            yield tuple(rows[i : i + step])


def _logits(run: _Run, model: Any) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Each prompt with its logits, on the CPU: (tokens, vocabulary)."""
    for rows in _batches(run.prompts):
        tokens = torch.tensor(rows, device=_device_of(run, model))
        accepted = inspect.signature(model.forward).parameters
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "decoder_input_ids": tokens,
            "use_cache": False,
        }
        output = model(**{name: value for name, value in inputs.items() if name in accepted})
        found = (output.logits if "logits" in output else output.last_hidden_state).cpu()
        yield from zip(rows, found, strict=True)


def _device_of(run: _Run, model: Any) -> torch.device:
    """Where a model takes its input: the weights of one that is spread over devices may not be there yet."""
    return torch.device(run.device) if model.device.type == "meta" else model.device


def _score(run: _Run, model: Any, keep: bool = False) -> _Score:
    score = _Score()
    causal = model.can_generate() and not model.config.is_encoder_decoder
    for i, (ids, logits) in enumerate(_logits(run, model)):
        if keep:
            run.reference.append(logits.clone())
        following = torch.tensor(ids[1:]) if causal and len(logits) == len(ids) else None
        _add(score, logits, run.reference[i], following)
    return score


def _add(score: _Score, logits: torch.Tensor, reference: torch.Tensor, following: torch.Tensor | None) -> None:
    """Add one prompt. Masked logits (-inf on both sides) count as equal."""
    a, b = logits.double(), reference.double()
    both = ~b.isfinite() & (a == b)
    a, b = a.masked_fill(both, 0.0), b.masked_fill(both, 0.0)
    score.broken += int((~a.isfinite() & b.isfinite()).any(-1).sum())
    gap = (a - b).nan_to_num(nan=math.inf)
    size = b.nan_to_num(posinf=0, neginf=0).norm(dim=-1)
    score.errors.append((gap.norm(dim=-1) / size.clamp(min=torch.finfo(torch.float64).tiny)).tolist())
    mine, theirs = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    score.kl += (theirs.exp() * (theirs - mine)).nan_to_num(nan=0.0).sum().item()
    score.same_top += int((mine.argmax(-1) == theirs.argmax(-1)).sum())
    score.positions += len(mine)
    if following is not None and len(following):
        score.loss -= mine[:-1].gather(1, following[:, None]).sum().item()
        score.predicted += len(following)


def _generate(run: _Run, model: Any, notes: list[str]) -> list[list[int]] | None:
    """Greedy continuations of the first prompts, as token ids."""
    if run.prompts.random or not model.can_generate() or model.config.is_encoder_decoder:
        return None
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    out = []
    for ids in run.prompts.ids[:GREEDY_PROMPTS]:
        start = ids[: max(len(ids) // 2, 1)]
        new = int(min(NEW_TOKENS, positions - len(start)))
        tokens = torch.tensor([start], device=_device_of(run, model))
        try:
            with build.quiet_transformers():
                found = model.generate(
                    input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=new, do_sample=False
                )
        except Exception as error:  # generation has its own requirements, some of which no text meets
            notes.append(f"no greedy continuation: {build.first_line(error)}")
            return None
        out.append(found[0, len(start) :].tolist())
    return out


def _side_by_side(
    prompts: Prompts, source: list[list[int]] | None, folded: list[list[int]] | None
) -> list[dict[str, Any]]:
    def words(ids: Any) -> str:
        if prompts.tokenizer is None:
            return " ".join(map(str, ids))
        return str(prompts.tokenizer.decode(ids, skip_special_tokens=True))

    rows = []
    for ids, a, b in zip(prompts.ids, source or (), folded or (), strict=False):
        same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        start = ids[: max(len(ids) // 2, 1)]
        rows.append({"prompt": words(start), "source": words(a), "folded": words(b), "same": same, "tokens": len(a)})
    return rows
