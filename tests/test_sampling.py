"""Sampled texts have the target's distribution: all texts of a tiny vocabulary with their exact probabilities."""

import itertools

import pytest
import torch
from scipy import stats
from test_head import random_tensors, tiny_head
from tiny_models import noisy_copy, tiny_model
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import speckv
from speckv import decode, head, randomness
from speckv.kernels import reference
from speckv.lookup import LookupDrafter, LookupFirst

VOCABULARY, NEW_TOKENS, SAMPLES = 4, 3, 1500
PROMPT = torch.tensor([[1, 2, 3]])
REPETITIVE_PROMPT = torch.tensor([[1, 2, 3, 0, 1, 2, 3, 1, 2]])
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def pair():
    small = {"vocab_size": VOCABULARY, "num_hidden_layers": 1}
    return tiny_model(seed=2, **small), tiny_model(seed=11, **small)


@torch.inference_mode()
def exact_probabilities(target, prompt=PROMPT, top_k=VOCABULARY, top_p=1.0, min_p=0.0):
    """The probability of each of the VOCABULARY ** NEW_TOKENS texts, by running the target on all of them."""
    texts = torch.tensor(list(itertools.product(range(VOCABULARY), repeat=NEW_TOKENS)))
    sequences = torch.cat([prompt.expand(len(texts), -1), texts], dim=1)
    logits = target(sequences).logits[:, prompt.shape[1] - 1:-1].double()
    scores = (logits / TEMPERATURE).flatten(0, 1)
    for warper in (TopKLogitsWarper(top_k), TopPLogitsWarper(top_p), MinPLogitsWarper(min_p)):
        scores = warper(None, scores)
    log_probabilities = scores.view(logits.shape).log_softmax(-1).gather(-1, texts.unsqueeze(-1)).squeeze(-1)
    return log_probabilities.sum(-1).exp()


def p_value(target, drafter, policy, prompt=PROMPT, has_seed=False, fast=True, **filters):
    """How well the texts that the loop samples fit the exact distribution; with seeds, or by rejection. With fast the
    models are run by the engine, which takes a seventh of the time; PyTorch tells the exact distribution."""
    counts = torch.zeros(VOCABULARY ** NEW_TOKENS)
    weights = torch.tensor([VOCABULARY ** i for i in reversed(range(NEW_TOKENS))])
    for seed in range(SAMPLES):
        torch.manual_seed(seed)
        output = speckv.generate(target, drafter, prompt, max_new_tokens=NEW_TOKENS, policy=policy,
                                 temperature=TEMPERATURE, seed=seed if has_seed else None, fast=fast, **filters)
        counts[(output.sequences[0, -NEW_TOKENS:] * weights).sum()] += 1
    return fit(counts, exact_probabilities(target, prompt, **filters))


def fit(counts, probabilities):
    """The p-value of texts counted, given their exact probabilities."""
    expected = probabilities * counts.sum()
    assert (counts[expected == 0] == 0).all(), "a text that the filters rule out was written"
    # Texts too rare for a chi-square are counted together.
    order = expected.argsort()
    rare = order[expected[order].cumsum(0) < 10]
    common = torch.ones(len(expected), dtype=torch.bool)
    common[rare] = False
    observed = torch.cat([counts[common], counts[rare].sum().reshape(1)]).double()
    wanted = torch.cat([expected[common], expected[rare].sum().reshape(1)])
    kept = wanted > 0
    return stats.chisquare(observed[kept], wanted[kept] * observed[kept].sum() / wanted[kept].sum()).pvalue


@pytest.mark.parametrize("has_seed", [False, True], ids=["rejection", "seeds"])
@pytest.mark.parametrize("policy", ["off", "fixed:1", "fixed:2"])
def test_sampled_texts_have_the_exact_distribution_of_the_target(pair, policy, has_seed):
    assert p_value(*pair, policy, has_seed=has_seed) > 1e-3


@pytest.mark.parametrize("has_seed", [False, True], ids=["rejection", "seeds"])
def test_so_have_those_of_models_that_pytorch_runs(pair, has_seed):
    assert p_value(*pair, "fixed:2", has_seed=has_seed, fast=False) > 1e-3


