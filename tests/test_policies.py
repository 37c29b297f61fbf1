"""The policies: published rules on hand-made signals, and all of them in the loop, where none may change the text."""

import math

import pytest
import torch
from tiny_models import noisy_copy, prompt_ids, tiny_model

import speckv
from speckv import InputError
from speckv.baselines import SVIP, AdaEDL, HFConfidence, HFHeuristic, Paper, SpecDecPlusPlus
from speckv.controller import from_arrays
from speckv.policies import NAMED, parse_policy
from speckv.policy import Fixed, StoppingSession
from speckv.records import StepRecord
from speckv.signals import Signal

EVERY = ["off", "fixed:3", *NAMED]


def step(gamma, accepted, signals=(), draft_ms=0.0, verify_ms=1.0):
    return StepRecord(gamma, accepted, accepted + 1, draft_ms, verify_ms, tuple(signals))


def drafted(policy, signals):
    """How many tokens a policy drafts where these are the signals it would meet."""
    session = policy.open(None)
    for count, signal in enumerate(signals, start=1):
        if count == session.max_draft() or not session.goes_on(count, signal):
            return count
    raise AssertionError("the policy wanted more signals than there are")


def sure(*confidences):
    return [Signal(0.0, confidence) for confidence in confidences]


def entropies(*nats):
    return [Signal(value / math.log(2), 0.5) for value in nats]


def test_hf_confidence_stops_after_the_first_unsure_token():
    assert drafted(HFConfidence(), sure(0.9, 0.4, 0.39, 0.9)) == 3
    assert drafted(HFConfidence(threshold=0.95), sure(0.9, 0.9)) == 1
    assert drafted(HFConfidence(), sure(*[0.9] * 30)) == 20
    with pytest.raises(InputError, match=r"threshold is 1\.5"):
        HFConfidence(threshold=1.5)


def test_hf_heuristic_grows_by_two_and_shrinks_by_one():
    session = HFHeuristic().open(None)
    asked = []
    for accepted in (5, 7, 3, 0, 8):
        asked.append(session.max_draft())
        session.record(step(asked[-1], min(accepted, asked[-1])))
    assert asked == [5, 7, 9, 8, 7] and session.max_draft() == 9
    for _ in range(20):
        session.record(step(3, 0))
    assert session.max_draft() == 1
    session.record(step(0, 0))
    assert session.max_draft() == 1


def test_svip_stops_where_the_square_root_of_the_entropy_in_nats_exceeds_its_threshold():
    assert drafted(SVIP(), entropies(0.1, 0.35, 0.37, 0.0)) == 3
    assert drafted(SVIP(threshold=0.2), entropies(0.05)) == 1


def test_adaedl_stops_by_its_bound_and_moves_its_threshold_with_the_acceptance():
    policy = AdaEDL()
    assert drafted(policy, entropies(0.1, 4.9, 5.1)) == 3  # 1 - sqrt(0.2 H) is 0 at H = 5
    session = policy.open(None)
    for _ in range(500):
        session.record(step(4, 0))
    assert not session.goes_on(1, entropies(4.9)[0])
    for _ in range(5000):
        session.record(step(4, 4))
    assert session.goes_on(1, entropies(5.5)[0])


def test_specdec_stops_where_a_rejection_is_likelier_than_its_threshold():
    assert drafted(SpecDecPlusPlus(), sure(0.9, 0.5, 0.6, 0.9)) == 3  # 0.9, 0.45, 0.27
    session = SpecDecPlusPlus().open(None)
    assert not session.goes_on(1, sure(0.2)[0])
    assert session.goes_on(1, sure(0.9)[0])  # a new draft starts from 1


def test_the_papers_rule_takes_the_step_before_and_its_argmax():
    # acceptance = mean confidence - gamma / 20, so the longest where the last step was sure, the shortest elsewhere.
    w1 = torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, -0.05]).unsqueeze(1)
    controller = from_arrays(w1.numpy(), [0.0], [[1.0]], [0.0])
    session = Paper(controller).open("nf4")
    assert session.max_draft() == 4
    session.record(step(4, 2, sure(0.9, 0.9, 0.9, 0.9)))
    assert session.max_draft() == 8
    session.record(step(8, 0, sure(*[0.15] * 8)))
    assert session.max_draft() == 2


