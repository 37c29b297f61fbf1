"""What the adaptive policy has learned of one compression: times, the run's rate, and of each kind of draft whether it
is worth making."""

from dataclasses import dataclass, field

from speckv.cost import ALONE, StepCosts, share_of_pass

FADE = 0.97               # of a step in the run's rate with each later one: about the last 30 count
MOST_SCALE, LEAST_SCALE = 2.0, 0.2  # of the controller's promise
SCALE_TRIALS = 8.0        # promised tokens that a scale of 1 is worth
LEAST_CAP, RETRY_CAP = 8, 2
FIRST_PAUSE, LONGEST_PAUSE = 8, 256  # passes without this kind of draft after it was found to cost more than it gives
TRIALS = 1                # drafts a pass of a batch, until drafting has proved its worth
PLAIN_EVERY = 128         # passes after which the time of a plain one is measured again
MOST_LOST = 1.5           # plain steps; what drafting may lose before a pause, a run of bad luck among them
MOST_GAINED = 1.5         # plain steps; gains beyond do not make up for later losses


@dataclass
class Source:
    """One kind of draft, a model's or copies of the text: how it has done, and whether it rests."""

    lost: float = 0.0          # against plain decoding, in plain steps; negative for a gain
    promised: float = SCALE_TRIALS
    accepted: float = SCALE_TRIALS
    pause: float = 0.0         # passes still to rest
    next_pause: float = FIRST_PAUSE
    cap: int = LEAST_CAP       # of a draft's length
    is_on_trial: bool = True   # until it has gained as much as it may lose
    trials: int = TRIALS       # drafts that may begin before one of them is judged, while on trial

    @property
    def scale(self) -> float:
        """What was accepted of what was promised."""
        return min(max(self.accepted / self.promised, LEAST_SCALE), MOST_SCALE)

    @property
    def may_draft(self) -> bool:
        return self.pause < 1e-6 and (not self.is_on_trial or self.trials > 0)

    def begin(self):
        """A draft is being made; that of one text of a batch is judged after those of the others have begun."""
        self.trials -= 1

    def record(self, gamma, accepted, promised, lost):
        """Learn from a draft of which so many tokens were promised, in a step that lost so many plain ones."""
        self.trials = TRIALS
        self.promised = FADE * self.promised + promised
        self.accepted = FADE * self.accepted + accepted
        if accepted == gamma:
            self.cap = max(self.cap, 2 * gamma)
        else:
            self.cap = max(min(self.cap, LEAST_CAP), 2 * accepted, self.cap - 1)
        if self.pause > 0:  # found by another text of the same pass
            return
        # A cumulative sum test (Page 1954).
        self.lost = max(self.lost + lost, -MOST_GAINED)
        if self.lost > MOST_LOST:
            self.pause, self.next_pause = self.next_pause, min(2 * self.next_pause, LONGEST_PAUSE)
            self.lost, self.cap, self.is_on_trial = 0.0, RETRY_CAP, True
        elif self.lost == -MOST_GAINED:
            self.next_pause, self.cap, self.is_on_trial = FIRST_PAUSE, max(self.cap, LEAST_CAP), False


@dataclass
class Experience:
    """Kept from text to text, and shared by those of a batch."""

    costs: StepCosts = field(default_factory=StepCosts)
    tokens: float = 0.0
    milliseconds: float = 0.0
    since_plain: float = 0.0  # passes
    sources: dict = field(default_factory=lambda: {False: Source(), True: Source()})  # by Signal.is_estimate

    def forget_trials(self):
        """Drafts that have begun will not be judged."""
        for source in self.sources.values():
            source.trials = TRIALS

    def record(self, step, promised, is_warm, others=ALONE):
        """Learn from a step, of whose draft the controller promised so many tokens; is_warm and others as in
        StepCosts."""
        self.costs.record(step, is_warm, others)
        # The usual, so that one stall of the machine does not look like a drafter that fails.
        ms = self.costs.usual_ms(step, others)
        self.tokens = FADE * self.tokens + step.tokens
        self.milliseconds = FADE * self.milliseconds + ms
        share = share_of_pass(step, others)
        for source in self.sources.values():
            source.pause = max(0.0, source.pause - share)
        self.since_plain += share
        if step.gamma == 0:
            if others.positions == others.texts:
                self.since_plain = 0.0
            return
        source = self.sources[step.signals[0].is_estimate]
        source.record(step.gamma, step.accepted, promised, self.costs.lost(step, others))

    @property
    def wants_plain(self) -> bool:
        """Whether the next step must not draft, since the time of a plain one is not known or was long ago."""
        return self.costs.is_empty or self.since_plain >= PLAIN_EVERY

    @property
    def rate(self) -> float:
        """Tokens per second of the run, of all texts that share its passes."""
        return 1e3 * self.tokens / self.milliseconds
