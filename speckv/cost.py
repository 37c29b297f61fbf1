"""What a draft token and a pass of the target cost here: measured on the run itself, so that no machine, compression or
context length has to be known in advance."""

import math
from typing import NamedTuple

import torch

MOST_POSITIONS = 256    # passes over more are counted as this many
NEWEST_SHARE = 0.05     # of a new measurement, once there are many: what is 20 steps old counts a third
LARGEST_JUMP = 1.5      # a measurement counts as at most so many times the estimate: another process was busy
TRUSTED = 20            # measurements after which more of them make an estimate no better
LEVEL_SHARE = 0.2       # of a new measurement in what passes of all lengths have in common
LARGEST_RISE = 1.2      # or fall of that, by one measurement
LINE_TRIALS = 4         # what the line through all lengths is worth where one length was seldom measured
USUAL_GROWTH = 0.03     # of a pass over one by one more, before it is measured: memory-bound passes are nearly flat
GROWTH_TRIALS = 10.0
USUAL_DRAFT_SHARE = 0.1  # of a plain pass, what a model's draft token takes before it is measured


class Others(NamedTuple):
    """The other texts that share a pass with one: how many, how many positions they have in it, as far as is known, and
    what a token of this one is worth beside theirs, of which the average is 1."""

    texts: int = 0
    positions: int = 0
    value: float = 1.0


ALONE = Others()


class _Estimate:
    """A running mean that outliers move little and old values hardly at all.

    The very first measurement is often that of a cold start, so a much lower second one takes its place.
    """

    def __init__(self):
        self.value = math.nan
        self.count = 0

    def add(self, value, weight=1.0):
        if 0 < self.count < 1.5 and value * LARGEST_JUMP < self.value:
            self.value = value
        elif self.count:
            value = min(max(value, self.value / LARGEST_JUMP), self.value * LARGEST_JUMP)
            self.value += max(weight / (self.count + weight), weight * NEWEST_SHARE) * (value - self.value)
        else:
            self.value = value
        self.count += weight


class _Line:
    """The straight line through passes of all lengths, each with the mean of its measurements and a weight. A length is
    moved at every step of a decode, so only sums are kept."""

    def __init__(self):
        self._weight = self._n = self._value = self._squares = self._products = 0.0
        self._height = self._slope = self._center = math.nan

    def change(self, n, weight, value, new_weight, new_value):
        """Count a length with a new weight and value in the place of these, and fit the line.

        The slope is held to what is usual until lengths far apart have been measured.
        """
        more, change = new_weight - weight, new_weight * new_value - weight * value
        self._weight += more
        self._n += more * n
        self._value += change
        self._squares += more * n * n
        self._products += change * n
        self._center, self._height = self._n / self._weight, self._value / self._weight
        spread = self._squares - self._center * self._n
        rise = self._products - self._center * self._value
        usual = USUAL_GROWTH * self._height / (1 + USUAL_GROWTH * (self._center - 1))
        self._slope = (rise + GROWTH_TRIALS * usual) / (spread + GROWTH_TRIALS)

    @property
    def numbers(self) -> tuple:
        """Height, slope and center, of which `at` makes what it returns."""
        return self._height, self._slope, self._center

    def at(self, n) -> float:
        return max(self._height + self._slope * (n - self._center), 0.1 * self._height)


