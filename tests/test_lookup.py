"""Prompt lookup finds what it should, knows how often it is right, and is lossless like any drafter."""

import math
import random

import pytest
import torch
from test_head import tiny_head
from tiny_models import VOCABULARY, noisy_copy, prompt_ids, tiny_model

import speckv
from speckv import InputError, ModelError, head, lookup
from speckv.drafters import CausalLMDrafter, as_drafter
from speckv.lookup import FADE, MATCH_PRIORS, MODEL_PRIOR, PRIOR_TRIALS, LookupDrafter, LookupFirst

PHRASE = torch.tensor([[5, 17, 42, 8, 23, 61]])
NEVER = 60  # a match of so many tokens does not occur in these tests


def plain(model, ids, max_new_tokens, **settings):
    return model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, **settings)


def tensor(*tokens):
    return torch.tensor([tokens])


def proposed(of_some):
    """The one token that lookup proposes; None where it proposes nothing."""
    if of_some is None:
        return None
    logits, token_ids = of_some
    assert logits.tolist() == [[0.0]] and token_ids.shape == (1,)
    return token_ids.item()


def after(*tokens, **settings):
    """What a new session proposes after these tokens."""
    return proposed(LookupDrafter(VOCABULARY, **settings).open().next_logits(tensor(*tokens)))


class Spy:
    """A drafter that notes what its session is asked, and answers like another."""

    def __init__(self, drafter):
        self.drafter = as_drafter(drafter)
        self.calls = []
        for name in ("name", "vocabulary", "context", "rope_switch", "wants_hidden"):
            setattr(self, name, getattr(self.drafter, name))

    def open(self):
        self.session = self.drafter.open()
        return self

    def next_logits(self, ids):
        self.calls.append(("next_logits", ids.shape[1]))
        return self.session.next_logits(ids)

    def observe(self, hidden, start):
        self.calls.append(("observe", start))
        self.session.observe(hidden, start)

    def rollback(self, length):
        self.calls.append(("rollback", length))
        self.session.rollback(length)

    @property
    def asked(self):
        return [length for call, length in self.calls if call == "next_logits"]


class Constant:
    """A drafter that proposes one token for ever."""

    name, vocabulary, context, rope_switch, wants_hidden = "constant", VOCABULARY, None, None, False

    def __init__(self, token):
        self.token = token

    def open(self):
        return self

    def next_logits(self, ids):
        logits = torch.zeros(1, VOCABULARY)
        logits[0, self.token] = 9.0
        return logits

    def rollback(self, length):
        pass


# What is proposed


def test_what_followed_last_time_is_proposed():
    assert after(1, 2, 3, 4, 1, 2) == 3


def test_the_longest_match_wins_over_a_later_one():
    assert after(1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3) == 50


def test_of_equal_matches_the_latest_wins():
    assert after(1, 2, 3, 50, 1, 2, 3, 60, 1, 2, 3) == 60


def test_beyond_the_longest_length_matches_are_equal():
    assert after(1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3, longest=2) == 60


@pytest.mark.parametrize("tokens", [(7,), (1, 2), (1, 2, 3, 4), (1, 2, 3, 9, 2)], ids=str)
def test_nothing_is_proposed_without_a_match(tokens):
    assert after(*tokens) is None


def test_a_match_may_overlap_the_end_it_matches():
    assert after(4, 4, 4) == 4
    assert after(1, 2, 1, 2, 1) == 2


def test_only_so_many_occurrences_are_looked_at(monkeypatch):
    text = (1, 2, 3, 50, 9, 2, 3, 60, 9, 2, 3, 61, 1, 2, 3)
    assert after(*text) == 50
    monkeypatch.setattr(lookup, "MOST_OCCURRENCES", 2)
    assert after(*text) == 61


def slow_match(tokens, longest, shortest):
    for length in range(min(longest, len(tokens)), shortest - 1, -1):
        for end in range(len(tokens) - 1, length - 1, -1):
            if tokens[end - length:end] == tokens[-length:]:
                return tokens[end]
    return None


