"""A feature head in the manner of EAGLE: a decoder layer, or a few, that continue the target's own hidden states.

At position i the head is fed what the target made of position i - 1 joined with the embedding of token i, and its
output stands for the last hidden state of position i: the output head makes of it the prediction of token i + 1, and
the next draft token takes it in place of the target's. Embedding and output head are the target's own; the output
head is cut to the tokens the target really writes, since in a small model it costs as much as a layer.

Sources: Li et al., EAGLE, arXiv 2401.15077; features of several layers: EAGLE-3, arXiv 2503.01840.
"""

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import DynamicCache

from speckv import drafter_folder, engine, pruned
from speckv.cache import cached, check_rollback, context_limit, rope_switch, vocabulary_size
from speckv.drafters import OfSome
from speckv.errors import ModelError
from speckv.head_engine import HeadEngine, draft_chains
from speckv.int8 import Int8Linear, linear, replace_linears

KIND = "head"
COMBINE, FUSE, CENTER, SCALE = "combine.weight", "fuse.weight", "features.center", "features.scale"
LAYERS, TOKEN_IDS = "features.layers", "token_ids"
FARTHEST = 10.0  # standard deviations; the first tokens of a text have hidden states like no others
WINDOW = 16      # tokens; a head that has more than these to read starts anew with the last of them


class FeatureHead(nn.Module):
    """A drafter for one target; a speckv.drafters.Drafter.

    decoder is a pruned model, which has the head's layers. tensors: combine [H, 2H] joins what the head made of the
    last position with the embedding; fuse [H, n·H] takes the former's place where the target has read the position,
    and is fed its hidden states after n layers, less center and times scale [n·H]; token_ids [S] i64 names the tokens
    the head can draft, in ascending order.
    """

    def __init__(self, target, decoder, tensors: dict):
        super().__init__()
        check_rollback(decoder, "drafter")
        self.decoder = decoder
        self.combine = nn.Parameter(tensors[COMBINE], requires_grad=False)
        self.fuse = nn.Parameter(tensors[FUSE], requires_grad=False)
        self.center, self.scale = tensors[CENTER], tensors[SCALE]
        self.token_ids = tensors[TOKEN_IDS]
        self.wants_hidden = tuple(tensors[LAYERS].tolist())
        self.name = f"feature head of {type(target).__name__}"
        self.vocabulary = vocabulary_size(target)
        self.context = context_limit(target)
        self.rope_switch = rope_switch(target)
        head = target.get_output_embeddings()
        # A copy of some of the rows: a matrix product cannot skip the others where they lie.
        self.rows = head.weight.detach()[self.token_ids]
        self._bias = head.bias.detach()[self.token_ids] if getattr(head, "bias", None) is not None else None
        self.cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
        self._engine, self._knows_engine = None, False

    @property
    def num_layers(self) -> int:
        return self.decoder.config.get_text_config(decoder=True).num_hidden_layers

    def hold_in_int8(self) -> None:
        """Round the head's own matrices to int8, which draft as well as before for half of the reading.

        For drafting alone: such a head can be neither trained nor stored. What is the target's stays as it is.
        """
        replace_linears(pruned.decoder_layers(self.decoder)[1])
        halves, fuse = [Int8Linear(half) for half in self.combine_halves()], Int8Linear(self.fuse)
        del self.combine, self.fuse  # a module cannot take the place of a parameter
        self.combine, self.fuse = nn.ModuleList(halves), fuse
        self.rows = Int8Linear(self.rows, self._bias)
        self._engine, self._knows_engine = None, False

    def combine_halves(self):
        """What takes the last position's output, and what takes the embedding: two matrices [H, H]."""
        return self.combine if isinstance(self.combine, nn.ModuleList) else self.combine.chunk(2, dim=1)

    def observed(self, states):
        """What positions that the target has read [B, n, layers·H] bring to the ones after them: [B, n, H]."""
        return linear(self.features(states).to(self.fuse.dtype), self.fuse)

    def features(self, states):
        """The target's hidden states [..., layers·H], centred and scaled, in fp32."""
        return ((states.to(self.center.dtype) - self.center) * self.scale).clamp(-FARTHEST, FARTHEST)

    def continued(self, hidden):
        """The same of positions that only the head has read, from its own last hidden states [B, n, H]."""
        return linear(hidden, self.combine_halves()[0])

    def hidden(self, before, ids, cache=None, **settings):
        """The head's last hidden states [B, n, H], from what the positions before bring [B, n, H], and ids [B, n]."""
        embeddings = self.decoder.get_input_embeddings()(ids)
        joined = before + linear(embeddings, self.combine_halves()[1])
        layers = self.decoder.base_model
        return layers(inputs_embeds=joined, **cached(layers, cache), **settings).last_hidden_state

    def logits(self, hidden):
        """Logits [..., S] over token_ids."""
        logits = linear(hidden.to(self.rows.dtype), self.rows, self._bias)
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits

    def own_tensors(self) -> dict:
        """What is stored; raises ModelError for a head held in int8, which has lost it."""
        if isinstance(self.fuse, Int8Linear):
            raise ModelError("a head held in int8 cannot be stored: store the one it was made of")
        return pruned.own_state(self.decoder) | {
            COMBINE: self.combine.detach(), FUSE: self.fuse.detach(), CENTER: self.center, SCALE: self.scale,
            LAYERS: torch.tensor(self.wants_hidden, dtype=torch.int32), TOKEN_IDS: self.token_ids.int()}

    def open(self):
        return _HeadSession(self, self._reader())

    def _reader(self):
        """What reads one sequence: the engine where it can, a head held in int8; else PyTorch."""
        if not self._knows_engine:
            can_use = isinstance(self.fuse, Int8Linear) and engine.why_not(self.decoder) is None
            self._engine, self._knows_engine = HeadEngine(self, FARTHEST) if can_use else None, True
        return _Reader(self) if self._engine is None else self._engine.open()


