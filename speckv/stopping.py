"""When a draft ends, in numbers: a rule that the loop follows token by token, and a drafter that makes all of it in one
call there."""

import math
from typing import NamedTuple

import torch


class Worth(NamedTuple):
    """The rule of speckv.adaptive in numbers: go on while one more token, or a few, are worth their time.

    signals [1, F] f32 are those of speckv.draft_state, what is known before the draft in them; the draft brings them up
    to date. weights are the controller's four tensors. costs [3, n] f64 are speckv.cost.StepCosts.numbers, which tell
    what a pass of the target takes; draft_ms is what one more draft token takes; rate the run's tokens a second, which
    counts as rate / scale for the controller; stands how often one more token of a model stands where all before it do.
    The controller has seen drafts of up to most_counted tokens, and the rule looks look_ahead tokens ahead.
    The pass has `others` positions of other texts.
    """

    signals: torch.Tensor
    weights: tuple
    costs: torch.Tensor
    draft_ms: float
    rate: float
    scale: float
    stands: float
    most_counted: int
    look_ahead: int
    others: int = 0

    @property
    def tensors(self) -> list:
        """As csrc/worth.h wants them."""
        return [self.signals, *self.weights, self.costs]

    def judge_copies(self, confidences: list) -> tuple:
        """How many tokens of a draft of copies are worth their time, to which the drafter gives these confidences, the
        controller's acceptance of so many, and the seconds it took to say so. Needs the C++ kernels."""
        return torch.ops.speckv.judge_copies(
            torch.tensor(confidences, dtype=torch.float64), self.tensors, self.draft_ms, self.rate, self.scale,
            self.most_counted, self.look_ahead, self.others)


class StopRule(NamedTuple):
    """Go on after a draft token while its confidence, its entropy in bits, and the survival of the draft so far (the
    product of its confidences) keep these limits, and one more is worth its time where `worth` is given. A draft has at
    most `longest` tokens."""

    longest: int
    least_confidence: float = 0.0
    most_entropy: float = math.inf
    least_survival: float = 0.0
    worth: Worth | None = None

    def keeps_limits(self, signal, survival) -> bool:
        """Whether a token with this Signal, with which the draft survives with this probability, ends no draft."""
        return (signal.confidence >= self.least_confidence and signal.entropy <= self.most_entropy
                and survival >= self.least_survival)


class Chain(NamedTuple):
    """A draft made in one call: the logits [n, S] that its tokens were drawn from (none where greedy), of the tokens
    with token_ids [S] i64 (None: of all); a Signal of each token drawn; the controller's acceptance of all of them (NaN
    without one); and the seconds that went into drawing and deciding."""

    logits: torch.Tensor
    token_ids: torch.Tensor | None
    signals: tuple
    acceptance: float
    seconds: float
