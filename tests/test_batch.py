"""Texts decoded together are those that each is alone."""

import math
from itertools import dropwhile
from types import SimpleNamespace

import pytest
import torch
from test_head import tiny_head
from tiny_models import prompt_ids, tiny_model

import speckv
from speckv import InputError, NumericalError
from speckv.cost import ALONE, Others
from speckv.fast import FastModel, FastTarget
from speckv.kernels import serving
from speckv.lookup import LookupDrafter
from speckv.policy import Fixed, PolicySession

LENGTHS = (1, 17, 4, 70, 9, 30, 2, 12)
needs_engine = pytest.mark.skipif(serving()["cpu"][0] != "cpu", reason="needs the C++ kernels")
ways = pytest.mark.parametrize("fast", [False, pytest.param(True, marks=needs_engine)], ids=["PyTorch", "fast"])


def mixed_requests():
    """Eight prompts of other lengths, with other settings, which end at other times."""
    settings = [{}, {"temperature": 0.8, "seed": 3}, {"max_new_tokens": 5}, {"temperature": 1.5, "seed": 4, "top_k": 9},
                {"eos_token_id": list(range(40))}, {"max_new_tokens": 0}, {"temperature": 0.7, "seed": 5, "top_p": 0.8},
                {"max_new_tokens": 1}]
    return [{"input_ids": prompt_ids(length, seed=length)} | more
            for length, more in zip(LENGTHS, settings, strict=True)]


DRAFTERS = {"none": (lambda target: None, "off"), "model": (lambda target: tiny_model(seed=1), "fixed:3"),
            "head": (tiny_head, "fixed:2"),
            "lookup": (lambda target: LookupDrafter(target.config.vocab_size), "fixed:4")}


@ways
@pytest.mark.parametrize("draft", DRAFTERS)
def test_a_batch_of_eight_equals_eight_single_runs(draft, fast):
    target = tiny_model()
    make, policy = DRAFTERS[draft]
    drafter, requests = make(target), mixed_requests()
    together = speckv.generate_batch(target, drafter, requests, policy=policy, fast=fast, max_new_tokens=30)
    for request, output in zip(requests, together, strict=True):
        alone = speckv.generate(target, drafter, policy=policy, fast=fast, **{"max_new_tokens": 30} | request)
        assert torch.equal(output.sequences, alone.sequences)
        assert [(step.gamma, step.accepted, step.tokens) for step in output.steps] == [
            (step.gamma, step.accepted, step.tokens) for step in alone.steps]
        assert output.new_tokens == alone.new_tokens and output.prompt_length == request["input_ids"].shape[1]


@needs_engine
@pytest.mark.parametrize("policy", ["fixed:2", "adaptive"])
def test_in_bf16_too_the_others_do_not_change_a_text(policy):
    target = tiny_model().bfloat16()
    drafter, prompts = tiny_head(target), [prompt_ids(length, seed=length) for length in LENGTHS]
    together = speckv.generate_batch(target, drafter, [{"input_ids": ids} for ids in prompts], policy=policy, fast=True,
                                     max_new_tokens=40, eos_token_id=[])
    for ids, output in zip(prompts, together, strict=True):
        plain = speckv.generate(target, None, ids, policy="off", fast=True, max_new_tokens=40, eos_token_id=[])
        assert torch.equal(output.sequences, plain.sequences)


@needs_engine
def test_all_texts_are_read_in_one_pass(monkeypatch):
    target, widths = tiny_model(), []
    read = FastTarget._read

    def counted(self, op, parts, layers):
        widths.append(len(parts))
        return read(self, op, parts, layers)
    monkeypatch.setattr(FastTarget, "_read", counted)
    requests = [{"input_ids": prompt_ids(1), "max_new_tokens": count} for count in (2, 4, 6)]
    speckv.generate_batch(target, None, requests, policy="off", fast=True, eos_token_id=[])
    assert widths == [3, 3, 2, 2, 1, 1], "a text that has ended is read no more"