class _Reader:
    """One sequence read by the head's layers in PyTorch."""

    def __init__(self, head):
        self._head = head
        self.dtype = head.decoder.get_input_embeddings().weight.dtype
        self._cache = DynamicCache(config=head.decoder.config)
        self._cache.activate_past_recording()
        self._state = None

    def read(self, ids, start, brought, states, first, goes_on):
        """Logits [1, S] of the token after ids [1, n], the tokens at positions start, start + 1, … of the text.

        brought [positions, H] is what each position brings to the one after it. states [1, m, layers·H], or None, are
        the target's of positions first, first + 1, …, for which it is worked out now; goes_on says that the position
        before `start` is one that only the head has read, in the call before.
        """
        end = start + ids.shape[1]
        if states is not None:
            brought[first:first + states.shape[1]] = self._head.observed(states)[0]
        if goes_on:
            brought[start - 1] = self._head.continued(self._state)[0]
        before = brought[max(start - 1, 0):end - 1].unsqueeze(0)
        if start == 0:  # nothing comes before the first position
            before = pad(before, (0, 0, 1, 0))
        self._state = self._head.hidden(before, ids, self._cache)[:, -1]
        return self._head.logits(self._state)

    def rollback(self, length):
        read = self._cache.get_seq_length()
        if read:
            self._cache.crop(length - read)


