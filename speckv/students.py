"""The two kinds of drafter that distilling trains: what each learns from a batch, and how good it is on held-out text.

A batch is tokens [R, L] i64, roles [R, L] u8 and the target's hidden states [R, L, n·H] after n layers, the last one
last (speckv.cache.hidden_states); position i predicts token i + 1, and only positions whose next token is the target's
own answer count. Both are judged by the same two figures: match, the share of positions where the drafter's first
choice is the target's; and accepted_at_4, the mean number of draft tokens that a greedy target would accept of four
(accepted_by_gamma: of one, two, three and four).
"""

import torch
from torch.nn import functional as F
from torch.nn.functional import pad
from transformers import DynamicCache

from speckv import drafter_folder, head, pruned
from speckv.corpus import ROLE_ANSWER

MATCH_GAMMA = 4
LOGIT_ROWS = 480   # positions whose logits are made at once: 31 MB for 16,384 tokens, see speckv/memory.py
DEPTH_DECAY = 0.8  # what each further token counts, against the one before


def head_logits(model, hidden):
    """The model's logits from its last hidden states, soft cap included (Gemma 2)."""
    output_head = model.get_output_embeddings()
    logits = output_head(hidden.to(output_head.weight.dtype))
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return torch.tanh(logits / cap) * cap if cap else logits


def _choose(roles, count, generator):
    """Up to count flat indices into [R, L - 1], drawn from the positions whose next token is the target's answer."""
    answers = (roles[:, 1:] == ROLE_ANSWER).flatten().nonzero().flatten()
    return answers[torch.randperm(len(answers), generator=generator)[:count]]


def _last(target, hidden):
    """The last of the joined hidden states."""
    return hidden[..., -target.config.get_text_config(decoder=True).hidden_size:]


def _added_mask(seen):
    """What is added to attention's scores [1, 1, L, keys] f32, where seen [L, keys] tells which keys count.

    Of the implementations of attention in transformers, "eager", which Gemma 2 has by default, knows no other mask.
    """
    return torch.zeros(1, 1, *seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))


def _mixed_precision(target):
    """bf16 products where the target is held in bf16; many CPUs are faster without."""
    return torch.autocast(target.device.type, torch.bfloat16, enabled=target.dtype == torch.bfloat16)


class PrunedStudent:
    """The target's first layers, trained on its full distribution."""

    kind = pruned.KIND

    def __init__(self, target, num_layers, tensors):
        self._target = target
        self._num_layers = num_layers
        self._device = target.device
        self._drafter = pruned.prune(target, num_layers)
        pruned.fill(self._drafter, tensors, torch.float32, target.device)
        names = pruned.own_state(self._drafter).keys()
        self.own = {key: value for key, value in self._drafter.base_model.named_parameters() if key in names}

    def loss(self, batch, num_positions, generator, done):
        """Cross-entropy against the target at num_positions of its answers; None where the rows hold none.

        done is the share of the training that lies behind, 0 to 1.
        """
        tokens, roles, hidden = batch
        chosen = _choose(roles, num_positions, generator).to(self._device)
        if len(chosen) == 0:
            return None
        with _mixed_precision(self._target):
            output = self._drafter.base_model(tokens[:, :-1].to(self._device), use_cache=False).last_hidden_state
            logits = head_logits(self._drafter, output.flatten(0, 1)[chosen])
            with torch.no_grad():
                features = _last(self._target, hidden)[:, :-1].to(self._device).flatten(0, 1)[chosen]
                teacher = head_logits(self._target, features).float().softmax(-1)
        return F.cross_entropy(logits.float(), teacher)

    @torch.no_grad()
    def judge(self, batch):
        """For each row: match [positions, 4] and whether the text goes on with the target's first choice [positions].

        A causal drafter reads the text itself, so its k-th token from here is its first token k - 1 positions on.
        """
        tokens, roles, hidden = batch
        hidden = _last(self._target, hidden)
        with _mixed_precision(self._target):
            output = self._drafter.base_model(tokens.to(self._device), use_cache=False).last_hidden_state
        for row in range(len(tokens)):
            positions = (roles[row, 1:] == ROLE_ANSWER).nonzero().flatten()
            choice = head_logits(self._target, hidden[row, positions].to(self._device)).argmax(-1).cpu()
            drafted = head_logits(self._drafter, output[row, positions.to(self._device)]).argmax(-1).cpu()
            match = (drafted == choice).unsqueeze(1).expand(-1, MATCH_GAMMA)
            yield match, choice == tokens[row, positions + 1]

    def save(self, folder, card):
        drafter_folder.write(folder, self.kind, self.own, card | {"num_layers": self._num_layers})


