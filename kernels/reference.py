"""The ops in plain PyTorch: the specification that every other backend must match.

Read top to bottom this is the whole method. While drafting, ``draft_sample`` draws a token and says how sure the
drafter was; ``plan_gamma`` turns those signals into a speculation length; ``draft_step`` is both at once; then
``verify_chain`` decides which draft tokens the target keeps, so that what comes out is distributed exactly as the
target alone would have written it. ``linear_int8`` makes a drafter's matrix products cheap,
and ``decode_attention`` the attention of a few tokens, both on a CPU.

Conventions shared by all backends: logits are fp32, fp16 or bf16 and all arithmetic is fp32 (cumulative sums fp64);
the last dimension is unit-stride; a logit of -inf is a masked token with probability exactly 0, never emitted;
temperature 0 means greedy, and one beyond COLDEST or HOTTEST counts as that; uniforms lie in [0, 1) and are inputs, so
equal numbers give equal tokens everywhere.
"""

import math

import torch

from speckv.kernels import checks

COLDEST, HOTTEST = 1 / 3e38, 1e37  # temperatures that have an inverse in fp32, which kernels multiply by
PAPER_SIGNALS = ("mean_entropy", "mean_confidence", "max_entropy", "min_confidence", "compression")


def divisor(temperature):
    """What logits are divided by: the temperature, and 1 where it is 0."""
    return temperature.clamp(COLDEST, HOTTEST).where(temperature > 0, 1.0)


def softmax_with_temperature(logits, temperature):
    """softmax(logits / temperature) over the last dimension in fp32; temperature broadcasts, 0 is computed as 1.

    The maximum is subtracted before dividing, so that a tiny temperature cannot overflow. torch.softmax is not used:
    on the CPU it sums a long row one by one in fp32, and is off by 1e-5 at a vocabulary of 150,000.
    """
    logits = logits.float()
    shifted = logits - logits.amax(dim=-1, keepdim=True)
    weights = torch.exp(shifted / divisor(temperature))
    return weights / weights.sum(dim=-1, keepdim=True)


def sample_inverse_cdf(weights, uniform):
    """Index of the first element whose running sum exceeds uniform * total; weights [B, V] >= 0, uniform [B].

    Zero weights are never chosen: their running sum equals their predecessor's, and a uniform so close to 1 that it
    walks off the end is brought back to the last element with weight.
    """
    cdf = weights.double().cumsum(dim=-1)
    threshold = uniform.double().unsqueeze(-1) * cdf[:, -1:]
    index = torch.searchsorted(cdf, threshold, right=True).squeeze(-1)
    positions = torch.arange(weights.shape[-1], device=weights.device)
    last = positions.where(weights > 0, 0).amax(dim=-1)
    return torch.minimum(index, last)


def filter_logits(logits, temperature, top_k=None, top_p=None, min_p=None):
    """The logits [B, ..., V] in fp32 with -inf for the tokens that the filters of their row remove.

    temperature [B] f32, and each optional: top_k [B] i64 >= 0 keeps the k highest logits (0: all); top_p [B] f32 in
    [0, 1] the fewest of those, from the highest on, that hold this share of their probability (1: all); min_p [B] f32
    in [0, 1] what has at least this share of the highest probability (0: all). Probabilities are those of
    softmax(logits / temperature), and the highest logit always stays. Rows of temperature 0 are greedy and left as
    they are.

    Each filter keeps the logits from some threshold on, so ties stay or go together, whatever their order. That is
    what transformers' TopK-, TopP- and MinPLogitsWarper do in this order, but for top_p where its edge falls between
    tokens of equal logit: transformers then keeps some of them, which ones is up to its sort, and here all stay.

    Sources: top-k, Fan et al., arXiv 1805.04833; top-p, Holtzman et al., arXiv 1904.09751; min-p, Nguyen et al.,
    arXiv 2407.01082.
    """
    logits = logits.float()
    if top_k is None and top_p is None and min_p is None:
        return logits
    vocabulary = logits.shape[-1]

    def by_row(setting):
        return setting.reshape(-1, *[1] * (logits.dim() - 1)).expand(*logits.shape[:-1], 1)
    temperature = by_row(temperature)
    ordered = logits.sort(dim=-1, descending=True).values
    scaled = (ordered - ordered[..., :1]) / divisor(temperature)
    weights = torch.exp(scaled)
    least = ordered[..., -1:]  # the threshold
    if top_k is not None:
        count = by_row(top_k.where(top_k > 0, vocabulary).clamp(max=vocabulary))
        least = ordered.gather(-1, count - 1)
        weights = weights.where(ordered >= least, 0)
    if top_p is not None:
        mass = weights.double().cumsum(dim=-1)
        reached = torch.searchsorted(mass, by_row(top_p) * mass[..., -1:]).clamp(max=vocabulary - 1)
        least = torch.where(by_row(top_p) < 1, torch.maximum(least, ordered.gather(-1, reached)), least)
    if min_p is not None:
        count = (scaled >= by_row(min_p).log()).sum(dim=-1, keepdim=True).clamp(min=1)
        least = torch.maximum(least, ordered.gather(-1, count - 1))
    return logits.masked_fill((logits < least) & (temperature > 0), float("-inf"))


