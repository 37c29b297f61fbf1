"""What a decode leaves behind: the sequences, one record a step, and totals."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from speckv.signals import Signal


class StepRecord(NamedTuple):
    """One draft-and-verify step.

    gamma draft tokens were proposed and `accepted` of them kept, so the step emitted `tokens` (accepted + 1 unless the
    sequence ended inside it). signals holds a Signal for each draft token; the four of the paper are made of them, and
    are None where nothing was drafted.
    """

    gamma: int
    accepted: int
    tokens: int
    draft_ms: float
    verify_ms: float
    signals: tuple[Signal, ...] = ()
    predicted: float | None = None  # how many of the draft the policy expected to be accepted, where it says

    @property
    def acceptance_rate(self) -> float:
        return self.accepted / self.gamma if self.gamma else 0.0

    @property
    def mean_entropy(self) -> float | None:
        return _mean([signal.entropy for signal in self.signals])

    @property
    def mean_confidence(self) -> float | None:
        return _mean([signal.confidence for signal in self.signals])

    @property
    def max_entropy(self) -> float | None:
        return max((signal.entropy for signal in self.signals), default=None)

    @property
    def min_confidence(self) -> float | None:
        return min((signal.confidence for signal in self.signals), default=None)


def _mean(values):
    """Never below the least or above the largest of them, as a rounded quotient may be."""
    return min(max(math.fsum(values) / len(values), min(values)), max(values)) if values else None


@dataclass(frozen=True)
class SpecOutput:
    """The result of speckv.generate.

    sequences [B, L] i64 is prompt plus new tokens, as in transformers; seconds is the whole call, prompt included.
    """

    sequences: torch.Tensor
    prompt_length: int
    seconds: float
    prefill_seconds: float
    steps: list[StepRecord] = field(repr=False)

    @property
    def new_tokens(self) -> int:
        return self.sequences.shape[1] - self.prompt_length

    @property
    def tokens_per_second(self) -> float:
        return self.new_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_step(self) -> float:
        return self.new_tokens / len(self.steps) if self.steps else 0.0

    @property
    def drafted(self) -> int:
        return sum(step.gamma for step in self.steps)

    @property
    def accepted(self) -> int:
        return sum(step.accepted for step in self.steps)

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def draft_ms(self) -> float:
        return sum(step.draft_ms for step in self.steps)

    @property
    def verify_ms(self) -> float:
        return sum(step.verify_ms for step in self.steps)
