"""Results of `flashnorm bench` as a file holds them: what --save writes, and the document of --json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from flashnorm_cli.bench.kernels import Measurement
from flashnorm_cli.bench.report import OURS
from flashnorm_cli.checkpoint.json_files import read_object
from flashnorm_cli.errors import CheckpointError, FlashNormError, shown

NUMBERS = ("us", "gb_per_s", "of_copy", "host_us")


def read_results(path: Path) -> tuple[dict[str, Any], list[Measurement], list[dict[str, Any]]]:
    """What a file says of its origin, the norms' measurements, and the rows of a model.

    Raises FlashNormError for a file that cannot be read, or that holds no results.
    """
    try:
        content = read_object(path)
    except CheckpointError as error:
        raise FlashNormError(str(error)) from error
    if isinstance(content.get("benchmark"), dict):
        content = content["benchmark"]
    results, models = content.get("results"), content.get("models") or []
    if not isinstance(results, list) or not isinstance(models, list) or not (results or models):
        raise FlashNormError(f"{path}: holds no results of flashnorm bench")
    for row in models:
        if not isinstance(row, dict) or not isinstance(row.get("mode"), str) or not isinstance(row.get("way"), str):
            raise FlashNormError(f"{path}: holds {shown(row)}, which is no row of a model")
        if "error" not in row and not (_is_pair(row.get("spread")) and _is_number(row.get("tok_per_s"))):
            raise FlashNormError(f"{path}: holds {shown(row)}, which is no row of a model")
    return content, [_measurement(path, each) for each in results], models


def gpu_of(content: dict[str, Any]) -> str | None:
    """What a file's results were measured on, as far as it says so."""
    norms = content.get("norms")
    gpu = norms.get("gpu") if isinstance(norms, dict) else None
    return gpu if isinstance(gpu, str) else None


def _measurement(path: Path, value: Any) -> Measurement:
    fields = {field.name for field in dataclasses.fields(Measurement)}
    good = (
        isinstance(value, dict)
        and fields >= value.keys() >= {"operation", "hidden", "tokens", "dtype", "contender"}
        and value["operation"] in OURS
        and all(type(value[key]) is int and value[key] > 0 for key in ("hidden", "tokens"))
        and all(isinstance(value[key], str) for key in ("dtype", "contender"))
        and all(value.get(key) is None or (_is_number(value[key]) and value[key] > 0) for key in NUMBERS)
        and (value.get("error") is None or isinstance(value["error"], str))
        and (value.get("spread") is None or _is_pair(value["spread"]))
    )
    if not good:
        raise FlashNormError(f"{path}: holds {shown(value)}, which is no measurement")
    return Measurement(**value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e12


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))