def draft_sample(logits, temperature, uniform, top_k=None, top_p=None, min_p=None):
    """Draw one draft token a row and measure how uncertain the drafter was.

    logits [B, V]; temperature [B] f32; uniform [B] f32 in [0, 1); top_k [B] i64, top_p [B] f32 and min_p [B] f32 as for
    filter_logits, None where no row has that filter.
    Returns token [B] i64; prob [B] f32, the probability of token under softmax(logits / temperature) of what the
    filters keep, 1 when greedy; entropy [B] f32 in bits and confidence [B] f32 (the largest probability), both of
    softmax(logits), as in SpecKV (arXiv 2605.02888, section 3), whatever temperature and filters are. Raises
    RuntimeError for NaN, +inf or all -inf logits, and for values out of range.
    """
    checks.draft_sample(logits, temperature, uniform, top_k, top_p, min_p)
    return _draft_sample("draft_sample", logits, temperature, uniform, top_k, top_p, min_p)


def _draft_sample(op, logits, temperature, uniform, top_k, top_p, min_p):
    checks.sampling_values(op, temperature, uniform)
    checks.filter_values(op, top_k, top_p, min_p)
    checks.logit_values(op, logits)

    drafter = softmax_with_temperature(logits, torch.ones_like(temperature).unsqueeze(-1))
    entropy = -torch.special.xlogy(drafter, drafter).sum(dim=-1) / math.log(2)
    confidence = drafter.amax(dim=-1)

    kept = filter_logits(logits, temperature, top_k, top_p, min_p)
    q = softmax_with_temperature(kept, temperature.unsqueeze(-1))
    greedy = temperature == 0
    token = torch.where(greedy, logits.float().argmax(dim=-1), sample_inverse_cdf(q, uniform))
    prob = torch.where(greedy, 1.0, q.gather(-1, token.unsqueeze(-1)).squeeze(-1))
    return token, prob, entropy, confidence


def plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate=0.0):
    """Choose a speculation length a row: the candidate with the most predicted tokens per second.

    signals [B, F] f32 with F >= 5, the first five being PAPER_SIGNALS; the controller is the paper's MLP,
    w1 [F+1, H], b1 [H], w2 [H, 1], b2 [1] f32, whose last input is the candidate gamma; gammas [G] i64;
    seconds [G] f32 > 0, what a step with that gamma costs (all ones is the paper's rule).
    Returns gamma [B] i64, the first argmax of tokens / seconds where tokens = clip(acceptance, 0, 1) * gamma + 1, and
    acceptance [B, G] f32 as the MLP gave it. With rate > 0, the tokens per second that a run achieves, gamma is the
    first argmax of tokens - rate * seconds instead: what a step gains over spending its time at that rate, which is the
    choice that makes the run fastest (renewal-reward; Dinkelbach, 1967). Raises RuntimeError where acceptance is not
    finite.
    """
    checks.plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate)
    return _plan_gamma("plan_gamma", signals, w1, b1, w2, b2, gammas, seconds, rate)