@pytest.mark.parametrize("longest, shortest", [(10, 2), (3, 3), (4, 1), (1, 1)])
def test_a_search_through_the_whole_text_finds_the_same_after_any_rollbacks(longest, shortest):
    draw = random.Random(longest)
    session = LookupDrafter(VOCABULARY, longest, shortest).open()
    standing = [draw.randrange(3)]
    for _ in range(150):
        text = list(standing)
        for _ in range(draw.randrange(5)):  # a draft
            token = proposed(session.next_logits(tensor(*text)))
            assert token == slow_match(text, longest, shortest)
            text.append(draw.randrange(3) if token is None or draw.random() < 0.3 else token)
        kept = draw.randint(len(standing), len(text))
        session.rollback(kept)
        standing = text[:kept] + [draw.randrange(3)]


def test_a_rollback_forgets_the_draft():
    session = LookupDrafter(VOCABULARY).open()
    assert proposed(session.next_logits(tensor(1, 2, 3))) is None
    assert proposed(session.next_logits(tensor(1, 2, 3, 7, 8, 9, 7, 8))) == 9
    session.rollback(3)
    assert proposed(session.next_logits(tensor(1, 2, 3, 7, 8))) is None


def test_a_rollback_into_what_stood_forgets_that_too():
    session = LookupDrafter(VOCABULARY).open()
    session.next_logits(tensor(1, 2, 3, 4, 1, 2))
    session.rollback(1)
    assert proposed(session.next_logits(tensor(1, 5, 6, 1, 2))) is None
    assert proposed(session.next_logits(tensor(1, 5, 6, 1, 2, 1, 5))) == 6


def test_the_rows_of_a_draft_are_tensors_of_their_own():
    session = LookupDrafter(VOCABULARY).open()
    text = [1, 2, 3, 4, 1, 2]
    rows = []
    for _ in range(3):
        rows.append(session.next_logits(tensor(*text)))
        text.append(proposed(rows[-1]))
    assert [proposed(row) for row in rows] == [3, 4, 1]


def test_sessions_share_nothing():
    drafter = LookupDrafter(VOCABULARY)
    drafter.open().next_logits(tensor(1, 2, 3, 4))
    assert drafter.open().next_logits(tensor(5, 1, 2)) is None


@pytest.mark.parametrize("longest, shortest", [(10, 0), (1, 2)])
def test_lengths_that_cannot_be_are_refused(longest, shortest):
    with pytest.raises(InputError, match=f"matches of {shortest} to {longest} tokens"):
        LookupDrafter(VOCABULARY, longest, shortest)


# In the loop

DRAFTERS = {
    "lookup": lambda target: LookupDrafter(VOCABULARY),
    "lookup from one token": lambda target: LookupDrafter(VOCABULARY, shortest=1),
    "before a language model": lambda target: LookupFirst(noisy_copy(target)),
    "before a head": lambda target: LookupFirst(tiny_head(target), shortest=1),
}


# With these seeds the texts repeat themselves in part.
SEEDS = {"llama": 2, "gemma": 0, "mistral-sliding": 2}


@pytest.fixture(scope="module", params=list(SEEDS))
def target(request):
    return tiny_model(request.param, seed=SEEDS[request.param])


