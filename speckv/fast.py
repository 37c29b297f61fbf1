"""A model, target or drafter, read by the C++ engine, in the place of speckv.cache.CachedModel."""

import math
import warnings
import weakref

import torch
from transformers import DynamicCache

from speckv.cache import CachedModel, cached, hidden_states
from speckv.engine import MOST_ROWS, DecoderStack, HeldMatrix, embedding_weight
from speckv.errors import ModelError

LONGEST_FLOAT_PROMPT = 64  # tokens; PyTorch reads a longer one sooner where the weights are fp32
_TARGETS = weakref.WeakKeyDictionary()


class FastTarget:
    """A target's weights as the engine reads them, made once for a model.

    Weights that are changed in place are seen, norms and biases apart; those that are replaced afterwards are not.
    """

    def __init__(self, model):
        try:
            self.stack = DecoderStack(model)
            self.head = HeldMatrix(model.get_output_embeddings())
            self._embedding = embedding_weight(model)
        except ModelError as error:
            raise ModelError(f"the fast path cannot decode this model: {error}") from error
        self.model = weakref.proxy(model)
        is_float = self.stack.cache_dtype == torch.float32 and not self.stack.is_quantized
        self.longest_prompt = LONGEST_FLOAT_PROMPT if is_float else math.inf

    @classmethod
    def of(cls, model):
        """The one of a model; raises ModelError, with the reason, where the engine cannot read it."""
        if model not in _TARGETS:
            _TARGETS[model] = cls(model)
        return _TARGETS[model]

    def open(self):
        return FastModel(self)

    def read(self, parts, layers=()):
        """Read the next tokens of several sequences in one pass.

        parts are (StackSession of the stack, ids [m] i64, keep), MOST_ROWS ids in all at the most. Returns the logits
        [sum of keep, V] f32 of the last `keep` tokens of each, and the hidden states [sum of m, len(layers)·H] f32 that
        so many layers made of all (0: the embeddings; -1: the last, after the final norm). What a sequence gets does
        not depend on the others, to the last bit.
        """
        return self._read(torch.ops.speckv.read_model.default, parts, layers)

    def read_best(self, parts, layers=()):
        """As `read`, but in the place of logits the most probable token [sum of keep] i64 at each, the first of equals,
        or -1 where the logits are no distribution."""
        return self._read(torch.ops.speckv.read_best.default, parts, layers)

    def _read(self, op, parts, layers):
        sessions, ids, kept = zip(*parts, strict=True)
        counts = [len(some) for some in ids]
        for session, count in zip(sessions, counts, strict=True):
            session.make_room(count)
        read, states = op(
            self.stack.number, self.head.number, self._embedding, ids[0] if len(ids) == 1 else torch.cat(ids),
            [session.keys for session in sessions], [session.values for session in sessions],
            [session.length for session in sessions], counts, kept, layers)
        for session, count in zip(sessions, counts, strict=True):
            session.length += count
        return read, states


class FastModel:
    """One sequence read by a FastTarget; serves as a speckv.cache.CachedModel does.

    Long prompts in fp32 are read by the model itself, whose operations are made for many rows.
    """

    def __init__(self, target):
        self._target = target
        self._session = target.stack.open()

    @property
    def length(self):
        return self._session.length

    def read(self, ids, keep: int, layers: tuple = ()):
        """As CachedModel.read, logits in fp32."""
        new = ids[:, self.length:]
        if self._leaves_to_model(new.shape[1]):
            return self._read_prompt(new, keep, layers)
        if new.shape[1] <= MOST_ROWS:
            logits, states = self._target.read([(self._session, new[0], keep)], layers)
        else:
            logits, states = self._read_in_parts(new[0], keep, layers)
        return logits.unsqueeze(0), states.unsqueeze(0) if layers else None

    def read_best(self, ids, keep: int, layers: tuple = ()):
        """As `read`, but with a list of the most probable tokens, see FastTarget.read_best; still logits where the ids
        are those of a whole prompt."""
        new = ids[0, self.length:]
        if self.length == 0 or len(new) > MOST_ROWS:
            return self.read(ids, keep, layers)
        best, states = self._target.read_best([(self._session, new, keep)], layers)
        return best.tolist(), states.unsqueeze(0) if layers else None

    def _leaves_to_model(self, count):
        return self.length == 0 and count > self._target.longest_prompt

    def _read_in_parts(self, ids, keep, layers):
        left, parts = len(ids), []
        for part in ids.split(MOST_ROWS):
            left -= len(part)
            parts.append(self._target.read([(self._session, part, min(len(part), max(0, keep - left)))], layers))
        return tuple(torch.cat(some) for some in zip(*parts, strict=True))

    @classmethod
    def read_together(cls, requests, layers: tuple = (), best: bool = False):
        """Read several sequences of one target in as few passes as their tokens need.

        requests are (FastModel, ids, keep); returns what `read`, or `read_best`, returns for each, to the last bit.
        """
        results = []
        for group in _groups(requests):
            if len(group) == 1:
                (model, ids, keep), = group
                results.append((model.read_best if best else model.read)(ids, keep, layers))
                continue
            new = [ids[0, model.length:] for model, ids, _ in group]
            target = group[0][0]._target
            read, states = (target.read_best if best else target.read)(
                [(model._session, some, keep) for (model, _, keep), some in zip(group, new, strict=True)], layers)
            parts = read.split([keep for _, _, keep in group])
            states = states.split([len(some) for some in new]) if layers else [None] * len(group)
            results += [(mine.tolist() if best else mine.unsqueeze(0), None if own is None else own.unsqueeze(0))
                        for mine, own in zip(parts, states, strict=True)]
        return results

    def _read_prompt(self, ids, keep, layers):
        cache = DynamicCache(config=self._target.model.config)
        output = self._target.model(ids, **cached(self._target.model, cache), logits_to_keep=max(1, keep),
                                    output_hidden_states=bool(layers))
        self._session.fill(cache)
        return output.logits[:, :keep].float(), hidden_states(output, layers).float() if layers else None

    def rollback(self, length: int) -> None:
        self._session.rollback(length)

    def restore(self) -> bool:
        return True  # a pass that fails has not moved the counter


def _groups(requests):
    """The requests in order, cut where the tokens to read would be more than the engine takes at once. What it leaves
    to the model is alone."""
    group, rows = [], 0
    for request in requests:
        model, ids, _ = request
        count = ids.shape[1] - model.length
        if model._leaves_to_model(count):
            count = MOST_ROWS
        if group and rows + count > MOST_ROWS:
            yield group
            group, rows = [], 0
        group.append(request)
        rows += count
    if group:
        yield group


def open_target(model, fast: bool):
    """A sequence of the model: read by the engine where that is asked for, with a warning where it cannot."""
    if not fast:
        return CachedModel(model)
    try:
        return FastTarget.of(model).open()
    except ModelError as error:
        warnings.warn(f"{error}; it is run in PyTorch", stacklevel=5)
        return CachedModel(model)