def _plan_gamma(op, signals, w1, b1, w2, b2, gammas, seconds, rate):
    checks.seconds_values(op, seconds)

    rows, candidates = signals.shape[0], gammas.shape[0]
    features = torch.cat([
        signals.unsqueeze(1).expand(rows, candidates, -1),
        gammas.float().reshape(1, candidates, 1).expand(rows, candidates, 1),
    ], dim=-1)
    hidden = torch.relu(features @ w1 + b1)
    acceptance = (hidden @ w2 + b2).squeeze(-1)
    checks.acceptance_values(op, acceptance)

    tokens = acceptance.clamp(0, 1) * gammas + 1
    score = tokens - rate * seconds if rate > 0 else tokens / seconds
    return gammas[score.argmax(dim=-1)], acceptance


def update_signals(signals, drafted, entropy, confidence):
    """The running signals [B, F] with one more draft token in them; `drafted` [B] i64 tokens were in them before."""
    drafted = drafted.float()
    first = drafted == 0
    updated = signals.clone()
    updated[:, 0] = torch.where(first, entropy, (signals[:, 0] * drafted + entropy) / (drafted + 1))
    updated[:, 1] = torch.where(first, confidence, (signals[:, 1] * drafted + confidence) / (drafted + 1))
    updated[:, 2] = torch.where(first, entropy, torch.maximum(signals[:, 2], entropy))
    updated[:, 3] = torch.where(first, confidence, torch.minimum(signals[:, 3], confidence))
    return updated


def draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate=0.0,
               top_k=None, top_p=None, min_p=None):
    """The draft side of a step: draft_sample, the signals brought up to date, plan_gamma; inputs as for those.

    drafted [B] i64 >= 0 counts the draft tokens already in signals [B, F] f32; at 0 the old values are not read.
    Returns token, prob, entropy, confidence, signals, gamma. The decoding loop drafts on while gamma > drafted + 1.
    """
    checks.draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate,
                      top_k, top_p, min_p)
    checks.drafted_values("draft_step", drafted)
    token, prob, entropy, confidence = _draft_sample("draft_step", logits, temperature, uniform, top_k, top_p, min_p)
    signals = update_signals(signals, drafted, entropy, confidence)
    gamma, _ = _plan_gamma("draft_step", signals, w1, b1, w2, b2, gammas, seconds, rate)
    return token, prob, entropy, confidence, signals, gamma


def verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                 top_k=None, top_p=None, min_p=None):
    """Keep the longest prefix of the draft that speculative sampling accepts, and add one token of the target's own.

    target_logits [B, K+1, V]: row i is the target's prediction of position i; draft_logits [B, K, V];
    draft_tokens [B, K] i64 (a negative id is padding and ends the row's draft); num_draft [B] i64 in [0, K];
    temperature [B] f32; uniform [B, K+1] f32 in [0, 1): column i decides on draft token i, and column num_draft[b]
    draws the token after the accepted ones. top_k, top_p and min_p [B], as for filter_logits, hold for all positions
    of a row, of the target and of the draft: p is the target's distribution after them, and q, where they are the
    settings that the draft tokens were drawn with, what those were drawn from. Returns tokens [B, K+1] i64 (accepted
    tokens, then the recovered or bonus token, then -1) and accepted [B] i64. Raises RuntimeError for bad logits in a
    row that decides something.

    Source: Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv 2302.01318, theorem 1.
    """
    checks.verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                        top_k, top_p, min_p)
    checks.sampling_values("verify_chain", temperature, uniform)
    checks.filter_values("verify_chain", top_k, top_p, min_p)
    batch, width, vocabulary = target_logits.shape
    max_draft = width - 1
    rows = torch.arange(batch, device=target_logits.device)
    position = torch.arange(width, device=target_logits.device)
    proposed = (position[:max_draft] < num_draft.unsqueeze(1)) & (draft_tokens >= 0)
    proposed = proposed.cumprod(dim=1).bool()
    checks.draft_values(draft_tokens, num_draft, proposed, vocabulary)

    greedy = temperature == 0
    filters = top_k, top_p, min_p
    p = softmax_with_temperature(filter_logits(target_logits, temperature, *filters), temperature.reshape(-1, 1, 1))
    q = softmax_with_temperature(filter_logits(draft_logits, temperature, *filters), temperature.reshape(-1, 1, 1))
    best = target_logits.float().argmax(dim=-1)

    # Accept token i with probability min(1, p/q). Multiplying keeps q = 0 harmless, and the strict comparison keeps
    # p = 0 out even when the uniform is 0.
    token = draft_tokens.where(proposed, 0)
    p_token = p[:, :max_draft].gather(-1, token.unsqueeze(-1)).squeeze(-1)
    q_token = q.gather(-1, token.unsqueeze(-1)).squeeze(-1)
    keep = torch.where(greedy.unsqueeze(1), token == best[:, :max_draft], uniform[:, :max_draft] * q_token < p_token)
    accepted = (keep & proposed).cumprod(dim=1).sum(dim=1)
    checks.verified_values(target_logits, draft_logits, accepted, proposed, greedy)

    # After a rejection the next token comes from what the target has and the draft has not, max(0, p - q); where
    # nothing was proposed (the draft is used up), q is zero and this is p itself.
    rejected = accepted < proposed.sum(dim=1)
    q_stop = torch.nn.functional.pad(q, (0, 0, 0, 1))[rows, accepted] * rejected.unsqueeze(1)
    p_stop = p[rows, accepted]
    residual = (p_stop - q_stop).clamp(min=0)
    residual = torch.where(residual.sum(dim=-1, keepdim=True) > 0, residual, p_stop)
    next_uniform = uniform.gather(1, num_draft.unsqueeze(1)).squeeze(1)
    next_token = torch.where(greedy, best[rows, accepted], sample_inverse_cdf(residual, next_uniform))

    padded = torch.nn.functional.pad(token, (0, 1))
    tokens = padded.where(position < accepted.unsqueeze(1), -1)
    tokens[rows, accepted] = next_token
    return tokens, accepted


def linear_int8(x, weight, scale):
    """A linear map whose weights are held in int8 with one scale a row: (x @ weight^T) * scale, summed in fp32.

    x [M, K] fp32, fp16 or bf16; weight [N, K] i8; scale [N] f32; rows of x and weight may lie any distance apart.
    Returns [M, N] of x's dtype. The C++ kernel is made for few rows, where the time goes into reading the weights.
    There is no Triton kernel: a GPU reads the 16-bit weights fast enough, and runs this reference.
    """
    checks.linear_int8(x, weight, scale)
    return ((x.float() @ weight.float().T) * scale).to(x.dtype)


def decode_attention(query, key, value, scale):
    """Causal attention of the last few tokens of a sequence over all of it: softmax(query · key · scale) · value.

    query [B, H, n, D] of the last n tokens; key [B, G, L, D], value [B, G, L, E], H a multiple of G: heads share keys
    in runs of H / G (grouped-query attention); scale > 0. All fp32, fp16 or bf16, of one dtype, unit stride in the last
    dimension. Returns [B, n, H, E] in that dtype; token i sees the first L - n + i + 1 positions. What a token gets
    from the C++ kernel is the same bits however many are asked with it. There is no Triton kernel: a GPU has several.

    Source: Ainslie et al., GQA, arXiv 2305.13245.
    """
    checks.decode_attention(query, key, value, scale)
    batch, heads, tokens, size = query.shape
    groups, positions = key.shape[1:3]
    in_group = heads // groups * tokens
    rows = query.float().reshape(batch, groups, in_group, size)
    scores = (rows @ key.float().transpose(2, 3)).reshape(batch, heads, tokens, positions) * scale
    position = torch.arange(positions, device=query.device)
    hidden = position > position[positions - tokens:].unsqueeze(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
    out = weights.reshape(batch, groups, in_group, positions) @ value.float()
    return out.reshape(batch, heads, tokens, value.shape[3]).transpose(1, 2).contiguous().to(query.dtype)
