"""Every verified position is processed with its own prefix, and every token of the text is asked about once."""

import math

import pytest
import torch
from test_decode import plain
from tiny_models import noisy_copy, prompt_ids, tiny_model
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

import speckv
from speckv import InputError, decode, processors
from speckv.lookup import LookupDrafter

IDS = torch.tensor([[3, 1, 4, 1, 5]])


@pytest.fixture(scope="module")
def pair():
    target = tiny_model()
    return target, noisy_copy(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_row_is_processed_with_the_tokens_before_it(dtype):
    seen = []

    def mark(ids, scores):
        seen.append(ids[0].tolist())
        assert scores.shape == (1, 6) and scores.dtype == torch.float32
        scores[0, 0] = ids.sum()
        return scores
    logits = torch.zeros(1, 3, 6, dtype=dtype)
    rows = processors.process_rows([mark], IDS, logits)
    assert seen == [[3, 1, 4], [3, 1, 4, 1], [3, 1, 4, 1, 5]]
    assert rows[0, :, 0].tolist() == [8, 9, 14]
    assert (logits == 0).all(), "a processor that writes in place leaves the model's logits alone"


def test_processors_work_in_turn():
    rows = processors.process_rows([lambda _, scores: scores + 1, lambda _, scores: scores * 2], IDS,
                                   torch.zeros(1, 1, 4))
    assert rows.tolist() == [[[2.0] * 4]]


def test_a_draft_that_is_ruled_out_is_none():
    row = torch.tensor([[-math.inf, 0.0, -math.inf]], dtype=torch.bfloat16)
    assert processors.process_draft([lambda _, scores: scores.index_fill(1, torch.tensor([1]), -math.inf)], IDS,
                                    row) is None


@pytest.mark.parametrize("spoil", [math.nan, math.inf], ids=str)
def test_a_draft_that_a_processor_makes_no_distribution_of_stays_as_it_was(spoil):
    row = torch.tensor([[-math.inf, 0.5, -math.inf]], dtype=torch.bfloat16)
    kept = processors.process_draft([lambda _, scores: scores.index_fill(1, torch.tensor([0]), spoil)], IDS, row)
    assert torch.equal(kept, row.float())


@pytest.mark.parametrize("policy", ["off", "fixed:1", "fixed:4", "adaptive"])
def test_generate_applies_processors_as_transformers_does(pair, policy):
    lists = [RepetitionPenaltyLogitsProcessor(1.3), NoRepeatNGramLogitsProcessor(2)]
    expected = plain(pair[0], prompt_ids(), 40, repetition_penalty=1.3, no_repeat_ngram_size=2)
    assert not torch.equal(expected, plain(pair[0], prompt_ids(), 40))
    output = speckv.generate(*pair, prompt_ids(), max_new_tokens=40, policy=policy, logits_processor=lists)
    assert torch.equal(output.sequences, expected)
    if policy == "fixed:4":
        assert 0 < output.acceptance_rate < 1


def test_lookup_does_not_propose_what_is_ruled_out(pair):
    # After the prompt's 5 6 7, lookup proposes 8, which is forbidden: nothing is drafted there.
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7]])

    def forbid(_, scores):
        return scores.index_fill(1, torch.tensor([8]), -math.inf)
    for forbidden, drafted in (([], True), ([forbid], False)):
        output = speckv.generate(pair[0], LookupDrafter(97), ids, max_new_tokens=3, policy="fixed:1",
                                 logits_processor=forbidden)
        assert (output.steps[0].gamma > 0) is drafted


def test_processors_of_the_draft_raise_acceptance(pair, monkeypatch):
    def acceptance():
        return speckv.generate(*pair, prompt_ids(), max_new_tokens=60, policy="fixed:3", logits_processor=[
            RepetitionPenaltyLogitsProcessor(2.0)]).acceptance_rate
    processed = acceptance()
    monkeypatch.setattr(decode, "process_draft", lambda processors, ids, row: row)
    assert processed > acceptance() + 0.1


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 11])
def test_a_criterion_ends_the_text_in_mid_step_and_is_asked_once_a_token(pair, stop_at):
    target, ids, asked = pair[0], prompt_ids(), []

    def enough(ids, scores):
        assert scores is None
        asked.append(ids[0].tolist())
        return torch.tensor([ids.shape[1] == 6 + stop_at])
    output = speckv.generate(target, target, ids, max_new_tokens=40, policy="fixed:4", stopping_criteria=[enough])
    text = plain(target, ids, 40)[0].tolist()
    assert output.sequences[0].tolist() == text[:6 + stop_at]
    assert asked == [text[:n] for n in range(7, 7 + stop_at)]
    assert sum(step.tokens for step in output.steps) == stop_at and output.accepted <= stop_at


def test_all_criteria_are_asked_where_one_ends_the_text(pair):
    asked = []

    def count(ids, _):
        asked.append(ids.shape[1])
        return False
    speckv.generate(pair[0], pair[0], prompt_ids(), max_new_tokens=9, stopping_criteria=[lambda *_: True, count])
    assert asked == [7]


def test_who_gives_processors_is_not_warned_of_the_generation_config(recwarn):
    target = tiny_model()
    target.generation_config.repetition_penalty = 1.3
    speckv.generate(target, target, prompt_ids(), max_new_tokens=2, logits_processor=[])
    assert not [warning for warning in recwarn if "does not apply" in str(warning.message)]


@pytest.mark.parametrize("name", ["logits_processor", "stopping_criteria"])
@pytest.mark.parametrize("value", [3, [None], ["text"], lambda ids, scores: scores], ids=["3", "none", "str", "bare"])
def test_what_cannot_be_called_is_refused(pair, name, value):
    with pytest.raises(InputError, match=f"{name} must be a list of callables"):
        speckv.generate(*pair, prompt_ids(), max_new_tokens=4, **{name: value})


@pytest.mark.parametrize("result, words", [(None, "NoneType"), (torch.zeros(97), r"\[97\]")], ids=["none", "shape"])
def test_a_processor_that_returns_no_scores_is_named(pair, result, words):
    def careless(ids, scores):
        return result
    with pytest.raises(InputError, match=rf"careless returned {words}: it must return the scores \[1, 97\]"):
        speckv.generate(*pair, prompt_ids(), max_new_tokens=4, logits_processor=[careless])
