"""What comes out is distributed as the target: chi-square tests with fixed seeds, and exact integration over uniforms.

Every check is also run against verifiers with one wrong rule, which it must reject.
"""

import pytest
import torch
from helpers_ops import EXACT, GRID_BITS, INTERPRETED, call, measure_of_tokens, random_uniform, share_of_uniforms
from planted_verifiers import (
    absolute_difference,
    assert_no_zero_probability_token,
    below_p,
    sampled_chain,
    target_itself,
    up_to_the_ratio,
    verifier,
)
from scipy.stats import chisquare

from speckv.kernels import draft_sample

TEMPERATURE = 0.8
TRIALS = 40_000
P_VALUE = 1e-3


def verify(**values):
    return call("verify_chain", values)


def logits_of(*probabilities):
    """Logits whose softmax at TEMPERATURE is this."""
    return torch.tensor(probabilities).log() * TEMPERATURE


statistical = pytest.mark.skipif(
    INTERPRETED, reason="40,000 rows would take an hour in the Triton interpreter; the integration needs 200")

# A language of four tokens with a memory of one. In the first position the target has masked token 3, which the draft
# likes.
TARGET_FIRST = logits_of(0.5, 0.3, 0.2, 0.0)
DRAFT_FIRST = logits_of(0.15, 0.25, 0.3, 0.3)
TARGET_NEXT = logits_of([0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25])
DRAFT_NEXT = logits_of([0.4, 0.1, 0.1, 0.4], [0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1])


def assert_counts_fit(counts, probabilities):
    """Chi-square of counts against probabilities; where those are 0, not one is tolerated."""
    possible = probabilities > 0
    assert (counts[~possible] == 0).all(), "something of probability zero was emitted"
    expected = probabilities[possible].double()
    expected = expected / expected.sum() * counts.sum()
    p_value = chisquare(counts[possible].double().numpy(), expected.numpy()).pvalue
    assert p_value > P_VALUE, f"chi-square p-value {p_value:.2e}"


def draw(logits, seed):
    rows = logits.shape[0]
    return draft_sample(logits, torch.full((rows,), TEMPERATURE), random_uniform(rows, seed=seed))[0]


def assert_emitted_tokens_fit_the_target(verify):
    """Draft two tokens from q, verify, and compare the first and the first two emitted tokens with the target."""
    first = draw(DRAFT_FIRST.expand(TRIALS, 4), seed=1)
    second = draw(DRAFT_NEXT[first], seed=2)
    target = torch.stack([TARGET_FIRST.expand(TRIALS, 4), TARGET_NEXT[first], TARGET_NEXT[second]], dim=1)
    draft = torch.stack([DRAFT_FIRST.expand(TRIALS, 4), DRAFT_NEXT[first]], dim=1)
    tokens, accepted = verify(**sampled_chain(
        target, draft, torch.stack([first, second], dim=1), random_uniform(TRIALS, 3, seed=3), temperature=TEMPERATURE))
    p_first = torch.softmax(TARGET_FIRST / TEMPERATURE, -1)
    assert_counts_fit(tokens[:, 0].bincount(minlength=4), p_first)

    # Where one token came out, the next step of the loop, here without a draft, gives the second.
    short = accepted == 0
    assert short.any() and not short.all()
    count = int(short.sum())
    following, _ = verify(**sampled_chain(
        TARGET_NEXT[tokens[short, 0]].unsqueeze(1), torch.empty(count, 0, 4), torch.empty(count, 0),
        random_uniform(count, 1, seed=4), temperature=TEMPERATURE))
    tokens[short, 1] = following[:, 0]
    joint = p_first.unsqueeze(1) * torch.softmax(TARGET_NEXT / TEMPERATURE, -1)
    assert_counts_fit((tokens[:, 0] * 4 + tokens[:, 1]).bincount(minlength=16), joint.flatten())


