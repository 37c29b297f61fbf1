"""What every backend refuses, and in which words: shapes and dtypes (checked in shape functions too), then values.

Shapes are checked by the functions named after the ops, with torch._check so that tracing can use them. Values are
checked by the reference; the C++ kernels check the same things with the same words, and Triton, which cannot raise,
returns token or gamma -1 in a row where these would raise.
"""

import torch

LOGIT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LARGEST_RATE = 1e30  # tokens per second; as fp32 it is finite


def _shape(op, name, tensor, *expected):
    """Check dtype-independent shape; `expected` holds an int, or None where any size will do."""
    torch._check(tensor.dim() == len(expected),
                 lambda: f"{op}: {name} must have {len(expected)} dimensions, got {tensor.dim()}")
    for axis, size in enumerate(expected):
        if size is not None:
            torch._check(tensor.shape[axis] == size,
                         lambda axis=axis, size=size: f"{op}: {name} must have size {size} in dimension {axis}, "
                                                      f"got {tensor.shape[axis]}")


def _dtype(op, name, tensor, dtype, words):
    torch._check(tensor.dtype == dtype, lambda: f"{op}: {name} must be {words}")


def _device(op, first, *others):
    for tensor in others:
        torch._check(tensor.device == first.device, lambda: f"{op}: all inputs must be on one device")


def _floating(op, name, tensor):
    torch._check(tensor.dtype in LOGIT_DTYPES, lambda: f"{op}: {name} must be float32, float16 or bfloat16")


def _unit_stride(op, name, tensor):
    torch._check(tensor.stride(-1) == 1 or tensor.shape[-1] == 1,
                 lambda: f"{op}: {name} must be contiguous in its last dimension")


def _logits(op, name, logits):
    _floating(op, name, logits)
    torch._check(logits.shape[-1] >= 1, lambda: f"{op}: {name} must have a vocabulary of at least 1")
    _unit_stride(op, name, logits)


def _filters(op, logits, top_k, top_p, min_p):
    float32 = torch.float32, "float32"
    for name, tensor, dtype in (("top_k", top_k, (torch.int64, "int64")), ("top_p", top_p, float32),
                                ("min_p", min_p, float32)):
        if tensor is not None:
            _shape(op, name, tensor, logits.shape[0])
            _dtype(op, name, tensor, *dtype)
            _device(op, logits, tensor)


def draft_sample(logits, temperature, uniform, top_k=None, top_p=None, min_p=None, op="draft_sample"):
    _shape(op, "logits", logits, None, None)
    _logits(op, "logits", logits)
    _shape(op, "temperature", temperature, logits.shape[0])
    _dtype(op, "temperature", temperature, torch.float32, "float32")
    _shape(op, "uniform", uniform, logits.shape[0])
    _dtype(op, "uniform", uniform, torch.float32, "float32")
    _filters(op, logits, top_k, top_p, min_p)
    _device(op, logits, temperature, uniform)


def plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate=0.0, op="plan_gamma"):
    _shape(op, "signals", signals, None, None)
    torch._check(signals.shape[1] >= 5, lambda: f"{op}: signals must have at least 5 columns, got {signals.shape[1]}")
    _shape(op, "w1", w1, signals.shape[1] + 1, None)
    torch._check(w1.shape[1] >= 1, lambda: f"{op}: w1 must have at least one hidden unit")
    _shape(op, "b1", b1, w1.shape[1])
    _shape(op, "w2", w2, w1.shape[1], 1)
    _shape(op, "b2", b2, 1)
    for name, tensor in (("signals", signals), ("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2), ("seconds", seconds)):
        _dtype(op, name, tensor, torch.float32, "float32")
    _shape(op, "gammas", gammas, None)
    _dtype(op, "gammas", gammas, torch.int64, "int64")
    torch._check(gammas.shape[0] >= 1, lambda: f"{op}: gammas must name at least one candidate")
    _shape(op, "seconds", seconds, gammas.shape[0])
    torch._check(0 <= rate <= LARGEST_RATE, lambda: f"{op}: rate must be finite and >= 0")
    _device(op, signals, w1, b1, w2, b2, gammas, seconds)


def draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate=0.0,
               top_k=None, top_p=None, min_p=None):
    op = "draft_step"
    draft_sample(logits, temperature, uniform, top_k, top_p, min_p, op)
    plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate, op)
    _shape(op, "signals", signals, logits.shape[0], None)
    _shape(op, "drafted", drafted, logits.shape[0])
    _dtype(op, "drafted", drafted, torch.int64, "int64")
    _device(op, logits, signals, drafted)


def verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                 top_k=None, top_p=None, min_p=None):
    op = "verify_chain"
    _shape(op, "target_logits", target_logits, None, None, None)
    batch, width, vocabulary = target_logits.shape
    torch._check(width >= 1, lambda: f"{op}: target_logits must have at least one position")
    _logits(op, "target_logits", target_logits)
    _shape(op, "draft_logits", draft_logits, batch, width - 1, vocabulary)
    _logits(op, "draft_logits", draft_logits)
    _shape(op, "draft_tokens", draft_tokens, batch, width - 1)
    _dtype(op, "draft_tokens", draft_tokens, torch.int64, "int64")
    _shape(op, "num_draft", num_draft, batch)
    _dtype(op, "num_draft", num_draft, torch.int64, "int64")
    _shape(op, "temperature", temperature, batch)
    _dtype(op, "temperature", temperature, torch.float32, "float32")
    _shape(op, "uniform", uniform, batch, width)
    _dtype(op, "uniform", uniform, torch.float32, "float32")
    _filters(op, target_logits, top_k, top_p, min_p)
    _device(op, target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform)


