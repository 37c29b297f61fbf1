"""verify_chain: agreement with the reference, and cases whose answer can be checked on paper."""

import math

import pytest
import torch
from helpers_ops import (
    call,
    each_dtype,
    each_shape,
    poisoned,
    random_chain,
    random_logits,
    random_uniform,
    skip_in_the_interpreter,
    skip_repeated_large_shapes,
)
from oracle_ops import assert_chain_is_well_formed, assert_verify_chain_agrees

from speckv.kernels import verify_chain

INF = float("inf")


def logs(*probabilities):
    """Logits whose softmax is this; a probability of 0 is a masked token."""
    return [math.log(p) if p else -INF for p in probabilities]


def one_chain(target, draft, draft_tokens, uniform, num_draft=None, temperature=1.0):
    """Tokens and accepted of a single row; target and draft are lists of distributions, one a position."""
    gamma, vocabulary = len(draft), len(target[0])
    tokens, accepted = verify_chain(
        torch.tensor([[logs(*p) for p in target]]),
        torch.tensor([[logs(*q) for q in draft]]).reshape(1, gamma, vocabulary),
        torch.tensor([draft_tokens], dtype=torch.int64).reshape(1, gamma),
        torch.tensor([gamma if num_draft is None else num_draft]),
        torch.tensor([temperature]), torch.tensor([uniform]))
    return tokens[0].tolist(), accepted.item()


@each_shape
@each_dtype
def test_agrees_with_the_reference_on_poisoned_views(shape, dtype):
    skip_repeated_large_shapes(shape, dtype)
    assert_verify_chain_agrees(random_chain(shape, dtype, "mixed", seed=shape[-1]))


@each_shape
def test_greedy_rows_agree_with_the_reference_where_ties_are_many(shape):
    # bf16 keeps 8 bits of each logit, so a large vocabulary has several highest ones.
    assert_verify_chain_agrees(random_chain(shape, torch.bfloat16, "greedy", seed=shape[-1]))


@pytest.mark.parametrize("batch, gamma", [(1, 1), (1, 16), (99, 3), (99, 7), (989, 5)])
def test_agrees_with_the_reference_for_batch_and_gamma(batch, gamma):
    skip_in_the_interpreter(batch > 99 or gamma == 7, "more than 500 positions")
    values = random_chain((batch, gamma, 41), seed=batch + gamma)
    _, accepted = assert_verify_chain_agrees(values)
    if batch > 1:
        full = accepted == values["num_draft"]
        assert full.any() and (~full).any(), "the inputs should give both full acceptance and rejection"


def test_target_and_draft_may_differ_in_dtype():
    values = random_chain((3, 5, 1023), torch.float32, seed=3)
    for dtype in (torch.bfloat16, torch.float16):
        assert_verify_chain_agrees({**values, "draft_logits": poisoned(values["draft_logits"].to(dtype))})
        assert_verify_chain_agrees({**values, "target_logits": poisoned(values["target_logits"].to(dtype))})


def test_expanded_and_strided_inputs_are_read_as_they_look():
    batch, gamma, vocabulary = 4, 3, 100
    assert_verify_chain_agrees({
        "target_logits": random_logits(1, gamma + 1, vocabulary, seed=1).expand(batch, -1, -1),
        "draft_logits": random_logits(gamma, batch, vocabulary, seed=2).transpose(0, 1),
        "draft_tokens": torch.tensor([5, 7, 9]).expand(batch, gamma),
        "num_draft": torch.tensor([3, 9, 2, 9, 0, 9, 1, 9])[::2],
        "temperature": torch.tensor(0.9).expand(batch),
        "uniform": random_uniform(gamma + 1, batch, seed=3).t(),
    })


# Case by case on paper. p and q of one position, the ratio p/q of the draft token, and the uniforms around it.

P, Q = (0.5, 0.25, 0.25, 0.0), (0.25, 0.5, 0.0, 0.25)


def test_a_token_that_the_target_likes_better_is_always_accepted():
    # p/q = 2: u up to the largest float below 1. The bonus token is then drawn from the second target position.
    bonus = (0.1, 0.2, 0.3, 0.4)
    for uniform in (0.0, 0.5, 1 - 2**-24):
        assert one_chain([P, bonus], [Q], [0], [uniform, 0.55]) == ([0, 2], 1)


@pytest.mark.parametrize("uniform, accepted", [(0.0, 1), (0.49, 1), (0.51, 0), (0.99, 0)])
def test_a_token_that_the_draft_likes_better_is_accepted_with_probability_p_over_q(uniform, accepted):
    # Token 1: p/q = 1/2. The residual max(0, p - q) is (1/4, 0, 1/4, 0): tokens 0 and 2, half each.
    tokens, count = one_chain([P, P], [Q], [1], [uniform, 0.75])
    assert count == accepted
    assert tokens == ([1, 2] if accepted else [2, -1])


@pytest.mark.parametrize("uniform, recovered", [(0.0, 0), (0.49, 0), (0.51, 2), (1 - 2**-24, 2)])
def test_the_recovered_token_is_drawn_from_the_residual(uniform, recovered):
    assert one_chain([P, P], [Q], [1], [0.9, uniform]) == ([recovered, -1], 0)


