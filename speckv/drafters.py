"""Where draft tokens come from."""

from typing import Protocol

from speckv.cache import CachedModel, check_rollback, context_limit, rope_switch, vocabulary_size


class Drafter(Protocol):
    """What the decoding loop needs of a drafter; one object serves any number of sequences, one after another."""

    name: str
    vocabulary: int
    context: int | None
    rope_switch: int | None  # see speckv.cache.rope_switch
    wants_hidden: tuple      # after which of the target's layers its sessions are shown the hidden states, see
                             # speckv.cache.hidden_states; empty for none

    def open(self) -> "DraftSession":
        """Start on a new sequence."""


class DraftSession(Protocol):
    """A drafter at work on one sequence.

    Two more methods are for those that need them. prefill(ids) reads the prompt but for its last token, before the
    first step, where next_logits(ids) would be asked and its answer not used. signals() gives (entropy in bits,
    confidence) of the last proposal, where its logits do not tell how sure it is, or None where they do.
    """

    def next_logits(self, ids):
        """Logits [B, V] of the token that follows ids [B, n]; ids extends what was seen, up to rollbacks.

        None where the drafter has nothing to propose, which ends the step's draft.
        """

    def observe(self, hidden, start: int) -> None:
        """The target's hidden states [B, n, layers·H] of positions start, start + 1, ...; called if wants_hidden."""

    def rollback(self, length: int) -> None:
        """Only the first `length` tokens of the sequence stand; forget the rest. Called after every step."""


class CausalLMDrafter:
    """Any causal language model that shares the target's tokenizer."""

    wants_hidden = ()

    def __init__(self, model):
        check_rollback(model, "drafter")
        self.model = model
        self.name = type(model).__name__
        self.vocabulary = vocabulary_size(model)
        self.context = context_limit(model)
        self.rope_switch = rope_switch(model)

    def open(self):
        return _CausalLMSession(self.model)


class _CausalLMSession:
    def __init__(self, model):
        self._model = CachedModel(model)

    def next_logits(self, ids):
        return self._model.read(ids, keep=1)[0][:, -1]

    def rollback(self, length):
        self._model.rollback(length)


def as_drafter(drafter) -> Drafter:
    """A drafter object as it is; a transformers model wrapped in one."""
    return drafter if hasattr(drafter, "open") and hasattr(drafter, "vocabulary") else CausalLMDrafter(drafter)
