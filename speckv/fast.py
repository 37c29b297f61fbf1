"""A target read by the C++ engine, in the place of speckv.cache.CachedModel."""

import warnings
import weakref

import torch
from transformers import DynamicCache

from speckv.cache import CachedModel, cached, hidden_states
from speckv.engine import MOST_ROWS, DecoderStack, HeldMatrix
from speckv.errors import ModelError

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

    Prompts in fp32 and bf16 are read by the model itself, whose products are made for many rows; those of bitsandbytes
    bring the weights to 16 bits first, and take longer than the engine.
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
        if self.length == 0 and new.shape[1] > MOST_ROWS and not self._target.stack.is_quantized:
            return self._read_prompt(new, keep, layers)
        inner = sorted({layer for layer in layers if layer >= 0})
        last, states = self._session.read(self._target.embedding(new[0]).float(), inner)
        logits = self._target.head(last[-keep:]).unsqueeze(0)
        if not layers:
            return logits, None
        by_layer = dict(zip(inner, states.split(last.shape[1], dim=1), strict=True)) | {-1: last}
        return logits, torch.cat([by_layer[layer] for layer in layers], dim=-1).unsqueeze(0)

    def _read_prompt(self, ids, keep, layers):
        cache = DynamicCache(config=self._target.model.config)
        output = self._target.model(ids, **cached(self._target.model, cache), logits_to_keep=keep,
                                    output_hidden_states=bool(layers))
        self._session.fill(cache)
        return output.logits.float(), hidden_states(output, layers).float() if layers else None

    def rollback(self, length: int) -> None:
        self._session.rollback(length)


def open_target(model, fast: bool):
    """A sequence of the model: read by the engine where that is asked for, with a warning where it cannot."""
    if not fast:
        return CachedModel(model)
    try:
        return FastTarget.of(model).open()
    except ModelError as error:
        warnings.warn(f"{error}; it is decoded in PyTorch", stacklevel=3)
        return CachedModel(model)