class Listening(PolicySession):
    """Drafts as many tokens as its place in the batch, and keeps what it is told of the other texts."""

    name = "listening"

    def __init__(self, gamma, told):
        self.gamma, self.told = gamma, told

    def will_draft(self):
        return True

    def max_draft(self):
        self.told.append(("before", self.gamma, self.others))
        return self.gamma

    def record(self, step):
        self.told.append(("after", step.gamma, self.others))


@ways
def test_a_text_is_told_of_the_others_that_share_its_pass(fast):
    told, places = [], iter((3, 0, 2))
    policy = SimpleNamespace(name="listening", open=lambda compression: Listening(next(places), told))
    requests = [{"input_ids": prompt_ids(6, seed=seed)} for seed in (1, 2, 3)]
    speckv.generate_batch(tiny_model(), tiny_model(seed=1), requests, policy=policy, fast=fast, max_new_tokens=30,
                          eos_token_id=[])
    told = [*dropwhile(lambda entry: entry[2] == ALONE, told)]  # what was asked before the first pass
    if fast:  # before a pass, of what they took of the last
        assert told[:3] == [("before", gamma, Others(2, 2)) for gamma in (3, 0, 2)]
        for i in (3, 6):
            kind = ("after", "before")[i // 3 - 1]
            assert told[i:i + 3] == [(kind, 3, Others(2, 4)), (kind, 0, Others(2, 7)), (kind, 2, Others(2, 5))]
        assert {others.texts for _, _, others in told} >= {2, 1}  # until one of them ends
    else:
        assert told == []


@needs_engine
def test_texts_that_memory_lets_share_no_pass_are_told_so(monkeypatch):
    told, places = [], iter((3, 2))
    policy = SimpleNamespace(name="listening", open=lambda compression: Listening(next(places), told))

    def fail(*arguments):
        raise MemoryError
    monkeypatch.setattr(FastModel, "read_together", staticmethod(fail))
    speckv.generate_batch(tiny_model(), tiny_model(seed=1), [{"input_ids": prompt_ids(6)} for _ in range(2)],
                          policy=policy, fast=True, max_new_tokens=5, eos_token_id=[])
    assert {others for when, _, others in told if when == "after"} == {ALONE}


@needs_engine
def test_what_a_shared_pass_has_read_before_memory_ends_is_taken_back(monkeypatch):
    requests = [{"input_ids": prompt_ids(6, seed=seed)} for seed in (1, 2)]

    def sequences():
        outputs = speckv.generate_batch(tiny_model(), tiny_model(seed=1), requests, policy="fixed:2", fast=True,
                                        max_new_tokens=12, eos_token_id=[])
        return [output.sequences for output in outputs]
    expected, read, failed = sequences(), FastModel.read_together, []

    def fail(*arguments):
        read(*arguments)
        failed.append(arguments)
        raise MemoryError
    monkeypatch.setattr(FastModel, "read_together", staticmethod(fail))
    assert all(torch.equal(*both) for both in zip(sequences(), expected, strict=True))
    assert len(failed) > 2  # the prompts, and steps


class Valuing(PolicySession):
    """Keeps what a token of its text is worth beside others, and drafts two where that is most."""

    name = "valuing"

    def __init__(self, told):
        self.told = told

    def will_draft(self):
        return True

    def max_draft(self):
        return 2 if self.others.value >= 1 else 0

    def record(self, step):
        assert step.gamma == 0 or self.others.value >= 1
        self.told.append(self.others.value)


@ways
def test_a_token_of_a_text_that_is_behind_is_worth_more_where_they_share_a_pass(fast):
    values, left, steps = ([], [], []), [40, 40, 25], []
    opened = iter(values)
    policy = SimpleNamespace(name="valuing", open=lambda compression: Valuing(next(opened)))
    requests = [{"input_ids": prompt_ids(6, seed=seed), "max_new_tokens": count} for seed, count in enumerate(left)]
    speckv.generate_batch(tiny_model(), tiny_model(seed=1), requests, policy=policy, fast=fast, eos_token_id=[],
                          on_step=lambda index, tokens, record: steps.append((index, len(tokens))))
    taken = [0, 0, 0]
    while steps:
        step = [steps.pop(0) for _ in range(3 - left.count(0))]
        told = {index: values[index][taken[index]] for index, _ in step}
        if not fast or len(step) == 1:
            assert set(told.values()) == {1.0}
        else:
            assert sum(told.values()) == pytest.approx(len(step))
            for one in told:
                for other in told:
                    assert (told[one] > told[other]) == (left[one] > left[other])
            if left == [40, 40, 25]:  # e^-3
                assert told[2] / told[0] == pytest.approx(math.exp(-15 / 5))
        for index, count in step:
            left[index] -= count
            taken[index] += 1
    assert left == [0, 0, 0]


@ways
def test_padded_rows_are_the_texts_without_their_padding(fast):
    target = tiny_model()
    lengths = (3, 8, 5)
    ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for row, length in enumerate(lengths):
        ids[row, 8 - length:] = prompt_ids(length, seed=length)
        mask[row, 8 - length:] = 1
    outputs = speckv.generate_batch(target, None, ids, policy="off", attention_mask=mask, max_new_tokens=9, fast=fast,
                                    eos_token_id=[])
    for row, length in enumerate(lengths):
        alone = speckv.generate(target, None, prompt_ids(length, seed=length), policy="off", max_new_tokens=9,
                                eos_token_id=[], fast=fast)
        assert torch.equal(outputs[row].sequences[:, 8:], alone.sequences[:, length:])


def test_every_step_is_told_with_the_text_it_belongs_to():
    target, told = tiny_model(), {0: [], 1: []}
    requests = [{"input_ids": prompt_ids(length)} for length in (4, 7)]
    outputs = speckv.generate_batch(target, tiny_model(seed=1), requests, policy=Fixed(2), max_new_tokens=12,
                                    on_step=lambda index, tokens, record: told[index].append((tokens, record)))
    for index, output in enumerate(outputs):
        written = [token for tokens, _ in told[index] for token in tokens]
        assert written == output.sequences[0, -output.new_tokens:].tolist()
        assert [record for _, record in told[index]] == output.steps
        assert 0 < output.prefill_seconds <= output.seconds


def test_no_requests_are_no_outputs():
    assert speckv.generate_batch(tiny_model(), None, [], policy="off") == []


@pytest.mark.parametrize("requests, shared, words", [
    ([{"input_ids": prompt_ids()}, {"input_ids": prompt_ids() - 10**6}], {}, "request 1: input_ids holds -"),
    ([{"input_ids": prompt_ids(), "beam": 3}], {}, "request 0 has 'beam'"),
    ([{"temperature": 1}], {}, "request 0 must be a mapping"),
    ([prompt_ids()], {}, "request 0 must be a mapping"),
    ({"input_ids": prompt_ids()}, {}, "requests is a dict"),
    (7, {}, "requests is a int"),
    ([], {"beam": 3}, "generate_batch has 'beam'"),
    (torch.zeros(3, dtype=torch.int64), {}, r"input_ids has shape \[3\]"),
    (torch.ones(2, 3, dtype=torch.int64), {"attention_mask": torch.ones(1, 3)}, "attention_mask has shape"),
    (torch.ones(2, 3, dtype=torch.int64), {"attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}, "request 1: "),
])
def test_what_cannot_be_decoded_is_named(requests, shared, words):
    with pytest.raises(InputError, match=words):
        speckv.generate_batch(tiny_model(), None, requests, policy="off", **{"max_new_tokens": 8} | shared)


def test_a_text_that_fails_is_named():
    target = tiny_model()
    with torch.no_grad():
        target.get_input_embeddings().weight[90] = float("nan")
    requests = [{"input_ids": prompt_ids(4) % 80 + 2}, {"input_ids": torch.tensor([[3, 90, 5]])}]
    with pytest.raises(NumericalError, match="request 1: step 0: verify_chain"):
        speckv.generate_batch(target, None, requests, policy="off", max_new_tokens=4)
