"""A causal language model together with the KV cache of one sequence, and taking tokens back out of it."""

import functools
import inspect

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from speckv.errors import ModelError


def check_rollback(model, role: str) -> None:
    """Raise ModelError unless rejected tokens can be taken back out of the model's cache without a trace.

    Full attention and sliding windows can; recurrent and convolutional states, and encoders, cannot.
    """
    if not hasattr(model, "config") or not hasattr(model, "generation_config"):
        raise ModelError(f"the {role} is a {type(model).__name__}: it must be a causal language model of transformers")
    name = type(model).__name__
    if model.training:
        raise ModelError(f"the {role} {name} is in train mode, where dropout changes every pass: call .eval()")
    if model.config.is_encoder_decoder:
        raise ModelError(f"the {role} {name} is an encoder-decoder: speckv decodes causal language models only")
    way_out = f"rejected draft tokens cannot be rolled back; use transformers' generate for this {role}"
    if getattr(model, "_is_stateful", False):
        raise ModelError(f"the {role} {name} keeps a recurrent state: {way_out}")
    for layer in DynamicCache(config=model.config).layers:
        if not layer.is_croppable:
            raise ModelError(f"the {role} {name} keeps a {type(layer).__name__} in its cache: {way_out}")


class _RoomyLayer(DynamicLayer):
    """A layer of full attention that writes into room made beforehand; transformers' copies all at every token."""

    def __init__(self, capacity):
        super().__init__()
        self._capacity = capacity
        self._length = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            shape = (*key_states.shape[:2], self._capacity)
            self._room = (key_states.new_empty(*shape, key_states.shape[3]),
                          value_states.new_empty(*shape, value_states.shape[3]))
        start, self._length = self._length, self._length + key_states.shape[2]
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, start:self._length] = states
        self.keys, self.values = (room[:, :, :self._length] for room in self._room)
        return self.keys, self.values


def roomy_cache(config, capacity: int) -> DynamicCache:
    """A KV cache for up to `capacity` tokens that are only ever appended."""
    cache = DynamicCache(config=config)
    cache.layers = [_RoomyLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def cached(model, cache) -> dict:
    """The arguments with which a model reads from and writes to a cache, or where it is None uses none."""
    return {"use_cache": False} if cache is None else {_cache_argument(model.__class__): cache, "use_cache": True}


@functools.cache
def _cache_argument(model_class):
    # Its name in earlier versions of transformers, and in models from elsewhere.
    return "cache" if "cache" in inspect.signature(model_class.forward).parameters else "past_key_values"


def hidden_states(output, layers: tuple):
    """The hidden states [B, n, len(layers)·H] of a model's output, joined.

    Layers are counted as in transformers' hidden_states: 0 is the embedding, -1 the last, final norm included.
    """
    return torch.cat([output.hidden_states[layer] for layer in layers], dim=-1)


class CachedModel:
    """Feeds a model the tokens it has not seen, and forgets the ones that were rejected."""

    def __init__(self, model):
        self.model = model
        self._empty()

    def _empty(self):
        self.length = 0  # tokens in the cache
        self._cache = DynamicCache(config=self.model.config)
        # Without this a sliding window drops the tokens that a rollback would bring back into view.
        self._cache.activate_past_recording()

    def read(self, ids, keep: int, layers: tuple = ()):
        """Feed what is new in ids [B, n], m tokens.

        Returns the logits [B, keep, V] after each of the last `keep` tokens, and the hidden states [B, m, n·H] of all
        m after the n layers asked for (see hidden_states), else None.
        """
        # To transformers 0 means all.
        output = self.model(ids[:, self.length:], **cached(self.model, self._cache), logits_to_keep=max(1, keep),
                            output_hidden_states=bool(layers))
        self.length = ids.shape[1]
        if self._cache.get_seq_length() != self.length:
            raise ModelError(f"{type(self.model).__name__} does not keep what it reads in its cache: speckv cannot "
                             "decode with it; use transformers' generate")
        return output.logits[:, :keep], hidden_states(output, layers) if layers else None

    def rollback(self, length: int) -> None:
        """Forget all but the first `length` tokens; harmless where fewer are cached."""
        if self.length == 0:
            return
        # Also with nothing to remove: it lets a sliding window return to its size.
        self._cache.crop(-max(0, self.length - length))
        self.length = min(self.length, length)

    def restore(self) -> bool:
        """Take out what a read that failed halfway has left in some of the layers; returns whether that can be done."""
        if any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self._cache.layers):
            return False
        if self.length == 0:
            self._empty()
            return True
        for layer in self._cache.layers:
            if not layer.is_initialized:  # one that shares another's keys
                continue
            kept = self.length
            if layer.is_sliding:  # counts the tokens before it has room for them, and holds no more than it needs
                kept = min(kept, layer.sliding_window - 1)
                layer.cumulative_length = self.length
            # Keys and values apart: the memory may have run out between the two.
            layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]
        return True


def context_limit(model):
    """How many tokens the model was made for, or None where its configuration does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def vocabulary_size(model) -> int:
    """Width of the model's logits."""
    return model.config.get_text_config(decoder=True).vocab_size


def rope_switch(model):
    """After how many tokens the model changes its position encoding (LongRoPE), or None where it never does."""
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    switches = [kind.get("original_max_position_embeddings") for kind in kinds if kind.get("rope_type") == "longrope"]
    return min((switch for switch in switches if switch), default=None)
