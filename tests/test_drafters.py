"""Drafters of the target's tokenizer whose logits are padded to another width."""

import pytest
import torch
from test_sampling import VOCABULARY, p_value
from tiny_models import noisy_copy, prompt_ids, tiny_model

import speckv
from speckv import ModelError, drafters, profile_decode
from speckv.drafters import CausalLMDrafter, OfSome
from speckv.lookup import LookupFirst
from speckv.models import load_drafter

WIDTH = 101
NARROWER, WIDER = 97, 105
each_width = pytest.mark.parametrize("width", [NARROWER, WIDER], ids=["narrower", "wider"])


def resized(model, width):
    """A noisy copy with rows of the vocabulary cut off or added."""
    drafter = noisy_copy(model, noise=0.02)
    with torch.no_grad():
        drafter.resize_token_embeddings(width, mean_resizing=False)
    return drafter.eval()


@pytest.fixture(scope="module")
def target():
    return tiny_model(vocab_size=WIDTH)


def plain(target, ids, count=40):
    return target.generate(ids, do_sample=False, max_new_tokens=count, pad_token_id=0)


@each_width
@pytest.mark.parametrize("policy", ["fixed:1", "fixed:4", "adaptive", "hf-confidence"])
def test_greedy_output_is_that_of_plain_decoding(target, width, policy):
    # The last ids, which the narrower drafter lacks, among them.
    ids = torch.cat([prompt_ids(), torch.tensor([[100, 5, 97, 100]])], dim=1)
    output = speckv.generate(target, resized(target, width), ids, max_new_tokens=40, policy=policy)
    assert torch.equal(output.sequences, plain(target, ids))
    if policy != "adaptive":  # which goes by the clock, and may draft little
        assert 0 < output.acceptance_rate < 1


@each_width
def test_a_target_that_writes_ids_the_drafter_lacks_is_followed(width):
    target = tiny_model(vocab_size=WIDTH)
    drafter = resized(target, width)
    with torch.no_grad():  # the rows of ids that the narrower drafter lacks point the way of other, frequent ones
        target.lm_head.weight[97:] = 1.5 * target.lm_head.weight[:4]
    texts = [plain(target, prompt_ids(seed=seed)) for seed in range(4)]
    assert sum((text >= 97).sum() for text in texts) > 4
    for seed, text in enumerate(texts):
        output = speckv.generate(target, drafter, prompt_ids(seed=seed), max_new_tokens=40, policy="fixed:3")
        assert torch.equal(output.sequences, text)


@each_width
def test_ids_that_one_of_them_lacks_are_not_drafted(target, width):
    model = resized(target, width)
    with torch.inference_mode():
        logits = CausalLMDrafter(model, WIDTH).open().next_logits(prompt_ids())
        own = model(prompt_ids()).logits[:, -1]
    shared = min(width, WIDTH)
    assert logits.shape == (1, WIDTH)
    torch.testing.assert_close(logits[:, :shared], own[:, :shared])
    assert logits[:, shared:].isneginf().all()


@each_width
def test_every_way_in_takes_them(target, width, tmp_path):
    model, expected = resized(target, width), plain(target, prompt_ids(), 20)
    model.save_pretrained(tmp_path)
    loaded, behind_lookup = load_drafter(str(tmp_path), target), load_drafter(f"lookup+{tmp_path}", target)
    assert isinstance(behind_lookup, LookupFirst)
    for drafter in (loaded, behind_lookup):
        output = speckv.generate(target, drafter, prompt_ids(), max_new_tokens=20, policy="fixed:2")
        assert torch.equal(output.sequences, expected) and output.accepted > 0
    (output,) = speckv.generate_batch(target, model, prompt_ids(), policy="fixed:2", max_new_tokens=20)
    assert torch.equal(output.sequences, expected)
    assert torch.equal(expected, target.generate(
        prompt_ids(), do_sample=False, max_new_tokens=20, pad_token_id=0, custom_generate=speckv.custom_generate,
        draft_model=model, policy="fixed:2"))
    profile = profile_decode.profile(target, model, prompt_ids(), policy="fixed:2", max_new_tokens=20)
    assert torch.equal(profile.output.sequences, expected)


