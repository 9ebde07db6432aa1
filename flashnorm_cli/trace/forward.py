"""One forward of a model on the meta device, under the tracer."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flashnorm_cli.errors import PlanError
from flashnorm_cli.trace.judge import judge
from flashnorm_cli.trace.result import Trace
from flashnorm_cli.trace.tracer import GainTracer
from flashnorm_cli.trace.values import tensors_in
from flashnorm_cli.trace.words import model_words

BATCH, TOKENS = 2, 6


_SET_DATA: Any = cast(Any, torch.Tensor.data).__set__  # `z.data = other` is no operation


class _Literals(TorchFunctionMode):
    """What Python sees of values without an operation: `torch.tensor(3)` as it is made, `f"expert_{index}"`."""

    def __init__(self, tracer: GainTracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__format__ and args[0].device.type == "meta" and args[0].ndim == 0:
            known = self.tracer.state.values.of(args[0])
            if known is not None:
                return format(known.item(), *args[1:])
        if func == _SET_DATA and not self.tracer.state.same_weight(*args):  # module.to(dtype) sets what was there
            self.tracer.state.escape_through_answer("data", args)
        out = func(*args, **(kwargs or {}))
        if (
            func in (torch.tensor, torch.as_tensor)
            and isinstance(out, torch.Tensor)
            and out.device.type == "meta"
            and not tensors_in(args)
        ):
            with torch.utils._python_dispatch._disable_current_modes():
                self.tracer.state.values.set(out, torch.tensor(*args, **{**(kwargs or {}), "device": "cpu"}))
        return out


def token_ids(model: PreTrainedModel, batch: int, length: int) -> torch.Tensor:
    """A handful of token ids of a model's vocabulary, (batch, length), int64."""
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 8)
    return (torch.arange(batch * length) * 7 + 3).view(batch, length) % vocabulary


def call_with(model: PreTrainedModel, tokens: torch.Tensor) -> dict[str, Any]:
    """Token ids as the arguments of a forward, and what else it cannot do without."""
    inputs: dict[str, Any] = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return inputs


def _inputs(model: PreTrainedModel, tracer: GainTracer, batch: int, length: int) -> dict[str, Any]:
    values = token_ids(model, batch, length)
    vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0) or 8)
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    if model.config.is_encoder_decoder and isinstance(end, int) and 0 <= end < vocabulary > 1:
        # Classifiers read the state at the end token, and want as many of those in each row.
        values = torch.where(values == end, (end + 1) % vocabulary, values)
        values[:, -1] = end
    tokens = torch.empty_like(values, device="meta")
    tracer.state.values.set(tokens, values)
    return call_with(model, tokens)


def _needs_one_row(model: PreTrainedModel) -> bool:
    """Whether it classifies sequences and has no token to pad them with: of several rows it finds no end."""
    text = model.config.get_text_config()
    pad = getattr(model.config, "pad_token_id", None)
    return "Classification" in type(model).__name__ and (pad if pad is not None else text.pad_token_id) is None


def trace_forward(model: PreTrainedModel) -> Trace:
    """Run text forwards of a model on the meta device and follow its gains.

    The first forward decides whether the model can be traced. More of them look into branches that it may not have
    taken, with conditions on data answered in other ways and with a single token as in decoding: they add uses.

    Args:
        model: on the meta device, in eval mode.
    Raises:
        PlanError: the forward cannot run on the meta device; the message names operation and module.
    """
    tracer = GainTracer(model)
    run_forwards(model, tracer)
    return judge(tracer.state)


def run_forwards(model: PreTrainedModel, tracer: GainTracer) -> None:
    """Run the model under a tracer, as `trace_forward` says. Raises PlanError where the first forward cannot run."""
    batch = 1 if _needs_one_row(model) else BATCH
    _run(model, tracer, batch, TOKENS)
    tracer.auxiliary = True
    for guesses in tracer.state.values.other_guesses():
        tracer.state.values.guesses = guesses
        with suppress(PlanError):
            _run(model, tracer, batch, TOKENS)
    with suppress(PlanError):
        _run(model, tracer, 1, 1)


def _run(model: PreTrainedModel, tracer: GainTracer, batch: int, length: int) -> None:
    inputs = _inputs(model, tracer, batch, length)
    try:
        with torch.no_grad(), torch.device("meta"), tracer.state.watching_modules(), _Literals(tracer), tracer:
            output = model(**inputs)
    except PlanError:
        raise
    except Exception as error:  # anything may come out of a model's own code, remote code included
        own = model_words(error)
        why = (
            f"{type(error).__name__}: {own}"
            if own
            else "an operation there goes by the values of its data, and a trace has shapes only"
        )
        raise PlanError(
            f"the forward of {type(model).__name__} cannot be traced: it stopped in `{tracer.state.module}` ({why})"
        ) from error
    finally:
        tracer.state.leave_modules()
    tracer.state.on_output(output)
