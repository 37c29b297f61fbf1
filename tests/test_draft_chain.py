"""A draft made in one call is that made token by token: the same tokens, signals and promises, whatever ends it."""

import math
import random
from itertools import product

import pytest
import torch
from test_head import features_of, int8_head
from tiny_models import VOCABULARY, prompt_ids, tiny_model

import speckv
from speckv import batch, decode
from speckv.adaptive import Adaptive
from speckv.cost import StepCosts
from speckv.errors import NumericalError
from speckv.head_engine import WantedChain, draft_chains
from speckv.kernels import serving
from speckv.lookup import LookupDrafter, LookupFirst
from speckv.policy import PolicySession
from speckv.stopping import StopRule

pytestmark = pytest.mark.skipif(serving()["cpu"][0] != "cpu", reason="the engine is of the C++ kernels")

POLICIES = ["fixed:1", "fixed:5", "adaptive", "hf-confidence", "hf-heuristic", "adaedl", "svip", "specdec++", "paper"]
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.7}, "with a seed": {"temperature": 0.7, "seed": 3},
            "filtered": {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "min_p": 0.02}}


class Clock:
    """Time that passes alike in both ways to draft, and never evenly."""

    def __init__(self):
        self._random = random.Random(5)
        self._now = 0.0

    def __call__(self):
        self._now += self._random.uniform(0.5e-3, 6e-3)
        return self._now


def decoded(monkeypatch, chains, decode_text):
    """What decode_text() returns, and how many drafts were made in one call."""
    calls = []
    with monkeypatch.context() as patched:
        rule_of = decode.Run._chain_rule

        def counted(self, gamma):
            rule = rule_of(self, gamma) if chains else None
            calls.append(rule is not None)
            return rule
        patched.setattr(decode.Run, "_chain_rule", counted)
        patched.setattr(decode.time, "perf_counter", Clock())
        torch.manual_seed(0)
        return decode_text(), sum(calls)


def steps_of(monkeypatch, chains, drafter, policy, sampling, ids, length=50):
    """The text and the steps; and how many drafts were made in one call."""
    return decoded(monkeypatch, chains, lambda: speckv.generate(
        tiny_model(), drafter, ids, policy=policy, max_new_tokens=length, **sampling))


@pytest.fixture(scope="module")
def drafter():
    """Sure of some tokens and unsure of others."""
    made = int8_head(tiny_model())
    made.rows.scale.mul_(4)
    return made


@pytest.mark.parametrize("kind", ["head", "lookup and head", "lookup"])
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("name", POLICIES)
def test_a_chain_is_the_draft_token_by_token(drafter, name, sampling, kind, monkeypatch):
    ids = prompt_ids(12).repeat(1, 2)
    drafters = {"head": drafter, "lookup and head": LookupFirst(drafter), "lookup": LookupDrafter(VOCABULARY, 5, 1)}
    drafter = drafters[kind]
    output, chains = steps_of(monkeypatch, True, drafter, name, sampling, ids)
    expected, none = steps_of(monkeypatch, False, drafter, name, sampling, ids)
    assert chains > 0 and none == 0
    assert torch.equal(output.sequences, expected.sequences)
    assert output.steps == expected.steps


def test_drafts_end_for_every_reason(drafter, monkeypatch):
    """What the test above compares has drafts of many lengths under every rule that stops."""
    for name, least in (("adaptive", 4), ("hf-confidence", 4), ("adaedl", 3), ("svip", 4), ("specdec++", 4)):
        output, _ = steps_of(monkeypatch, True, drafter, name, {}, prompt_ids(12))
        assert len({step.gamma for step in output.steps}) >= least, name