class _HeadSession:
    """The head at work on one sequence: which positions it has read, and what was known of the positions before."""

    def __init__(self, head, reader):
        self._token_ids = head.token_ids
        self._reader = reader
        self._first = 0   # positions before are not read
        self._length = 0  # positions read, those before the first included
        self._exact = 0   # of these, how many were fed nothing but the target's own features
        self._observed = 0
        self._continued = None  # the length of the text behind whose end the last logits were, while it stands
        self._pending = []  # (start, hidden states, end) that no draft has asked for yet; what lies behind the end fell
        embedding = head.decoder.get_input_embeddings().weight
        self._brought = embedding.new_zeros(256, embedding.shape[1], dtype=reader.dtype)

    def observe(self, hidden, start: int) -> None:
        """The target's hidden states [1, n, layers·H] of the positions from `start` on."""
        self._observed = start + hidden.shape[1]
        self._pending.append((start, hidden, self._observed))

    def prefill(self, ids):
        """Nothing: a head reads only the end of a text, when there is a draft to make."""

    def next_logits(self, ids):
        """Logits [1, S] of the token after ids [1, n], of the tokens that the head can draft."""
        end = ids.shape[1]
        start = self._begin(end, end)
        goes_on = self._observed < start == self._continued
        logits = self._reader.read(ids[:, start:], start, self._brought, *self._take_in(), goes_on)
        self._read(end, end)
        return OfSome(logits, self._token_ids)

    def chains(self, ids):
        """See speckv.drafters.DraftSession: where the engine reads the head."""
        return False if hasattr(self._reader, "open_chain") else None

    def draft_chain(self, ids, end, *how):
        """See speckv.drafters.DraftSession."""
        wanted = self.open_chain(ids, end, *how)
        drafted, = draft_chains([wanted])
        self.close_chain(wanted, drafted)
        return drafted

    def open_chain(self, ids, end, *how):
        """See speckv.drafters.DraftSession."""
        longest = how[-1].longest
        start = self._begin(end, end + longest - 1)
        return self._reader.open_chain(ids, start, end, self._brought, *self._take_in(), *how)

    def close_chain(self, wanted, drafted):
        """See speckv.drafters.DraftSession."""
        self._reader.close_chain(wanted, drafted)
        end = wanted.whole[1]
        self._read(end, end + len(drafted.signals) - 1)

    def _begin(self, end, last):
        """From which position on a text of `end` tokens is to be read, when no more than `last` will be."""
        if end - self._length > WINDOW:
            self._first = self._length = end - WINDOW
            self._reader.rollback(0)
        self._room(max(last, self._observed))
        return self._length

    def _read(self, end, last):
        """So many tokens were read, those behind `end` in a draft."""
        self._length = self._continued = last
        if end <= self._observed + 1:
            self._exact = end

    def rollback(self, length: int) -> None:
        """Forget what lies behind `length`, and what was computed from guessed features."""
        self._length = self._exact = min(length, self._exact, self._length)
        self._first = min(self._first, self._length)
        self._reader.rollback(self._length - self._first)
        self._observed = min(self._observed, length)
        self._continued = None
        while self._pending and self._pending[-1][2] > length:
            first, hidden, _ = self._pending.pop()
            if first < length:
                self._pending.append((first, hidden, length))

    def _take_in(self):
        """The states observed since the last draft, those of rejected tokens left out, and the position of the first;
        None for no states."""
        if not self._pending:
            return None, 0
        # What lies before the first position that is read is not asked for.
        start = max(self._pending[0][0], self._first - 1)
        states = [hidden[:, max(start - first, 0):end - first] for first, hidden, end in self._pending if end > start]
        self._pending = []
        if not states:
            return None, 0
        return states[0] if len(states) == 1 else torch.cat(states, dim=1), start

    def _room(self, positions):
        missing = positions - self._brought.shape[0]
        if missing > 0:
            self._brought = pad(self._brought, (0, 0, 0, missing + positions))


def feature_layers(target) -> tuple:
    """Which of the target's hidden states a head is fed: early, middle and late ones, and the last.

    The last has been shaped into a prediction and has lost much of what the earlier ones still know of the text
    (Li et al., EAGLE-3, arXiv 2503.01840).
    """
    count = target.config.get_text_config(decoder=True).num_hidden_layers
    inner = {min(max(1, round(count * share)), count - 1) for share in (0.1, 0.5, 0.9)} - {0}
    return (*sorted(inner), -1)


