"""A feature head (speckv.head) held in int8, at work in the C++ engine."""

import torch
from transformers import DynamicCache

from speckv.engine import MOST_ROWS, DecoderStack, HeldMatrix


class HeadEngine:
    """The head's matrices as the engine reads them; open() starts on a sequence."""

    def __init__(self, head):
        self.embedding = head.decoder.get_input_embeddings()
        self.stack = DecoderStack(head.decoder)
        self.from_last, self.from_embedding = (HeldMatrix(half) for half in head.combine_halves())
        self.fuse, self.rows = HeldMatrix(head.fuse), HeldMatrix(head.rows)
        # Prompts go through the layers in PyTorch; the head's own methods, since the head itself holds this object.
        self.read_prompt = head.hidden
        self.config, self.cap, self.features = head.decoder.config, head.cap, head.features

    def open(self):
        return _Reader(self)


class _Reader:
    """One sequence; see the reader in PyTorch in speckv.head, whose place it takes. All in fp32."""

    dtype = torch.float32

    def __init__(self, engine):
        self._engine = engine
        self._session = engine.stack.open()

    def observed(self, states):
        return self._engine.fuse(self._engine.features(states[0])).unsqueeze(0)

    def continued(self, hidden):
        return self._engine.from_last(hidden[0]).unsqueeze(0)

    def logits(self, hidden):
        logits, cap = self._engine.rows(hidden), self._engine.cap
        return torch.tanh(logits / cap) * cap if cap else logits

    def hidden(self, before, ids):
        engine = self._engine
        if self._session.length == 0 and ids.shape[1] > MOST_ROWS:
            cache = DynamicCache(config=engine.config)
            last = engine.read_prompt(before.to(engine.embedding.weight.dtype), ids, cache)
            self._session.fill(cache)
            return last[:, -1:].float()
        joined = before[0] + engine.from_embedding(engine.embedding(ids[0]).float())
        return self._session.read(joined)[0][None, -1:]

    def rollback(self, length):
        self._session.rollback(length)
