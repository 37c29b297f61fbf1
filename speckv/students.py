"""The two kinds of drafter that distilling trains: what each learns from a batch, and how good it is on held-out text.

A batch is tokens [R, L] i64, roles [R, L] u8 and the target's last hidden states [R, L, H]; position i predicts token
i + 1, and only positions whose next token is the target's own answer count. Both are judged by the same two figures:
match, the share of positions where the drafter's first choice is the target's; and accepted_at_4, the mean number of
draft tokens that a greedy target would accept of four.
"""

import torch
from torch.nn import functional as F
from transformers import DynamicCache

from speckv import drafter_folder, head, pruned
from speckv.corpus import ROLE_ANSWER

MATCH_GAMMA = 4
HEAD_DEPTH = 3           # draft tokens deep that a head is trained
DEPTH_DECAY = 0.8        # what each further token counts, against the one before
FEATURE_WEIGHT = 0.1     # of the distance to the target's hidden states, against the cross-entropy


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


class PrunedStudent:
    """The target's first layers, trained on its full distribution."""

    kind = pruned.KIND

    def __init__(self, target, num_layers):
        self._target = target
        self._num_layers = num_layers
        self._device = target.device
        self._drafter = pruned.prune(target, num_layers)
        pruned.fill(self._drafter, pruned.first_layers(target, num_layers), torch.float32, target.device)
        names = pruned.own_state(self._drafter).keys()
        self.own = {key: value for key, value in self._drafter.base_model.named_parameters() if key in names}

    def loss(self, batch, num_positions, generator):
        """Cross-entropy against the target at num_positions of its answers; None where the rows hold none."""
        tokens, roles, hidden = batch
        chosen = _choose(roles, num_positions, generator).to(self._device)
        if len(chosen) == 0:
            return None
        with torch.autocast(self._device.type, torch.bfloat16):
            output = self._drafter.base_model(tokens[:, :-1].to(self._device), use_cache=False).last_hidden_state
            logits = head_logits(self._drafter, output.flatten(0, 1)[chosen])
            with torch.no_grad():
                features = hidden[:, :-1].to(self._device).flatten(0, 1)[chosen]
                teacher = head_logits(self._target, features).float().softmax(-1)
        return F.cross_entropy(logits.float(), teacher)

    @torch.no_grad()
    def judge(self, batch):
        """For each row: match [positions, 4] and whether the text goes on with the target's first choice [positions].

        A causal drafter reads the text itself, so its k-th token from here is its first token k - 1 positions on.
        """
        tokens, roles, hidden = batch
        with torch.autocast(self._device.type, torch.bfloat16):
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

    def __init__(self, target, token_ids):
        self._target = target
        self._device = target.device
        self._head = head.build(target, head.initial_tensors(target, token_ids))
        self._head.float()
        names = pruned.own_state(self._head.layer).keys()
        self.own = {key: value for key, value in self._head.layer.base_model.named_parameters() if key in names}
        self.own[head.COMBINE] = self._head.combine

    def _passes(self, tokens, features, depth):
        """What the head makes of every position when it is 1, 2, … depth tokens into a draft: a list of [R, L, H].

        In pass d a position sees the passes before as a draft would have left them: pass 1 (all features the
        target's) up to d - 1 positions back, then one position of each later pass, then itself.
        """
        length = tokens.shape[1]
        position = torch.arange(length, device=self._device)
        distance = position.unsqueeze(1) - position.unsqueeze(0)  # query - key
        cache = DynamicCache(config=self._head.layer.config)
        fed, outputs = features, []
        for d in range(1, depth + 1):
            before = F.pad(fed[:, :-1], (0, 0, 1, 0))
            seen = [distance >= d - 1] + [distance == d - m for m in range(2, d + 1)]
            output = self._head.hidden(
                before, tokens, past_key_values=cache, use_cache=True, position_ids=position.unsqueeze(0),
                attention_mask=torch.cat(seen, dim=1).expand(len(tokens), 1, -1, -1))
            outputs.append(output.last_hidden_state)
            fed = outputs[-1]
        return outputs

    def loss(self, batch, num_positions, generator):
        """Cross-entropy and distance of features, at num_positions, summed over HEAD_DEPTH tokens of a draft."""
        tokens, roles, hidden = batch
        chosen = _choose(roles, num_positions, generator).to(self._device)
        if len(chosen) == 0:
            return None
        tokens, features = tokens[:, :-1].to(self._device), hidden[:, :-1].to(self._device)
        wanted = features.flatten(0, 1)[chosen]
        with torch.autocast(self._device.type, torch.bfloat16):
            with torch.no_grad():
                teacher = self._head.logits(wanted).float().softmax(-1)
            total = 0.0
            for d, output in enumerate(self._passes(tokens, features, HEAD_DEPTH)):
                made = output.flatten(0, 1)[chosen]
                loss = F.cross_entropy(self._head.logits(made).float(), teacher)
                loss = loss + FEATURE_WEIGHT * F.smooth_l1_loss(made.float(), wanted.float())
                total = total + DEPTH_DECAY ** d * loss
        return total / sum(DEPTH_DECAY ** d for d in range(HEAD_DEPTH))

    @torch.no_grad()
    def judge(self, batch):
        """For each row: match [positions, 4], column k of it k + 1 tokens into a draft, and whether the text goes on
        with the target's first choice [positions]."""
        tokens, roles, hidden = batch
        with torch.autocast(self._device.type, torch.bfloat16):
            outputs = self._passes(tokens.to(self._device), hidden.to(self._device), MATCH_GAMMA)
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
    """The two held-out figures, and the match k tokens into a draft."""
    matches, chains = [], []
    for batch in batches:
        for match, follows in student.judge(batch):
            matches.append(match)
            if len(match) >= MATCH_GAMMA:
                # Token k of the draft that starts at i is drafted at position i + k - 1, k tokens deep.
                ahead = torch.stack([match[k:len(match) - MATCH_GAMMA + 1 + k, k] for k in range(MATCH_GAMMA)], dim=1)
                is_greedy = follows.unfold(0, MATCH_GAMMA, 1).all(-1)
                chains.append(ahead[is_greedy].long().cumprod(-1).sum(-1))
    match = torch.cat(matches).float() if matches else torch.zeros(0, MATCH_GAMMA)
    accepted = torch.cat(chains).float() if chains else torch.zeros(0)
    by_depth = match.mean(0).tolist() if len(match) else [0.0] * MATCH_GAMMA
    return {"match": by_depth[0], "match_by_depth": by_depth,
            "accepted_at_4": accepted.mean().item() if len(accepted) else 0.0}
