"""Chain verification with one rule exchanged, and the checks that must tell the right rules from the wrong ones.

A statistical test that cannot fail proves nothing: the same functions that check the ops are run against these.
"""

import torch

LARGEST_UNIFORM = 1 - 2**-24


def sampled_chain(target_logits, draft_logits, draft_tokens, uniform, num_draft=None, temperature=1.0):
    """Arguments of verify_chain; num_draft is the full draft, temperature one for all rows."""
    batch, gamma = draft_logits.shape[:2]
    return {
        "target_logits": target_logits, "draft_logits": draft_logits,
        "draft_tokens": torch.as_tensor(draft_tokens, dtype=torch.int64).reshape(batch, gamma),
        "num_draft": torch.full((batch,), gamma) if num_draft is None else torch.tensor(num_draft),
        "temperature": torch.full((batch,), temperature), "uniform": torch.as_tensor(uniform),
    }


def strictly_below_the_ratio(uniform, p, q):
    return uniform * q < p


def up_to_the_ratio(uniform, p, q):
    """Wrong: at u = 0 it accepts a token that the target cannot write."""
    return uniform * q <= p


def below_p(uniform, p, q):
    """Wrong: forgets that the token was drawn from q."""
    return uniform < p


def clamped_difference(p, q):
    return (p - q).clamp(min=0)


def absolute_difference(p, q):
    """Wrong: the clamp is missing, so what the draft had too much of comes back."""
    return (p - q).abs()


def target_itself(p, q):
    """Wrong: draws the recovered token from p."""
    return p


def verifier(accepts=strictly_below_the_ratio, residual=clamped_difference):
    """verify_chain for sampled rows of full drafts, with these two rules."""
    def verify(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform):
        batch, gamma = draft_tokens.shape
        rows = torch.arange(batch)
        p = torch.softmax(target_logits.double() / temperature.reshape(-1, 1, 1), dim=-1)
        q = torch.softmax(draft_logits.double() / temperature.reshape(-1, 1, 1), dim=-1)
        p_token = p[:, :gamma].gather(-1, draft_tokens.unsqueeze(-1)).squeeze(-1)
        q_token = q.gather(-1, draft_tokens.unsqueeze(-1)).squeeze(-1)
        accepted = accepts(uniform[:, :gamma], p_token, q_token).long().cumprod(dim=1).sum(dim=1)

        p_stop = p[rows, accepted]
        q_stop = torch.nn.functional.pad(q, (0, 0, 0, 1))[rows, accepted]
        weights = torch.where((accepted < gamma).unsqueeze(1), residual(p_stop, q_stop), p_stop)
        cdf = weights.cumsum(dim=-1)
        threshold = uniform[:, gamma:].double() * cdf[:, -1:]
        next_token = torch.searchsorted(cdf, threshold, right=True).squeeze(1)

        kept = torch.arange(gamma + 1) < accepted.unsqueeze(1)
        tokens = torch.nn.functional.pad(draft_tokens, (0, 1)).where(kept, -1)
        return tokens.scatter(1, accepted.unsqueeze(1), next_token.unsqueeze(1)), accepted
    return verify


def assert_no_zero_probability_token(verify):
    """u = 0 at a draft token that the target has masked: it is rejected, and what follows is in the support."""
    target = torch.tensor([0.0, 0.5, 0.5, 0.0]).log().expand(2, 2, 4)
    draft = torch.tensor([0.4, 0.2, 0.2, 0.2]).log().expand(2, 1, 4)
    values = sampled_chain(target, draft, [[0], [3]], [[0.0, 0.0], [0.0, LARGEST_UNIFORM]])
    tokens, accepted = verify(**values)
    assert accepted.tolist() == [0, 0], "a token of probability zero was accepted"
    assert tokens.tolist() == [[1, -1], [2, -1]]
