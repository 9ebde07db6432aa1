"""Level weights: what every tensor must hold, recomputed from the source, compared bit for bit.

Both checkpoints are streamed once, shard by shard (`shard_stream.py`); the sha256 of every folded shard is taken on the
way.
"""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from flashnorm_cli.checkpoint.header import TensorEntry
from flashnorm_cli.checkpoint.model import Progress
from flashnorm_cli.checkpoint.tensors import TORCH_DTYPE, one_thread_each
from flashnorm_cli.proof import contract
from flashnorm_cli.proof.diagnose import diagnose
from flashnorm_cli.proof.difference import Difference
from flashnorm_cli.proof.figures import WeightsFigures
from flashnorm_cli.proof.pairing import DROPPED, Pair
from flashnorm_cli.proof.result import Finding, LevelResult
from flashnorm_cli.proof.shard_stream import Expected, ShardStream

# Another tool may round the gain, and then the product: two units in the last place of the coarser dtype. A fold that
# carries our record has to hold the very bits.
FOREIGN_UNITS = 2.0
MAX_DIAGNOSED = 40


@dataclass
class _Outcome:
    """What the streams leave behind."""

    differences: dict[str, Difference] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    bytes_read: int = 0


def check_weights(pair: Pair, workers: int, report: Progress) -> tuple[LevelResult, dict[str, str]]:
    """Compare every tensor and file of a folded checkpoint with what the source and the plan say.

    Returns the level's result (figures: `WeightsFigures`), and the sha256 of each folded shard.
    """
    expected = expected_tensors(pair)
    findings = [*contract.check(pair), *pair.findings]
    comparable = []
    for name, want in expected.items():
        entry = pair.folded.tensors.get(name)
        if entry is None:
            findings.append(Finding(name, _why_missing(pair, name)))
        elif problem := other_shape(pair, entry, want):
            findings.append(Finding(name, problem))
        else:
            comparable.append(name)
    for name in pair.folded.tensors:
        if name not in expected and pair.states.get(name) is None:
            findings.append(Finding(name, "is not in the source, and no fold adds it"))

    outcome = _stream(pair, {name: expected[name] for name in comparable}, workers, report)
    described = {finding.what for finding in findings}
    rounded: list[str] = []
    wrong: list[str] = []
    for name, difference in outcome.differences.items():
        is_product = expected[name].factor is not None  # what is only copied has nothing to round
        fine = pair.foreign and is_product and difference.largest <= FOREIGN_UNITS
        (rounded if fine else wrong).append(name)
    for i, name in enumerate(wrong):
        if name in described and name in pair.states:
            continue  # a norm that has been described already
        difference = outcome.differences[name]
        why = difference.words
        if not expected[name].rotated and i < MAX_DIAGNOSED:
            why = diagnose(pair, name, difference.largest)
        findings.append(Finding(name, describe(pair.folded.tensors[name], difference, why), difference.error))
    notes = _notes(pair, [outcome.differences[name].largest for name in rounded])
    figures = WeightsFigures(
        tensors=len(expected),
        changed=sum(bool(w.factor is not None or w.fill is not None or w.rotated) for w in expected.values()),
        identical=len(comparable) - len(rounded) - len(wrong),
        rounded_otherwise=len(rounded),
        differing=len(expected) - len(comparable) + len(wrong),
        bytes_read=outcome.bytes_read,
        layout=pair.layout,
        folded=len(pair.gains),
        kept=len(pair.plan.norms) - len(pair.gains),
    )
    status = "failed" if findings else "passed"
    return LevelResult("weights", status, figures, tuple(findings), tuple(notes)), outcome.hashes


def _notes(pair: Pair, rounded: list[float]) -> list[str]:
    notes = []
    if rounded:
        notes.append(
            f"{len(rounded)} tensors were rounded in another way than flashnorm rounds, by {max(rounded):.1f} units in "
            "the last place at most"
        )
    if pair.plan.rotation is not None:
        notes.append(
            f"the {len(pair.plan.rotation.tensors)} rotated tensors were recomputed in float64, and compared with what "
            "their dtype makes of that, give or take the noise of float32 sums"
        )
    if not pair.gains:
        notes.append("no norm is folded: every one keeps the source's weight")
    return notes + contract.notes(pair)


