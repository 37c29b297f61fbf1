"""draft_sample: one draft token a row, and how uncertain the drafter was."""

import math

import pytest
import torch
from helpers_ops import (
    BACKEND,
    LARGEST_UNIFORM,
    assert_refused,
    call,
    each_dtype,
    each_shape,
    poisoned,
    random_logits,
    random_uniform,
    skip_in_the_interpreter,
    skip_repeated_large_shapes,
    temperatures,
)
from oracle_ops import assert_draft_sample_agrees

from speckv.kernels import draft_sample
from speckv.kernels.reference import COLDEST, HOTTEST

INF = float("inf")


def draft_values(logits, temperature, uniform):
    return {"logits": logits, "temperature": torch.as_tensor(temperature), "uniform": torch.as_tensor(uniform)}


def one_row(logits, temperature, uniform, dtype=torch.float32):
    """Token, prob, entropy and confidence of a single row, as numbers."""
    outputs = draft_sample(torch.tensor([logits], dtype=dtype), torch.tensor([temperature]), torch.tensor([uniform]))
    return [output.item() for output in outputs]


@each_shape
@each_dtype
def test_agrees_with_the_reference_on_poisoned_views(shape, dtype):
    skip_repeated_large_shapes(shape, dtype)
    batch, gamma, vocabulary = shape
    count = batch * gamma
    assert_draft_sample_agrees({
        "logits": poisoned(random_logits(count, vocabulary, dtype=dtype, seed=vocabulary)),
        "temperature": poisoned(temperatures("mixed", count)),
        "uniform": poisoned(random_uniform(count, seed=vocabulary)),
    })


@pytest.mark.parametrize("batch", [1, 99, 989])
def test_agrees_with_the_reference_in_batches_of(batch):
    skip_in_the_interpreter(batch > 99, "989 rows")
    assert_draft_sample_agrees(draft_values(
        random_logits(batch, 100, seed=batch), temperatures("mixed", batch), random_uniform(batch, seed=batch)))


def test_hand_written_numbers():
    # softmax of these is 1/2, 1/4, 1/8, 1/8: 1.75 bits.
    logits = [math.log(4), math.log(2), 0.0, 0.0]
    for uniform, token, prob in ((0.0, 0, 0.5), (0.49, 0, 0.5), (0.51, 1, 0.25), (0.76, 2, 0.125), (0.88, 3, 0.125)):
        assert one_row(logits, 1.0, uniform) == pytest.approx([token, prob, 1.75, 0.5], rel=1e-6)
    # At temperature 1/2 the weights are 16, 4, 1, 1; entropy and confidence stay those of temperature 1.
    assert one_row(logits, 0.5, 0.75) == pytest.approx([1, 4 / 22, 1.75, 0.5], rel=1e-6)
    assert one_row(logits, 0.0, 0.99) == pytest.approx([0, 1.0, 1.75, 0.5], rel=1e-6)


def test_a_uniform_on_a_boundary_belongs_to_the_next_token():
    # All numbers here are exact in fp32: four tokens of probability 1/4.
    assert [one_row([0.0] * 4, 1.0, uniform)[0] for uniform in (0.0, 0.25, 0.5, 0.75)] == [0, 1, 2, 3]


@each_dtype
def test_greedy_takes_the_lowest_index_of_a_tie_with_probability_one(dtype):
    for vocabulary, first in ((2, 0), (100, 37), (8193, 0), (8193, 4095), (8193, 8191), (10000, 4096)):
        logits = torch.full((1, vocabulary), -1.0, dtype=dtype)
        logits[0, first::7] = 3.0
        logits[0, -1] = 3.0
        token, prob, _, _ = draft_sample(logits, torch.zeros(1), torch.tensor([0.9]))
        assert (token.item(), prob.item()) == (first, 1.0)


def test_greedy_takes_negative_and_positive_zero_for_a_tie():
    assert one_row([-1.0, -0.0, 0.0], 0.0, 0.5)[0] == 1


def test_greedy_tells_subnormal_logits_apart():
    assert one_row([0.0, 1e-40, 2e-40, -1e-40], 0.0, 0.5)[0] == 2


def test_a_greedy_row_does_not_read_its_uniform():
    logits = random_logits(1, 1023)
    low, high = (draft_sample(logits, torch.zeros(1), torch.tensor([u])) for u in (0.0, LARGEST_UNIFORM))
    assert all(map(torch.equal, low, high))


def test_a_vocabulary_of_one_is_certain():
    for temperature in (0.0, 1.0, 1e30):
        assert one_row([-7.0], temperature, LARGEST_UNIFORM) == [0, 1.0, 0.0, 1.0]