@pytest.mark.parametrize("policy", ["fixed:1", "fixed:4"])
@pytest.mark.parametrize("prompt", [PHRASE.repeat(1, 4), prompt_ids(12), prompt_ids(1)],
                         ids=["repeated", "random", "one token"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_output_is_that_of_plain_decoding(target, drafter, prompt, policy):
    output = speckv.generate(target, DRAFTERS[drafter](target), prompt, max_new_tokens=40, policy=policy)
    assert torch.equal(output.sequences, plain(target, prompt, 40))
    assert all(step.gamma <= int(policy.removeprefix("fixed:")) for step in output.steps)
    assert sum(step.tokens for step in output.steps) == output.new_tokens == 40


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_drafts_above_are_sometimes_right_and_sometimes_wrong(target, drafter):
    # Without this the test above could pass with a loop that never accepts, or never rejects.
    output = speckv.generate(target, DRAFTERS[drafter](target), PHRASE.repeat(1, 4), max_new_tokens=90,
                             policy="fixed:3")
    assert 0 < output.acceptance_rate < 1


def test_padding_is_not_looked_up():
    target = tiny_model()
    ids = PHRASE.repeat(1, 3)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.int64), ids], dim=1)
    mask = (padded > 0).long()
    output = speckv.generate(target, LookupDrafter(VOCABULARY), padded, attention_mask=mask, max_new_tokens=40,
                             policy="fixed:3")
    assert torch.equal(output.sequences, plain(target, padded, 40, attention_mask=mask))
    bare = speckv.generate(target, LookupDrafter(VOCABULARY), ids, max_new_tokens=40, policy="fixed:3")
    assert [step.gamma for step in output.steps] == [step.gamma for step in bare.steps]


def test_a_step_without_a_match_is_plain_decoding_and_says_so():
    target = tiny_model()
    output = speckv.generate(target, LookupDrafter(VOCABULARY, NEVER, NEVER), PHRASE.repeat(1, 4), max_new_tokens=12,
                             policy="fixed:4")
    assert [(step.gamma, step.accepted, step.tokens) for step in output.steps] == [(0, 0, 1)] * 12
    assert all(step.mean_entropy is None and step.min_confidence is None for step in output.steps)
    assert output.acceptance_rate == 0


class Brief:
    """A drafter that proposes only so many tokens a step."""

    def __init__(self, drafter, most):
        self.drafter, self.most = as_drafter(drafter), most
        for name in ("name", "vocabulary", "context", "rope_switch", "wants_hidden"):
            setattr(self, name, getattr(self.drafter, name))

    def open(self):
        self.session, self.left = self.drafter.open(), self.most + 1  # the prompt is read first
        return self

    def next_logits(self, ids):
        self.left -= 1
        return self.session.next_logits(ids) if self.left >= 0 else None

    def rollback(self, length):
        self.left = self.most
        self.session.rollback(length)


@pytest.mark.parametrize("most", [1, 2])
def test_a_draft_that_ends_early_is_recorded_as_long_as_it_was(most):
    target = tiny_model()
    output = speckv.generate(target, Brief(target, most), prompt_ids(), max_new_tokens=12, policy="fixed:4")
    assert torch.equal(output.sequences, plain(target, prompt_ids(), 12))
    assert [(step.gamma, step.accepted) for step in output.steps[:-1]] == [(most, most)] * (len(output.steps) - 1)
    assert output.acceptance_rate == 1.0


# How well it does


def estimate(prior, *outcomes):
    """The documented estimate after these outcomes."""
    weights = [FADE ** i for i in reversed(range(len(outcomes)))]
    successes = sum(weight * outcome for weight, outcome in zip(weights, outcomes, strict=True))
    return (PRIOR_TRIALS * prior + successes) / (PRIOR_TRIALS + sum(weights))


def test_the_estimate_follows_what_stood():
    session = LookupDrafter(VOCABULARY).open()
    pair = MATCH_PRIORS[1]
    session.prefill(tensor(1, 2, 9, 1))
    assert proposed(session.next_logits(tensor(1, 2, 9, 1, 2))) == 9
    assert session.signals()[1] == pytest.approx(estimate(pair))
    session.rollback(5)
    assert session.next_logits(tensor(1, 2, 9, 1, 2, 7)) is None  # 9 did not stand
    session.rollback(6)
    assert proposed(session.next_logits(tensor(1, 2, 9, 1, 2, 7, 1, 2))) == 7
    assert session.signals()[1] == pytest.approx(estimate(pair, 0))
    session.next_logits(tensor(1, 2, 9, 1, 2, 7, 1, 2, 7))
    session.rollback(9)  # 7 did, as the draft token it was
    assert proposed(session.next_logits(tensor(1, 2, 9, 1, 2, 7, 1, 2, 7, 50, 2, 9))) == 1
    assert session.signals()[1] == pytest.approx(estimate(pair, 0, 1))