class HeadStudent:
    """A feature head, trained several of its own tokens deep on the target's distribution over the tokens it drafts."""

    kind = head.KIND

    def __init__(self, target, depth, tensors, is_trained=False):
        self._target = target
        self._depth = depth
        self._is_trained = is_trained  # the tensors are those of a head that has learned to go on from itself
        self._device = target.device
        self._head = head.build(target, tensors)
        self._head.float()
        names = pruned.own_state(self._head.decoder).keys()
        self.own = {key: value for key, value in self._head.decoder.base_model.named_parameters() if key in names}
        self.own |= {head.COMBINE: self._head.combine, head.FUSE: self._head.fuse}

    def _passes(self, tokens, hidden, depth):
        """What the head makes of every position when it is 1, 2, … depth tokens into a draft: a list of [R, L, H].

        In pass d a position sees the passes before as a draft would have left them: pass 1 (all features the
        target's) up to d - 1 positions back, then one position of each later pass, then itself. The tokens are those
        of the text in every pass: of a draft, only what the target would have written too is ever used.
        """
        length = tokens.shape[1]
        position = torch.arange(length, device=self._device)
        distance = position.unsqueeze(1) - position.unsqueeze(0)  # query - key
        # Of full attention, whatever the layers': a window would drop the keys of earlier passes, not of earlier
        # positions. The masks keep to it instead.
        cache = DynamicCache() if depth > 1 else None
        windows = self._windows(length)
        brought, outputs = self._head.observed(hidden), []
        for d in range(1, depth + 1):
            mask = None  # causal
            if d > 1:
                later = [distance == d - m for m in range(2, d + 1)]
                masks = {kind: _added_mask(torch.cat([(distance >= d - 1) & (distance < window), *later], dim=1))
                         for kind, window in windows.items()}
                # Only a model whose layers may differ takes a mask for each kind.
                mask = masks if len(masks) > 1 else masks.popitem()[1]
            outputs.append(self._head.hidden(
                pad(brought[:, :-1], (0, 0, 1, 0)), tokens, cache,
                position_ids=position.unsqueeze(0), attention_mask=mask))
            if d < depth:
                brought = self._head.continued(outputs[-1])
        return outputs

    def _windows(self, length):
        """How many positions back the layers attend, their own included, by the name of their kind."""
        config = self._head.decoder.config
        kinds = getattr(config.get_text_config(decoder=True), "layer_types", None) or ["any"] * self._head.num_layers
        return {kind: layer.sliding_window if layer.is_sliding else length
                for kind, layer in zip(kinds, DynamicCache(config=config).layers, strict=True)}

    def _depth_at(self, done):
        """One token deep for half of the training, where most is learnt for the least; then step by step deeper. What
        was trained deep would forget its later tokens in that half, and win them back in the other."""
        if self._is_trained:
            return self._depth
        return 1 if done < 0.5 else min(self._depth, 2 + int((2 * done - 1) * (self._depth - 1)))

    def loss(self, batch, num_positions, generator, done):
        """Cross-entropy at num_positions, averaged over the tokens of a draft of growing depth.

        done is the share of the training that lies behind, 0 to 1.
        """
        tokens, roles, hidden = batch
        chosen = _choose(roles, num_positions, generator).to(self._device)
        if len(chosen) == 0:
            return None
        depth = self._depth_at(done)
        tokens, hidden = tokens[:, :-1].to(self._device), hidden[:, :-1].to(self._device)
        total, states = 0.0, _last(self._target, hidden).flatten(0, 1)
        with _mixed_precision(self._target):
            outputs = self._passes(tokens, hidden, depth)
            for part in chosen.split(LOGIT_ROWS):
                with torch.no_grad():
                    teacher = self._head.logits(states[part]).float().softmax(-1)
                for d, output in enumerate(outputs):
                    drafted = self._head.logits(output.flatten(0, 1)[part])
                    share = DEPTH_DECAY ** d * len(part) / len(chosen)
                    total = total + share * F.cross_entropy(drafted.float(), teacher)
        return total / sum(DEPTH_DECAY ** d for d in range(depth))

    @torch.no_grad()
    def judge(self, batch):
        """For each row: match [positions, 4], column k of it k + 1 tokens into a draft, and whether the text goes on
        with the target's first choice [positions]."""
        tokens, roles, hidden = batch
        with _mixed_precision(self._target):
            outputs = self._passes(tokens.to(self._device), hidden.to(self._device), MATCH_GAMMA)
        hidden = _last(self._target, hidden)
        for row in range(len(tokens)):
            positions = (roles[row, 1:] == ROLE_ANSWER).nonzero().flatten()
            choice = head_logits(self._target, hidden[row, positions].to(self._device)).argmax(-1).cpu()
            drafted = [self._head.token_ids[self._head.logits(output[row, positions.to(self._device)]).argmax(-1)]
                       for output in outputs]
            match = torch.stack([ids.cpu() == choice for ids in drafted], dim=1)
            yield match, choice == tokens[row, positions + 1]

    def save(self, folder, card):
        head.save(folder, self._head, card)


def evaluate(student, batches) -> dict:
    """The held-out figures: match, also k tokens into a draft, and how many tokens of a draft are accepted."""
    matches, chains = [], []
    for batch in batches:
        for match, follows in student.judge(batch):
            matches.append(match)
            if len(match) >= MATCH_GAMMA:
                # Token k of the draft that starts at i is drafted at position i + k - 1, k tokens deep.
                ahead = torch.stack([match[k:len(match) - MATCH_GAMMA + 1 + k, k] for k in range(MATCH_GAMMA)], dim=1)
                is_greedy = follows.unfold(0, MATCH_GAMMA, 1).all(-1)
                chains.append(ahead[is_greedy].long().cumprod(-1).cumsum(-1))
    match = torch.cat(matches).float() if matches else torch.zeros(0, MATCH_GAMMA)
    accepted = torch.cat(chains).float() if chains else torch.zeros(0, MATCH_GAMMA)
    by_depth, by_gamma = (figures.mean(0).tolist() if len(figures) else [0.0] * MATCH_GAMMA
                          for figures in (match, accepted))
    return {"match": by_depth[0], "match_by_depth": by_depth, "accepted_at_4": by_gamma[-1],
            "accepted_by_gamma": by_gamma}