@pytest.fixture(scope="module", params=[0.03, 0.3], ids=["good drafter", "bad drafter"])
def pair(request):
    target = tiny_model()
    return target, noisy_copy(target, noise=request.param)


@pytest.mark.parametrize("policy", EVERY)
def test_no_policy_changes_a_greedy_text(pair, policy):
    target, drafter = pair
    for length in (1, 6):
        expected = target.generate(prompt_ids(length), do_sample=False, max_new_tokens=60, pad_token_id=0)
        output = speckv.generate(target, drafter, prompt_ids(length), max_new_tokens=60, policy=policy)
        assert torch.equal(output.sequences, expected)


class ByTheToken(StoppingSession):
    """The forbidden rule: it drops what it does not like of a token's own value. Proof that the test below can fail."""

    name = "by the token"

    def open(self, compression):
        return self

    def max_draft(self):
        return 3

    def draft(self, logits, temperature, uniform, drafted, own):
        token, signal, _ = super().draft(logits, temperature, uniform, drafted, own)
        while token.item() % 2:  # draws again until it likes the token
            token, signal, _ = super().draft(logits, temperature, torch.rand(1), drafted, own)
        return token, signal, True

    def goes_on(self, drafted, signal):
        return True


def pair_counts(policy, runs=2500):
    """How often each pair of first two tokens came, sampled, over a vocabulary of eight."""
    target = tiny_model(vocab_size=8, seed=4, initializer_range=0.6)
    drafter = noisy_copy(target, noise=0.5)
    policy, counts = parse_policy(policy), torch.zeros(8, 8)
    for seed in range(runs):
        torch.manual_seed(seed)  # not generate's seed, with which a draft token has no say in what is written
        ids = speckv.generate(target, drafter, torch.tensor([[1, 2]]), max_new_tokens=3, policy=policy,
                              temperature=1.0, fast=True).sequences[0]
        counts[ids[2], ids[3]] += 1
    with torch.inference_mode():
        first = target(torch.tensor([[1, 2]])).logits[0, -1].softmax(-1)
        texts = torch.tensor([[1, 2, token] for token in range(8)])
        second = target(texts).logits[:, -1].softmax(-1)
    return counts, first.unsqueeze(1) * second * runs


def p_value(counts, expected):
    from scipy.stats import chisquare

    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum().reshape(1)]).double()
    wanted = torch.cat([expected[is_common], expected[~is_common].sum().reshape(1)]).double()
    return chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue


@pytest.mark.parametrize("policy", ["adaptive", "hf-confidence"])
def test_a_policy_that_stops_by_signals_samples_the_targets_distribution(policy):
    assert p_value(*pair_counts(policy)) > 1e-3


def test_a_policy_that_looks_at_the_token_does_not():
    counts, expected = pair_counts(ByTheToken(), runs=1000)
    assert p_value(counts, expected) < 1e-6


def test_adaedl_refuses_a_bound_that_no_entropy_moves():
    with pytest.raises(InputError, match="gamma is 0"):
        AdaEDL(gamma=0.0)


def test_names_are_parsed_and_others_refused():
    assert parse_policy("off") == Fixed(0)
    for name in NAMED:
        assert parse_policy(name).name == name
    for name in ("fixed", "fixed:x", "adaptiv", "fixed:-1"):
        with pytest.raises(InputError):
            parse_policy(name)


def test_a_policy_that_opens_something_else_is_named():
    class Wrong:
        name = "wrong"

        def open(self, compression):
            return 5
    with pytest.raises(InputError, match="policy 'wrong' opens a int"):
        speckv.generate(tiny_model(), None, prompt_ids(), policy=Wrong(), max_new_tokens=2)
