"""Prompt lookup: draft tokens copied from the text itself, from where it last read as it does now.

No model is run, so a draft token costs microseconds. It pays where a text repeats its prompt or itself: summaries,
answers from documents, edits of code.

Source: Saxena, Prompt Lookup Decoding, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

import math
from bisect import bisect_right
from typing import NamedTuple

import torch

from speckv.drafters import OfSome, as_drafter, open_drafter
from speckv.errors import InputError
from speckv.kernels import serving
from speckv.signals import Signal
from speckv.stopping import Chain

_HAS_KERNELS = serving()["cpu"][0] == "cpu"
# How many earlier occurrences of the last tokens are looked at, the latest first. It bounds a search to some 80 µs; in
# 8,192 tokens of real text no two tokens stand together more than 91 times, and a search takes 3 µs.
MOST_OCCURRENCES = 1024
# The success of a proposal is estimated by the length of its match: from these lengths on, with these priors. They are
# the shares measured in greedy answers of SmolLM2-135M-Instruct to 60 questions of Spec-Bench (7,280 tokens), rounded.
MATCH_LENGTHS = (1, 2, 3, 5, 8)
MATCH_PRIORS = (0.25, 0.55, 0.7, 0.75, 0.9)
MODEL_PRIOR = 0.5
PRIOR_TRIALS = 4  # what a prior is worth
FADE = 0.97       # what an outcome is worth one trial later: about the last 30 count


class LookupDrafter:
    """Proposes what followed the longest earlier run of tokens that ends like the text; of equals, the latest run.

    vocabulary is the width of the target's logits. A match is of at least `shortest` tokens, and not told from longer
    ones beyond `longest`. Where nothing matches nothing is proposed, and the step is plain decoding.
    """

    wants_hidden = ()
    context = None
    rope_switch = None
    name = "prompt lookup"

    def __init__(self, vocabulary: int, longest: int = 10, shortest: int = 2):
        if not 1 <= shortest <= longest:
            raise InputError(f"lookup matches of {shortest} to {longest} tokens: shortest must be 1 or more, and "
                             "longest no less")
        self.vocabulary = vocabulary
        self.longest = longest
        self.shortest = shortest

    def open(self):
        return _LookupSession(self)


class LookupFirst:
    """Lookup in front of a model drafter, which drafts the steps in which lookup promises less, or has no match.

    A step is drafted by one of the two: by lookup where the estimated success of its first token is at least the
    model drafter's acceptance rate in this text so far, since its draft costs nothing. Where the policy lets one of
    them rest, the other drafts all that it can.
    """

    def __init__(self, drafter, longest: int = 10, shortest: int = 2):
        self.drafter = as_drafter(drafter)
        self.name = f"prompt lookup, then {self.drafter.name}"
        self.vocabulary = self.drafter.vocabulary
        self.context = self.drafter.context
        self.rope_switch = self.drafter.rope_switch
        self.wants_hidden = self.drafter.wants_hidden
        self._lookup = LookupDrafter(self.vocabulary, longest, shortest)

    def open(self, fast=False):
        return _LookupFirstSession(self._lookup.open(), open_drafter(self.drafter, fast))


class _Match(NamedTuple):
    token: int   # what followed
    length: int  # how many tokens agree


class _Text:
    """Token ids in which the end of the text is found again; appended to, and cut, at the end."""

    def __init__(self, longest, shortest):
        self.tokens = []
        self._longest = longest
        self._shortest = shortest
        self._ends = {}  # each run of `shortest` tokens: the positions behind its occurrences, ascending

    def append(self, token):
        self.tokens.append(token)
        if len(self.tokens) >= self._shortest:
            self._ends.setdefault(tuple(self.tokens[-self._shortest:]), []).append(len(self.tokens))

    def cut(self, length):
        while len(self.tokens) > length:
            if len(self.tokens) >= self._shortest:
                self._ends[tuple(self.tokens[-self._shortest:])].pop()
            self.tokens.pop()

    def match(self):
        """The longest match of the text's end, the latest of equals; None without one."""
        tokens, here = self.tokens, len(self.tokens)
        ends = self._ends.get(tuple(tokens[-self._shortest:]), ())
        length, found = self._shortest - 1, None
        # The last occurrence is the end of the text itself; something follows every other.
        for end in ends[-2:-2 - MOST_OCCURRENCES:-1]:
            # A longer match agrees in the token before the best so far: nearly all fall at this.
            if end <= length or tokens[end - 1 - length] != tokens[here - 1 - length]:
                continue
            agreed = self._shortest
            while agreed < min(end, self._longest) and tokens[end - 1 - agreed] == tokens[here - 1 - agreed]:
                agreed += 1
            if agreed > length:
                length, found = agreed, end
            if length == self._longest:
                break
        return None if found is None else _Match(tokens[found], length)


