"""Bad shapes and dtypes are refused in the same words for real and for fake tensors; good ones predict outputs."""

import pytest
import torch
from helpers_ops import (
    call,
    call_reference,
    random_attention,
    random_chain,
    random_controller,
    random_filters,
    random_linear,
    random_logits,
    random_signals,
)
from torch._subclasses.fake_tensor import FakeTensorMode

W1, B1, W2, B2 = random_controller(5, hidden=16)
DRAFT = {"logits": random_logits(3, 100), "temperature": torch.ones(3), "uniform": torch.zeros(3), **random_filters(3)}
PLAN = {"signals": random_signals(3), "w1": W1, "b1": B1, "w2": W2, "b2": B2, "gammas": torch.tensor([2, 4]),
        "seconds": torch.ones(2)}
GOOD = {
    "draft_sample": DRAFT,
    "plan_gamma": PLAN,
    "draft_step": {**DRAFT, **PLAN, "drafted": torch.zeros(3, dtype=torch.int64)},
    "verify_chain": {**random_chain((3, 2, 100), rows="sampled"), **random_filters(3)},
    "linear_int8": random_linear(3, 100, 7),
    "decode_attention": random_attention(2, 4, 2, 3, 10, 8, 6),
}

FLOAT64 = torch.float64
LOGITS_REFUSED = [
    ("logits", torch.zeros(100), "logits must have 2 dimensions, got 1"),
    ("logits", torch.zeros(3, 100, dtype=FLOAT64), "logits must be float32, float16 or bfloat16"),
    ("logits", torch.zeros(3, 100, dtype=torch.int64), "logits must be float32, float16 or bfloat16"),
    ("logits", torch.zeros(3, 0), "logits must have a vocabulary of at least 1"),
    ("logits", torch.zeros(100, 3).t(), "logits must be contiguous in its last dimension"),
    ("logits", torch.zeros(3, 1).expand(3, 100), "logits must be contiguous in its last dimension"),
    ("temperature", torch.ones(2), "temperature must have size 3 in dimension 0, got 2"),
    ("temperature", torch.ones(3, 1), "temperature must have 1 dimensions, got 2"),
    ("temperature", torch.ones(3, dtype=FLOAT64), "temperature must be float32"),
    ("uniform", torch.zeros(4), "uniform must have size 3 in dimension 0, got 4"),
    ("uniform", torch.zeros(3, dtype=torch.float16), "uniform must be float32"),
]
FILTERS_REFUSED = [
    ("top_k", torch.ones(2, dtype=torch.int64), "top_k must have size 3 in dimension 0, got 2"),
    ("top_k", torch.ones(3), "top_k must be int64"),
    ("top_p", torch.ones(3, 1), "top_p must have 1 dimensions, got 2"),
    ("top_p", torch.ones(3, dtype=FLOAT64), "top_p must be float32"),
    ("min_p", torch.zeros(4), "min_p must have size 3 in dimension 0, got 4"),
    ("min_p", torch.zeros(3, dtype=torch.int64), "min_p must be float32"),
]
PLAN_REFUSED = [
    ("signals", torch.zeros(5), "signals must have 2 dimensions, got 1"),
    ("signals", torch.zeros(3, 4), "signals must have at least 5 columns, got 4"),
    ("signals", torch.zeros(3, 6), "w1 must have size 7 in dimension 0, got 6"),
    ("signals", torch.zeros(3, 5, dtype=FLOAT64), "signals must be float32"),
    ("w1", torch.zeros(6), "w1 must have 2 dimensions, got 1"),
    ("w1", torch.zeros(6, 0), "w1 must have at least one hidden unit"),
    ("w1", torch.zeros(6, 16, dtype=torch.bfloat16), "w1 must be float32"),
    ("b1", torch.zeros(15), "b1 must have size 16 in dimension 0, got 15"),
    ("b1", torch.zeros(16, dtype=FLOAT64), "b1 must be float32"),
    ("w2", torch.zeros(16), "w2 must have 2 dimensions, got 1"),
    ("w2", torch.zeros(16, 2), "w2 must have size 1 in dimension 1, got 2"),
    ("w2", torch.zeros(16, 1, dtype=FLOAT64), "w2 must be float32"),
    ("b2", torch.zeros(2), "b2 must have size 1 in dimension 0, got 2"),
    ("b2", torch.zeros(1, dtype=FLOAT64), "b2 must be float32"),
    ("gammas", torch.tensor(2), "gammas must have 1 dimensions, got 0"),
    ("gammas", torch.tensor([2.0, 4.0]), "gammas must be int64"),
    ("gammas", torch.tensor([2, 4], dtype=torch.int32), "gammas must be int64"),
    ("gammas", torch.empty(0, dtype=torch.int64), "gammas must name at least one candidate"),
    ("seconds", torch.ones(3), "seconds must have size 2 in dimension 0, got 3"),
    ("seconds", torch.ones(2, dtype=FLOAT64), "seconds must be float32"),
]
STEP_REFUSED = [
    ("signals", torch.zeros(2, 5), "signals must have size 3 in dimension 0, got 2"),
    ("drafted", torch.zeros(2, dtype=torch.int64), "drafted must have size 3 in dimension 0, got 2"),
    ("drafted", torch.zeros(3, 1, dtype=torch.int64), "drafted must have 1 dimensions, got 2"),
    ("drafted", torch.zeros(3), "drafted must be int64"),
]
CHAIN_REFUSED = [
    ("target_logits", torch.zeros(3, 100), "target_logits must have 3 dimensions, got 2"),
    ("target_logits", torch.zeros(3, 0, 100), "target_logits must have at least one position"),
    ("target_logits", torch.zeros(3, 3, 0), "target_logits must have a vocabulary of at least 1"),
    ("target_logits", torch.zeros(3, 3, 100, dtype=FLOAT64), "target_logits must be float32, float16 or bfloat16"),
    ("target_logits", torch.zeros(3, 100, 3).transpose(1, 2),
     "target_logits must be contiguous in its last dimension"),
    ("draft_logits", torch.zeros(3, 100), "draft_logits must have 3 dimensions, got 2"),
    ("draft_logits", torch.zeros(3, 3, 100), "draft_logits must have size 2 in dimension 1, got 3"),
    ("draft_logits", torch.zeros(2, 2, 100), "draft_logits must have size 3 in dimension 0, got 2"),
    ("draft_logits", torch.zeros(3, 2, 99), "draft_logits must have size 100 in dimension 2, got 99"),
    ("draft_logits", torch.zeros(3, 2, 100, dtype=FLOAT64), "draft_logits must be float32, float16 or bfloat16"),
    ("draft_logits", torch.zeros(3, 100, 2).transpose(1, 2), "draft_logits must be contiguous in its last dimension"),
    ("draft_tokens", torch.zeros(3, 3, dtype=torch.int64), "draft_tokens must have size 2 in dimension 1, got 3"),
    ("draft_tokens", torch.zeros(3, dtype=torch.int64), "draft_tokens must have 2 dimensions, got 1"),
    ("draft_tokens", torch.zeros(3, 2, dtype=torch.int32), "draft_tokens must be int64"),
    ("num_draft", torch.zeros(2, dtype=torch.int64), "num_draft must have size 3 in dimension 0, got 2"),
    ("num_draft", torch.zeros(3), "num_draft must be int64"),
    ("temperature", torch.ones(1), "temperature must have size 3 in dimension 0, got 1"),
    ("temperature", torch.ones(3, dtype=FLOAT64), "temperature must be float32"),
    ("uniform", torch.zeros(3, 2), "uniform must have size 3 in dimension 1, got 2"),
    ("uniform", torch.zeros(3, 3, dtype=FLOAT64), "uniform must be float32"),
]
LINEAR_REFUSED = [
    ("x", torch.zeros(100), "x must have 2 dimensions, got 1"),
    ("x", torch.zeros(3, 100, dtype=FLOAT64), "x must be float32, float16 or bfloat16"),
    ("x", torch.zeros(3, 100, dtype=torch.int8), "x must be float32, float16 or bfloat16"),
    ("x", torch.zeros(3, 0), "x must have at least one column"),
    ("x", torch.zeros(100, 3).t(), "x must be contiguous in its last dimension"),
    ("x", torch.zeros(3, 99), "weight must have size 99 in dimension 1, got 100"),
    ("weight", torch.zeros(100, dtype=torch.int8), "weight must have 2 dimensions, got 1"),
    ("weight", torch.zeros(7, 100), "weight must be int8"),
    ("weight", torch.zeros(7, 100, dtype=torch.uint8), "weight must be int8"),
    ("weight", torch.zeros(0, 100, dtype=torch.int8), "weight must have at least one row"),
    ("weight", torch.zeros(100, 7, dtype=torch.int8).t(), "weight must be contiguous in its last dimension"),
    ("scale", torch.ones(6), "scale must have size 7 in dimension 0, got 6"),
    ("scale", torch.ones(7, 1), "scale must have 1 dimensions, got 2"),
    ("scale", torch.ones(7, dtype=torch.bfloat16), "scale must be float32"),
]
ATTENTION_REFUSED = [
    ("query", torch.zeros(4, 3, 8), "query must have 4 dimensions, got 3"),
    ("query", torch.zeros(2, 4, 3, 8, dtype=FLOAT64), "query must be float32, float16 or bfloat16"),
    ("query", torch.zeros(2, 4, 3, 0), "query must have heads of at least 1"),
    ("query", torch.zeros(2, 4, 8, 3).transpose(2, 3), "query must be contiguous in its last dimension"),
    ("query", torch.zeros(3, 4, 3, 8), "key must have size 3 in dimension 0, got 2"),
    ("query", torch.zeros(2, 4, 3, 7), "key must have size 7 in dimension 3, got 8"),
    ("query", torch.zeros(2, 4, 3, 8, dtype=torch.float16), "query, key and value must have one dtype"),
    ("query", torch.zeros(2, 5, 3, 8), "query must have a multiple of the 2 heads of key, got 5"),
    ("query", torch.zeros(2, 4, 11, 8), "query has 11 tokens, key only 10"),
    ("key", torch.zeros(2, 2, 8, 10).transpose(2, 3), "key must be contiguous in its last dimension"),
    ("key", torch.zeros(2, 2, 9, 8), "value must have size 9 in dimension 2, got 10"),
    ("value", torch.zeros(2, 1, 10, 6), "value must have size 2 in dimension 1, got 1"),
    ("value", torch.zeros(2, 2, 10, 0), "value must have heads of at least 1"),
    ("scale", 0.0, "scale must be finite and > 0"),
    ("scale", float("nan"), "scale must be finite and > 0"),
    ("scale", float("inf"), "scale must be finite and > 0"),
]
REFUSED = [
    *((op, *case) for op in ("draft_sample", "draft_step", "verify_chain") for case in FILTERS_REFUSED),
    *(("draft_sample", *case) for case in LOGITS_REFUSED),
    *(("plan_gamma", *case) for case in PLAN_REFUSED),
    *(("draft_step", *case) for case in LOGITS_REFUSED + PLAN_REFUSED + STEP_REFUSED),
    *(("verify_chain", *case) for case in CHAIN_REFUSED),
    *(("linear_int8", *case) for case in LINEAR_REFUSED),
    *(("decode_attention", *case) for case in ATTENTION_REFUSED),
]


