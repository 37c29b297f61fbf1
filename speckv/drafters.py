"""Where draft tokens come from."""

from inspect import signature
from typing import NamedTuple, Protocol

import torch
from torch.nn.functional import pad

from speckv.cache import check_rollback, context_limit, rope_switch, vocabulary_size
from speckv.errors import ModelError
from speckv.fast import open_target

# How far the widths of two models' logits may lie apart and still be taken for one tokenizer's, padded differently: so
# many ids, and this share of the wider. Qwen2.5 has 151,936 and 152,064 by size, Pythia 50,304 to 50,688.
MOST_PADDING = 1024
MOST_PADDING_SHARE = 1 / 16


class OfSome(NamedTuple):
    """Logits [B, S] of some tokens of the vocabulary, of those with token_ids [S] i64, ascending; no other is drafted.

    Drawing from a few thousand logits is sooner done than from those of the whole vocabulary, most of them -inf.
    """

    logits: torch.Tensor
    token_ids: torch.Tensor


class Drafter(Protocol):
    """What the decoding loop needs of a drafter; one object serves any number of sequences, one after another."""

    name: str
    vocabulary: int
    context: int | None
    rope_switch: int | None  # see speckv.cache.rope_switch
    wants_hidden: tuple      # after which of the target's layers its sessions are shown the hidden states, see
                             # speckv.cache.hidden_states; empty for none

    def open(self) -> "DraftSession":
        """Start on a new sequence. One that takes an argument `fast` is told whether the C++ engine is wanted."""


class DraftSession(Protocol):
    """A drafter at work on one sequence.

    Three more methods are for those that need them. prefill(ids) reads the prompt but for its last token, before the
    first step, where next_logits(ids) would be asked and its answer not used. signals() gives (entropy in bits,
    confidence) of the last proposal, where its logits do not tell how sure it is, or None where they do. ask(may_draft)
    is given the policy's PolicySession.may_draft, for a drafter with two ways to draft.

    Two are for one that makes a whole draft in a call, greedy or sampled, where the policy has a StopRule and nothing
    changes its logits, on a CPU. chains(ids) says whether it will behind ids [1, n], all of which stand: of which kind,
    Signal.is_estimate, its signals will be, or None where it goes token by token.
    draft_chain(ids, end, uniform, temperature, filters, rule) drafts behind the first `end` tokens of ids [1, room] i64
    as the rule says, writes the tokens into ids, and returns a speckv.stopping.Chain; uniform
    [1, rule.longest or more] f32 are the numbers to draw with, temperature and filters those of PolicySession.draft.

    Two more are for one that can make the drafts of several sequences together. open_chain, given what draft_chain is
    given, returns a speckv.head_engine.WantedChain, or None where it drafts alone; close_chain(wanted, chain) is told
    what became of it.
    """

    def next_logits(self, ids):
        """Logits [B, V] of the token that follows ids [B, n], or OfSome; ids extends what was seen, up to rollbacks.

        None where the drafter has nothing to propose, which ends the step's draft.
        """

    def observe(self, hidden, start: int) -> None:
        """The target's hidden states [B, n, layers·H] of positions start, start + 1, ...; called if wants_hidden."""

    def rollback(self, length: int) -> None:
        """Only the first `length` tokens of the sequence stand; forget the rest. Called after every step."""


class CausalLMDrafter:
    """Any causal language model that shares the target's tokenizer.

    vocabulary is the width of the target's logits, where it is not the model's own: models of one tokenizer pad it to
    different widths. Ids that the model lacks are never drafted, and are read as its last one; ids that the target
    lacks are drafted no more. What is verified is drawn from what is left, so the output stays the target's own, and
    two tokenizers that this takes for one cost acceptance alone. Raises ModelError where the widths differ by more
    than padding.
    """

    wants_hidden = ()

    def __init__(self, model, vocabulary=None):
        check_rollback(model, "drafter")
        self.model = model
        self.name = type(model).__name__
        self.vocabulary = vocabulary_size(model) if vocabulary is None else vocabulary
        self.context = context_limit(model)
        self.rope_switch = rope_switch(model)
        widths = sorted((self.vocabulary, vocabulary_size(model)))
        if widths[1] - widths[0] > min(MOST_PADDING, widths[1] * MOST_PADDING_SHARE):
            raise ModelError(other_vocabulary(vocabulary_size(model), vocabulary))

    def open(self, fast=False):
        if self.vocabulary == vocabulary_size(self.model):
            return _CausalLMSession(self.model, fast)
        return _PaddedSession(self.model, fast, self.vocabulary)


class _CausalLMSession:
    def __init__(self, model, fast):
        self._model = open_target(model, fast)

    def next_logits(self, ids):
        return self._model.read(ids, keep=1)[0][:, -1]

    def rollback(self, length):
        self._model.rollback(length)


class _PaddedSession(_CausalLMSession):
    """A model's session with its logits brought to another width."""

    def __init__(self, model, fast, vocabulary):
        super().__init__(model, fast)
        self._own, self._vocabulary = vocabulary_size(model), vocabulary

    def next_logits(self, ids):
        logits = super().next_logits(ids.clamp(max=self._own - 1))
        return pad(logits, (0, self._vocabulary - self._own), value=float("-inf"))  # by less than 0: cut


def as_drafter(drafter, vocabulary=None) -> Drafter:
    """A drafter object as it is; a transformers model wrapped in one, for a target of this vocabulary."""
    is_drafter = hasattr(drafter, "open") and hasattr(drafter, "vocabulary")
    return drafter if is_drafter else CausalLMDrafter(drafter, vocabulary)


def open_drafter(drafter: Drafter, fast: bool) -> DraftSession:
    """A drafter's session, run by the C++ engine where that is wanted and the drafter knows how."""
    return drafter.open(fast=True) if fast and "fast" in signature(drafter.open).parameters else drafter.open()


def other_vocabulary(own, target) -> str:
    """What to say of a drafter whose logits have another width than the target's."""
    return (f"draft vocabulary is {own}, target {target}: a drafter must share the target's tokenizer; see "
            "'speckv distill'")