@pytest.mark.parametrize("settings", [
    {"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.9, "min_p": 0.3},
    {"top_k": 3, "top_p": 0.9, "min_p": 0.3, "has_seed": True}], ids=str)
def test_filtered_texts_have_the_exact_distribution_of_the_filtered_target(pair, settings):
    assert p_value(*pair, "fixed:2", **settings) > 1e-3


def test_lookup_leaves_the_distribution_of_the_filtered_target_as_it_is(pair):
    filters = {"top_k": 3, "top_p": 0.9}
    assert p_value(pair[0], LookupDrafter(VOCABULARY, shortest=1), "fixed:2", REPETITIVE_PROMPT, **filters) > 1e-3


@pytest.mark.parametrize("policy", ["adaptive", "hf-confidence"])
def test_every_kind_of_policy_draws_with_the_filters(pair, policy):
    # With top_k = 1, sampling is greedy: a draft token drawn otherwise would be rejected or, worse, kept.
    texts = [speckv.generate(*pair, PROMPT, max_new_tokens=30, policy=policy, **settings) for settings in (
        {}, {"temperature": TEMPERATURE, "top_k": 1, "seed": 0}, {"temperature": TEMPERATURE, "top_p": 0.0, "seed": 1})]
    assert all(torch.equal(text.sequences, texts[0].sequences) for text in texts)


def test_a_head_that_can_draft_only_some_tokens_leaves_the_distribution_as_it_is():
    target = tiny_model(seed=2, vocab_size=VOCABULARY, num_hidden_layers=2)
    torch.manual_seed(0)
    tensors = random_tensors(target, torch.tensor([0, 2, 3]))
    assert p_value(target, head.build(target, tensors), "fixed:2") > 1e-3


def test_a_head_in_int8_leaves_the_distribution_as_it_is():
    target = tiny_model(seed=2, vocab_size=VOCABULARY, num_hidden_layers=2)
    torch.manual_seed(0)
    drafter = head.build(target, random_tensors(target, torch.tensor([0, 1, 3])))
    drafter.hold_in_int8()
    assert p_value(target, drafter, "fixed:2") > 1e-3


def test_lookup_leaves_the_distribution_as_it_is(pair):
    assert p_value(pair[0], LookupDrafter(VOCABULARY, shortest=1), "fixed:2", REPETITIVE_PROMPT) > 1e-3


def test_lookup_before_a_drafter_leaves_the_distribution_as_it_is(pair):
    # From matches of two, so that steps of both kinds follow each other.
    assert p_value(pair[0], LookupFirst(pair[1]), "fixed:2", REPETITIVE_PROMPT) > 1e-3


def sample_target_after_rejection(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform):
    """A planted bug: after a rejection, draw from p instead of the residual."""
    tokens, accepted = reference.verify_chain(
        target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform)
    stop = accepted[0]
    p = reference.softmax_with_temperature(target_logits[:, stop], temperature.reshape(-1, 1))
    tokens[0, stop] = reference.sample_inverse_cdf(p, uniform.gather(1, num_draft.unsqueeze(1)).squeeze(1))
    return tokens, accepted


def accept_too_often(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform):
    """A planted bug: accept with probability min(1, 2 p/q)."""
    eased = torch.cat([uniform[:, :-1] / 2, uniform[:, -1:]], dim=1)
    return reference.verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, eased)


@pytest.mark.parametrize("bug", [sample_target_after_rejection, accept_too_often])
def test_the_test_above_fails_for_a_wrong_verifier(pair, bug, monkeypatch):
    monkeypatch.setattr(decode, "verify_chain", bug)
    assert p_value(*pair, "fixed:2") < 1e-3


def test_the_test_of_lookup_fails_for_a_wrong_verifier(pair, monkeypatch):
    monkeypatch.setattr(decode, "verify_chain", sample_target_after_rejection)
    assert p_value(pair[0], LookupDrafter(VOCABULARY, shortest=1), "fixed:2", REPETITIVE_PROMPT) < 1e-3


DRAFTS = {"nothing": lambda target: None, "model": lambda target: noisy_copy(target), "head": tiny_head,
          "lookup": lambda target: LookupDrafter(target.config.vocab_size, shortest=1),
          "lookup first": lambda target: LookupFirst(noisy_copy(target))}


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("policy", ["fixed:1", "fixed:5", "adaptive", "hf-confidence"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.6, "top_k": 40, "top_p": 0.95, "min_p": 0.01}],
                         ids=["plain", "filters"])
def test_a_seed_gives_the_text_of_plain_decoding_whatever_drafts(draft, policy, settings):
    target = tiny_model()
    settings = {"temperature": 1.0, "max_new_tokens": 80, "seed": 7, "eos_token_id": []} | settings
    drafter = DRAFTS[draft](target)
    plain = speckv.generate(target, None, PROMPT, policy="off", **settings)
    output = speckv.generate(target, drafter, PROMPT, policy="off" if drafter is None else policy, **settings)
    assert torch.equal(output.sequences, plain.sequences)
    if draft == "model" and policy != "adaptive":  # which goes by the clock, and may find nothing worth drafting
        assert output.accepted > 0
    other = speckv.generate(target, drafter, PROMPT, policy="off", **settings | {"seed": 8})
    assert not torch.equal(other.sequences, plain.sequences)
    longer = speckv.generate(target, None, PROMPT, policy="off", **settings | {"max_new_tokens": 100})
    assert torch.equal(longer.sequences[:, :plain.sequences.shape[1]], plain.sequences)


def numbers_of_the_position_before(target_logits, draft_tokens, temperature, uniform, **filters):
    """A planted bug: numbers one position off."""
    return randomness.verify_coupled(target_logits, draft_tokens, temperature, uniform.roll(1, dims=1), **filters)


def test_the_test_above_fails_where_numbers_are_mixed_up(monkeypatch):
    monkeypatch.setattr(decode, "verify_coupled", numbers_of_the_position_before)
    with pytest.raises(AssertionError):
        test_a_seed_gives_the_text_of_plain_decoding_whatever_drafts("model", "fixed:5", {})


def test_without_a_seed_torch_makes_the_text_repeatable_and_greedy_decoding_draws_nothing(pair):
    def text(seed, **settings):
        torch.manual_seed(seed)
        sequences = speckv.generate(*pair, PROMPT, max_new_tokens=30, policy="fixed:2", eos_token_id=[],
                                    **settings).sequences
        return sequences, torch.rand(1)
    first, again, other = (text(seed, temperature=1.0)[0] for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    _, number = text(3)
    assert number == torch.rand(1, generator=torch.Generator().manual_seed(3))