def message(function, op, values):
    """The first line of the error that a call raises."""
    with pytest.raises(RuntimeError) as error:
        function(op, values)
    return str(error.value).splitlines()[0]


def fake(values):
    mode = FakeTensorMode()
    return mode, {name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
                  for name, value in values.items()}


@pytest.mark.parametrize("op, name, tensor, words", REFUSED, ids=[
    f"{op}-{name}-{index}" for index, (op, name, *_) in enumerate(REFUSED)])
def test_bad_shapes_and_dtypes_are_refused_in_one_voice(op, name, tensor, words):
    values = {**GOOD[op], name: tensor}
    expected = f"{op}: {words}"
    assert message(call_reference, op, values) == expected
    assert message(call, op, values) == expected
    mode, fakes = fake(values)
    with mode:
        assert message(call, op, fakes) == expected


@pytest.mark.parametrize("op", GOOD)
def test_tensors_on_two_devices_are_refused(op):
    for name, tensor in GOOD[op].items():
        if not isinstance(tensor, torch.Tensor):
            continue
        assert message(call, op, {**GOOD[op], name: tensor.to("meta")}) == f"{op}: all inputs must be on one device"


@pytest.mark.parametrize("op", GOOD)
def test_the_shape_function_predicts_shapes_strides_and_dtypes(op):
    outputs = call(op, GOOD[op])
    mode, fakes = fake(GOOD[op])
    with mode:
        predicted = call(op, fakes)
    assert len(outputs) == len(predicted)
    for out, guess in zip(outputs, predicted, strict=True):
        assert (out.shape, out.dtype, out.stride()) == (guess.shape, guess.dtype, guess.stride())


@pytest.mark.parametrize("op", ["draft_sample", "draft_step", "verify_chain"])
def test_a_last_dimension_of_one_needs_no_unit_stride(op):
    if op == "verify_chain":
        values = random_chain((3, 2, 1), rows="sampled")
        values["target_logits"] = torch.zeros(3, 3, 5)[..., ::5]
    else:
        values = {**GOOD[op], "logits": torch.zeros(3, 5)[:, ::5]}
    tokens, *_ = call(op, values)
    assert tokens.flatten()[0] == 0