def test_a_chain_that_learned_costs_is_the_same(drafter, monkeypatch):
    """One policy object over several texts: prices, scales, caps and rests are in the rule."""
    made = []
    for chains in (True, False):
        policy = Adaptive()
        outputs = [steps_of(monkeypatch, chains, drafter, policy, {}, prompt_ids(n), 50)[0] for n in (3, 12, 20)]
        made.append([step for output in outputs for step in output.steps])
    assert made[0] == made[1]


REQUESTS = [{"input_ids": prompt_ids(n, seed=n).repeat(1, 2), "max_new_tokens": 20 + n} | sampling
            for n, sampling in zip((4, 9, 15), ({}, SAMPLING["filtered"], SAMPLING["with a seed"]), strict=True)]


def cloned(part):
    """A WantedChain of copies: a draft writes into what it is given."""
    if isinstance(part, torch.Tensor):
        return part.clone()
    return type(part)(map(cloned, part)) if type(part) in (tuple, list) else part


@pytest.mark.parametrize("policy", ["fixed:3", "svip", "adaptive"])
def test_drafts_made_together_are_those_made_alone(drafter, policy, monkeypatch):
    widths = []

    def compared(wanted):
        copies = [WantedChain(*map(cloned, each)) for each in wanted]
        together = draft_chains(wanted)
        for each, copy, chain in zip(wanted, copies, together, strict=True):
            alone, = draft_chains([copy])
            assert (chain.signals, repr(chain.acceptance)) == (alone.signals, repr(alone.acceptance))
            assert torch.equal(chain.logits, alone.logits)
            assert all(map(torch.equal, (each.ids, each.state, each.brought, each.keys, each.values),
                           (copy.ids, copy.state, copy.brought, copy.keys, copy.values)))
            assert all(map(torch.equal, each.controller, copy.controller))
        widths.append(len(wanted))
        return together
    monkeypatch.setattr(batch, "draft_chains", compared)
    monkeypatch.setattr(decode.time, "perf_counter", Clock())
    requests = [request | {"max_new_tokens": 40} for request in REQUESTS]
    speckv.generate_batch(tiny_model(), LookupFirst(drafter), requests, policy=policy, fast=True, eos_token_id=[])
    assert sum(width > 1 for width in widths) >= 3, widths


@pytest.mark.parametrize("policy", ["fixed:3", "svip"])
def test_a_chain_beside_other_texts_is_the_draft_token_by_token(drafter, policy, monkeypatch):
    made = []
    for chains in (True, False):
        outputs, calls = decoded(monkeypatch, chains, lambda: speckv.generate_batch(
            tiny_model(), LookupFirst(drafter), REQUESTS, policy=policy, fast=True, eos_token_id=[]))
        assert (calls > 10) == chains
        made.append([(step.gamma, step.accepted, step.tokens, step.signals, step.predicted)
                     for output in outputs for step in output.steps])
    assert made[0] == made[1]


def test_logits_that_are_none_are_named_with_the_request(drafter):
    broken = int8_head(tiny_model())
    broken.rows.scale.fill_(math.nan)
    with pytest.raises(NumericalError, match=r"request 0: step \d+: draft_chains: row 0"):
        speckv.generate_batch(tiny_model(), broken, REQUESTS, policy="fixed:3", fast=True, eos_token_id=[])


def test_a_policy_without_a_rule_is_asked_token_by_token(drafter, monkeypatch):
    class Odd(PolicySession):
        name = "odd"

        def open(self, compression):
            return self

        def max_draft(self):
            return 4
    output, chains = steps_of(monkeypatch, True, drafter, Odd(), {}, prompt_ids(12))
    assert chains == 0 and {step.gamma for step in output.steps} >= {4}


def test_processors_are_asked_token_by_token(drafter, monkeypatch):
    _, chains = steps_of(monkeypatch, True, drafter, "fixed:3", {"logits_processor": [lambda ids, row: row]},
                         prompt_ids(12))
    assert chains == 0


