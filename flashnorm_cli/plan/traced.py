"""A model on the meta device and the trace of its forward: what a plan starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from flashnorm_cli.checkpoint.model import Checkpoint
from flashnorm_cli.errors import PlanError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from flashnorm_cli.trace.result import Trace


class Traced(NamedTuple):
    """`missing` are the model's parameters that the files lack."""

    model: PreTrainedModel
    missing: set[str]
    trace: Trace

    def head(self) -> str | None:
        """Runtime name of the output head's weight."""
        weight = getattr(self.model.get_output_embeddings(), "weight", None)
        return next((name for name, p in self.model.named_parameters() if p is weight), None)

    def head_gains(self) -> list[str]:
        """The gains that the output head reads."""
        head = self.trace.readers.get(self.head() or "")
        return self.trace.gains_of(head.ids) if head else []


def traced(checkpoint: Checkpoint, config: PretrainedConfig, cls: Any, untied: bool = False) -> Traced:
    """Build a model and run its forward under the tracer; `untied` with a head apart from the embedding.

    Attention and experts have several implementations; the plainest that runs is the one to follow.

    Raises:
        PlanError: it cannot be built, or no implementation can be traced.
    """
    from flashnorm_cli.modeling import build
    from flashnorm_cli.trace.forward import trace_forward

    first_error = None
    for attention, experts in (("eager", "batched_mm"), ("eager", "eager"), ("sdpa", "eager")):
        try:
            model, missing = build.build(checkpoint, config, cls, attention, experts, untied)
            return Traced(model, missing, trace_forward(model))
        except PlanError as error:
            first_error = first_error or error
    raise first_error or PlanError("no implementation of attention to trace")