class _Share:
    """A running share of successes: a prior at first, and what is long ago counts little."""

    def __init__(self, prior):
        self._prior = prior
        self._successes = self._trials = 0.0

    def record(self, is_success):
        self._successes = FADE * self._successes + is_success
        self._trials = FADE * self._trials + 1

    @property
    def value(self) -> float:
        """Between 0 and 1, and never either."""
        return (PRIOR_TRIALS * self._prior + self._successes) / (PRIOR_TRIALS + self._trials)


class _LookupSession:
    """Lookup at work on one sequence."""

    def __init__(self, drafter):
        self._vocabulary = drafter.vocabulary
        self._text = _Text(drafter.longest, drafter.shortest)
        self._standing = 0  # how many tokens of the text stand; behind them lies the step's draft
        self._has_begun = False
        self._is_drafting = False
        self._match = None
        self._successes = [_Share(prior) for prior in MATCH_PRIORS]

    def prefill(self, ids):
        """Take in ids without scoring: the target did not write the prompt."""
        for token in ids[0, self._standing:].tolist():
            self._text.append(token)
        self._standing = ids.shape[1]

    def next_logits(self, ids):
        """The logit of the one token that is proposed, which is 0; None where nothing matches."""
        if self._is_drafting:
            for token in ids[0, len(self._text.tokens):].tolist():
                self._text.append(token)
        else:
            self._read(ids)
            self._is_drafting = True
        self._match = self._text.match()
        if self._match is None:
            return None
        return OfSome(torch.zeros(1, 1, device=ids.device), torch.tensor([self._match.token], device=ids.device))

    def signals(self):
        """Entropy in bits and confidence: of a coin that falls as often as such proposals have stood.

        Those of the logits would be 0 and 1, whatever the match is worth.
        """
        share = self._success(self._match).value
        return -share * math.log2(share) - (1 - share) * math.log2(1 - share), share

    def chains(self, ids):
        """See speckv.drafters.DraftSession."""
        return True if _HAS_KERNELS else None

    def draft_chain(self, ids, end, uniform, temperature, filters, rule):
        """As above. What is proposed does not hang on what is drawn, so it is judged when all of it is known."""
        self._read(ids[:, :end])
        self._is_drafting = True
        text, signals, survival = self._text, [], 1.0
        while len(signals) < rule.longest and (match := text.match()) is not None:
            self._match = match
            signals.append(Signal(*self.signals(), is_estimate=True))
            text.append(match.token)
            survival *= signals[-1].confidence
            if not rule.keeps_limits(signals[-1], survival):
                break
        acceptance, seconds = math.nan, 0.0
        if signals and rule.worth is not None:
            count, acceptance, seconds = rule.worth.judge_copies([signal.confidence for signal in signals])
            del signals[count:]
            text.cut(end + count)
        tokens = text.tokens[end:]
        ids.numpy()[0, end:end + len(tokens)] = tokens
        return Chain(self._sure_of(tokens, temperature), None, tuple(signals), acceptance, seconds)

    def _sure_of(self, tokens, temperature):
        """The logits [n, V] that such tokens are drawn from; none where the text is greedy."""
        if temperature.item() == 0:
            return torch.empty(0, self._vocabulary)
        logits = torch.full((len(tokens), self._vocabulary), float("-inf"))
        logits[range(len(tokens)), tokens] = 0.0
        return logits

    def promise(self, ids):
        """The estimated success of what would be proposed after ids [1, n], all of which stand; 0 without a match."""
        self._read(ids)
        match = self._text.match()
        return 0.0 if match is None else self._success(match).value

    def rollback(self, length):
        # The draft goes too where it stands: it is read again, and scored, as text.
        self._standing = min(self._standing, length)
        self._text.cut(self._standing)
        self._is_drafting = False

    def _read(self, ids):
        """Take in what is new in ids, all of which stand, and score what lookup proposed or would have proposed.

        A draft token x is accepted with probability p(x), and that is also how often the target itself writes x: so
        every token of the output tells of lookup's success, drafted by it or not.
        """
        if not self._has_begun:  # what is left of the prompt
            self.prefill(ids)
            self._has_begun = True
        for token in ids[0, self._standing:].tolist():
            match = self._text.match()
            if match is not None:
                self._success(match).record(match.token == token)
            self._text.append(token)
        self._standing = ids.shape[1]

    def _success(self, match):
        return self._successes[bisect_right(MATCH_LENGTHS, match.length) - 1]


