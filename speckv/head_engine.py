"""A feature head (speckv.head) held in int8, at work in the C++ engine."""

import weakref

import torch

from speckv.engine import DecoderStack, HeldMatrix
from speckv.signals import Signal
from speckv.stopping import Chain


class HeadEngine:
    """The head's matrices as the engine reads them; open() starts on a sequence."""

    def __init__(self, head, farthest):
        self.stack = DecoderStack(head.decoder)
        from_last, from_embedding = (HeldMatrix(half) for half in head.combine_halves())
        fuse, output = HeldMatrix(head.fuse), HeldMatrix(head.rows)
        self.token_ids = head.token_ids
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

    def draft_chain(self, ids, start, end, brought, states, first, uniform, temperature, filters, rule) -> Chain:
        """Draft behind the first `end` tokens of ids [1, room] i64, into ids, as a StopRule says; the rest as in
        `read`, with the numbers [1, rule.longest or more] f32 to draw with, temperature and filters [1]."""
        session, worth = self._session, rule.worth
        session.make_room(end - start + rule.longest - 1)
        controller, numbers = [], (0.0, 1.0, 1.0, 0.0, 1, 1, 0)
        if worth is not None:
            controller = worth.tensors
            numbers = (worth.draft_ms, worth.rate, worth.scale, worth.stands, worth.most_counted, worth.look_ahead,
                       worth.others)
        logits, report = torch.ops.speckv.draft_chain(
            self._engine.number, ids, start, end, rule.longest, brought, self._state,
            self._engine.no_states if states is None else states[0].float(), first, session.keys, session.values,
            session.length, temperature, uniform, filters.get("top_k"), filters.get("top_p"), filters.get("min_p"),
            rule.least_confidence, rule.most_entropy, rule.least_survival, controller, *numbers)
        _, seconds, acceptance, *measured = report.tolist()
        signals = tuple(map(Signal, measured[::2], measured[1::2]))
        session.length += end - start + len(signals) - 1
        return Chain(logits, self._engine.token_ids, signals, acceptance, seconds)

    def rollback(self, length):
        self._session.rollback(length)