def test_each_length_of_match_has_its_own_estimate():
    session = LookupDrafter(VOCABULARY).open()
    text = [*range(10, 20), 1, *range(10, 18)]
    assert proposed(session.next_logits(tensor(*text))) == 18
    assert session.signals()[1] == pytest.approx(MATCH_PRIORS[4])
    session.rollback(len(text))
    text += [50, 10, 11]  # 18 did not stand, and nobody would have proposed 10 or 11
    assert proposed(session.next_logits(tensor(*text))) == 12
    assert session.signals()[1] == pytest.approx(MATCH_PRIORS[1])
    session.rollback(len(text))
    text += [12, 13, 14, 15, 16, 17]  # foretold by matches of 2, 3, 4, 5, 6 and 7 tokens
    session.next_logits(tensor(*text))
    assert session.signals()[1] == pytest.approx(estimate(MATCH_PRIORS[4], 0))
    session.rollback(len(text))
    session.next_logits(tensor(*text, 60, 12, 13, 14))
    assert session.signals()[1] == pytest.approx(estimate(MATCH_PRIORS[2], 1, 1))


def test_the_prompt_and_tokens_that_did_not_stand_are_not_scored():
    session = LookupDrafter(VOCABULARY).open()
    session.prefill(tensor(*[1, 2, 3] * 8))
    text = [*[1, 2, 3] * 8, 9, 1, 2]
    first = session.next_logits(tensor(*text))
    for drafted in ([3], [3, 1], [3, 1, 2]):
        session.next_logits(tensor(*text, *drafted))
    session.rollback(len(text))
    text += [50, 1, 2]
    assert proposed(first) == 3
    assert proposed(session.next_logits(tensor(*text))) == 50
    assert session.signals()[1] == pytest.approx(estimate(MATCH_PRIORS[1], 0))


def test_the_entropy_is_that_of_a_coin():
    session = LookupDrafter(VOCABULARY).open()
    session.next_logits(tensor(1, 2, 3, 1, 2))
    entropy, confidence = session.signals()
    assert entropy == pytest.approx(-confidence * math.log2(confidence) - (1 - confidence) * math.log2(1 - confidence))


def test_records_carry_the_estimate():
    # The drafts of a text that copies itself for ever: match upon match, ever surer.
    target = tiny_model(num_hidden_layers=1)
    target.lm_head.weight.data[:] = 0
    output = speckv.generate(target, LookupDrafter(VOCABULARY), tensor(0, 0), max_new_tokens=60, policy="fixed:3")
    drafts = [step for step in output.steps if step.gamma]
    assert all(0 < step.min_confidence <= step.mean_confidence < 1 for step in drafts)
    assert all(0 < step.mean_entropy <= step.max_entropy < 1 for step in drafts)
    assert drafts[-1].min_confidence > 0.9 > drafts[0].min_confidence
    assert output.acceptance_rate == 1.0


# In front of a model drafter


def first_session(model, text, **settings):
    """A LookupFirst session that has read all of text but its last token."""
    session = LookupFirst(model, **settings).open()
    session.prefill(tensor(*text[:-1]))
    return session


LONG = [*range(10, 20), 1, *range(10, 19)]  # ends in a match of 9 tokens, foretold to go on with 19
SHORT = [1, 2, 50, 3, 1]                    # ends in a match of 1, foretold to go on with 2


def test_a_promising_match_is_drafted_without_the_model():
    model = Spy(Constant(7))
    session = first_session(model, LONG)
    assert model.asked == [len(LONG) - 1]  # the prompt
    assert proposed(session.next_logits(tensor(*LONG))) == 19
    assert proposed(session.next_logits(tensor(*LONG, 19))) == 1
    assert session.signals()[1] == pytest.approx(MATCH_PRIORS[4])
    session.rollback(len(LONG) + 1)
    assert model.asked == [len(LONG) - 1]
    assert ("rollback", len(LONG) + 1) in model.calls