class _LookupFirstSession:
    """Lookup and a model drafter's session at work on one sequence; one of them drafts a step."""

    def __init__(self, lookup, model):
        self._lookup = lookup
        self._model = model
        self._acceptance = _Share(MODEL_PRIOR)
        self._may_draft = lambda is_estimate: True
        self._source = None  # of the step's draft
        self._start = 0      # where the step's draft begins
        self._drafted = 0

    def ask(self, may_draft):
        self._may_draft = may_draft

    def prefill(self, ids):
        self._lookup.prefill(ids)
        getattr(self._model, "prefill", self._model.next_logits)(ids)

    def observe(self, hidden, start):
        self._model.observe(hidden, start)

    def next_logits(self, ids):
        """What the step's source proposes; the model, where it was not asked, catches up on what it has missed."""
        self._choose(ids)
        if self._source is None:
            return None
        logits = self._source.next_logits(ids)
        self._drafted += logits is not None
        return logits

    def chains(self, ids):
        """See speckv.drafters.DraftSession."""
        self._choose(ids)
        return self._source.chains(ids) if hasattr(self._source, "chains") else None

    def draft_chain(self, *arguments):
        chain = self._source.draft_chain(*arguments)
        self._drafted += len(chain.signals)
        return chain

    def open_chain(self, *arguments):
        """See speckv.drafters.DraftSession."""
        return self._source.open_chain(*arguments) if hasattr(self._source, "open_chain") else None

    def close_chain(self, wanted, chain):
        """See speckv.drafters.DraftSession."""
        self._source.close_chain(wanted, chain)
        self._drafted += len(chain.signals)

    def _choose(self, ids):
        """The step's source, where it has none."""
        if self._source is not None:
            return
        # Of the text and of past outcomes only, as the choice of what to draft must be.
        promise = self._lookup.promise(ids) if self._may_draft(True) else 0.0
        can_model = self._may_draft(False)
        if can_model or promise > 0:
            self._source = self._model if can_model and promise < self._acceptance.value else self._lookup
            self._start = ids.shape[1]

    def signals(self):
        return self._source.signals() if hasattr(self._source, "signals") else None

    def rollback(self, length):
        if self._source is self._model:
            accepted = length - self._start
            # What comes after the first rejected token was not tried.
            for i in range(min(accepted + 1, self._drafted)):
                self._acceptance.record(i < accepted)
        self._source = None
        self._drafted = 0
        self._lookup.rollback(length)
        self._model.rollback(length)