def test_an_empty_batch_gives_empty_outputs():
    outputs = draft_sample(torch.empty(0, 100), torch.empty(0), torch.empty(0))
    assert [tuple(output.shape) for output in outputs] == [(0,)] * 4
    assert [output.dtype for output in outputs] == [torch.int64, *[torch.float32] * 3]


@pytest.mark.parametrize("temperature", [1e-30, 1e-40], ids=["normal", "subnormal"])
def test_a_tiny_temperature_splits_the_mass_among_ties_only(temperature):
    logits = torch.tensor([[1.0, 5.0, 4.999, 5.0]]).expand(2, 4)
    token, prob, _, _ = draft_sample(logits, torch.full((2,), temperature), torch.tensor([0.49, 0.51]))
    assert token.tolist() == [1, 3] and prob.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("logits, temperature, counts_as", [
    ([3.3e-39, 1.3e-39, 3e-40], 1e-45, COLDEST), ([2e38, 0.0, -1e38], 3e38, HOTTEST)], ids=["coldest", "hottest"])
def test_a_temperature_without_an_inverse_counts_as_the_nearest_that_has_one(logits, temperature, counts_as):
    weights = [math.exp((logit - logits[0]) / counts_as) for logit in logits]
    for uniform in (0.01, 0.3, 0.6, 0.99):
        token, prob, _, _ = one_row(logits, temperature, uniform)
        assert sum(weights[:token]) < uniform * sum(weights) < sum(weights[:token + 1])
        assert prob == pytest.approx(weights[token] / sum(weights), rel=1e-4)


@pytest.mark.parametrize("temperature", [1e30, 3e38])
def test_a_huge_temperature_is_uniform_over_what_is_not_masked(temperature):
    logits = torch.tensor([[-INF, 60.0, -60.0, -INF, 0.0, 7.0]]).expand(4, 6)
    token, prob, _, _ = draft_sample(logits, torch.full((4,), temperature), torch.tensor([0.1, 0.3, 0.6, 0.9]))
    assert token.tolist() == [1, 2, 4, 5] and prob.tolist() == [0.25] * 4


def test_entropy_is_in_bits_and_zero_where_one_token_has_everything():
    for vocabulary in (2, 8, 4096):
        *_, entropy, confidence = one_row([3.5] * vocabulary, 0.7, 0.5)
        assert (entropy, confidence) == pytest.approx((math.log2(vocabulary), 1 / vocabulary), rel=1e-6)
    assert one_row([-INF, 2.0, -INF], 0.7, 0.5) == pytest.approx([1, 1.0, 0.0, 1.0])


def test_probability_keeps_its_relative_precision_when_small():
    # e^-11 / (1 + e^-11) = 1.67e-5, and the uniform lies in the middle of it.
    token, prob, _, _ = one_row([-11.0, 0.0], 1.0, 8e-6)
    assert (token, prob) == (0, pytest.approx(math.exp(-11) / (1 + math.exp(-11)), rel=1e-6))


@pytest.mark.parametrize("logits", [
    [0.0] * 5, [1e-40] * 5, [-1e-40, 1e-40, 0.0, -0.0, 1e-45],
], ids=["zeros", "subnormal", "mixed-subnormal"])
def test_logits_that_are_all_but_zero_are_uniform(logits):
    tokens = [one_row(logits, 1.0, (i + 0.5) / 5) for i in range(5)]
    assert [row[0] for row in tokens] == [0, 1, 2, 3, 4]
    assert tokens[0][1:] == pytest.approx([0.2, math.log2(5), 0.2], rel=1e-6)


def test_mixed_magnitudes_up_to_the_whole_range_of_fp32():
    assert one_row([-3e38, 1e-40, 3e38, 5.0], 1.0, 0.5) == pytest.approx([2, 1.0, 0.0, 1.0])
    assert one_row([-3e38, 3e38, 3e38], 2.0, 0.7) == pytest.approx([2, 0.5, 1.0, 0.5], rel=1e-6)
    assert one_row([-60000.0, 65504.0, 65504.0], 0.5, 0.2, torch.float16) == pytest.approx([1, 0.5, 1.0, 0.5], rel=1e-6)