def test_bad_logits_are_named_with_their_step(monkeypatch):
    broken = int8_head(tiny_model())
    broken.rows.scale.fill_(float("inf"))
    with pytest.raises(NumericalError, match="step 0: draft_chains: row 0: a logit is "):
        speckv.generate(tiny_model(), broken, prompt_ids(), policy="fixed:3", max_new_tokens=20)


def drafted(head, ids, start, end, most, brought, state, states, first, keys, values, cached, temperature, uniform,
            top_k, top_p, min_p, controller, **real):
    """The op for one sequence."""
    filters = [torch.empty(0) if filter is None else filter for filter in (top_k, top_p, min_p)]
    return torch.ops.speckv.draft_chains(
        head, [ids], [start, end, most, first, cached], [brought], [state], [states], [keys], [values], [temperature],
        [uniform], filters, controller, [float(number) for number in real.values()])


@torch.inference_mode()
def test_what_does_not_fit_is_refused():
    drafter = int8_head(tiny_model())
    session = drafter.open()
    session.observe(torch.randn(1, 4, 96), 0)
    reader, room = session._reader, torch.cat([prompt_ids(4), torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    weights = Adaptive().controller.tensors().values()
    controller = [torch.zeros(1, 10), *weights, torch.ones(3, 33, dtype=torch.float64)]
    fine = {
        "head": reader._engine.number, "ids": room, "start": 0, "end": 4, "most": 3, "brought": torch.zeros(8, 32),
        "state": torch.zeros(32), "states": torch.zeros(4, 96), "first": 0, "keys": torch.zeros(1, 2, 8, 8),
        "values": torch.zeros(1, 2, 8, 8), "cached": 0, "temperature": torch.ones(1), "uniform": torch.rand(1, 3),
        "top_k": None, "top_p": None, "min_p": None, "least_confidence": 0.0, "most_entropy": 99.0,
        "least_survival": 0.0, "controller": controller, "draft_ms": 1.0, "rate": 1.0, "scale": 1.0, "stands": 0.6,
        "most_counted": 8, "look_ahead": 2, "others": 0}
    logits, report = drafted(**fine)
    assert logits.shape[1] == len(drafter.token_ids) and report.shape == (1, 4 + 2 * len(logits))

    def controlled(index, tensor):
        return {"controller": [*controller[:index], tensor, *controller[index + 1:]]}
    for change, words in (
            ({"head": 10**9}, "none of number"), ({"ids": room.int()}, "int64"), ({"ids": room[0]}, "2 dimensions"),
            ({"ids": -1 - room}, "ids must be in"), *(({name: number}, "room for a draft") for name, number in (
                ("most", 0), ("most", 5), ("most", 2**62), ("start", -1), ("start", 4), ("end", 2**62), ("end", 0))),
            ({"brought": torch.zeros(5, 32)}, "a row for every position"), ({"state": torch.zeros(31)}, "size 32"),
            ({"states": torch.zeros(4, 95)}, "size 96"), ({"first": 5}, "a row for every position"),
            ({"cached": 3}, "room for 8 tokens"), ({"keys": torch.zeros(1, 1, 8, 8)}, "size 2"),
            ({"temperature": torch.tensor([-1.0])}, "temperature"), ({"temperature": torch.ones(2)}, "size 1"),
            ({"uniform": torch.rand(1, 2)}, "a number for each"), ({"uniform": torch.ones(1, 3)}, "uniform"),
            ({"top_k": torch.tensor([-1])}, "top_k"), ({"top_p": torch.ones(2)}, "size 1"),
            ({"controller": controller[:5]}, "six tensors"), (controlled(0, torch.zeros(1, 9)), "w1"),
            (controlled(5, torch.ones(3, 4).double()), "at least 5"), (controlled(5, torch.ones(3, 33)), "float64"),
            (controlled(5, torch.ones(2, 33).double()), "size 3"),
            (controlled(4, torch.full((1,), float("nan"))), "not finite"), ({"rate": -1.0}, "rate"),
            ({"scale": 0.0}, "rate"), ({"look_ahead": 0}, "look_ahead"), ({"look_ahead": 9}, "look_ahead"),
            ({"most_counted": 0}, "look_ahead"), ({"others": -1}, "others"),
            ({"look_ahead": 4, "controller": [*controller[:-1], torch.ones(3, 5).double()]}, "look_ahead")):
        with pytest.raises(RuntimeError, match=words):
            drafted(**fine | change)


def test_lists_that_do_not_match_are_refused(drafter):
    engine, one = drafter.open()._reader._engine, [torch.ones(1)]
    for sequences, numbers, words in ((0, 5, "one or more"), (2, 5, "as many tensors"), (1, 4, "as many numbers")):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.speckv.draft_chains(engine.number, one * sequences, [0] * numbers, *[one] * 7, one * 3, [],
                                          [0.0] * 10)


def test_copies_that_cannot_be_judged_are_refused():
    controller = [torch.zeros(1, 10), *Adaptive().controller.tensors().values(), torch.ones(3, 33).double()]
    fine = {"confidences": torch.full((4,), 0.9).double(), "controller": controller, "draft_ms": 0.1, "rate": 1.0,
            "scale": 1.0, "most_counted": 8, "look_ahead": 2, "others": 0}
    count, acceptance, seconds = torch.ops.speckv.judge_copies(*fine.values())
    assert 1 <= count <= 4 and math.isfinite(acceptance) and seconds > 0
    for change, words in (
            ({"confidences": torch.ones(4)}, "float64"), ({"confidences": torch.ones(0).double()}, "one or more"),
            ({"confidences": torch.ones(1, 4).double()}, "1 dimensions"), ({"controller": []}, "six tensors"),
            ({"rate": float("nan")}, "rate"), ({"look_ahead": 0}, "look_ahead")):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.speckv.judge_copies(*(fine | change).values())


@pytest.mark.parametrize("others", [0, 100, 252, 255, 1000])
def test_copies_beside_many_positions_have_their_price(others):
    costs = StepCosts().numbers
    costs[2, :5] = torch.tensor([1.0, 2000.0, 10.0, 100.0, 4.0])  # 10 ms a position, and 2 s at 100 of them
    controller = [torch.zeros(1, 10), *Adaptive().controller.tensors().values(), costs]
    sure = torch.ones(6).double()
    for rate, expected in ((130.0, 1), (1.0, 6)):  # at 130 tokens a second 10 ms are worth 1.3 tokens
        count, _, _ = torch.ops.speckv.judge_copies(sure, controller, 0.0, rate, 2.0, 8, 2, others)
        assert count == expected


def test_what_is_read_in_a_chain_is_read_once(drafter):
    """After a chain the session is where the token-by-token one is: what it is asked next it answers alike."""
    ids = prompt_ids(12)
    target = tiny_model()
    features = features_of(target, ids)
    for accepted in product((0, 1, 3), (0, 2)):
        sessions = drafter.open(), drafter.open()
        for session in sessions:
            session.observe(features[:, :4], 0)
        room = torch.cat([ids[:, :5], torch.zeros(1, 7, dtype=torch.int64)], dim=1)
        rule = StopRule(3)
        with torch.inference_mode():
            chain = sessions[0].draft_chain(room, 5, torch.zeros(1, 3), torch.zeros(1), {}, rule)
            for end in (5, 6, 7):
                row = sessions[1].next_logits(room[:, :end])
                assert row.token_ids[row.logits[0].argmax()] == room[0, end]
            assert len(chain.signals) == 3
            length = 5
            for kept in accepted:
                for session in sessions:
                    session.observe(features[:, length - 1:length + kept], length - 1)
                    session.rollback(length + kept)
                length += kept + 1
                first, second = (session.next_logits(ids[:, :length]) for session in sessions)
                assert torch.equal(first.logits, second.logits)
