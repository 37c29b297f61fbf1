"""The adaptive policy: its rule, its rate, bounds on a wrong controller, batches, and the fit of a good one."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny_models import noisy_copy, prompt_ids, tiny_model

import speckv
from speckv import ModelError
from speckv.adaptive import Adaptive
from speckv.controller import from_arrays
from speckv.controller_fit import examples, fit, fit_and_judge, predict, select
from speckv.cost import ALONE, Others
from speckv.draft_state import LONGEST_COUNTED, SIGNALS
from speckv.experience import FIRST_PAUSE, LEAST_CAP, MOST_LOST, MOST_SCALE, PLAIN_EVERY
from speckv.kernels import draft_step
from speckv.records import StepRecord
from speckv.signals import Signal

VOCABULARY = 50
FIT_STEPS = 800


def step(gamma, accepted, draft_ms, verify_ms, confidence=0.5, is_estimate=False):
    signals = tuple(Signal(1.0, confidence, is_estimate) for _ in range(gamma))
    return StepRecord(gamma, accepted, accepted + 1, draft_ms, verify_ms, signals)


def constant_controller(acceptance):
    """Promises this acceptance rate whatever it sees."""
    inputs = len(SIGNALS) + 1
    return from_arrays(torch.zeros(inputs, 2).numpy(), [0.0, 0.0], [[0.0], [0.0]], [acceptance])


class World:
    """A loop without models: tokens of equal confidence, a price list, and drafts of which `stands` tokens stand."""

    def __init__(self, policy, draft_ms=2.0, verify_ms=lambda n: 40.0 + n, stands=lambda number: 2, compression=None,
                 logit=20.0):
        self.session = policy.open(compression)
        self.draft_ms, self.verify_ms, self.stands = draft_ms, verify_ms, stands
        self.logits = torch.zeros(1, VOCABULARY)
        self.logits[0, 3] = logit

    def run(self, steps):
        """The gammas chosen, and tokens over milliseconds."""
        gammas, tokens, total = [], 0, 0.0
        for number in range(steps):
            gamma, most = 0, self.session.max_draft()
            while gamma < most:
                _, signal, goes_on = self.session.draft(self.logits, torch.ones(1), torch.zeros(1), gamma, None)
                gamma += 1
                if not goes_on:
                    break
            if gamma:
                self.session.promise(gamma)
            accepted = min(gamma, self.stands(number))
            signals = (signal,) * gamma if gamma else ()
            record = StepRecord(gamma, accepted, accepted + 1, gamma * self.draft_ms, self.verify_ms(gamma + 1),
                                signals)
            self.session.record(record)
            gammas.append(gamma)
            tokens, total = tokens + record.tokens, total + record.draft_ms + record.verify_ms
        return gammas, tokens / total


# -- the rule


def test_it_drafts_as_long_as_a_token_is_worth_its_time():
    # Each draft token stands with the same share; the promise of the next is that share while all before it stand.
    policy = Adaptive(constant_controller(0.9))
    cheap, _ = World(policy, draft_ms=0.2, verify_ms=lambda n: 40 + 0.2 * n, stands=lambda number: 99).run(40)
    assert cheap[0] == 0 and max(cheap) == policy.longest  # the first step measures plain decoding
    dear, _ = World(Adaptive(constant_controller(0.1)), draft_ms=10.0, verify_ms=lambda n: 40 + 4 * n,
                    stands=lambda number: number % 10 == 0).run(40)
    assert max(dear[1:]) == 1


def test_what_a_token_costs_decides_with_one_controller():
    def mean_gamma(draft_ms):
        policy = Adaptive(constant_controller(0.5))
        gammas, _ = World(policy, draft_ms=draft_ms, stands=lambda number: number % 5).run(80)
        return sum(gammas) / len(gammas)
    assert mean_gamma(0.3) > mean_gamma(15.0) + 1


def test_it_drafts_past_a_length_that_alone_is_not_worth_its_time():
    # A pass over three or four positions costs the same, a good deal more than over two: a draft of three is best.
    def verify_ms(positions):
        return 40.0 + 10 * (positions > 2) + 20 * max(0, positions - 4)
    world = World(Adaptive(constant_controller(0.9)), draft_ms=0.2, verify_ms=verify_ms, stands=lambda number: 3,
                  logit=6.0)
    for gamma in 30 * (0, 1, 2, 3, 4):
        world.session.record(step(gamma, min(gamma, 3), 0.2 * gamma, verify_ms(gamma + 1)))
    gammas, _ = world.run(40)
    assert gammas == [3] * 40


def test_a_drafter_that_is_never_right_is_given_up_and_tried_again_ever_more_rarely():
    world = World(Adaptive(constant_controller(1.0)), draft_ms=4.0, stands=lambda number: 0)
    gammas, rate = world.run(2000)
    drafting = [number for number, gamma in enumerate(gammas) if gamma]
    gaps = [later - earlier for earlier, later in pairwise(drafting) if later - earlier > 1]
    assert gaps[0] >= FIRST_PAUSE and gaps[-1] > 8 * gaps[0]
    assert rate > 0.97 / 41


def test_drafting_comes_back_where_it_pays_again():
    gammas, _ = World(Adaptive(constant_controller(0.8)), stands=lambda number: 0 if number < 100 else 5).run(500)
    assert sum(gamma > 0 for gamma in gammas[60:100]) < 20
    assert sum(gamma > 0 for gamma in gammas[-100:]) > 95


@pytest.mark.parametrize("promise", [0.0, 0.02, 1.0], ids=["promises nothing", "little", "everything"])
@pytest.mark.parametrize("draft_ms", [0.5, 2.0, 8.0, 30.0], ids=str)
@pytest.mark.parametrize("kept", [0, 1, 3], ids=lambda kept: f"{kept} stand")
def test_a_wrong_controller_costs_little(promise, draft_ms, kept):
    world = World(Adaptive(constant_controller(promise)), draft_ms, stands=lambda number: kept)
    _, rate = world.run(1500)
    assert rate > 0.97 / 41  # plain decoding


@pytest.mark.parametrize("seed", range(8))
def test_random_weights_cost_little(seed):
    source = torch.Generator().manual_seed(seed)
    inputs = len(SIGNALS) + 1
    controller = from_arrays(*(torch.randn(*shape, generator=source).numpy() for shape in (
        (inputs, 16), (16,), (16, 1), (1,))))
    for kept in (0, 1, 2):
        _, rate = World(Adaptive(controller), draft_ms=3.0, stands=lambda number, kept=kept: kept).run(600)
        assert rate > 0.97 / 41


def test_promises_are_scaled_by_what_was_kept_of_them_and_the_scale_is_bounded():
    policy = Adaptive(constant_controller(1.0))
    World(policy, stands=lambda number: 1).run(200)
    assert policy._experience[None].sources[False].scale < 0.9
    policy = Adaptive(constant_controller(0.01))
    World(policy, draft_ms=0.01, verify_ms=lambda n: 40.0, stands=lambda number: 9).run(200)
    assert policy._experience[None].sources[False].scale == MOST_SCALE


def test_the_first_drafts_are_short_whatever_is_promised():
    gammas, _ = World(Adaptive(constant_controller(1.0)), draft_ms=0.0, verify_ms=lambda n: 40.0).run(3)
    assert max(gammas) == LEAST_CAP


def test_compressions_are_learned_apart_and_kept_from_text_to_text():
    policy = Adaptive(constant_controller(0.6))
    World(policy, verify_ms=lambda n: 20.0 + n, compression="nf4").run(60)
    World(policy, verify_ms=lambda n: 90.0 + n, compression="int8").run(60)
    assert policy._experience["nf4"].costs.verify_ms(1) < 25 < 85 < policy._experience["int8"].costs.verify_ms(1)
    assert World(policy, compression="nf4").run(1)[0] != [0]  # knows already what a plain step takes


def test_it_is_one_launch_a_draft_token(monkeypatch):
    launches = []
    monkeypatch.setattr("speckv.adaptive.draft_step", lambda *args: launches.append(1) or draft_step(*args))
    monkeypatch.setattr("speckv.policy.draft_sample", lambda *args: pytest.fail("a second launch"))
    target = tiny_model()
    output = speckv.generate(target, noisy_copy(target), prompt_ids(), max_new_tokens=40, policy="adaptive")
    assert len(launches) == output.drafted > 0
    assert all(record.predicted is not None for record in output.steps if record.gamma)


def test_a_controller_of_other_signals_is_refused():
    with pytest.raises(ModelError, match="takes 5 signals"):
        Adaptive(from_arrays(torch.zeros(6, 4).numpy(), [0.0] * 4, torch.zeros(4, 1).numpy(), [0.0]))


def test_unsure_drafts_end_whatever_the_controller_promises():
    def longest(logit):
        policy = Adaptive(constant_controller(1.0))
        return max(World(policy, draft_ms=0.5, stands=lambda number: 99, logit=logit).run(60)[0])
    assert longest(3.0) < longest(5.0) < longest(20.0) == 16  # confidences of 0.29, 0.75 and 1


@pytest.mark.parametrize("others, expected", [(ALONE, 2.0), (Others(7, 7), 2.5)], ids=["alone", "in turns"])
def test_what_a_draft_has_missed_is_its_price_where_texts_take_turns(others, expected):
    policy = Adaptive()
    session = policy.open(None)
    session.others = others
    for draft_ms in (0.0, 2.0, 0.0, 6.0):  # counted as 1.5 times what is usual
        gamma = int(draft_ms > 0)
        if gamma:
            session.promise(gamma)
        session.record(step(gamma, gamma, draft_ms, 40.0))
    assert policy._experience[None].costs.draft_ms(False) == pytest.approx(expected)


def test_a_text_that_is_ahead_of_its_batch_drafts_nothing():
    world = World(Adaptive())
    assert sum(world.run(20)[0]) > 0
    world.session.others = Others(7, 7, 0.9)
    assert sum(world.run(20)[0]) > 0
    world.session.others = Others(7, 7, 0.4)
    assert set(world.run(20)[0]) == {0}


def test_a_text_whose_tokens_are_worth_more_than_those_of_others_drafts_longer():
    policy = Adaptive(constant_controller(1.0))
    worlds = [World(policy, stands=lambda number: 99, logit=6.0) for _ in range(2)]
    longest = [0, 0]
    for _ in range(60):
        for index, (world, value) in enumerate(zip(worlds, (1.4, 0.6), strict=True)):
            world.session.others = Others(1, 1, value)
            longest[index] = max(longest[index], *world.run(1)[0])
    assert longest[0] >= longest[1] + 3


def test_one_kind_of_draft_rests_while_the_other_goes_on():
    policy = Adaptive(constant_controller(0.5))
    session = policy.open(None)
    session.record(step(0, 0, 0.0, 40.0))
    while session.may_draft(False):
        session.record(step(3, 0, 9.0, 43.0))
    assert session.may_draft(True) and session.will_draft()
    session.is_asked = True  # by a drafter that has both kinds
    assert session.max_draft() > 0
    session.is_asked = False
    assert session.max_draft() == 0
    session.is_asked = True
    while session.may_draft(True):
        session.record(step(3, 0, 9.0, 43.0, is_estimate=True))
    assert not session.may_draft(False) and session.max_draft() == 0  # and nobody looks for a match


class Batch:
    """Eight texts that one policy serves, of which each drafts `length` tokens a pass or none."""

    def __init__(self, policy, pass_ms, draft_ms=2.0, length=1):
        self.policy, self.pass_ms, self.draft_ms, self.length = policy, pass_ms, draft_ms, length
        self.logits = World(policy).logits
        self.sessions = [policy.open(None) for _ in range(8)]

    def run(self, passes, accepted):
        """How many draft in each of the passes."""
        counts = []
        for _ in range(passes):
            gammas = []
            for session in self.sessions:
                session.others = Others(7, 7 + sum(gammas))
                most = session.max_draft()
                if most:
                    session.draft(self.logits, torch.ones(1), torch.zeros(1), 0, None)
                gammas.append(min(most, self.length))
            rows = 8 + sum(gammas)
            for session, gamma in zip(self.sessions, gammas, strict=True):
                session.others = Others(7, rows - 1 - gamma)
                share = self.pass_ms(rows) * (1 + gamma) / rows
                session.record(step(gamma, min(gamma, accepted), self.draft_ms * gamma, share))
            counts.append(sum(gamma > 0 for gamma in gammas))
        return counts


def test_the_passes_of_a_batch_are_priced_by_the_positions_of_all_texts():
    policy = Adaptive(constant_controller(0.5))
    Batch(policy, lambda rows: 40.0 + 0.5 * (rows - 8)).run(60, 1)
    costs = policy._experience[None].costs
    assert costs.verify_ms(8) == pytest.approx(40, rel=0.02) and costs.verify_ms(16) == pytest.approx(44, rel=0.01)
    first, second = costs.more_ms(0, False, 2, Others(7, 7))
    assert first == pytest.approx(2.5, abs=0.1) and second == pytest.approx(5, abs=0.2)
    # The draft, and half a millisecond of the pass; a token of one is an eighth of a plain pass, of 40 ms.
    for positions in (7, 14):  # of the others, with drafts or without
        for value in (1, 4):
            lost = costs.lost(step(1, 1, 2.0, 5.5), Others(7, positions, value))
            assert lost == pytest.approx(2.5 / 40 - value / 8, abs=0.007)
    # Beyond what is counted one more costs what it does at the end of that.
    for price in (lambda positions: costs.more_ms(0, False, 2, Others(7, positions))[1],
                  lambda positions: costs.lost(step(2, 0, 4.0, 5.5), Others(7, positions))):
        assert price(1000) == price(2000) == pytest.approx(price(100), rel=0.02)


def test_texts_whose_long_drafts_are_accepted_in_part_go_on_where_that_is_the_faster():
    # 24 tokens in 40 + 8 + 17 ms, where plain decoding has 8 in 40.
    batch = Batch(Adaptive(constant_controller(0.9)), lambda rows: 40.0 + 0.2 * (rows - 8), draft_ms=0.43, length=5)
    assert batch.run(60, 2)[20:] == 40 * [8]


def test_one_pass_of_a_batch_begins_one_rest():
    policy = Adaptive(constant_controller(0.9))
    batch = Batch(policy, lambda rows: 13.0 + 5.0 * (rows - 8))  # 40 and 16 ms more than 13
    assert batch.run(2, 0) == [0, 8]
    source = policy._experience[None].sources[False]
    assert source.next_pause == 2 * FIRST_PAUSE and source.pause == FIRST_PAUSE


@pytest.mark.parametrize("order", [1, -1], ids=["losses first", "gains first"])
def test_a_pass_is_judged_when_all_its_texts_have_counted(order):
    policy = Adaptive(constant_controller(0.9))
    Batch(policy, lambda rows: 40.0).run(1, 0)
    sessions = [policy.open(None) for _ in range(8)]
    source, losses = policy._experience[None].sources[False], []
    for session, accepted in zip(sessions, [0, 0, 0, 0, 2, 2, 2, 2][::order], strict=True):
        session.others = Others(7, 21)
        session.record(step(2, accepted, 5.0, 6.0))  # 24 rows in 48 ms
        losses.append(source.lost)
    assert source.pause == 0 and 0 < source.lost < MOST_LOST
    assert (max(losses) > MOST_LOST) == (order == 1)  # in between


def test_what_drafts_of_a_pass_lose_counts_together():
    def drafts(accepted):  # with which a pass takes half as long again
        batch = Batch(Adaptive(constant_controller(0.5)), lambda rows: 40.0 + 0.5 * (rows - 8))
        return sum(batch.run(100, accepted))
    assert drafts(0) < 150 < 700 < drafts(1)


def test_plain_passes_are_measured_again_after_so_many_passes():
    batch = Batch(Adaptive(constant_controller(0.9)), lambda rows: 40.0 + 0.2 * (rows - 8), draft_ms=0.2)
    counts = batch.run(300, 1)
    plain = [number for number, count in enumerate(counts) if count == 0]
    assert plain[0] == 0 and len(plain) == 3 and plain[2] - plain[1] >= PLAIN_EVERY


def test_a_batch_in_which_one_more_position_costs_much_stops_drafting():
    batch = Batch(Adaptive(constant_controller(0.9)), lambda rows: 13.0 + 3.0 * (rows - 8), draft_ms=0.5)
    assert sum(count > 0 for count in batch.run(200, 1)[20:]) <= 3  # of 180 passes, to try again


# -- fitting


def made_up(sequences=40, steps=30, seed=0):
    """Texts in which a token stands with its confidence, which is what there is to learn."""
    source = torch.Generator().manual_seed(seed)
    texts = []
    for _ in range(sequences):
        records = []
        for _ in range(steps):
            confidences = (0.05 + 0.9 * torch.rand(6, generator=source)).tolist()
            falls = (torch.rand(6, generator=source) >= torch.tensor(confidences)).nonzero()
            accepted = falls[0].item() if len(falls) else 6
            signals = tuple(Signal(3 * (1 - confidence), confidence) for confidence in confidences)
            records.append(StepRecord(6, accepted, accepted + 1, 6.0, 40.0, signals))
        texts.append(("bf16", records))
    return texts


def test_examples_are_what_the_loop_feeds_its_controller(monkeypatch):
    seen = []

    def spy(*args):
        outputs = draft_step(*args)
        seen.append(outputs[4][0].clone())
        return outputs
    monkeypatch.setattr("speckv.adaptive.draft_step", spy)
    target = tiny_model()
    output = speckv.generate(target, noisy_copy(target), prompt_ids(), max_new_tokens=60, policy="adaptive")
    data = examples([(None, output.steps)])
    torch.testing.assert_close(torch.tensor(data.signals).float(), torch.stack(seen), rtol=1e-5, atol=1e-6)
    assert data.accepted.tolist() == [min(record.accepted, i + 1) for record in output.steps
                                      for i in range(record.gamma)]


def test_a_fit_comes_close_to_knowing_the_probabilities_on_texts_it_did_not_see():
    texts = made_up()
    figures = fit_and_judge(texts, steps=FIT_STEPS).figures
    data = examples(texts[::5])  # the held-out ones
    confidences = [[signal.confidence for signal in record.signals] for _, records in texts[::5] for record in records]
    stands = torch.tensor(confidences).cumprod(1)
    more = data.more.reshape(-1, 6)[:, :5]
    best = np.corrcoef((stands[:, :5] * 0.5).flatten(), more.flatten())[0, 1]  # the next confidence is 0.5 on average
    assert 0.9 * best < figures["correlation_next_token"] <= best + 0.02
    stood = data.accepted == data.number
    best = np.corrcoef(stands.flatten(), stood)[0, 1]
    assert 0.85 * best < figures["correlation_draft_token"] <= best + 0.02
    accepted = data.accepted.reshape(-1, 6)
    best = np.corrcoef(stands.cumsum(1).flatten(), accepted.flatten())[0, 1]
    assert 0.85 * best < figures["correlation_accepted_tokens"] <= best + 0.02


def test_the_gain_of_one_more_token_is_a_probability_on_average():
    data = examples(made_up())
    controller = fit(data, steps=FIT_STEPS)
    accepted, _, more = predict(controller, data)
    for number in range(1, 6):
        rows = data.number == number
        assert more[rows].mean() == pytest.approx(data.more[rows].mean(), abs=0.04)
        assert accepted[rows].mean() == pytest.approx(data.accepted[rows].mean(), abs=0.15)
    assert select(data, data.number == 1).signals.shape == (1200, len(SIGNALS))
    assert LONGEST_COUNTED >= 6


def test_the_same_records_give_the_same_controller():
    data = examples(made_up(12))
    one, other = fit(data, steps=50), fit(data, steps=50)
    assert all(torch.equal(one.tensors()[name], other.tensors()[name]) for name in one.tensors())
