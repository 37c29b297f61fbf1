"""The policy of this package: draft on while the next token is worth more than its time.

A run's throughput is E[tokens a step] / E[time a step], so with S = P(the draft so far and the next token are accepted)
and the rate that the run achieves, one more token pays where

    S  >  rate * (time to draft it + time to verify one position more).

S is the controller's, an MLP on the signals so far; the times are measured on the run (speckv.cost); the rate too, so
the rule tunes itself (Dinkelbach's iteration). What makes it aware of compression and machine is what they cost.

A controller that is wrong costs little. Three things bound it, all learned from the run and all reversible: what it
promises is scaled by what was accepted of what it promised; a draft may be at most twice as long as what was lately
accepted (and LEAST_CAP); and where drafting is slower than plain decoding it stops, and is tried again after a while,
with short drafts, each time twice as late.

Sources: renewal-reward, and Dinkelbach 1967; the controller: SpecKV, arXiv 2605.02888.
"""

import math
from dataclasses import dataclass, field

import torch

from speckv.compression import compression_level
from speckv.controller import Controller, shipped_controller
from speckv.cost import StepCosts
from speckv.draft_state import LONGEST_COUNTED, SIGNALS, DraftState
from speckv.errors import ModelError, NumericalError
from speckv.kernels import draft_step
from speckv.policy import PolicySession
from speckv.signals import Signal, read_numbers

FADE = 0.97               # of a step in the run's rate with each later one: about the last 30 count
MOST_SCALE, LEAST_SCALE = 2.0, 0.2  # of the controller's promise
SCALE_TRIALS = 8.0        # promised tokens that a scale of 1 is worth
LEAST_CAP, RETRY_CAP = 8, 2
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # plain steps after drafting was found slower
PLAIN_EVERY = 128         # steps after which the time of a plain step is measured again
MOST_LOST = 1.5           # plain steps; what drafting may lose before a pause, a run of bad luck among them
MOST_GAINED = 1.5         # plain steps; gains beyond do not make up for later losses


@dataclass
class _Experience:
    """What a policy has learned of one compression; kept from sequence to sequence."""

    costs: StepCosts = field(default_factory=StepCosts)
    tokens: float = 0.0
    milliseconds: float = 0.0
    lost: float = 0.0          # by drafting, against plain decoding, in plain steps; negative for a gain
    promised: float = SCALE_TRIALS
    accepted: float = SCALE_TRIALS
    is_warm: bool = False      # whether a model drafted in the last step, and has read all the text but its end
    since_plain: int = 0
    pause: int = 0             # plain steps still to take
    next_pause: int = FIRST_PAUSE
    cap: int = LEAST_CAP       # of a draft's length

    def record(self, step, promised):
        """Learn from a step, of whose draft the controller promised so many tokens."""
        self.costs.record(step, self.is_warm)
        self.is_warm = any(not signal.is_estimate for signal in step.signals)
        ms = self.costs.usual_ms(step)  # so that one stall of the machine does not look like a drafter that fails
        self.tokens = FADE * self.tokens + step.tokens
        self.milliseconds = FADE * self.milliseconds + ms
        if step.gamma == 0:
            self.since_plain = 0
            self.pause = max(0, self.pause - 1)
            return
        self.since_plain += 1
        self.promised = FADE * self.promised + promised
        self.accepted = FADE * self.accepted + step.accepted
        if step.accepted == step.gamma:
            self.cap = max(self.cap, 2 * step.gamma)
        else:
            self.cap = max(min(self.cap, LEAST_CAP), 2 * step.accepted, self.cap - 1)
        self._judge(ms / self.costs.verify_ms(1) - step.tokens)

    def _judge(self, lost):
        """Make a pause where drafting has been slower than plain decoding: a cumulative sum test (Page 1954)."""
        self.lost = max(self.lost + lost, -MOST_GAINED)
        if self.lost > MOST_LOST:
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, LONGEST_PAUSE)
            self.lost, self.cap = 0.0, RETRY_CAP
        elif self.lost == -MOST_GAINED:
            self.next_pause, self.cap = FIRST_PAUSE, max(self.cap, LEAST_CAP)

    @property
    def wants_plain(self) -> bool:
        """Whether the next step should not draft: it is a pause, or the time of a plain step is not known."""
        return self.pause > 0 or self.costs.is_empty or self.since_plain >= PLAIN_EVERY

    @property
    def scale(self) -> float:
        """What was accepted of what was promised."""
        return min(max(self.accepted / self.promised, LEAST_SCALE), MOST_SCALE)

    @property
    def rate(self) -> float:
        """Tokens per second of the run."""
        return 1e3 * self.tokens / self.milliseconds


