"""How many tokens to draft in a step. A policy sees numbers, never a model."""

from dataclasses import dataclass
from typing import Protocol

from speckv.cost import ALONE
from speckv.errors import InputError
from speckv.kernels import draft_sample
from speckv.records import StepRecord
from speckv.signals import Signal, read_signals
from speckv.stopping import Chain, StopRule


class Policy(Protocol):
    """How to decide; supply your own object with these members. One object may serve many sequences."""

    name: str

    def open(self, compression: str | None) -> "PolicySession":
        """Start on a new sequence of a target held at this compression ("bf16", "int8", "nf4"; None if unknown)."""


class PolicySession:
    """A policy at work on one sequence: drafts as many tokens as max_draft says. Override what differs."""

    name = "policy"
    is_asked = False  # whether the drafter asks may_draft() before it drafts
    others = ALONE    # the texts that share the pass which verifies the step

    def max_draft(self) -> int:
        """The most tokens the next step may draft; 0 is plain decoding."""
        raise NotImplementedError

    def will_draft(self) -> bool:
        """Whether the drafter should read the prompt with the target: it will be asked before long."""
        return self.max_draft() > 0

    def may_draft(self, is_estimate: bool) -> bool:
        """Whether the step may be drafted in this way, is_estimate as in Signal; asked by drafters that have two."""
        return True

    def draft(self, logits, temperature, uniform, drafted: int, own, **filters):
        """Draw draft token number `drafted` (from 0) and say whether to draft another.

        logits [1, V], or [1, S] of the tokens that the drafter can draft (speckv.drafters.OfSome), temperature [1] f32
        and uniform [1] f32 are those of draft_sample; own is (entropy, confidence) where the drafter gives its own;
        filters are those of top_k, top_p and min_p, each [1], that the text is sampled with: the token must be drawn
        with them, too. Returns the token [1] i64, as an index into logits, its Signal (numbers, or tensors [1] that
        nobody has waited for yet) and whether to go on. The answer must not depend on the token: dropping, or stopping
        at, a token for what it is would change the distribution of the text.
        """
        token, signal = sample(logits, temperature, uniform, own, **filters)
        return token, signal, True

    def stop_rule(self, most: int, is_estimate: bool) -> StopRule | None:
        """When the draft that is about to be made, of at most so many tokens with signals of this kind, ends, for a
        drafter that makes it in one call; None to be asked token by token, with draft()."""

    def drafted(self, chain: Chain) -> None:
        """What became of the draft that stop_rule was asked for, where it has a token."""

    def promise(self, gamma: int) -> float | None:
        """How many of the draft just made, of gamma tokens, the policy expects to be accepted; None if it does not say.
        """

    def record(self, step: StepRecord) -> None:
        """The step is over; learn from it."""


class StoppingSession(PolicySession):
    """A session that looks at the signals of each draft token before it asks for another: override goes_on."""

    def goes_on(self, drafted: int, signal: Signal) -> bool:
        """Whether to draft another token after `drafted` of them, the last with this signal."""
        raise NotImplementedError

    def draft(self, logits, temperature, uniform, drafted, own, **filters):
        token, signal = sample(logits, temperature, uniform, own, **filters)
        (signal,) = read_signals([signal])
        return token, signal, self.goes_on(drafted + 1, signal)


class LimitedSession(StoppingSession):
    """One whose rule is a few limits: override limits."""

    _survival = 1.0

    def limits(self) -> dict:
        """Those of StopRule that hold for the next token."""
        raise NotImplementedError

    def stop_rule(self, most, is_estimate):
        return StopRule(most, **self.limits())

    def goes_on(self, drafted, signal):
        self._survival = signal.confidence * (1.0 if drafted == 1 else self._survival)
        return self.stop_rule(self.max_draft(), signal.is_estimate).keeps_limits(signal, self._survival)


def sample(logits, temperature, uniform, own, **filters):
    """A draft token [1] and its Signal: of the drafter's distribution without the filters, or the drafter's own."""
    token, _, entropy, confidence = draft_sample(logits, temperature, uniform, **filters)
    if own is None:
        return token, Signal(entropy, confidence)
    return token, Signal(*own, is_estimate=True)


@dataclass(frozen=True)
class Fixed:
    """Draft the same number of tokens at every step; gamma 0 is plain decoding through the same loop."""

    gamma: int

    def __post_init__(self):
        if type(self.gamma) is not int:
            raise InputError(f"gamma is {self.gamma!r}: it must be a whole number")
        if self.gamma < 0:
            raise InputError(f"gamma is {self.gamma}: it must be 0 (plain decoding) or more")

    @property
    def name(self) -> str:
        return f"fixed:{self.gamma}" if self.gamma else "off"

    def open(self, compression=None):
        return _FixedSession(self)


class CountingSession(PolicySession):
    """A session that settles before the draft how many tokens it has."""

    def stop_rule(self, most, is_estimate):
        return StopRule(most)


class _FixedSession(CountingSession):
    def __init__(self, policy):
        self.name = policy.name
        self._gamma = policy.gamma

    def max_draft(self):
        return self._gamma


def open_policy(policy: Policy, compression: str | None = None) -> PolicySession:
    """A session of a policy; raises InputError where it has none."""
    session = policy.open(compression)
    if not isinstance(session, PolicySession):
        raise InputError(f"policy {policy.name!r} opens a {type(session).__name__}: it must be a "
                         "speckv.policy.PolicySession")
    return session
