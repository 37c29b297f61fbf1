"""A model, target or drafter, read by the C++ engine, in the place of speckv.cache.CachedModel."""

import math
import warnings
import weakref

import torch
from transformers import DynamicCache

from speckv.cache import CachedModel, cached, hidden_states
from speckv.engine import MOST_ROWS, DecoderStack, HeldMatrix
from speckv.errors import ModelError

LONGEST_FLOAT_PROMPT = MOST_ROWS  # tokens; PyTorch reads a longer one sooner where the weights are fp32
_TARGETS = weakref.WeakKeyDictionary()


class FastTarget:
    """A target's weights as the engine reads them, made once for a model.

    Weights that are changed in place are seen, norms and biases apart; those that are replaced afterwards are not.
    """

    def __init__(self, model):
        try:
            self.stack = DecoderStack(model)
            self.head = HeldMatrix(model.get_output_embeddings())
        except ModelError as error:
            raise ModelError(f"the fast path cannot decode this model: {error}") from error
        self.model = weakref.proxy(model)
        self.embedding = model.get_input_embeddings()
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
        if self.length == 0 and new.shape[1] > self._target.longest_prompt:
            return self._read_prompt(new, keep, layers)
        last, states = self._session.read(self._target.embedding(new[0]).float(), _inner(layers))
        logits = self._target.head(last[-keep:]).unsqueeze(0)
        return logits, _joined(last, states, layers).unsqueeze(0) if layers else None

    @classmethod
    def read_together(cls, requests, layers: tuple = ()):
        """Read several sequences of one target in as few passes as their tokens need.

        requests are (FastModel, ids, keep); returns what `read` returns for each, to the last bit.
        """
        results = []
        for group in _groups(requests):
            if len(group) == 1:
                (model, ids, keep), = group
                results.append(model.read(ids, keep, layers))
                continue
            target = group[0][0]._target
            new = [ids[0, model.length:] for model, ids, _ in group]
            embedded = target.embedding(torch.cat(new)).float().split([len(ids) for ids in new])
            last, states = target.stack.read(
                [(model._session, x) for (model, _, _), x in zip(group, embedded, strict=True)], _inner(layers))
            hidden = _joined(last, states, layers) if layers else None
            ends = torch.tensor([len(ids) for ids in new]).cumsum(0).tolist()
            kept = [range(end - keep, end) for end, (_, _, keep) in zip(ends, group, strict=True)]
            logits = target.head(last[[row for rows in kept for row in rows]]).split([len(rows) for rows in kept])
            hidden = hidden.split([len(ids) for ids in new]) if layers else [None] * len(group)
            results += [(mine.unsqueeze(0), None if states is None else states.unsqueeze(0))
                        for mine, states in zip(logits, hidden, strict=True)]
        return results

    def _read_prompt(self, ids, keep, layers):
        cache = DynamicCache(config=self._target.model.config)
        output = self._target.model(ids, **cached(self._target.model, cache), logits_to_keep=keep,
                                    output_hidden_states=bool(layers))
        self._session.fill(cache)
        return output.logits.float(), hidden_states(output, layers).float() if layers else None

    def rollback(self, length: int) -> None:
        self._session.rollback(length)

    def restore(self) -> bool:
        return True  # a pass that fails has not moved the counter


def _inner(layers):
    """The layers that the engine is asked for, ascending; the last hidden states come by themselves."""
    return sorted({layer for layer in layers if layer >= 0})


def _joined(last, states, layers):
    """The hidden states [m, len(layers)·H] in the order asked for."""
    by_layer = dict(zip(_inner(layers), states.split(last.shape[1], dim=1), strict=True)) | {-1: last}
    return torch.cat([by_layer[layer] for layer in layers], dim=-1)


def _groups(requests):
    """The requests in order, cut where the tokens to read would be more than the engine takes at once."""
    group, rows = [], 0
    for request in requests:
        model, ids, _ = request
        count = ids.shape[1] - model.length
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
