"""Draws and decisions in fp64, one row at a time, with their distance to the nearest boundary; and comparisons.

Backends agree on a token wherever the uniform is more than BOUNDARY away from the place where the answer changes;
nearer than that, fp32 may decide either way.
"""

import math

import torch
from helpers_ops import BACKEND, TOLERANCE, call, call_reference

BOUNDARY = 1e-6
RARELY = 0.02  # share of rows that may lie near a boundary: with more, a test would compare too little


def softmax64(logits, temperature):
    logits = logits.double()
    return torch.softmax((logits - logits.max()) / (temperature or 1.0), dim=-1)


def draw64(weights, uniform):
    """The token that inverse CDF gives, and how far the uniform is from the nearest boundary."""
    cdf = weights.cumsum(0) / weights.sum()
    token = min(int(torch.searchsorted(cdf, uniform, right=True)), int(weights.nonzero().max()))
    return token, float((cdf - uniform).abs().min())


def filter64(logits, temperature, top_k=0, top_p=1.0, min_p=0.0):
    """The logits with -inf where a filter removes them, and how far the filters are from deciding otherwise."""
    logits, distance = logits.double(), 1.0
    if not temperature:
        return logits, distance
    if top_k:
        least = logits.sort(descending=True).values[min(top_k, len(logits)) - 1]
        logits = logits.where(logits >= least, -math.inf)
    highest = logits.max()
    if top_p < 1:
        values, place = logits.unique(return_inverse=True)
        mass = torch.zeros(len(values), dtype=torch.float64).index_add(0, place, softmax64(logits, temperature))
        above = 1 - mass.cumsum(0)  # of all higher values: equal logits share their fate
        distance = float((above[:-1] - top_p).abs().min()) if len(values) > 1 else 1.0
        logits = logits.where((above < top_p)[place] | (logits == highest), -math.inf)
    if min_p:
        ratio = torch.exp((logits - highest) / temperature)
        below = ratio[logits < highest]
        distance = min(distance, float((below - min_p).abs().min())) if len(below) else distance
        logits = logits.where(ratio >= min_p, -math.inf)
    return logits, distance


def settings_of_row(row, top_k=None, top_p=None, min_p=None):
    """The filters of one row as numbers."""
    settings = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    return {name: tensor[row].item() for name, tensor in settings.items() if tensor is not None}


def draft_sample64(logits, temperature, uniform, **filters):
    """Token, its distance to the nearest boundary, its probability, entropy and confidence, each [B]."""
    rows = []
    for i, (row, t, u) in enumerate(zip(logits, temperature.tolist(), uniform.tolist(), strict=True)):
        kept, margin = filter64(row, t, **settings_of_row(i, **filters))
        p, q = softmax64(row, 1.0), softmax64(kept, t)
        token, distance = draw64(q, u) if t else (int(row.double().argmax()), 1.0)
        distance = min(distance, margin)
        entropy = -torch.special.xlogy(p, p).sum() / math.log(2)
        rows.append((token, distance, float(q[token]) if t else 1.0, float(entropy), float(p.max())))
    token, *numbers = zip(*rows, strict=True)
    return torch.tensor(token), *map(torch.tensor, numbers)


def verify_chain64(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, **filters):
    """Tokens, accepted, and each row's smallest distance to a boundary among the decisions that it took."""
    batch, width, _ = target_logits.shape
    tokens = torch.full((batch, width), -1)
    accepted = torch.zeros(batch, dtype=torch.int64)
    distances = torch.ones(batch)
    for row in range(batch):
        t, u, kept, distance = float(temperature[row]), uniform[row].tolist(), 0, 1.0
        weights = None
        settings = settings_of_row(row, **filters)

        def distribution64(logits, t=t, settings=settings):
            kept, margin = filter64(logits, t, **settings)
            return softmax64(kept, t), margin
        for position in range(int(num_draft[row])):
            token = int(draft_tokens[row, position])
            if token < 0:
                break
            p, margin = distribution64(target_logits[row, position])
            distance = min(distance, margin)
            if t == 0:
                keep = token == int(target_logits[row, position].double().argmax())
            else:
                q, margin = distribution64(draft_logits[row, position])
                distance = min(distance, margin)
                keep = u[position] * q[token] < p[token]
                if q[token] > 0:
                    distance = min(distance, abs(u[position] - float(p[token] / q[token])))
            if not keep:
                weights = (p - q).clamp(min=0) if t else None
                break
            tokens[row, kept] = token
            kept += 1
        if weights is None or not weights.any():
            weights, margin = distribution64(target_logits[row, kept])
            distance = min(distance, margin)
        if t == 0:
            tokens[row, kept] = int(target_logits[row, kept].double().argmax())
        else:
            tokens[row, kept], nearest = draw64(weights, u[int(num_draft[row])])
            distance = min(distance, nearest)
        accepted[row], distances[row] = kept, distance
    return tokens, accepted, distances