@pytest.mark.parametrize("text", [SHORT, [1, 2, 3, 4]], ids=["short match", "no match"])
def test_what_is_not_promising_is_left_to_the_model(text):
    model = Spy(Constant(7))
    session = first_session(model, text, shortest=1)
    assert session.next_logits(tensor(*text)).argmax() == 7
    # The rest of the step too, whatever comes to match in it.
    assert session.next_logits(tensor(*text, *LONG)).argmax() == 7
    assert session.signals() is None
    assert model.asked == [len(text) - 1, len(text), len(text) + len(LONG)]


def test_a_lookup_draft_that_runs_out_of_match_stops():
    session = first_session(Constant(7), LONG)
    assert proposed(session.next_logits(tensor(*LONG))) == 19
    assert session.next_logits(tensor(*LONG, 77)) is None


def test_the_model_catches_up_on_what_it_was_not_asked():
    model = Spy(Constant(7))
    session = first_session(model, LONG)
    session.next_logits(tensor(*LONG))
    session.rollback(len(LONG) + 1)
    text = [*LONG, 19, 80]
    assert session.next_logits(tensor(*text)).argmax() == 7
    assert model.asked == [len(LONG) - 1, len(text)]


def test_the_models_acceptance_counts_the_tokens_that_were_tried():
    session = first_session(Constant(7), [1, 2, 3])
    text = [1, 2, 3]
    for accepted in (3, 0, 2):
        for drafted in range(3):
            session.next_logits(tensor(*text, *[7] * drafted))
        session.rollback(len(text) + accepted)
        text += [7] * accepted + [len(text) + 20]
    assert session._acceptance.value == pytest.approx(estimate(MODEL_PRIOR, 1, 1, 1, 0, 1, 1, 0))
    text += LONG
    assert proposed(session.next_logits(tensor(*text))) == 19
    session.rollback(len(text))
    # Steps of lookup do not tell of the model.
    assert session._acceptance.value == pytest.approx(estimate(MODEL_PRIOR, 1, 1, 1, 0, 1, 1, 0))


def test_the_models_acceptance_decides_when_lookup_is_good_enough():
    session = first_session(Constant(7), SHORT, shortest=1)
    text, outcomes = list(SHORT), []
    while estimate(MATCH_PRIORS[0], 0) < estimate(MODEL_PRIOR, *outcomes):  # 2 did not come either
        for drafted in range(3):
            assert session.next_logits(tensor(*text, *[7] * drafted)).argmax() == 7
        session.rollback(len(text))  # none stands, and of three only the first was tried
        outcomes.append(0)
        text.append(20 + len(outcomes))
    assert 0 < len(outcomes) < 10
    text.append(1)
    assert proposed(session.next_logits(tensor(*text))) == 21  # what followed the 1 at the end of SHORT


def test_accepted_drafts_of_the_model_keep_lookup_waiting():
    session = first_session(Constant(7), LONG[:-1])
    text = [*LONG[:-1], 60, 61]
    for i in range(30):
        assert session.next_logits(tensor(*text)).argmax() == 7
        session.next_logits(tensor(*text, 7))
        session.rollback(len(text) + 2)
        text += [7, 7, 62 + i]
    text += LONG[:8]
    # A match of 8, which a model drafter of less success would not have been asked before.
    assert MODEL_PRIOR < MATCH_PRIORS[4] < estimate(MODEL_PRIOR, *[1] * 60)
    assert session.next_logits(tensor(*text)).argmax() == 7
    assert session.signals() is None