def _heads(op, name, tensor, *expected):
    _shape(op, name, tensor, *expected)
    _floating(op, name, tensor)
    torch._check(tensor.shape[3] >= 1, lambda: f"{op}: {name} must have heads of at least 1")
    _unit_stride(op, name, tensor)


def decode_attention(query, key, value, scale):
    op = "decode_attention"
    _heads(op, "query", query, None, None, None, None)
    _heads(op, "key", key, query.shape[0], None, None, query.shape[3])
    _heads(op, "value", value, query.shape[0], key.shape[1], key.shape[2], None)
    torch._check(key.dtype == query.dtype and value.dtype == query.dtype,
                 lambda: f"{op}: query, key and value must have one dtype")
    torch._check(key.shape[1] >= 1 and query.shape[1] % key.shape[1] == 0,
                 lambda: f"{op}: query must have a multiple of the {key.shape[1]} heads of key, got {query.shape[1]}")
    torch._check(query.shape[2] <= key.shape[2],
                 lambda: f"{op}: query has {query.shape[2]} tokens, key only {key.shape[2]}")
    torch._check(0 < scale <= 1e30, lambda: f"{op}: scale must be finite and > 0")
    _device(op, query, key, value)


def linear_int8(x, weight, scale):
    op = "linear_int8"
    _shape(op, "x", x, None, None)
    _floating(op, "x", x)
    torch._check(x.shape[1] >= 1, lambda: f"{op}: x must have at least one column")
    _unit_stride(op, "x", x)
    _shape(op, "weight", weight, None, x.shape[1])
    _dtype(op, "weight", weight, torch.int8, "int8")
    torch._check(weight.shape[0] >= 1, lambda: f"{op}: weight must have at least one row")
    _unit_stride(op, "weight", weight)
    _shape(op, "scale", scale, weight.shape[0])
    _dtype(op, "scale", scale, torch.float32, "float32")
    _device(op, x, weight, scale)


def _first(bad):
    """Row-major index of the first True, as a tuple of ints."""
    return tuple(bad.nonzero()[0].tolist())


def sampling_values(op, temperature, uniform):
    bad = ~(temperature.isfinite() & (temperature >= 0))
    if bad.any():
        raise RuntimeError(f"{op}: row {_first(bad)[0]}: temperature must be finite and >= 0")
    bad = ~((uniform >= 0) & (uniform < 1))
    if bad.any():
        raise RuntimeError(f"{op}: row {_first(bad)[0]}: uniform must be in [0, 1)")


def filter_values(op, top_k, top_p, min_p):
    if top_k is not None and (top_k < 0).any():
        raise RuntimeError(f"{op}: row {_first(top_k < 0)[0]}: top_k must be >= 0")
    for name, share in (("top_p", top_p), ("min_p", min_p)):
        if share is not None and (bad := ~((share >= 0) & (share <= 1))).any():
            raise RuntimeError(f"{op}: row {_first(bad)[0]}: {name} must be in [0, 1]")


def seconds_values(op, seconds):
    if not (seconds.isfinite() & (seconds > 0)).all():
        raise RuntimeError(f"{op}: seconds must be finite and > 0")


def drafted_values(op, drafted):
    if (drafted < 0).any():
        raise RuntimeError(f"{op}: row {_first(drafted < 0)[0]}: drafted must be >= 0")


def acceptance_values(op, acceptance):
    bad = ~acceptance.isfinite()
    if bad.any():
        raise RuntimeError(f"{op}: row {_first(bad)[0]}: predicted acceptance is not finite")


def _bad_logits(logits):
    """True for the rows (all dimensions but the last) that are not a distribution."""
    return logits.isnan().any(-1) | logits.isposinf().any(-1) | logits.isneginf().all(-1)


def _reason(row):
    if row.isnan().any():
        return "a logit is NaN"
    return "a logit is +inf" if row.isposinf().any() else "every logit is -inf"


def logit_values(op, logits):
    bad = _bad_logits(logits)
    if bad.any():
        (row,) = _first(bad)
        raise RuntimeError(f"{op}: row {row}: {_reason(logits[row])}")


def draft_values(draft_tokens, num_draft, proposed, vocabulary):
    bad = (num_draft < 0) | (num_draft > draft_tokens.shape[1])
    if bad.any():
        raise RuntimeError(f"verify_chain: row {_first(bad)[0]}: num_draft must be in [0, {draft_tokens.shape[1]}]")
    bad = proposed & (draft_tokens >= vocabulary)
    if bad.any():
        raise RuntimeError(
            f"verify_chain: row {_first(bad)[0]}: a draft token is outside the vocabulary of {vocabulary}")


def verified_values(target_logits, draft_logits, accepted, proposed, greedy):
    """Raise for bad logits among the positions that decided something: those up to and including the stop."""
    position = torch.arange(target_logits.shape[1], device=target_logits.device)
    read = position <= accepted.unsqueeze(1)
    bad_target = _bad_logits(target_logits) & read
    bad_draft = _bad_logits(draft_logits) & read[:, :-1] & proposed & ~greedy.unsqueeze(1)
    for name, logits, bad in (("target", target_logits, bad_target), ("draft", draft_logits, bad_draft)):
        if bad.any():
            row, at = _first(bad)
            raise RuntimeError(f"verify_chain: row {row}, position {at}: {name} logits: {_reason(logits[row, at])}")
