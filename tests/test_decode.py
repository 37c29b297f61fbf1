"""The loop is lossless at temperature 0, ends exactly where it should, and tells what it did."""

import pytest
import torch
from tiny_models import ARCHITECTURES, noisy_copy, prompt_ids, tiny_model

import speckv
from speckv.cache import CachedModel
from speckv.drafters import CausalLMDrafter


def plain(model, ids, max_new_tokens, **settings):
    return model.generate(ids, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=0, **settings)


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def pair(request):
    target = tiny_model(request.param)
    return target, noisy_copy(target)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("policy", ["off", "fixed:1", "fixed:2", "fixed:3", "fixed:5", "fixed:16"])
def test_greedy_output_is_that_of_plain_decoding(pair, policy, max_new_tokens):
    target, drafter = pair
    ids = prompt_ids()
    output = speckv.generate(target, drafter, ids, max_new_tokens=max_new_tokens, policy=policy)
    assert torch.equal(output.sequences, plain(target, ids, max_new_tokens))


@pytest.mark.parametrize("length", [1, 2, 30])
def test_greedy_output_is_the_same_for_any_prompt_length(pair, length):
    target, drafter = pair
    ids = prompt_ids(length, seed=length)
    output = speckv.generate(target, drafter, ids, max_new_tokens=20, policy="fixed:4")
    assert torch.equal(output.sequences, plain(target, ids, 20))


def test_the_drafters_are_sometimes_right_and_sometimes_wrong(pair):
    # Without this the tests above could pass with a loop that never accepts, or never rejects.
    target, drafter = pair
    output = speckv.generate(target, drafter, prompt_ids(), max_new_tokens=60, policy="fixed:3")
    assert 0 < output.acceptance_rate < 1


def test_a_drafter_that_is_the_target_is_always_accepted():
    target = tiny_model()
    output = speckv.generate(target, target, prompt_ids(), max_new_tokens=40, policy="fixed:3")
    assert output.acceptance_rate == 1.0
    assert [step.tokens for step in output.steps] == [4] * 10


@pytest.mark.parametrize("stop_at", [0, 1, 4, 5, 11])
def test_an_end_of_sequence_inside_the_accepted_part_ends_the_text_there(stop_at):
    target = tiny_model()
    ids = prompt_ids()
    text = plain(target, ids, 40)[0, ids.shape[1]:].tolist()
    eos = text[stop_at]
    end = text.index(eos)
    output = speckv.generate(target, target, ids, max_new_tokens=40, policy="fixed:8", eos_token_id=eos)
    assert output.sequences[0, ids.shape[1]:].tolist() == text[:end + 1]
    assert torch.equal(output.sequences, plain(target, ids, 40, eos_token_id=eos))
    # Nothing after the end counts as accepted.
    assert sum(step.tokens for step in output.steps) == end + 1
    assert output.accepted <= end + 1


def test_a_list_of_end_tokens_stops_at_the_first_of_them():
    target = tiny_model()
    ids = prompt_ids()
    text = plain(target, ids, 40)[0, ids.shape[1]:].tolist()
    output = speckv.generate(target, target, ids, max_new_tokens=40, eos_token_id=[text[9], text[5]])
    assert torch.equal(output.sequences, plain(target, ids, 40, eos_token_id=[text[9], text[5]]))


def test_the_generation_config_says_where_to_end_unless_told_otherwise():
    target = tiny_model()
    ids = prompt_ids()
    text = plain(target, ids, 20)[0, ids.shape[1]:].tolist()
    target.generation_config.eos_token_id = text[6]
    ended = speckv.generate(target, target, ids, max_new_tokens=20)
    assert ended.new_tokens == text.index(text[6]) + 1


def test_left_padding_is_as_good_as_none():
    target = tiny_model()
    drafter = noisy_copy(target)
    ids = prompt_ids()
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(ids)], dim=1)
    output = speckv.generate(target, drafter, padded, attention_mask=mask, max_new_tokens=20, policy="fixed:3")
    assert torch.equal(output.sequences, plain(target, padded, 20, attention_mask=mask))


def test_no_new_tokens_means_the_prompt_itself():
    target = tiny_model()
    output = speckv.generate(target, target, prompt_ids(), max_new_tokens=0)
    assert torch.equal(output.sequences, prompt_ids())
    assert output.steps == []