@pytest.mark.parametrize("kind", ["language model", "head"])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_lookup_that_never_matches_changes_nothing(kind, temperature):
    target = tiny_model()
    drafter = CausalLMDrafter(noisy_copy(target)) if kind == "language model" else tiny_head(target)
    settings = {"max_new_tokens": 50, "policy": "fixed:3", "temperature": temperature, "seed": 4}
    alone = speckv.generate(target, drafter, PHRASE.repeat(1, 3), **settings)
    behind = speckv.generate(target, LookupFirst(drafter, NEVER + 1, NEVER), PHRASE.repeat(1, 3), **settings)
    assert torch.equal(alone.sequences, behind.sequences)

    def figures(step):
        return (step.gamma, step.accepted, step.tokens, step.mean_entropy, step.mean_confidence, step.max_entropy,
                step.min_confidence)
    assert [figures(step) for step in alone.steps] == [figures(step) for step in behind.steps]


class FreshEachTime(Spy):
    """Compares what a session answers first in a step with a new session that was shown the same, which must be all."""

    def open(self):
        self.seen, self.is_new_step = [], False
        self.steps = self.skipped = self.unasked = 0
        return super().open()

    def observe(self, hidden, start):
        self.seen.append((hidden.clone(), start))
        super().observe(hidden, start)

    def next_logits(self, ids):
        logits = super().next_logits(ids)
        if self.is_new_step:
            positions = {start + i for hidden, start in self.seen for i in range(hidden.shape[1])}
            assert positions == set(range(ids.shape[1] - 1)) or not self.wants_hidden
            fresh = self.drafter.open()
            for hidden, start in self.seen:
                fresh.observe(hidden, start)
            fresh.rollback(ids.shape[1] - 1)
            for mine, other in zip(logits, fresh.next_logits(ids), strict=True):
                torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
            self.steps += 1
            self.skipped += self.unasked
            self.unasked = 0
        self.is_new_step = False
        return logits

    def rollback(self, length):
        self.unasked += self.is_new_step
        self.is_new_step = True
        self.seen = [(hidden[:, :length - start], start) for hidden, start in self.seen if start < length]
        super().rollback(length)


@pytest.mark.parametrize("kind", ["language model", "head"])
def test_after_steps_of_lookup_the_model_drafts_as_if_it_had_read_the_text_at_once(target, kind, monkeypatch):
    monkeypatch.setattr(head, "WINDOW", 200)  # with fewer, a head that falls behind leaves some out
    spy = FreshEachTime(noisy_copy(target, noise=0.4) if kind == "language model" else tiny_head(target))
    output = speckv.generate(target, LookupFirst(spy, shortest=1), PHRASE.repeat(1, 4), max_new_tokens=90,
                             policy="fixed:3")
    assert torch.equal(output.sequences, plain(target, PHRASE.repeat(1, 4), 90))
    assert spy.steps > 3 and spy.skipped > 3  # it had both to catch up and to go on


# By name


def test_lookup_is_loaded_by_name(tmp_path):
    target = tiny_model()
    assert isinstance(speckv.load_drafter("lookup", target), LookupDrafter)
    noisy_copy(target).save_pretrained(tmp_path)
    drafter = speckv.load_drafter(f"lookup+{tmp_path}", target)
    assert isinstance(drafter, LookupFirst)
    output = speckv.generate(target, drafter, PHRASE.repeat(1, 2), max_new_tokens=20, policy="fixed:3")
    assert torch.equal(output.sequences, plain(target, PHRASE.repeat(1, 2), 20))


@pytest.mark.parametrize("name", ["lookup+", "lookup+lookup", "lookup+lookup+smollm2"])
def test_a_name_without_a_drafter_behind_lookup_is_refused(name):
    with pytest.raises(ModelError, match=r"after 'lookup\+' comes the drafter .* as in 'lookup\+smollm2'"):
        speckv.load_drafter(name, tiny_model())


def test_an_unknown_drafter_behind_lookup_is_named():
    with pytest.raises(ModelError, match=r"'\./nowhere' is neither a drafter folder nor a causal language model"):
        speckv.load_drafter("lookup+./nowhere", tiny_model())


def test_a_lookup_of_another_vocabulary_is_refused():
    with pytest.raises(ModelError, match="draft vocabulary is 50, target 97"):
        speckv.generate(tiny_model(), LookupDrafter(50), prompt_ids(), max_new_tokens=2)
