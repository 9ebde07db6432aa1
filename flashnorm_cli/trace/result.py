"""What a trace finds: gains, their readers, and how gains escape."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from flashnorm_cli.trace.companions import small

# A channel of a reader that no traced use has touched: any gain is compatible with it.
UNUSED = -1


@dataclass(frozen=True)
class Gain:
    """A parameter that scales a normalised activation channel by channel.

    The factor is `scale * parameter + offset`: (1, 0) for the usual `w`, (1, 1) for the `1 + w` of Gemma.
    `first_id` is the id of the parameter's first element; element `i` of the flattened parameter has
    `first_id + i`.
    """

    parameter: str
    shape: tuple[int, ...]
    module: str
    scale: float
    offset: float
    first_id: int

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass
class Reader:
    """A parameter that contracts scaled channels along `dim`; `ids[c]` is the gain element that scales channel c.

    `ids` is int64 of length `shape[dim]`: 0 where the channel is read unscaled, `UNUSED` where it is not read.
    """

    parameter: str
    dim: int
    ids: torch.Tensor
    module: str


@dataclass
class Trace:
    """What one forward pass showed. All names are runtime parameter names, the first one of a shared parameter."""

    gains: dict[str, Gain] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)  # gain -> the reason why its norm keeps its weight
    tied_conflicts: dict[str, set[str]] = field(default_factory=dict)  # gain -> readers that are embeddings too
    fed: set[str] = field(default_factory=set)  # gains that at least one parameter reads
    reached: set[str] = field(default_factory=set)  # parameters that any operation touched
    asked: tuple[str, ...] = ()  # modules in which a condition on unknown data decided what was computed
    fingerprint: str = ""  # of the sequence of operations; equal for equal forwards
    _firsts: torch.Tensor = field(default_factory=lambda: torch.empty(0))  # first ids of the gains

    def gains_of(self, ids: torch.Tensor) -> list[str]:
        """Names of the gains that scale something in an ids tensor."""
        if len(self._firsts) != len(self.gains):
            self._firsts = torch.tensor([g.first_id for g in self.gains.values()], device="cpu")
        present = small(ids).flatten().unique()
        which = torch.bucketize(present[present > 0], self._firsts, right=True) - 1
        names = list(self.gains)
        return [names[i] for i in which.unique().tolist()]
