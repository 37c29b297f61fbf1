"""What the adaptive policy has learned of one compression: times, the run's rate, and of each kind of draft whether it
is worth making."""

import math
from dataclasses import dataclass, field

from speckv.cost import ALONE, StepCosts, share_of_pass

FADE = 0.97               # of a pass in the run's rate with each later one: about the last 30 count
MOST_SCALE, LEAST_SCALE = 2.0, 0.2  # of the controller's promise
SCALE_TRIALS = 8.0        # promised tokens that a scale of 1 is worth
LEAST_CAP, RETRY_CAP = 8, 2
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # passes without this kind of draft after it was found to cost more than it gives
PLAIN_EVERY = 128         # passes after which the time of a plain one is measured again
MOST_LOST = 1.5           # what drafting may lose before a pause, a run of bad luck among them
MOST_GAINED = 1.5         # gains beyond do not make up for later losses


@dataclass
class Source:
    """One kind of draft, a model's or copies of the text: how it has done, and whether it rests."""

    lost: float = 0.0          # against plain decoding; negative for a gain. A plain pass of n texts counts sqrt(n)
    promised: float = SCALE_TRIALS
    accepted: float = SCALE_TRIALS
    pause: int = 0             # passes still to rest
    next_pause: int = FIRST_PAUSE
    cap: int = LEAST_CAP       # of a draft's length

    @property
    def scale(self) -> float:
        """What was accepted of what was promised."""
        return min(max(self.accepted / self.promised, LEAST_SCALE), MOST_SCALE)

    def record(self, gamma, accepted, promised, lost):
        """Learn from a draft of which so many tokens were promised, in a step that lost so much."""
        self.promised = FADE * self.promised + promised
        self.accepted = FADE * self.accepted + accepted
        if accepted == gamma:
            self.cap = max(self.cap, 2 * gamma)
        else:
            self.cap = max(min(self.cap, LEAST_CAP), 2 * accepted, self.cap - 1)
        self.lost += lost

    def end_pass(self):
        """Rest on, or begin to where too much was lost: a cumulative sum test (Page 1954), over all texts of a pass."""
        if self.pause:
            self.pause -= 1
            return
        self.lost = max(self.lost, -MOST_GAINED)
        if self.lost > MOST_LOST:
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, LONGEST_PAUSE)
            self.lost, self.cap = 0.0, RETRY_CAP
        elif self.lost == -MOST_GAINED:
            self.next_pause, self.cap = FIRST_PAUSE, max(self.cap, LEAST_CAP)


@dataclass
class Experience:
    """Kept from text to text, and shared by those of a batch."""

    costs: StepCosts = field(default_factory=StepCosts)
    tokens: float = 0.0
    milliseconds: float = 0.0
    since_plain: int = 0      # passes
    recorded: float = 0.0     # of the present pass
    sources: dict = field(default_factory=lambda: {False: Source(), True: Source()})  # by Signal.is_estimate

    def record(self, step, promised, is_warm, others=ALONE):
        """Learn from a step, of whose draft the controller promised so many tokens; is_warm and others as in
        StepCosts."""
        self.costs.record(step, is_warm, others)
        # The usual, so that one stall of the machine does not look like a drafter that fails.
        ms = self.costs.usual_ms(step, others)
        fade = FADE ** (1 / (1 + others.texts))
        self.tokens = fade * self.tokens + others.value * step.tokens
        self.milliseconds = fade * self.milliseconds + ms
        if step.gamma:
            # Among the texts of a pass chance evens out, so less that was lost tells as much.
            lost = self.costs.lost(step, others) * math.sqrt(1 + others.texts)
            self.sources[step.signals[0].is_estimate].record(step.gamma, step.accepted, promised, lost)
        self.recorded += share_of_pass(step, others)
        if self.recorded > 1 - 1e-6:
            self.recorded = 0.0
            self._end_pass(is_plain=step.gamma == 0 and others.positions == others.texts)

    def _end_pass(self, is_plain):
        for source in self.sources.values():
            source.end_pass()
        self.since_plain = 0 if is_plain else self.since_plain + 1

    @property
    def wants_plain(self) -> bool:
        """Whether the next step must not draft, since the time of a plain one is not known or was long ago."""
        return self.costs.is_empty or self.since_plain >= PLAIN_EVERY

    @property
    def rate(self) -> float:
        """Tokens per second of the run, of all texts that share its passes."""
        return 1e3 * self.tokens / self.milliseconds