class StepCosts:
    """Milliseconds of drafting and verifying, learned from StepRecords.

    Where nothing was measured yet it answers with what is usual, in units of the first pass; so the first few steps of
    a run decide with rough costs.

    A pass over n positions, of one text or of several, costs level * own(n). Every pass tells of the level, which a
    longer context or a busier machine raises for all: without it a length that was measured long ago, in a shorter
    text, would look cheap beside one that is measured now.
    """

    def __init__(self):
        self._verify = {}         # positions: _Estimate, where the level is 1
        self._level = 1.0
        self._copied = _Estimate()  # a token, by lookup
        self._first = _Estimate()   # of a draft, by a model, which reads what the target added to the last one
        self._next = _Estimate()    # each one after that
        self._line = _Line()
        #: What verify_ms makes its answers of, kept up to date: [3, MOST_POSITIONS + 1] f64 of which the first two rows
        #: are trials and the milliseconds of each length, where the level is 1; the third is the level, the line's
        #: height, slope and center, and LINE_TRIALS. See csrc/worth.cpp.
        self.numbers = torch.zeros(3, MOST_POSITIONS + 1, dtype=torch.float64)
        self._table = self.numbers.numpy()

    @property
    def is_empty(self) -> bool:
        """Whether no pass was measured yet."""
        return not self._verify

    def record(self, step, is_warm: bool = True, others: Others = ALONE) -> None:
        """Learn from a StepRecord, of a pass beside other texts; of that pass each text tells, and counts by its share.

        Where a model did not draft in the step before (is_warm is False) its first draft token reads what it has missed
        too, and tells nothing of the next.
        """
        positions, share = min(step.gamma + 1 + others.positions, MOST_POSITIONS), share_of_pass(step, others)
        self._learn_level(positions, step.verify_ms / share, share)
        estimate, verify_ms = self._verify.get(positions), step.verify_ms / share / self._level
        if (estimate is None or estimate.count < 0.99) and not self.is_empty:
            # A stall would keep drafts from this length, and so from being measured at it again.
            verify_ms = min(verify_ms, LARGEST_JUMP * self._line.at(positions))
        if estimate is None:
            estimate = self._verify[positions] = _Estimate()
            weight, value = 0, 0.0
        else:
            weight, value = min(estimate.count, TRUSTED), estimate.value
        estimate.add(verify_ms, share)
        trials = min(estimate.count, TRUSTED)
        self._line.change(positions, weight, value, trials, estimate.value)
        table = self._table
        table[0, positions], table[1, positions] = trials, estimate.value
        table[2, :5] = (self._level, *self._line.numbers, LINE_TRIALS)
        copied = _copied(step)
        modelled = step.gamma - copied
        if modelled and (is_warm or not self._first.count):
            rest = max(step.draft_ms - copied * self.draft_ms(True), 0.0)
            if modelled > 1 and self._first.count:
                self._next.add(max(rest - self._first.value, 0.0) / (modelled - 1))
            else:
                self._first.add(rest / modelled)
        elif copied and not modelled:
            self._copied.add(step.draft_ms / copied)

    def _learn_level(self, positions, verify_ms, share):
        if not self.is_empty:
            level = verify_ms / self._own_ms(positions)
            level = min(max(level, self._level / LARGEST_RISE), self._level * LARGEST_RISE)
            self._level += share * LEVEL_SHARE * (level - self._level)

    def draft_ms(self, is_estimate: bool, number: int = 0) -> float:
        """Of one draft token, the first of its draft (number 0) or a later one, of a model or (is_estimate) copied
        from the text."""
        if is_estimate:
            return self._copied.value if self._copied.count else 0.0
        if number > 0 and self._next.count:
            return self._next.value
        return self._first.value if self._first.count else USUAL_DRAFT_SHARE * self.verify_ms(1)

    def verify_ms(self, positions: int) -> float:
        """Of a pass of the target over so many positions: gamma + 1, and those of other texts."""
        return 1.0 if self.is_empty else self._level * self._own_ms(min(positions, MOST_POSITIONS))

    def _own_ms(self, positions):
        line, own = self._line.at(positions), self._verify.get(positions)
        if own is None:
            return line
        trials = min(own.count, TRUSTED)
        return (trials * own.value + LINE_TRIALS * line) / (trials + LINE_TRIALS)

    def more_ms(self, gamma: int, is_estimate: bool, count: int, others: Others = ALONE) -> list[float]:
        """What a step with gamma draft tokens takes longer by one more of a kind, by two, up to count."""
        positions = min(gamma + 1 + others.positions, MOST_POSITIONS - count)
        draft_ms, verify_ms = self.draft_ms(is_estimate, gamma), self.verify_ms(positions)
        return [i * draft_ms + max(0.0, self.verify_ms(positions + i) - verify_ms) for i in range(1, count + 1)]

    def step_ms(self, gamma: int, is_estimate: bool = False) -> float:
        """Of a whole step with gamma draft tokens of one kind."""
        return self._drafts_ms(gamma, is_estimate) + self.verify_ms(gamma + 1)

    def usual_ms(self, step, others: Others = ALONE) -> float:
        """Of a step such as this StepRecord, which may itself have been held up, with its share of the pass."""
        return self._draft_ms_of(step) + share_of_pass(step, others) * self.verify_ms(
            step.gamma + 1 + others.positions)

    def lost(self, step, others: Others = ALONE) -> float:
        """What a step such as this StepRecord takes beyond its tokens, in plain passes: what its draft makes the pass
        longer, beside what the same tokens take without. All draft tokens of a pass make it longer by the same."""
        texts, positions = 1 + others.texts, min(step.gamma + 1 + others.positions, MOST_POSITIONS)
        drafted = min(step.gamma + others.positions - others.texts, positions - 1)
        more_ms = self.verify_ms(positions) - self.verify_ms(positions - drafted)
        more_ms = self._draft_ms_of(step) + more_ms * step.gamma / drafted
        return more_ms / self.verify_ms(texts) - others.value * (step.tokens - 1) / texts

    def _draft_ms_of(self, step):
        copied = _copied(step)
        return self._drafts_ms(copied, True) + self._drafts_ms(step.gamma - copied, False)

    def _drafts_ms(self, count, is_estimate):
        if count == 0:
            return 0.0
        return self.draft_ms(is_estimate) + (count - 1) * self.draft_ms(is_estimate, 1)


def share_of_pass(step, others):
    """Of a step in the pass that verified it beside other texts."""
    return (step.gamma + 1) / (step.gamma + 1 + others.positions)


def _copied(step):
    """How many tokens of its draft were copied from the text."""
    return [signal.is_estimate for signal in step.signals].count(True)
