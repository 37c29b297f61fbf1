"""The inputs of the adaptive controller: the paper's signals of the draft so far, and what else is known by then.

All of it is known before the token it helps to decide about is drawn: the distributions so far, how many there were,
and what became of earlier drafts. The same code feeds the controller in the loop and its training.
"""

from speckv.kernels.reference import PAPER_SIGNALS

EXTRA_SIGNALS = (
    "drafted",         # tokens of the draft, this one included, over LONGEST_COUNTED
    "is_estimate",     # 1 where the drafter told its own signals (prompt lookup)
    "own_confidence",  # what it told, else 0
    "survival",        # product of the confidences of the tokens before this one in the draft
    "acceptance",      # how often the first token of such a draft was accepted in this text, the last ones most
)
SIGNALS = PAPER_SIGNALS + EXTRA_SIGNALS
MEASURED = PAPER_SIGNALS.index("compression")  # signals of the distributions come before it, known ones from it on
LONGEST_COUNTED = 8  # a draft of more tokens looks like one of so many; more were not trained on
FADE = 0.9           # of an outcome with each later one: about the last ten count
PRIOR, PRIOR_TRIALS = 0.5, 2.0


class DraftState:
    """Of one sequence: begin() a draft, write() what is known before each token and say after() what it was like."""

    def __init__(self, compression_level: int):
        self._level = float(compression_level)
        self._successes = {False: PRIOR * PRIOR_TRIALS, True: PRIOR * PRIOR_TRIALS}
        self._trials = {False: PRIOR_TRIALS, True: PRIOR_TRIALS}
        self._survival = 1.0

    def begin(self) -> None:
        """A new draft starts."""
        self._survival = 1.0

    def write(self, row, drafted: int, own) -> None:
        """Put what is known before draft token number `drafted` (from 0) into row [F] f32, of NumPy; own is (entropy,
        confidence) or None. The first four are draft_step's to bring up to date, and stay as they are."""
        is_estimate = own is not None
        # One by one: NumPy takes several times as long to make an array of them first.
        row[MEASURED] = self._level
        row[MEASURED + 1] = min(drafted + 1, LONGEST_COUNTED) / LONGEST_COUNTED
        row[MEASURED + 2] = is_estimate
        row[MEASURED + 3] = own[1] if is_estimate else 0.0
        row[MEASURED + 4] = self._survival
        row[MEASURED + 5] = self.acceptance(is_estimate)

    def after(self, confidence: float) -> float:
        """The token was drawn from a distribution of this confidence, or of the drafter's own; returns the product of
        the draft's confidences so far."""
        self._survival *= confidence
        return self._survival

    def record(self, step) -> None:
        """The step is over."""
        if step.signals:
            kind = step.signals[0].is_estimate
            self._successes[kind] = FADE * self._successes[kind] + (step.accepted > 0)
            self._trials[kind] = FADE * self._trials[kind] + 1

    def acceptance(self, is_estimate: bool) -> float:
        """How often the first token of a draft of this kind was accepted lately."""
        return self._successes[is_estimate] / self._trials[is_estimate]
