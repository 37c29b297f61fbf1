"""The policy of this package: draft on while the next token is worth more than its time.

A run's throughput is E[tokens a step] / E[time a step], so with S = P(the draft so far and the next token are accepted)
and the rate that the run achieves, one more token pays where

    S  >  rate * (time to draft it + time to verify one position more).

S is the controller's, an MLP on the signals so far; the times are measured on the run (speckv.cost); the rate too, so
the rule tunes itself (Dinkelbach's iteration). What makes it aware of compression and machine is what they cost.

A controller that is wrong costs little. S is never more than the product of the confidences so far allows. Three more
bounds are learned from the run, all reversible, and apart for a model's drafts and for copies of the text, which cost
hardly anything: what is promised is scaled by what was accepted of what was promised; a draft may be at most twice as
long as what was lately accepted (and LEAST_CAP); and where drafts were slower than plain decoding that kind of draft
rests, and is tried again after a while, with short ones, each time twice as late.

Sources: renewal-reward, and Dinkelbach 1967; the controller: SpecKV, arXiv 2605.02888.
"""

import math

import torch

from speckv.compression import compression_level
from speckv.controller import Controller, shipped_controller
from speckv.draft_state import LONGEST_COUNTED, SIGNALS, DraftState
from speckv.errors import ModelError, NumericalError
from speckv.experience import Experience
from speckv.kernels import draft_step, plan_gamma
from speckv.policy import PolicySession
from speckv.signals import Signal, read_numbers
from speckv.stopping import StopRule, Worth

NEXT_STANDS = 0.6  # how often one more token of a model stands, where all before it do
LOOK_AHEAD = 2     # tokens
LEAST_VALUE = 0.5  # of a token beside those of other texts, for a draft to be made
NOTHING_TOLD = 0.0, 0.0  # by a drafter of its own signals, before it has proposed a token


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
        self._experience = {}  # compression: Experience

    def open(self, compression=None):
        return _AdaptiveSession(self, compression, self._experience.setdefault(compression, Experience()))


class _AdaptiveSession(PolicySession):
    """Adaptive at work on one sequence."""

    name = Adaptive.name

    def __init__(self, policy, compression, experience):
        self._weights = tuple(policy.controller.tensors().values())
        self._longest = policy.longest
        self._experience = experience
        self._state = DraftState(compression_level(compression))
        # "Stop here", "one more" and so on; a draft longer than what was trained on keeps the last pair.
        gammas = torch.arange(LONGEST_COUNTED + 1)
        self._choices = [gammas[i:i + 1 + LOOK_AHEAD] for i in range(LONGEST_COUNTED)]
        self._drafted = [torch.tensor([i]) for i in range(policy.longest + 1)]
        self._signals = torch.zeros(1, len(SIGNALS))
        seconds = torch.ones(1 + LOOK_AHEAD)
        self._seconds = [seconds[:len(choices)] for choices in self._choices]
        self._more_seconds = seconds.numpy()[1:]  # the same memory, which NumPy writes to sooner
        self._no_price = torch.ones(1)
        self._promise = 0.0
        self._is_warm = False      # whether a model drafted in the last step, and has read all the text but its end
        self._is_estimate = False  # of the last draft
        self._chained = None       # of a draft made in one call: how many tokens, and the controller's acceptance

    def max_draft(self):
        self._state.begin()
        self._chained = None
        kinds = (False, True) if self.is_asked else (self._is_estimate,)
        is_ahead = self.others.value < LEAST_VALUE
        if is_ahead or self._experience.wants_plain or not any(map(self.may_draft, kinds)):
            return 0
        return self._longest

    def will_draft(self):
        return not all(source.pause for source in self._experience.sources.values())

    def may_draft(self, is_estimate):
        return self._experience.sources[is_estimate].pause == 0

    def draft(self, logits, temperature, uniform, drafted, own, **filters):
        costs, is_estimate, device = self._experience.costs, own is not None, logits.device
        source = self._experience.sources[is_estimate]
        self._state.write(self._signals.numpy()[0], drafted, own)
        stop_here = min(drafted + 1, LONGEST_COUNTED - 1)
        more_ms = costs.more_ms(drafted + 1, is_estimate, LOOK_AHEAD, self.others)
        for i, ms in enumerate(more_ms):
            self._more_seconds[i] = 1 + ms / 1e3  # only the differences matter to the rule
        inputs = (self._signals, self._drafted[drafted], *self._weights, self._choices[stop_here],
                  self._seconds[stop_here])
        if device.type != "cpu":
            inputs = (tensor.to(device) for tensor in inputs)
        token, _, entropy, confidence, signals, gamma = draft_step(
            logits, temperature, uniform, *inputs, self._rate / source.scale, **filters)
        entropy, confidence, gamma = read_numbers(entropy, confidence, gamma)
        if gamma < 0 or math.isnan(entropy):
            raise NumericalError("draft_step: row 0: the logits are not a distribution (NaN, +inf, or all -inf)")
        self._signals = signals if device.type == "cpu" else signals.cpu()
        signal = Signal(*own, is_estimate=True) if is_estimate else Signal(entropy, confidence)
        # Two estimates of S must both say so: the controller's has seen no draft longer than LONGEST_COUNTED.
        stands = signal.confidence if is_estimate else NEXT_STANDS
        is_worth_it = self._is_worth_it(self._state.after(signal.confidence), stands, more_ms)
        return token, signal, gamma > stop_here and is_worth_it and drafted + 1 < source.cap

    def stop_rule(self, most, is_estimate):
        experience, source = self._experience, self._experience.sources[is_estimate]
        self._state.write(self._signals.numpy()[0], 0, NOTHING_TOLD if is_estimate else None)
        return StopRule(min(most, source.cap), worth=Worth(
            self._signals, self._weights, experience.costs.numbers, experience.costs.draft_ms(is_estimate, 1),
            self._rate, source.scale, NEXT_STANDS, LONGEST_COUNTED, LOOK_AHEAD, self.others.positions))

    def drafted(self, chain):
        self._chained = len(chain.signals), chain.acceptance

    @property
    def _rate(self):
        """Tokens per second that a draft token of this text has to keep up with."""
        return self._experience.rate / self.others.value

    def _is_worth_it(self, survival, stands, more_ms):
        """Whether one more token or the next few are worth so many milliseconds, where the draft survives with this
        probability and each of them stands with that."""
        rate, tokens = self._rate / 1e3, 0.0
        for ms in more_ms:
            survival *= stands
            tokens += survival
            if tokens > rate * ms:
                return True
        return False

    def promise(self, gamma):
        if self._chained is not None and self._chained[0] == gamma:
            acceptance = self._chained[1]
        else:
            counted = self._drafted[min(gamma, LONGEST_COUNTED)]
            acceptance = plan_gamma(self._signals, *self._weights, counted, self._no_price)[1].item()
        self._promise = min(max(acceptance, 0.0), 1.0) * gamma
        return self._promise

    def record(self, step):
        self._state.record(step)
        # Texts that take turns to draft have missed something each time: what that takes is the price of a draft there.
        self._experience.record(step, self._promise, self._is_warm or self.others.texts > 0, self.others)
        self._is_warm = False in [signal.is_estimate for signal in step.signals]
        if step.signals:
            self._is_estimate = step.signals[0].is_estimate