def assert_emission_integrates_to_the_target(verify):
    """One draft token: the measure of all (draft token, uniforms) that emit v first is p(v), whichever v.

    The acceptance of each draft token and the steps of the recovered and bonus token are found by bisection.
    """
    def run(draft_token, accept, uniform):
        rows = len(draft_token)
        return verify(**sampled_chain(
            torch.stack([TARGET_FIRST, TARGET_NEXT[0]]).expand(rows, 2, 4), DRAFT_FIRST.expand(rows, 1, 4),
            draft_token, torch.stack([accept, uniform], dim=1), temperature=TEMPERATURE))

    every = torch.arange(4)
    accepted = share_of_uniforms(lambda u: run(every, u, torch.full((4,), 0.5))[1] == 0, 4)
    rejected = (accepted < 1).nonzero().flatten()
    nearly_one = 1 - 2**-GRID_BITS
    recovered = torch.zeros(4, 4, dtype=torch.float64)
    recovered[rejected] = measure_of_tokens(
        lambda row, u: run(rejected[row], torch.full_like(u, nearly_one), u)[0][:, 0], len(rejected))

    p, q = (torch.softmax(logits.double() / TEMPERATURE, -1) for logits in (TARGET_FIRST, DRAFT_FIRST))
    emitted = q * accepted + (q * (1 - accepted)) @ recovered
    torch.testing.assert_close(emitted, p, rtol=0, atol=EXACT)

    # Token 0 is always accepted, so what follows it is the bonus token, drawn from the next position.
    bonus = measure_of_tokens(lambda row, u: run(row, torch.zeros_like(u), u)[0][:, 1], 1)[0]
    torch.testing.assert_close(bonus, torch.softmax(TARGET_NEXT[0].double() / TEMPERATURE, -1), rtol=0, atol=EXACT)


@statistical
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_draft_tokens_are_distributed_as_the_softmax(temperature):
    logits = torch.tensor([0.3, -1.0, 2.0, -float("inf"), 0.0, 1.1, 0.2])
    uniform = random_uniform(TRIALS, seed=11)
    token, *_ = draft_sample(logits.expand(TRIALS, 7), torch.full((TRIALS,), temperature), uniform)
    assert_counts_fit(token.bincount(minlength=7), torch.softmax(logits / temperature, -1))


def test_draft_tokens_integrate_to_the_softmax():
    logits = torch.tensor([0.3, -1.0, 2.0, -float("inf"), 0.0, 1.1, 0.2])
    measure = measure_of_tokens(lambda row, u: draft_sample(logits.expand(len(u), 7), torch.full((len(u),), 0.8), u)[0],
                                rows=1, vocabulary=7)[0]
    torch.testing.assert_close(measure, torch.softmax(logits.double() / 0.8, -1), rtol=0, atol=EXACT)


@statistical
def test_emitted_tokens_are_distributed_as_the_target():
    assert_emitted_tokens_fit_the_target(verify)


def test_emission_integrates_to_the_target():
    assert_emission_integrates_to_the_target(verify)


@statistical
def test_the_statistical_check_passes_a_right_verifier():
    assert_emitted_tokens_fit_the_target(verifier())


def test_the_other_checks_pass_a_right_verifier():
    assert_emission_integrates_to_the_target(verifier())
    assert_no_zero_probability_token(verifier())


WRONG = {"residual-without-clamp": verifier(residual=absolute_difference),
         "recovered-from-the-target": verifier(residual=target_itself),
         "accepted-below-p": verifier(accepts=below_p)}


@statistical
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_the_statistical_check_rejects_a_wrong_verifier(wrong):
    with pytest.raises(AssertionError, match=r"chi-square|probability zero"):
        assert_emitted_tokens_fit_the_target(wrong)


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_the_integration_rejects_a_wrong_verifier(wrong):
    with pytest.raises(AssertionError, match="not close"):
        assert_emission_integrates_to_the_target(wrong)


def test_the_hand_written_case_rejects_acceptance_up_to_the_ratio():
    # One uniform in 2^24 shows it, so no statistics would.
    with pytest.raises(AssertionError, match="probability zero was accepted"):
        assert_no_zero_probability_token(verifier(accepts=up_to_the_ratio))