def build(target, tensors: dict) -> FeatureHead:
    """A head from its stored tensors, which say how many layers; raises ModelError where they do not fit the target."""
    config = target.config.get_text_config(decoder=True)
    size, count = config.hidden_size, config.num_hidden_layers
    tensors = dict(tensors)
    try:
        own = {key: tensors.pop(key) for key in (COMBINE, FUSE, CENTER, SCALE, LAYERS, TOKEN_IDS)}
    except KeyError as error:
        raise ModelError(f"the drafter's weights lack {error}: they are not those of a feature head of this version; "
                         "make one with 'speckv distill'") from None
    fed = size * len(own[LAYERS])
    for key, shape in ((COMBINE, (size, 2 * size)), (FUSE, (size, fed)), (CENTER, (fed,)), (SCALE, (fed,))):
        if own[key].shape != shape:
            raise ModelError(f"the drafter's weights do not fit this target: {key} is {list(own[key].shape)}, wanted "
                             f"{list(shape)}; make one with 'speckv distill'")
    layers, token_ids = own[LAYERS], own[TOKEN_IDS].long()
    if layers.dim() != 1 or len(layers) == 0 or (layers < -1).any() or (layers > count).any():
        raise ModelError(f"the drafter's weights do not fit this target: it has {count} layers, they want the hidden "
                         f"states after {layers.tolist()}")
    if token_ids.dim() != 1 or not 0 < len(token_ids) <= vocabulary_size(target) or (
            (token_ids < 0) | (token_ids >= vocabulary_size(target))).any() or (token_ids.diff() <= 0).any():
        raise ModelError("the drafter's token ids do not fit this target: they must be ascending ids of its vocabulary")
    embedding = target.get_input_embeddings().weight
    decoder = pruned.prune(target, max(1, pruned.stored_layers(target, tensors)))  # of none, fill tells what is missing
    pruned.fill(decoder, tensors, embedding.dtype, embedding.device)
    own |= {key: own[key].to(embedding) for key in (COMBINE, FUSE)}
    own |= {key: own[key].to(embedding.device, torch.float32) for key in (CENTER, SCALE)}
    return FeatureHead(target, decoder, own | {TOKEN_IDS: token_ids.to(embedding.device)})


def initial_tensors(target, token_ids, center, scale, num_layers: int = 1) -> dict:
    """Where training starts: the target's first layers, fed the embedding alone until they learn what features add.

    center and scale [layers·H] f32 are the mean of the target's hidden states and one over their standard deviation.
    """
    size = target.config.get_text_config(decoder=True).hidden_size
    combine = torch.cat([torch.zeros(size, size), torch.eye(size)], dim=1)
    return pruned.first_layers(target, num_layers) | {
        COMBINE: combine, FUSE: torch.zeros(size, len(center)),
        CENTER: center.bfloat16(), SCALE: scale.bfloat16(),  # as they will be stored
        LAYERS: torch.tensor(feature_layers(target), dtype=torch.int32), TOKEN_IDS: token_ids.int()}


def grow(target, tensors: dict, num_layers: int) -> dict:
    """The tensors of a head of num_layers layers that drafts exactly as the given one, which has no more of them.

    Each new layer is a copy of the target's in its place, with zeros in what adds its attention and its MLP to the
    residual stream: it passes on what it is given until it learns better. The target must be dense. Raises ModelError
    where the target's layers are not known to allow that.
    """
    name, layers = pruned.decoder_layers(target)
    size = target.config.get_text_config(decoder=True).hidden_size
    silent = {f"{name}.{index}.{path}"
              for index, layer in enumerate(layers) for path in _output_projections(layer, size)}
    added = {key: torch.zeros_like(tensor) if key.rpartition(".")[0] in silent else tensor
             for key, tensor in pruned.first_layers(target, num_layers).items() if key not in tensors}
    grown = tensors | added
    if not _agree(build(target, tensors), build(target, grown)):
        raise ModelError(f"a head for {type(target).__name__} cannot be given more layers without a change of what it "
                         "drafts: keep the layers it has, or train a deeper one from the start")
    return grown


def _output_projections(layer, size):
    """The names of the linear maps that give a decoder layer's results, as models define them: in each part the last.

    Parts are attention and MLP, or maps that lie in the layer itself; size is that of the residual stream.
    """
    for name, part in layer.named_children():
        paths = [path for path, module in part.named_modules(prefix=name)
                 if isinstance(module, nn.Linear) and module.out_features == size]
        yield from paths[-1:]


@torch.no_grad()
def _agree(head, other):
    """Whether two heads make the same of a few tokens, bit for bit."""
    embedding = head.decoder.get_input_embeddings()
    ids = torch.arange(4, device=embedding.weight.device).unsqueeze(0)
    return torch.equal(*(each.hidden(embedding(ids), ids) for each in (head, other)))


def save(folder, head: FeatureHead, card: dict) -> None:
    """Write a head's folder: weights in bf16 and their card."""
    drafter_folder.write(folder, KIND, head.own_tensors(), card | {"num_layers": head.num_layers})
