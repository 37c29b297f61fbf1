"""What only the Triton backend promises, on CPU tensors: -1 where it cannot raise, and how little it reads.

Run in a process of its own: TRITON_INTERPRET=1 SPECKV_BACKEND=triton pytest tests/triton_kernels
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

from speckv.kernels import draft, reference, sampling, verify

from .probe import watch

# numpy's, of the interpreter, where infinities and NaN do what they are meant to do
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

VOCABULARY = 2 * sampling.LARGEST_BLOCK_V + 100  # three blocks, the last one nearly empty
LARGEST_UNIFORM = 1 - 2**-24
NAN, INF = float("nan"), float("inf")

bad_logits = pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda row: row[-1:].fill_(NAN), id="NaN in the last block"),
        pytest.param(lambda row: row[:1].fill_(INF), id="+inf"),
        pytest.param(lambda row: row.fill_(-INF), id="all -inf"),
    ],
)
bad_settings = pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", value) for value in (-1.0, NAN, INF)] + [("uniform", value) for value in (-0.1, 1.0, NAN)],
)


def padded(tensor):
    """The same values in a larger, poisoned buffer: a free row stride, and no row 16-byte aligned."""
    poison = NAN if tensor.is_floating_point() else 2**62
    buffer = torch.full([size + 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 3], poison, dtype=tensor.dtype)
    view = buffer[tuple(slice(1, None) for _ in tensor.shape[:-1]) + (slice(1, -2),)]
    return view.copy_(tensor)


def sampling_inputs(rows=3, vocabulary=VOCABULARY, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return {
        "logits": (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype),
        "temperature": torch.tensor([0.0, 1.0, 0.7])[torch.arange(rows) % 3],
        "uniform": torch.rand(rows, generator=generator),
    }


def controller(signals=5, hidden=16):
    generator = torch.Generator().manual_seed(hidden)
    return {
        "w1": 0.2 * torch.randn(signals + 1, hidden, generator=generator),
        "b1": torch.randn(hidden, generator=generator),
        "w2": 0.3 * torch.randn(hidden, 1, generator=generator),
        "b2": torch.randn(1, generator=generator),
        "gammas": torch.tensor([2, 4, 6]),
        "seconds": torch.tensor([1.0, 1.5, 2.1]),
    }


def step_inputs(rows=3, **kwargs):
    return sampling_inputs(rows, **kwargs) | {
        "signals": torch.rand(rows, 5, generator=torch.Generator().manual_seed(1)),
        "drafted": torch.arange(rows),
        **controller(),
    }


def verify_inputs(rows=3, max_draft=3, vocabulary=VOCABULARY, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows)
    return {
        "target_logits": (4 * torch.randn(rows, max_draft + 1, vocabulary, generator=generator)).to(dtype),
        "draft_logits": (4 * torch.randn(rows, max_draft, vocabulary, generator=generator)).to(dtype),
        "draft_tokens": torch.randint(0, vocabulary, (rows, max_draft), generator=generator),
        "num_draft": torch.full((rows,), max_draft),
        "temperature": torch.ones(rows),
        "uniform": torch.rand(rows, max_draft + 1, generator=generator),
    }


def accept_all(inputs, rows):
    """Make the draft what the target would write: the most probable tokens, with uniforms that accept them."""
    inputs["draft_logits"][rows] = inputs["target_logits"][rows, :-1]
    inputs["draft_tokens"][rows] = inputs["target_logits"][rows, :-1].float().argmax(-1)


def assert_only_row_changes(outputs, clean, row):
    """Every row but one is the same, bit for bit, as where nothing was spoiled."""
    others = torch.arange(clean[0].shape[0]) != row
    for output, expected in zip(outputs, clean, strict=True):
        assert torch.equal(output[others], expected[others])


# The probe itself


@triton.jit
def reads_past_the_end(x_ptr, out_ptr, N: tl.constexpr):
    tl.store(out_ptr + tl.program_id(0), tl.sum(tl.load(x_ptr + tl.arange(0, N) + 1), axis=0))


@triton.jit
def writes_one_place(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


def test_the_probe_finds_a_read_past_the_end():
    inside_a_buffer = torch.zeros(16)[:8]
    with watch(), pytest.raises(Exception, match="1 reads outside of every tensor"):
        reads_past_the_end[(1,)](inside_a_buffer, torch.zeros(1), N=8)


def test_the_probe_finds_two_programs_writing_one_element():
    with watch(), pytest.raises(Exception, match="out_ptr: an element is written twice"):
        writes_one_place[(2,)](torch.zeros(4))


# -1 where the reference raises


@bad_logits
@pytest.mark.parametrize("row", [0, 1], ids=["greedy", "sampled"])
def test_draft_step_answers_bad_logits_with_minus_one(spoil, row):
    inputs = step_inputs(rows=2)
    clean = draft.draft_step(**inputs)
    spoil(inputs["logits"][row])
    outputs = draft.draft_step(**inputs)
    token, prob, entropy, confidence, _, gamma = outputs
    assert token[row] == -1
    assert gamma[row] == -1
    assert prob[row].isnan() and entropy[row].isnan() and confidence[row].isnan()
    assert_only_row_changes(outputs, clean, row)
    inputs = sampling_inputs(rows=2)
    spoil(inputs["logits"][row])
    assert_only_row_changes(draft.draft_sample(**inputs), clean[:4], row)


@bad_settings
def test_draft_sample_answers_a_bad_setting_with_minus_one(setting, value):
    inputs = sampling_inputs(vocabulary=100)
    clean = draft.draft_sample(**inputs)
    inputs[setting][1] = value
    outputs = draft.draft_sample(**inputs)
    assert outputs[0][1] == -1
    assert_only_row_changes(outputs, clean, 1)


def test_plan_gamma_answers_a_row_without_finite_acceptance_with_minus_one():
    inputs = {"signals": torch.rand(3, 5, generator=torch.Generator().manual_seed(0)), **controller()}
    clean = draft.plan_gamma(**inputs)
    for value in (NAN, INF):
        inputs["signals"][1, 2] = value
        outputs = draft.plan_gamma(**inputs)
        assert outputs[0][1] == -1
        assert not outputs[1][1].isfinite().all()
        assert_only_row_changes(outputs, clean, 1)


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF])
def test_bad_seconds_leave_no_gamma_in_any_row(value):
    inputs = step_inputs(vocabulary=100)
    inputs["seconds"][2] = value
    *drawn, gamma = draft.draft_step(**inputs)
    assert (gamma == -1).all()
    assert (drawn[0] >= 0).all()


def test_a_negative_count_of_drafted_tokens_leaves_no_gamma():
    inputs = step_inputs(vocabulary=100)
    clean = draft.draft_step(**inputs)
    inputs["drafted"][1] = -1
    outputs = draft.draft_step(**inputs)
    assert outputs[-1][1] == -1
    assert_only_row_changes(outputs, clean, 1)


@pytest.mark.parametrize(("name", "value"), [("top_k", -1), ("top_p", 1.1), ("top_p", NAN), ("min_p", -0.1)])
def test_a_bad_filter_is_answered_with_minus_one(name, value):
    filters = {"top_k": torch.tensor([5, 5, 0]), "top_p": torch.tensor([0.9, 1.0, 0.5]), "min_p": torch.zeros(3)}
    for launcher, inputs in ((draft.draft_sample, sampling_inputs), (verify.verify_chain, verify_inputs)):
        inputs = {**inputs(vocabulary=100), **filters}
        clean = launcher(**inputs)
        inputs[name] = inputs[name].clone()
        inputs[name][1] = value
        outputs = launcher(**inputs)
        assert (outputs[0][1] == -1).all()
        assert_only_row_changes(outputs, clean, 1)


@bad_logits
@pytest.mark.parametrize(("side", "position"), [("target_logits", 0), ("draft_logits", 1), ("target_logits", 2)])
def test_verify_chain_answers_bad_logits_that_decide_with_minus_one(spoil, side, position):
    inputs = verify_inputs(rows=2, max_draft=2)
    accept_all(inputs, slice(None))
    clean = verify.verify_chain(**inputs)
    spoil(inputs[side][1, position])
    tokens, accepted = outputs = verify.verify_chain(**inputs)
    assert (tokens[1] == -1).all() and accepted[1] == -1
    assert_only_row_changes(outputs, clean, 1)


@bad_settings
def test_verify_chain_answers_a_bad_setting_with_minus_one(setting, value):
    inputs = verify_inputs(vocabulary=100)
    clean = verify.verify_chain(**inputs)
    inputs[setting][1, ...] = value
    tokens, accepted = outputs = verify.verify_chain(**inputs)
    assert (tokens[1] == -1).all() and accepted[1] == -1
    assert_only_row_changes(outputs, clean, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_draft", -1), ("num_draft", 4), ("draft_tokens", 100), ("draft_tokens", 2**62)],
)
def test_verify_chain_refuses_a_draft_that_is_out_of_range_without_reading_logits(name, value):
    inputs = verify_inputs(vocabulary=100)
    clean = verify.verify_chain(**inputs)
    inputs[name][1, ...] = value
    with watch() as probe:
        tokens, accepted = outputs = verify.verify_chain(**inputs)
    assert (tokens[1] == -1).all() and accepted[1] == -1
    assert_only_row_changes(outputs, clean, 1)
    assert probe.reads("target_logits_ptr")[1].sum() == probe.reads("draft_logits_ptr")[1].sum() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_behind_the_stop_decide_nothing(temperature):
    inputs = verify_inputs(vocabulary=100)
    inputs["temperature"].fill_(temperature)
    inputs["uniform"][:, 0] = LARGEST_UNIFORM  # rejects the first token, an improbable one
    inputs["draft_tokens"][:, 0] = inputs["target_logits"][:, 0].argmin(-1)
    clean = verify.verify_chain(**inputs)
    inputs["target_logits"][:, 1:] = NAN
    inputs["draft_logits"][:, 1:] = NAN
    assert (clean[1] == 0).all()
    for output, expected in zip(verify.verify_chain(**inputs), clean, strict=True):
        assert torch.equal(output, expected)


# Edges of the inverse CDF that blocks and fp32 make


@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM])
def test_no_token_of_probability_zero_at_the_ends_of_the_inverse_cdf(uniform):
    """Blocks of logits so low that their tokens have subnormal probabilities, or none, around one of mass."""
    block = sampling.LARGEST_BLOCK_V
    below = torch.linspace(-104, -86, 10)
    logits = torch.full((len(below), 3 * block), -200.0)
    logits[:, block : 2 * block] = 0.0
    logits[:, 5] = logits[:, 2 * block + 5] = below
    token, prob, *_ = draft.draft_sample(logits, torch.ones(len(below)), torch.full((len(below),), uniform))
    assert (prob > 0).all()
    assert (logits.gather(1, token[:, None]) > -200).all()


def test_a_temperature_that_divides_to_infinity_draws_the_maximum():
    inputs = sampling_inputs(rows=2)
    inputs["temperature"] = torch.tensor([1e-40, 1e-30])
    token, prob, *_ = draft.draft_sample(**inputs)
    assert torch.equal(token, inputs["logits"].argmax(-1))
    assert (prob == 1).all()


def test_infinite_signals_do_not_leak_through_padded_hidden_units():
    """-inf into every hidden unit is a zero after the relu; a padded unit would turn it into 0 * inf."""
    weights = controller(hidden=3)
    weights["w1"] = weights["w1"].abs()
    signals = torch.full((1, 5), -INF)
    gamma, acceptance = draft.plan_gamma(signals, **weights)
    expected_gamma, expected = reference.plan_gamma(signals, **weights)
    assert torch.equal(gamma, expected_gamma)
    torch.testing.assert_close(acceptance, expected)


# What is read and written


def block_length(token):
    """How many logits the block of a token holds."""
    block_v = sampling.LARGEST_BLOCK_V
    return min(block_v, VOCABULARY - int(token) // block_v * block_v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("op", ["draft_sample", "draft_step"])
def test_drafting_reads_the_logits_once_and_one_block_again_in_one_launch(op, dtype):
    inputs = (step_inputs if op == "draft_step" else sampling_inputs)(rows=4, dtype=dtype)
    inputs["uniform"][3] = LARGEST_UNIFORM
    with watch() as probe:
        token, *_ = getattr(draft, op)(**inputs)
    again = sum(block_length(row_token) for row_token in token)
    assert probe.launches == [f"{op}_kernel"]
    assert probe.bytes_read("logits_ptr") == (4 * VOCABULARY + again) * dtype.itemsize
    assert probe.reads("logits_ptr").min() == 1


@pytest.mark.parametrize("greedy", [False, True], ids=["sampled", "greedy"])
def test_verifying_reads_only_the_rows_that_decide(greedy):
    """Row 0 accepts everything, row 1 stops at its second token, row 2 has no draft, row 3 a padded one."""
    inputs = verify_inputs(rows=4)
    accept_all(inputs, slice(None))
    inputs["temperature"].fill_(0.0 if greedy else 1.0)
    inputs["draft_tokens"][1, 1] = inputs["target_logits"][1, 1].argmin()
    inputs["draft_logits"][1, 1] = -inputs["target_logits"][1, 1]
    inputs["num_draft"][2] = 0
    inputs["draft_tokens"][3, 1] = -1
    with watch() as probe:
        tokens, accepted = verify.verify_chain(**inputs)
    assert accepted.tolist() == [3, 1, 0, 1]
    assert probe.launches == ["verify_chain_kernel"]

    target_reads = probe.reads("target_logits_ptr").sum(-1)
    draft_reads = probe.reads("draft_logits_ptr").sum(-1)
    for row, kept in enumerate(accepted.tolist()):
        rejected = row == 1
        next_block = block_length(tokens[row, kept])
        for position in range(kept):
            # One pass, then the block of the argmax, or the one logit of the draft token.
            again = block_length(tokens[row, position]) if greedy else 1
            assert target_reads[row, position] == VOCABULARY + again
            assert draft_reads[row, position] == (0 if greedy else VOCABULARY + 1)
        if rejected and not greedy:  # a second pass for the residual
            assert target_reads[row, kept] == draft_reads[row, kept] == 2 * VOCABULARY + next_block + 1
        else:
            assert target_reads[row, kept] == VOCABULARY + next_block
        assert (target_reads[row, kept + 1 :] == 0).all()
        assert (draft_reads[row, kept + rejected :] == 0).all()


def filtered(inputs):
    """Inputs of three rows with filters, also ones that are off."""
    filters = {"top_k": torch.tensor([5, 0, 3]), "top_p": torch.tensor([1.0, 0.9, 0.5]),
               "min_p": torch.tensor([0.0, 0.1, 0.2])}
    return lambda **kwargs: inputs(**kwargs, dtype=torch.bfloat16) | filters


CALLS = {
    "draft_sample": (draft.draft_sample, sampling_inputs, ["token_ptr", "prob_ptr", "entropy_ptr", "confidence_ptr"]),
    "plan_gamma": (
        draft.plan_gamma,
        lambda **_: {"signals": torch.rand(3, 7), **controller(signals=7, hidden=5)},
        ["gamma_ptr", "acceptance_ptr"],
    ),
    "draft_step": (draft.draft_step, step_inputs, ["token_ptr", "confidence_ptr", "updated_signals_ptr", "gamma_ptr"]),
    "verify_chain": (verify.verify_chain, verify_inputs, ["tokens_ptr", "accepted_ptr"]),
    "filtered draft_sample": (draft.draft_sample, filtered(sampling_inputs), ["token_ptr", "prob_ptr"]),
    "filtered verify_chain": (verify.verify_chain, filtered(verify_inputs), ["tokens_ptr", "accepted_ptr"]),
}


@pytest.mark.parametrize("vocabulary", [1, 7, 1023, VOCABULARY])
@pytest.mark.parametrize("op", CALLS)
def test_every_access_is_to_an_element_and_every_output_is_written_once(op, vocabulary):
    if op.startswith("filtered") and vocabulary > 1023:
        pytest.skip("a hundred passes over three blocks take the interpreter minutes")
    launcher, inputs, outputs = CALLS[op]
    inputs = inputs(vocabulary=vocabulary)
    expected = launcher(**inputs)
    with watch() as probe:
        results = launcher(**{name: padded(tensor) for name, tensor in inputs.items()})
    assert probe.launches == [f"{op.split()[-1]}_kernel"]
    for name in outputs:
        assert (probe.writes(name) == 1).all()
    for result, value in zip(results, expected, strict=True):
        assert torch.equal(result, value)


@pytest.mark.parametrize("op", CALLS)
def test_no_rows_is_no_work(op):
    launcher, inputs, _ = CALLS[op]
    shared = controller()
    empty = {name: tensor if name in shared else tensor[:0] for name, tensor in inputs(vocabulary=7).items()}
    results = launcher(**empty)
    assert all(result.shape[0] == 0 for result in results)
