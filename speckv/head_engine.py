"""A feature head (speckv.head) held in int8, at work in the C++ engine."""

import weakref
from itertools import chain
from typing import NamedTuple

import torch

from speckv.engine import DecoderStack, HeldMatrix
from speckv.signals import Signal
from speckv.stopping import Chain

FILTERS = ("top_k", "top_p", "min_p")


class WantedChain(NamedTuple):
    """A draft that a head is to make, see draft_chains in csrc/draft_chain.cpp: its tensors and numbers."""

    engine: "HeadEngine"
    ids: torch.Tensor
    whole: tuple
    brought: torch.Tensor
    state: torch.Tensor
    states: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    temperature: torch.Tensor
    uniform: torch.Tensor
    filters: tuple
    controller: tuple
    real: tuple


def draft_chains(wanted) -> list[Chain]:
    """The drafts of several sequences that one head is to make, token after token of all in one walk through its
    weights. What one gets does not depend on the others. `seconds` of each are those of all."""
    _, ids, whole, brought, state, states, keys, values, temperature, uniform, filters, controllers, real = (
        zip(*wanted, strict=True))
    logits, report = torch.ops.speckv.draft_chains.default(
        wanted[0].engine.number, ids, [*chain.from_iterable(whole)], brought, state, states, keys, values, temperature,
        uniform, [*chain.from_iterable(filters)], [*chain.from_iterable(controllers)], [*chain.from_iterable(real)])
    chains, begin = [], 0
    for each, (count, _, seconds, acceptance, *measured) in zip(wanted, report.tolist(), strict=True):
        count = int(count)
        end = begin + (0 if each.temperature.item() == 0 else count)
        signals = tuple(map(Signal, measured[:2 * count:2], measured[1:2 * count:2]))
        chains.append(Chain(logits[begin:end], each.engine.token_ids, signals, acceptance, seconds))
        begin = end
    return chains


class HeadEngine:
    """The head's matrices as the engine reads them; open() starts on a sequence."""

    def __init__(self, head, farthest):
        self.stack = DecoderStack(head.decoder)
        from_last, from_embedding = (HeldMatrix(half) for half in head.combine_halves())
        fuse, output = HeldMatrix(head.fuse), HeldMatrix(head.rows)
        self.token_ids = head.token_ids
        self.none = torch.empty(0)
        self.no_states = torch.empty(0, len(head.center))
        # It keeps what it is made of, whatever becomes of the objects here.
        self.number = torch.ops.speckv.open_head(
            self.stack.number, fuse.number, from_last.number, from_embedding.number, output.number,
            head.decoder.get_input_embeddings().weight.detach(), head.token_ids, head.center, head.scale, farthest,
            head.cap or 0.0)
        weakref.finalize(self, torch.ops.speckv.close_head, self.number)

    def open(self):
        return _Reader(self)


class _Reader:
    """One sequence; see the reader in PyTorch in speckv.head, whose place it takes. All in fp32."""

    dtype = torch.float32

    def __init__(self, engine):
        self._engine = engine
        self._session = engine.stack.open()
        self._state = torch.empty(engine.stack.hidden_size)

    def read(self, ids, start, brought, states, first, goes_on):
        session, ids = self._session, ids[0]
        session.make_room(len(ids))
        logits = torch.ops.speckv.read_head(
            self._engine.number, ids, start, brought, self._state,
            self._engine.no_states if states is None else states[0].float(), first, goes_on, session.keys,
            session.values, session.length)
        session.length += len(ids)
        return logits

    def open_chain(self, ids, start, end, brought, states, first, uniform, temperature, filters, rule) -> "WantedChain":
        """What it takes to draft behind the first `end` tokens of ids [1, room] i64, into ids, as a StopRule says; the
        rest as in `read`, with the numbers [1, rule.longest or more] f32 to draw with, temperature and filters [1]."""
        session, worth = self._session, rule.worth
        session.make_room(end - start + rule.longest - 1)
        numbers = (0.0, 1.0, 1.0, 0.0, 1, 1, 0) if worth is None else (
            worth.draft_ms, worth.rate, worth.scale, worth.stands, worth.most_counted, worth.look_ahead, worth.others)
        none = self._engine.none
        return WantedChain(
            self._engine, ids, (start, end, rule.longest, first, session.length), brought, self._state,
            self._engine.no_states if states is None else states[0].float(), session.keys, session.values, temperature,
            uniform, tuple(filters.get(name, none) for name in FILTERS), () if worth is None else worth.tensors,
            (rule.least_confidence, rule.most_entropy, rule.least_survival, *numbers))

    def close_chain(self, wanted, chain):
        """The chain was made of what it took."""
        start, end, *_ = wanted.whole
        self._session.length += end - start + len(chain.signals) - 1

    def rollback(self, length):
        self._session.rollback(length)