def test_records_and_totals_add_up():
    target = tiny_model()
    seen = []
    output = speckv.generate(target, noisy_copy(target), prompt_ids(), max_new_tokens=33, policy="fixed:4",
                             on_step=lambda tokens, record: seen.append((tokens, record)))
    assert [record for _, record in seen] == output.steps
    assert [token for tokens, _ in seen for token in tokens] == output.sequences[0, 6:].tolist()
    assert output.new_tokens == 33 == sum(step.tokens for step in output.steps)
    for step in output.steps:
        assert 0 <= step.accepted <= step.gamma <= 4
        assert step.tokens == step.accepted + 1
        assert step.draft_ms > 0 and step.verify_ms > 0
        if step.gamma:
            assert 0 <= step.mean_entropy <= step.max_entropy
            assert 0 < step.min_confidence <= step.mean_confidence <= 1
    assert output.acceptance_rate == output.accepted / output.drafted
    assert output.tokens_per_second == pytest.approx(33 / output.seconds)
    # The loop never drafts past the end: the last step has room for what it drafted and one more.
    assert sum(step.tokens for step in output.steps[:-1]) + output.steps[-1].gamma + 1 <= 33


def test_plain_decoding_needs_no_drafter_and_drafts_nothing():
    target = tiny_model()
    output = speckv.generate(target, None, prompt_ids(), max_new_tokens=10, policy="off")
    assert output.drafted == 0 and len(output.steps) == 10
    assert all(step.mean_entropy is None for step in output.steps)


def test_the_models_are_as_they_were():
    target, drafter = tiny_model(), tiny_model(seed=3)
    before = [{key: value.clone() for key, value in model.state_dict().items()} for model in (target, drafter)]
    speckv.generate(target, drafter, prompt_ids(), max_new_tokens=12, temperature=1.0, seed=0)
    for model, state in zip((target, drafter), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not model.training


def test_the_output_can_be_trained_on():
    # The usual next step of whoever samples for training; a tensor of inference mode would refuse it.
    target = tiny_model()
    sequences = speckv.generate(target, target, prompt_ids(), max_new_tokens=4).sequences
    target(sequences, labels=sequences).loss.backward()
    sequences += 1


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8])
def test_ids_of_any_whole_type_are_taken_and_come_back_as_int64(kind):
    target = tiny_model()
    output = speckv.generate(target, target, prompt_ids().to(kind), max_new_tokens=4)
    assert torch.equal(output.sequences, plain(target, prompt_ids(), 4))


@pytest.mark.parametrize("make", [torch.tensor, lambda ids: torch.tensor(ids[0]), tuple, set])
def test_end_tokens_are_taken_in_any_usual_form(make):
    target = tiny_model()
    text = plain(target, prompt_ids(), 20)[0, 6:].tolist()
    output = speckv.generate(target, target, prompt_ids(), max_new_tokens=20, eos_token_id=make([text[6]]))
    assert output.new_tokens == text.index(text[6]) + 1


def test_settings_of_the_generation_config_that_are_not_applied_are_named():
    target = tiny_model()
    target.generation_config.repetition_penalty = 1.3
    with pytest.warns(UserWarning, match="does not apply repetition_penalty"):
        speckv.generate(target, target, prompt_ids(), max_new_tokens=2)


@pytest.mark.parametrize("length", [5, 30])  # within the sliding window of 8, and beyond it
def test_logits_after_a_rollback_are_those_of_a_fresh_pass(pair, length):
    # A stale cache would not change the text, only make the drafter useless: nothing else would notice.
    target, drafter = pair
    ids, wrong, right = prompt_ids(length), prompt_ids(3, seed=1), prompt_ids(4, seed=2)
    session = CausalLMDrafter(drafter).open()
    cached = CachedModel(target)
    with torch.inference_mode():
        for model in (session, cached):
            read = model.next_logits if model is session else lambda ids: cached.read(ids, keep=1)[0][:, -1]
            read(ids)
            model.rollback(length)
            for i in range(1, 4):
                read(torch.cat([ids, wrong[:, :i]], dim=1))
            model.rollback(length)
            text = torch.cat([ids, right], dim=1)
            expected = (drafter if model is session else target)(text).logits[:, -1]
            torch.testing.assert_close(read(text), expected, rtol=1e-4, atol=1e-4)