@pytest.mark.parametrize("width, filters", [(VOCABULARY - 1, {}), (VOCABULARY + 1, {"top_p": 0.8})],
                         ids=["narrower", "wider and filtered"])
def test_the_distribution_stays_the_targets(width, filters, monkeypatch):
    monkeypatch.setattr(drafters, "MOST_PADDING_SHARE", 1 / 2)
    small = {"num_hidden_layers": 1}
    target, model = tiny_model(seed=2, vocab_size=VOCABULARY, **small), tiny_model(seed=11, vocab_size=width, **small)
    # The prompt holds the id 3, which the narrower drafter lacks, and the target writes it.
    assert p_value(target, model, "fixed:2", **filters) > 1e-3


def test_a_seed_gives_the_text_of_plain_decoding(target):
    settings = {"max_new_tokens": 40, "temperature": 1.0, "seed": 3}
    expected = speckv.generate(target, None, prompt_ids(), policy="off", **settings)
    for width in (NARROWER, WIDER):
        output = speckv.generate(target, resized(target, width), prompt_ids(), policy="fixed:3", **settings)
        assert torch.equal(output.sequences, expected.sequences) and output.accepted > 0


@pytest.mark.parametrize("own, vocabulary, is_padding", [
    (97, 103, True), (97, 104, False), (104, 97, False), (20_000, 21_024, True), (20_000, 21_025, False),
    (21_025, 20_000, False)])
def test_how_far_widths_may_differ(own, vocabulary, is_padding):
    model = tiny_model(vocab_size=own, num_hidden_layers=1)
    if is_padding:
        assert CausalLMDrafter(model, vocabulary).vocabulary == vocabulary
    else:
        with pytest.raises(ModelError, match=f"draft vocabulary is {own}, target {vocabulary}.*speckv distill"):
            CausalLMDrafter(model, vocabulary)


def test_a_drafter_object_made_for_another_width_is_refused(target):
    with pytest.raises(ModelError, match="draft vocabulary is 97, target 101"):
        speckv.generate(target, CausalLMDrafter(resized(target, NARROWER)), prompt_ids())


class Some:
    """The target as its own drafter, of which only the `count` most probable tokens are proposed."""

    context = rope_switch = None
    name, wants_hidden = "the most probable", ()

    def __init__(self, target, count):
        self.drafter, self.count = CausalLMDrafter(target), count
        self.vocabulary = self.drafter.vocabulary

    def open(self):
        self.session = self.drafter.open()
        self.rollback = self.session.rollback
        return self

    def next_logits(self, ids):
        logits = self.session.next_logits(ids)
        token_ids = logits[0].topk(self.count).indices.sort().values
        return OfSome(logits[:, token_ids], token_ids)


@pytest.mark.parametrize("processors", [None, [lambda ids, scores: scores.roll(1, dims=1)]], ids=["as is", "processed"])
@pytest.mark.parametrize("policy", ["fixed:3", "hf-confidence"])
def test_logits_of_some_tokens_are_taken_for_those(target, policy, processors):
    ids = prompt_ids()
    outputs = [speckv.generate(target, draft, ids, max_new_tokens=40, policy=policy, logits_processor=processors)
               for draft in (Some(target, 1), Some(target, 5), target)]
    for output in outputs:
        assert output.acceptance_rate == 1.0
        assert torch.equal(output.sequences, outputs[-1].sequences)


def test_samples_of_some_tokens_are_accepted_and_of_all_the_targets_own_always(target):
    def rate(count):
        outputs = [speckv.generate(target, Some(target, count), prompt_ids(), max_new_tokens=100, policy="fixed:2",
                                   temperature=1.0, eos_token_id=[], seed=None) for _ in range(4)]
        return sum(step.accepted for output in outputs for step in output.steps) / sum(
            step.gamma for output in outputs for step in output.steps)
    assert rate(WIDTH) == 1.0
    assert 0.05 < rate(20) < 0.95