@pytest.mark.parametrize("uniform, recovered", [(0.1, 0), (0.66, 0), (0.67, 2), (0.9, 2)])
def test_the_residual_is_normalized_by_its_own_sum(uniform, recovered):
    # p - q = (0.4, -0.6, 0.2): 0 with 2/3 and 2 with 1/3.
    assert one_chain([(0.5, 0.2, 0.3)] * 2, [(0.1, 0.8, 0.1)], [1], [0.9, uniform]) == ([recovered, -1], 0)


@pytest.mark.parametrize("uniform, bonus", [(0.05, 0), (0.15, 1), (0.45, 2), (0.95, 3)])
def test_the_bonus_token_is_drawn_from_the_position_after_the_draft(uniform, bonus):
    last = (0.1, 0.2, 0.3, 0.4)
    assert one_chain([P, P, last], [P, P], [0, 1], [0.5, 0.5, uniform]) == ([0, 1, bonus], 2)


def test_the_first_rejection_ends_the_chain():
    # Position 1 rejects token 3 (p = 0); position 2 would have been accepted and does not matter.
    assert one_chain([P, P, P, P], [P, Q, P], [0, 3, 0], [0.5, 0.5, 0.0, 0.75]) == ([0, 2, -1, -1], 1)


def test_temperature_applies_to_both_distributions():
    # At temperature 1/2 the probabilities are squared: p/q of token 1 goes from 1/2 to
    # (1/16 / (6/16)) / (4/16 / (6/16)) = 1/4, and the residual of 0 and 2 from equal to 3/6 : 1/6.
    tokens, accepted = one_chain([P, P], [Q], [1], [0.3, 0.7], temperature=0.5)
    assert (tokens, accepted) == ([0, -1], 0)
    assert one_chain([P, P], [Q], [1], [0.3, 0.8], temperature=0.5) == ([2, -1], 0)
    assert one_chain([P, P], [Q], [1], [0.24, 0.1], temperature=0.5) == ([1, 0], 1)


def test_a_greedy_row_keeps_the_draft_while_it_is_the_argmax():
    target = [(0.1, 0.6, 0.3), (0.5, 0.1, 0.4), (0.2, 0.3, 0.5)]
    draft = [(1.0, 0.0, 0.0)] * 2  # misleading on purpose: a greedy row does not look at it
    for draft_tokens, expected in (([1, 0], ([1, 0, 2], 2)), ([1, 2], ([1, 0, -1], 1)), ([0, 0], ([1, -1, -1], 0))):
        assert one_chain(target, draft, draft_tokens, [0.9, 0.9, 0.9], temperature=0.0) == expected


def test_a_greedy_row_takes_the_lowest_index_of_a_tie():
    target = [(0.2, 0.4, 0.4)] * 2
    assert one_chain(target, target[:1], [1], [0.9, 0.9], temperature=0.0) == ([1, 1], 1)
    assert one_chain(target, target[:1], [2], [0.0, 0.0], temperature=0.0) == ([1, -1], 0)


def test_padding_in_mid_chain_ends_the_draft_and_the_next_token_comes_from_p():
    # Three drafted, the second is -1. Column 3 = num_draft draws, from p of position 1: (0.5, 0.25, 0.25, 0), not
    # from a residual, in which token 1 would have nothing.
    for uniform, token in ((0.49, 0), (0.6, 1), (0.9, 2)):
        assert one_chain([P] * 4, [Q] * 3, [0, -1, 0], [0.5, 0.9, 0.9, uniform]) == ([0, token, -1, -1], 1)


def test_a_chain_that_starts_with_padding_decodes_one_token():
    assert one_chain([P] * 3, [Q] * 2, [-1, 0], [0.9, 0.9, 0.6]) == ([1, -1, -1], 0)
    assert one_chain([P] * 3, [Q] * 2, [-5, 0], [0.9, 0.9, 0.6], temperature=0.0) == ([0, -1, -1], 0)


def test_a_row_without_a_draft_draws_from_p_with_its_first_uniform():
    for uniform, token in ((0.49, 0), (0.6, 1), (0.9, 2)):
        assert one_chain([P] * 3, [Q] * 2, [1, 1], [uniform, 0.0, 0.0], num_draft=0) == ([token, -1, -1], 0)


def test_a_partial_draft_draws_with_the_uniform_after_its_own():
    # One token drafted of two possible: column 1 draws both the bonus and the recovered token.
    assert one_chain([P] * 3, [Q] * 2, [1, 1], [0.1, 0.6, 0.0], num_draft=1) == ([1, 1, -1], 1)
    assert one_chain([P] * 3, [Q] * 2, [1, 1], [0.9, 0.6, 0.0], num_draft=1) == ([2, -1, -1], 0)


def test_plain_decoding_needs_no_draft_at_all():
    tokens, accepted = verify_chain(
        torch.tensor([[logs(*P)]] * 3), torch.empty(3, 0, 4), torch.empty(3, 0, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, 1.0, 0.0]), torch.tensor([[0.6], [0.9], [0.9]]))
    assert tokens.tolist() == [[1], [2], [0]] and accepted.tolist() == [0, 0, 0]


def test_an_empty_batch_gives_empty_outputs():
    values = random_chain((0, 3, 100))
    tokens, accepted = call("verify_chain", values)
    assert tokens.shape == (0, 4) and accepted.shape == (0,)
    assert tokens.dtype == accepted.dtype == torch.int64


def test_a_vocabulary_of_one_is_always_accepted():
    values = random_chain((3, 4, 1), rows="mixed")
    tokens, accepted = call("verify_chain", values)
    assert_chain_is_well_formed(values, tokens, accepted)
    assert torch.equal(accepted, values["num_draft"])
