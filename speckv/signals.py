"""How sure a drafter was of a token: what policies decide from and records keep."""

import math
from typing import NamedTuple

import torch

from speckv.errors import NumericalError


class Signal(NamedTuple):
    """Of one draft token: the entropy in bits and the largest probability of the distribution it was drawn from.

    is_estimate says that the drafter gave them itself, from past success (prompt lookup, whose distributions are
    one-hot whatever its proposals are worth).
    """

    entropy: float
    confidence: float
    is_estimate: bool = False


def read_numbers(*tensors) -> list:
    """The values of tensors [1], all at once: on a GPU a read waits for the device."""
    if tensors[0].device.type == "cpu":
        return [tensor.item() for tensor in tensors]
    return torch.cat([tensor.double() for tensor in tensors]).tolist()


def read_signals(signals) -> tuple:
    """Signals with every tensor [1] among their numbers read, all at once.

    Raises NumericalError where the draft logits were no distribution.
    """
    tensors = [part for signal in signals for part in signal[:2] if isinstance(part, torch.Tensor)]
    if tensors:
        numbers = iter(read_numbers(*tensors))
        signals = [Signal(*(next(numbers) if isinstance(part, torch.Tensor) else part for part in signal[:2]),
                          signal.is_estimate) for signal in signals]
    for signal in signals:
        if math.isnan(signal.entropy):
            raise NumericalError("draft_sample: row 0: the logits are not a distribution (NaN, +inf, or all -inf)")
    return tuple(signals)
