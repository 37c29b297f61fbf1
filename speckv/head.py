"""A feature head in the manner of EAGLE: one decoder layer that continues the target's own last hidden states.

At position i the layer is fed the target's last hidden state of position i - 1 joined with the embedding of token i,
and its output stands for the hidden state of position i: the output head makes of it the prediction of token i + 1,
and the next draft token takes it in place of the target's. Embedding and output head are the target's own; the output
head is cut to the tokens the target really writes, since in a small model it costs as much as the layer.

Source: Li et al., EAGLE, arXiv 2401.15077.
"""

import torch
from torch import nn
from transformers import DynamicCache

from speckv import drafter_folder, pruned
from speckv.cache import check_rollback, context_limit, rope_switch, vocabulary_size
from speckv.errors import ModelError

KIND = "head"
COMBINE, TOKEN_IDS = "combine.weight", "token_ids"


class FeatureHead(nn.Module):
    """A drafter for one target; a speckv.drafters.Drafter.

    layer is a pruned model of one layer, combine [H, 2H] joins feature and embedding, token_ids [S] i64 names the
    tokens it can draft, in ascending order.
    """

    wants_hidden = True

    def __init__(self, target, layer, combine, token_ids):
        super().__init__()
        check_rollback(layer, "drafter")
        self.layer = layer
        self.combine = nn.Parameter(combine, requires_grad=False)
        self.token_ids = token_ids
        self.name = f"feature head of {type(target).__name__}"
        self.vocabulary = vocabulary_size(target)
        self.context = context_limit(target)
        self.rope_switch = rope_switch(target)
        head = target.get_output_embeddings()
        # A copy of some of the rows: a matrix product cannot skip the others where they lie.
        self._rows = head.weight.detach()[token_ids]
        self._bias = head.bias.detach()[token_ids] if getattr(head, "bias", None) is not None else None
        self._cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)

    def hidden(self, features, ids, **settings):
        """The layer's last hidden states [B, n, H], from the features [B, n, H] of the positions before and ids."""
        embeddings = self.layer.get_input_embeddings()(ids)
        joined = torch.cat([features.to(embeddings.dtype), embeddings], dim=-1)
        return self.layer.base_model(inputs_embeds=nn.functional.linear(joined, self.combine), **settings)

    def logits(self, hidden):
        """Logits [..., S] over token_ids."""
        logits = nn.functional.linear(hidden.to(self._rows.dtype), self._rows, self._bias)
        return torch.tanh(logits / self._cap) * self._cap if self._cap else logits

    def own_tensors(self) -> dict:
        """What is stored: the layer and its norm, the joining matrix, and the token ids."""
        return pruned.own_state(self.layer) | {COMBINE: self.combine.detach(), TOKEN_IDS: self.token_ids.int()}

    def open(self):
        return _HeadSession(self)


class _HeadSession:
    """The head at work on one sequence: which positions it has read, and which features are the target's own."""

    def __init__(self, head):
        self._head = head
        self._cache = DynamicCache(config=head.layer.config)
        self._cache.activate_past_recording()
        self._length = 0  # positions in the cache
        self._exact = 0   # of these, how many were fed nothing but the target's own features
        self._observed = 0
        # [1, positions, H]: the target's own where observed, then what the head made of them.
        self._features = head.combine.new_zeros(1, 256, head.combine.shape[0])

    def observe(self, hidden, start: int) -> None:
        """The target's last hidden states [1, n, H] of the positions from `start` on."""
        self._room(start + hidden.shape[1])
        self._features[:, start:start + hidden.shape[1]] = hidden
        self._observed = start + hidden.shape[1]

    def next_logits(self, ids):
        """Logits [1, V] of the token after ids [1, n]; -inf where the head cannot draft a token."""
        start, end = self._length, ids.shape[1]
        self._room(end)
        before = self._features[:, max(start - 1, 0):end - 1]
        if start == 0:  # nothing comes before the first position
            before = nn.functional.pad(before, (0, 0, 1, 0))
        hidden = self._head.hidden(
            before, ids[:, start:], past_key_values=self._cache, use_cache=True).last_hidden_state
        self._length = end
        if end <= self._observed + 1:
            self._exact = end
        if end > self._observed:
            self._features[:, end - 1] = hidden[:, -1]
        logits = hidden.new_full((1, self._head.vocabulary), float("-inf"))
        return logits.index_copy_(1, self._head.token_ids, self._head.logits(hidden[:, -1]).to(logits.dtype))

    def rollback(self, length: int) -> None:
        """Forget what lies behind `length`, and what was computed from guessed features."""
        kept = min(length, self._exact, self._length)
        if self._length:
            self._cache.crop(kept - self._length)
        self._length = self._exact = kept
        self._observed = min(self._observed, length)

    def _room(self, positions):
        missing = positions - self._features.shape[1]
        if missing > 0:
            self._features = nn.functional.pad(self._features, (0, 0, 0, missing + positions))


def build(target, tensors: dict) -> FeatureHead:
    """A head from its stored tensors; raises ModelError where they do not fit the target."""
    tensors = dict(tensors)
    hidden_size = target.config.get_text_config().hidden_size
    try:
        combine, token_ids = tensors.pop(COMBINE), tensors.pop(TOKEN_IDS).long()
    except KeyError as error:
        raise ModelError(f"the drafter's weights lack {error}: they are not those of a feature head") from None
    if combine.shape != (hidden_size, 2 * hidden_size):
        raise ModelError(f"the drafter's weights do not fit this target: {COMBINE} is {list(combine.shape)}, wanted "
                         f"{[hidden_size, 2 * hidden_size]}; make one with 'speckv distill'")
    if token_ids.dim() != 1 or not 0 < len(token_ids) <= vocabulary_size(target) or (
            (token_ids < 0) | (token_ids >= vocabulary_size(target))).any() or (token_ids.diff() <= 0).any():
        raise ModelError("the drafter's token ids do not fit this target: they must be ascending ids of its vocabulary")
    embedding = target.get_input_embeddings().weight
    layer = pruned.prune(target, 1)
    pruned.fill(layer, tensors, embedding.dtype, embedding.device)
    return FeatureHead(target, layer, combine.to(embedding), token_ids.to(embedding.device))


def initial_tensors(target, token_ids) -> dict:
    """Where training starts: the target's first layer, fed the embedding alone until it learns what features add."""
    hidden_size = target.config.get_text_config().hidden_size
    combine = torch.cat([torch.zeros(hidden_size, hidden_size), torch.eye(hidden_size)], dim=1)
    return pruned.first_layers(target, 1) | {COMBINE: combine, TOKEN_IDS: token_ids.int()}


def save(folder, head: FeatureHead, card: dict) -> None:
    """Write a head's folder: weights in bf16 and their card."""
    drafter_folder.write(folder, KIND, head.own_tensors(), card)