# ---- what must be there ----------------------------------------------------------------------------------------------


def expected_tensors(pair: Pair) -> dict[str, Expected]:
    """Every tensor that the folded checkpoint has to hold."""
    source = pair.source
    expected: dict[str, Expected] = {}
    for name, entry in source.tensors.items():
        if name in pair.gains:
            if pair.states[name] != DROPPED:
                expected[name] = Expected(None, "", fill=pair.norms[name].identity)
        elif name in pair.readers:
            reader = pair.readers[name]
            expected[name] = Expected(entry, source.shard_of[name], reader.dim, pair.factor(reader))
        else:
            expected[name] = Expected(entry, source.shard_of[name])
    for name in pair.expected_added:
        reader = pair.readers[name]
        origin = reader.values_from or name
        expected[name] = Expected(source.tensors[origin], source.shard_of[origin], reader.dim, pair.factor(reader))
    if pair.plan.rotation is not None:
        turned = pair.plan.rotation.tensors
        expected.update({n: replace(expected[n], rotated=dims) for n, dims in turned.items() if n in expected})
    return expected


def _why_missing(pair: Pair, name: str) -> str:
    if name in pair.expected_added:
        norms = {run.norm for run in pair.readers[name].runs if run.norm}
        return (
            f"is missing: {', '.join(sorted(norms))} is folded, and its reader is tied to the embedding, so it needs "
            "weights of its own"
        )
    if name in pair.states:
        return "is left out, but is not a folded norm"
    return "is missing"


def other_shape(pair: Pair, entry: TensorEntry, want: Expected) -> str | None:
    name = entry.name
    shape, dtype = (
        (want.origin.shape, want.origin.dtype)
        if want.origin is not None
        else (pair.source.tensors[name].shape, pair.source.tensors[name].dtype)
    )
    if entry.shape != shape:
        return f"has shape {list(entry.shape)} instead of {list(shape)}"
    both_float = entry.dtype in TORCH_DTYPE and dtype in TORCH_DTYPE
    if entry.dtype != dtype and not (pair.foreign and both_float):
        return f"is stored as {entry.dtype} instead of {dtype}"
    return None


def describe(entry: TensorEntry, difference: Difference, why: str) -> str:
    if difference.first is None:
        return why or "differs"
    flat, found, wanted = difference.first
    place = []
    for size in reversed(entry.shape):
        place.append(flat % size)
        flat //= size
    where = f"[{', '.join(str(p) for p in reversed(place))}]"
    total = math.prod(entry.shape)
    many = (
        f"{difference.values:,} of {total:,} values differ, the first at {where}: {found:.6g} instead of {wanted:.6g}"
    )
    return f"{why}; {many}" if why else many


# ---- streaming -------------------------------------------------------------------------------------------------------


def _stream(pair: Pair, expected: dict[str, Expected], workers: int, report: Progress) -> _Outcome:
    outcome = _Outcome()
    total = sum(header.file_size for header in pair.folded.shards.values())
    lock = threading.Lock()
    stop = threading.Event()

    def on_bytes(folded: int, source: int) -> None:
        if stop.is_set():
            raise InterruptedError
        with lock:
            done[0] += folded
            outcome.bytes_read += folded + source
            report(done[0], total, "Comparing weights")

    done = [0]

    def work(shard: str) -> None:
        try:
            with ShardStream(pair, shard, expected, on_bytes) as stream:
                differences, digest = stream.run()
            with lock:
                outcome.differences.update(differences)
                outcome.hashes[shard] = digest
        except BaseException:
            stop.set()
            raise

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:  # shards and hashing are the parallelism
        futures = [pool.submit(work, shard) for shard in pair.folded.shards]
        try:
            errors = [error for f in futures if (error := f.exception()) is not None]
        except BaseException:  # KeyboardInterrupt: leaving the pool waits for its threads
            stop.set()
            raise
    for error in sorted(errors, key=lambda e: isinstance(e, InterruptedError)):
        raise error
    order = {name: i for i, name in enumerate(pair.folded.tensors)}
    outcome.differences = dict(sorted(outcome.differences.items(), key=lambda item: order[item[0]]))
    return outcome