def assert_close(actual, expected, dtype, what=""):
    torch.testing.assert_close(actual, expected, **TOLERANCE[dtype], msg=lambda text: f"{what}: {text}")


def assert_draft_sample_agrees(values, outputs=None):
    """The serving backend against the reference, and both against fp64, on draft_sample's four outputs."""
    logits = values["logits"]
    outputs = call("draft_sample", values) if outputs is None else outputs
    assert [out.dtype for out in outputs] == [torch.int64, *[torch.float32] * 3]
    assert all(out.shape == logits.shape[:1] for out in outputs)

    filters = {name: values[name] for name in ("top_k", "top_p", "min_p") if name in values}
    token64, distance, *numbers64 = draft_sample64(logits, values["temperature"], values["uniform"], **filters)
    certain = distance > BOUNDARY
    assert (~certain).float().mean() <= RARELY
    expected = call_reference("draft_sample", values)
    for backend, (token, *numbers) in ((BACKEND, outputs), ("reference", expected)):
        assert torch.equal(token[certain], token64[certain]), f"tokens of {backend}"
        drawn = certain | (token == token64)
        for name, number, number64 in zip(("prob", "entropy", "confidence"), numbers, numbers64, strict=True):
            assert_close(number[drawn], number64[drawn], logits.dtype, f"{name} of {backend} against fp64")
    for name, number, reference in zip(("prob", "entropy", "confidence"), outputs[1:], expected[1:], strict=True):
        assert_close(number[certain], reference[certain], logits.dtype, f"{name} of {BACKEND} against the reference")


def assert_chain_is_well_formed(values, tokens, accepted):
    """Accepted draft tokens, one more token of the vocabulary, then -1."""
    draft_tokens, num_draft = values["draft_tokens"], values["num_draft"]
    batch, width, vocabulary = values["target_logits"].shape
    assert tokens.shape == (batch, width) and tokens.dtype == torch.int64
    assert accepted.shape == (batch,) and accepted.dtype == torch.int64
    assert ((accepted >= 0) & (accepted <= num_draft)).all()
    assert torch.equal(accepted + 1, (tokens != -1).sum(dim=1))
    position = torch.arange(width)
    kept = position < accepted.unsqueeze(1)
    assert torch.equal(tokens[:, :-1][kept[:, :-1]], draft_tokens[kept[:, :-1]])
    written = position <= accepted.unsqueeze(1)
    assert ((tokens[written] >= 0) & (tokens[written] < vocabulary)).all()
    assert (tokens[~written] == -1).all()


def assert_verify_chain_agrees(values):
    """The serving backend against the reference, and both against fp64; returns what the backend gave."""
    tokens, accepted = call("verify_chain", values)
    assert_chain_is_well_formed(values, tokens, accepted)
    expected = call_reference("verify_chain", values)
    tokens64, accepted64, distance = verify_chain64(**values)
    certain = distance > BOUNDARY
    assert (~certain).float().mean() <= RARELY
    for backend, (some_tokens, some_accepted) in ((BACKEND, (tokens, accepted)), ("reference", expected)):
        assert torch.equal(some_accepted[certain], accepted64[certain]), f"accepted of {backend} against fp64"
        assert torch.equal(some_tokens[certain], tokens64[certain]), f"tokens of {backend} against fp64"
    return tokens, accepted