@pytest.mark.parametrize("centre", [0.0, -64.0], ids=["of both signs", "all negative"])
@pytest.mark.parametrize("vocabulary", [1, 33, 1023, 2113])
def test_equal_logits_give_equal_bits_in_every_dtype(vocabulary, centre):
    # Halves below 128 are exact in each. A residual of target and draft in two dtypes would else be noise.
    logits = (random_logits(6, vocabulary, seed=vocabulary) * 2).round() / 2 + centre
    arguments = temperatures("mixed", 6), random_uniform(6, seed=vocabulary)
    expected = draft_sample(logits, *arguments)
    for dtype in (torch.bfloat16, torch.float16):
        for actual, wanted in zip(draft_sample(logits.to(dtype), *arguments), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_a_constant_added_to_all_logits_changes_nothing():
    # Multiples of 1/64 below 64 leave room for 4096 in fp32, so the differences stay exact.
    logits = (random_logits(8, 1023, seed=5) * 64).round() / 64
    arguments = torch.full((8,), 0.8), random_uniform(8, seed=5)
    for plain, shifted in zip(draft_sample(logits, *arguments), draft_sample(logits + 4096, *arguments), strict=True):
        torch.testing.assert_close(plain, shifted, rtol=1e-6, atol=1e-7)


def test_expanded_and_strided_inputs_are_read_as_they_look():
    logits = random_logits(1, 1023, seed=6).expand(6, 1023)
    uniform = random_uniform(6, 2, seed=6)[:, 1]
    assert_draft_sample_agrees(draft_values(logits, torch.tensor(0.9).expand(6), uniform))
    assert_draft_sample_agrees(draft_values(logits, temperatures("mixed", 18)[::3], uniform[:1].expand(6)))


@pytest.mark.parametrize("vocabulary", [100, 8193, 10000, 151936])
@pytest.mark.parametrize("uniform", [0.0, LARGEST_UNIFORM], ids=["zero", "largest"])
def test_vocabulary_tail_without_mass_is_never_drawn(vocabulary, uniform):
    # Mass from 10 up to 90 % of the vocabulary, for flat and for peaked logits; masked and underflowing outside.
    first, last = vocabulary // 10, vocabulary * 9 // 10
    for outside in (-INF, -1e4):
        logits = torch.full((2, vocabulary), outside)
        logits[0, first:last] = 0.0
        logits[1, first:last] = random_logits(last - first, seed=vocabulary).clamp(-30, 30)
        token, prob, _, _ = draft_sample(logits, torch.ones(2), torch.full((2,), uniform))
        assert ((token >= first) & (token < last)).all() and (prob > 0).all()
        # In the flat row every token weighs more than the rounding of the sum, so the answer is known.
        assert token[0] == (first if uniform == 0 else last - 1)


REFUSED_LOGITS = {"nan": ([0.0, float("nan"), 1.0], "a logit is NaN"), "inf": ([0.0, INF, 1.0], "a logit is +inf"),
                  "nan-and-inf": ([INF, float("nan"), -INF], "a logit is NaN"),
                  "all-masked": ([-INF] * 3, "every logit is -inf")}


@pytest.mark.parametrize("temperature", [0.0, 0.9], ids=["greedy", "sampled"])
@each_dtype
@pytest.mark.parametrize("bad", REFUSED_LOGITS)
def test_bad_logits_in_one_row_are_refused_by_name(bad, dtype, temperature):
    values, reason = REFUSED_LOGITS[bad]
    for vocabulary in (3, 8193):
        good = random_logits(3, vocabulary, dtype=dtype)
        logits = good.clone()
        logits[1] = -INF if bad == "all-masked" else 0.5
        logits[1, -3:] = torch.tensor(values)
        assert_refused("draft_sample", draft_values(good, [temperature] * 3, [0.3] * 3), {"logits": logits}, 1,
                       f"draft_sample: row 1: {reason}")


def test_of_two_bad_rows_the_first_is_named():
    logits = random_logits(20, 100)
    logits[7, 3], logits[18, 1] = INF, float("nan")
    good = draft_values(random_logits(20, 100), [1.0] * 20, [0.5] * 20)
    if BACKEND == "triton":
        assert (call("draft_sample", {**good, "logits": logits})[0] == -1).nonzero().flatten().tolist() == [7, 18]
    else:
        assert_refused("draft_sample", good, {"logits": logits}, 7, "draft_sample: row 7: a logit is +inf")


@pytest.mark.parametrize("temperature", [-1.0, -1e-40, INF, float("nan")])
def test_a_bad_temperature_is_refused(temperature):
    good = draft_values(random_logits(3, 100), [1.0] * 3, [0.5] * 3)
    assert_refused("draft_sample", good, {"temperature": torch.tensor([1.0, 1.0, temperature])}, 2,
                   "draft_sample: row 2: temperature must be finite and >= 0")


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("uniform", [1.0, -1e-6, float("nan"), INF])
def test_a_bad_uniform_is_refused(uniform, temperature):
    good = draft_values(random_logits(3, 100), [temperature] * 3, [0.5] * 3)
    assert_refused("draft_sample", good, {"uniform": torch.tensor([uniform, 0.5, 0.5])}, 0,
                   "draft_sample: row 0: uniform must be in [0, 1)")