class Adaptive:
    """Drafts while a token is worth its time; give one object to many calls and it keeps what it has learned.

    controller has the inputs speckv.draft_state.SIGNALS (the shipped one if None); longest bounds a draft.
    """

    name = "adaptive"

    def __init__(self, controller: Controller | None = None, longest: int = 16):
        controller = shipped_controller() if controller is None else controller
        if controller.w1.shape[0] != len(SIGNALS) + 1:
            raise ModelError(f"the controller takes {controller.w1.shape[0] - 1} signals, 'adaptive' has "
                             f"{len(SIGNALS)}: make one with 'speckv train'")
        self.controller = controller
        self.longest = longest
        self._experience = {}  # compression: _Experience

    def open(self, compression=None):
        return _AdaptiveSession(self, compression, self._experience.setdefault(compression, _Experience()))


class _AdaptiveSession(PolicySession):
    """Adaptive at work on one sequence."""

    name = Adaptive.name

    def __init__(self, policy, compression, experience):
        self._controller = policy.controller
        self._weights = tuple(policy.controller.tensors().values())
        self._longest = policy.longest
        self._experience = experience
        self._state = DraftState(compression_level(compression))
        # Pairs of "stop here" and "one more"; a draft longer than what was trained on keeps the last pair.
        gammas = torch.arange(LONGEST_COUNTED + 1)
        self._pairs = [gammas[i:i + 2] for i in range(LONGEST_COUNTED)]
        self._drafted = [torch.tensor([i]) for i in range(policy.longest + 1)]
        self._signals = torch.zeros(1, len(SIGNALS))
        self._seconds = torch.ones(2)
        self._more_seconds = self._seconds.numpy()[1:]  # the same memory, which NumPy writes to sooner
        self._promise = 0.0

    def max_draft(self):
        self._state.begin()
        return 0 if self._experience.wants_plain else min(self._experience.cap, self._longest)

    def will_draft(self):
        return self._experience.pause == 0

    def draft(self, logits, temperature, uniform, drafted, own, **filters):
        costs, is_estimate, device = self._experience.costs, own is not None, logits.device
        self._state.write(self._signals, drafted, own)
        stop_here = min(drafted + 1, LONGEST_COUNTED - 1)
        # Of the two seconds only the difference matters to the rule.
        more_ms = costs.draft_ms(is_estimate) + max(0.0, costs.verify_ms(drafted + 3) - costs.verify_ms(drafted + 2))
        self._more_seconds[0] = 1 + more_ms / 1e3
        inputs = (self._signals, self._drafted[drafted], *self._weights, self._pairs[stop_here], self._seconds)
        if device.type != "cpu":
            inputs = (tensor.to(device) for tensor in inputs)
        token, _, entropy, confidence, signals, gamma = draft_step(
            logits, temperature, uniform, *inputs, self._experience.rate / self._experience.scale, **filters)
        entropy, confidence, gamma = read_numbers(entropy, confidence, gamma)
        if gamma < 0 or math.isnan(entropy):
            raise NumericalError("draft_step: row 0: the logits are not a distribution (NaN, +inf, or all -inf)")
        self._signals = signals.cpu()
        signal = Signal(*own, is_estimate=True) if is_estimate else Signal(entropy, confidence)
        self._state.after(signal.confidence)
        return token, signal, gamma > stop_here

    def promise(self, gamma):
        counted = torch.tensor([min(gamma, LONGEST_COUNTED)])
        acceptance = self._controller.plan(self._signals, counted)[1].item()
        self._promise = min(max(acceptance, 0.0), 1.0) * gamma
        return self._promise

    def record(self, step):
        self._state.record(step)
        self._experience.record(step, self._promise)
