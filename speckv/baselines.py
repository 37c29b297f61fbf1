"""The published ways to choose how many tokens to draft, for comparison.

Each is its authors' rule on the signals of one sequence. They look at the drafter alone: none knows what a token costs.
"""

import math
from dataclasses import dataclass

import torch

from speckv.compression import compression_level
from speckv.controller import Controller
from speckv.errors import InputError
from speckv.policy import CountingSession, LimitedSession

LONGEST_DRAFT = 20  # where a rule has no limit of its own: transformers' num_assistant_tokens


@dataclass(frozen=True)
class HFConfidence:
    """Stop after a token of less than `threshold` confidence.

    Source: transformers' assisted generation (assistant_confidence_threshold 0.4, num_assistant_tokens 20), after Mamou
    et al., DISCO, arXiv 2405.04304. Its own threshold adapts only where scikit-learn is installed; here it stands.
    """

    threshold: float = 0.4
    longest: int = LONGEST_DRAFT

    def __post_init__(self):
        _check_share("threshold", self.threshold)

    @property
    def name(self) -> str:
        return "hf-confidence"

    def open(self, compression=None):
        return _LimitedSession(self, least_confidence=self.threshold)


@dataclass(frozen=True)
class HFHeuristic:
    """Two tokens more after a draft that was accepted whole, one less after any other, never less than one.

    Source: transformers' num_assistant_tokens_schedule "heuristic", which starts from `start`.
    """

    start: int = 5

    @property
    def name(self) -> str:
        return "hf-heuristic"

    def open(self, compression=None):
        return _HeuristicSession(self)


@dataclass(frozen=True)
class SVIP:
    """Stop after a token whose entropy H (in nats) is so high that the bound sqrt(H) on what the target may reject
    exceeds `threshold`: go on while sqrt(H) < threshold.

    Source: Zhang et al., SVIP, arXiv 2411.18462. The threshold is ours, not checked against theirs.
    """

    threshold: float = 0.6
    longest: int = LONGEST_DRAFT

    @property
    def name(self) -> str:
        return "svip"

    def open(self, compression=None):
        return _LimitedSession(self, most_entropy=self.threshold ** 2 / math.log(2))


@dataclass(frozen=True)
class AdaEDL:
    """Stop where a lower bound of the next token's acceptance, 1 - sqrt(gamma · H) with H in nats, falls below a
    threshold that follows the acceptance rate of this text.

    Source: Agrawal et al., AdaEDL, arXiv 2410.18351, algorithm 1. The constants were not checked against the paper.
    """

    gamma: float = 0.2
    aim: float = 0.9       # alpha: the acceptance rate the threshold is steered to
    momentum: float = 0.5  # beta_1, of the acceptance rate
    smoothing: float = 0.9  # beta_2, of the threshold
    step: float = 0.01     # epsilon
    longest: int = 10

    def __post_init__(self):
        if not self.gamma > 0:
            raise InputError(f"gamma is {self.gamma}: it must be above 0")

    @property
    def name(self) -> str:
        return "adaedl"

    def open(self, compression=None):
        return _AdaEDLSession(self)


@dataclass(frozen=True)
class SpecDecPlusPlus:
    """Stop where the estimated probability that some token of the draft is rejected exceeds `threshold`.

    Source: Huang et al., SpecDec++, arXiv 2405.19715. Theirs is estimated by a head trained on the drafter's hidden
    states; here, as for every policy, from the signals: each token stands with its confidence.
    """

    threshold: float = 0.7
    longest: int = LONGEST_DRAFT

    def __post_init__(self):
        _check_share("threshold", self.threshold)

    @property
    def name(self) -> str:
        return "specdec++"

    def open(self, compression=None):
        return _LimitedSession(self, least_survival=1 - self.threshold)


@dataclass(frozen=True)
class Paper:
    """The SpecKV paper's rule, made causal: its MLP on the signals of the step before, argmax of tokens a step.

    The paper feeds the MLP the signals of the very step it decides, which nobody has before the draft; a text's first
    step drafts 4. Source: arXiv 2605.02888.
    """

    controller: Controller
    gammas: tuple = (2, 4, 6, 8)

    @property
    def name(self) -> str:
        return "paper"

    def open(self, compression=None):
        return _PaperSession(self, compression)


def _check_share(name, value):
    if not 0 < value < 1:
        raise InputError(f"{name} is {value}: it must lie between 0 and 1")


class _LimitedSession(LimitedSession):
    """Goes on while the same limits are kept."""

    def __init__(self, policy, **limits):
        self.name = policy.name
        self._longest = policy.longest
        self._limits = limits

    def max_draft(self):
        return self._longest

    def limits(self):
        return self._limits


class _HeuristicSession(CountingSession):
    def __init__(self, policy):
        self.name = policy.name
        self._gamma = policy.start

    def max_draft(self):
        return self._gamma

    def record(self, step):
        if step.gamma:
            is_whole = step.accepted == step.gamma
            self._gamma = self._gamma + 2 if is_whole else max(1, self._gamma - 1)
            # Where a step could not draft all that was asked, the answer is the same as for the draft it made.
            self._gamma = min(self._gamma, LONGEST_DRAFT)


class _AdaEDLSession(LimitedSession):
    def __init__(self, policy):
        self.name = policy.name
        self._policy = policy
        self._threshold = 0.0
        self._acceptance = policy.aim

    def max_draft(self):
        return self._policy.longest

    def limits(self):
        # 1 - sqrt(gamma * H) >= threshold; no entropy is so low where the threshold is above 1
        farthest = 1 - self._threshold
        return {"most_entropy": farthest * abs(farthest) / (self._policy.gamma * math.log(2))}

    def record(self, step):
        if not step.gamma:
            return
        policy = self._policy
        self._acceptance = policy.momentum * self._acceptance + (1 - policy.momentum) * step.acceptance_rate
        sign = (self._acceptance < policy.aim) - (self._acceptance > policy.aim)
        moved = self._threshold + policy.step * sign
        self._threshold = policy.smoothing * self._threshold + (1 - policy.smoothing) * moved


class _PaperSession(CountingSession):
    def __init__(self, policy, compression):
        self.name = policy.name
        self._policy = policy
        self._gammas = torch.tensor(policy.gammas)
        self._signals = torch.zeros(1, 5)
        self._signals[0, 4] = compression_level(compression)
        self._gamma = 4

    def max_draft(self):
        return self._gamma

    def record(self, step):
        if step.gamma:
            for i, value in enumerate((step.mean_entropy, step.mean_confidence, step.max_entropy, step.min_confidence)):
                self._signals[0, i] = value
            self._gamma = int(self._policy.controller.plan(self._signals, self._gammas)[0])
