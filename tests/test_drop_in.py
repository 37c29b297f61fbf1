"""model.generate with custom_generate=speckv.custom_generate writes what model.generate writes without it."""

import functools
import itertools
import random

import pytest
import torch
from test_sampling import VOCABULARY as FEW
from test_sampling import fit
from tiny_chat import tiny_tokenizer
from tiny_models import noisy_copy, prompt_ids, tiny_model
from transformers import (
    MaxLengthCriteria,
    MinPLogitsWarper,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    WatermarkingConfig,
)
from transformers.generation import BaseStreamer

import speckv
from speckv import InputError, ModelError, decode, drop_in, processors
from speckv.drafters import CausalLMDrafter
from speckv.lookup import LookupDrafter

PROMPT = 6
SETTINGS = {  # of a greedy call: name, and how to draw a value
    "repetition_penalty": lambda draw: draw.choice([1.3, 0.8]),
    "no_repeat_ngram_size": lambda draw: draw.choice([1, 2, 3]),
    "encoder_repetition_penalty": lambda draw: 1.5,
    "encoder_no_repeat_ngram_size": lambda draw: 2,
    "bad_words_ids": lambda draw: [draw.sample(range(2, 97), draw.choice([1, 1, 2])) for _ in range(30)],
    "sequence_bias": lambda draw: [[draw.sample(range(2, 97), draw.choice([1, 2])), draw.uniform(-9, 9)]
                                   for _ in range(40)],
    "suppress_tokens": lambda draw: draw.sample(range(6, 97), 40),
    "begin_suppress_tokens": lambda draw: draw.sample(range(6, 97), 60),
    "min_length": lambda draw: draw.randint(5, 25),
    "min_new_tokens": lambda draw: draw.randint(1, 12),
    "forced_bos_token_id": lambda draw: 5,
    "forced_eos_token_id": lambda draw: draw.choice([1, [0, 1]]),
    "exponential_decay_length_penalty": lambda draw: (3, 1.5),
    "remove_invalid_values": lambda draw: True,
    "renormalize_logits": lambda draw: True,
    "watermarking_config": lambda draw: WatermarkingConfig(bias=4.0),
    "eos_token_id": lambda draw: draw.sample(range(2, 97), draw.choice([1, 4, 12])),
    "stop_strings": lambda draw: [f"w{i}" for i in draw.sample(range(93), 15)],
}
POLICIES = ["off", "fixed:1", "fixed:2", "fixed:5", "adaptive", "hf-confidence"]


@pytest.fixture(scope="module")
def pair():
    return small_pair()


def small_pair():
    target = tiny_model(num_hidden_layers=1)
    return target, noisy_copy(target, noise=0.1)


def write(model, ids, max_new_tokens=12, pad_token_id=0, **settings):
    """transformers' own text."""
    return model.generate(ids, max_new_tokens=max_new_tokens, pad_token_id=pad_token_id, **settings)


def speculate(pair, ids, policy="fixed:3", **settings):
    """The same through speckv."""
    return write(pair[0], ids, custom_generate=speckv.custom_generate, draft_model=pair[1], policy=policy, **settings)


def padded_batch(lengths, pad=0):
    """Prompts of these lengths, padded on the left: input_ids and attention_mask."""
    ids = torch.full((len(lengths), max(lengths)), pad)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        ids[i, -length:] = prompt_ids(length, seed=i)
        mask[i, -length:] = 1
    return ids, mask


def stopping_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens("abcdef")  # with which StopStringCriteria finds out what a token looks like
    return tokenizer


def early_end(target, ids, row, **settings):
    """A token that ends the text of this row of a batch, and none of the others."""
    texts = write(target, ids, **settings)[:, ids.shape[1]:].tolist()
    others = {token for i, text in enumerate(texts) for token in text if i != row}
    return next(token for token in texts[row][2:] if token not in others)


def drawn_configuration(seed):
    """A prompt and settings of both calls, by chance."""
    draw = random.Random(seed)
    settings = {name: SETTINGS[name](draw) for name in draw.sample(list(SETTINGS), draw.randint(2, 5))}
    if "exponential_decay_length_penalty" in settings:  # which without an end is an error in transformers
        settings.setdefault("eos_token_id", [3, 50])
    if draw.random() < 0.25:
        settings["logits_processor"] = [draw.choice([
            MinPLogitsWarper(0.05), TopKLogitsWarper(5), lambda ids, scores: scores.roll(int(ids.sum()) % 3, dims=1)])]
    return prompt_ids(draw.choice([1, 2, 6, 20]), seed), settings | {"max_new_tokens": draw.choice([1, 6, 14, 14])}


def mismatches(pair, seeds):
    """Of the configurations drawn with these seeds, those whose two texts differ; how many differ from a bare text."""
    wrong, changed = [], 0
    tokenizer = stopping_tokenizer()
    for seed in seeds:
        ids, settings = drawn_configuration(seed)
        expected = write(pair[0], ids, tokenizer=tokenizer, **settings)
        draw = random.Random(-1 - seed)
        ours = dict(settings)
        if strings := ours.pop("stop_strings", None):
            ours["stopping_criteria"] = [StopStringCriteria(tokenizer, strings)]
        drafter = draw.choice([pair[1], pair[1], pair[0], LookupDrafter(97, shortest=1)])
        text = speculate((pair[0], drafter), ids, draw.choice(POLICIES), fast=draw.random() < 0.3, **ours)
        if not torch.equal(text, expected):
            wrong.append((seed, settings))
        changed += not torch.equal(expected, write(pair[0], ids, settings["max_new_tokens"]))
    return wrong, changed


@pytest.mark.parametrize("first", range(0, 200, 25))
def test_greedy_texts_of_any_settings_are_those_of_transformers(pair, first):
    wrong, changed = mismatches(pair, range(first, first + 25))
    assert wrong == []
    assert changed >= 15, "most configurations must change the text, or this test says little"


def process_with_one_prefix(processors_, ids, logits):
    """A planted bug: all rows of a pass are processed with the prefix of the first."""
    first = ids.shape[1] - logits.shape[1] + 1
    return torch.stack([processors.process(processors_, ids[:, :first], logits[:, i].float())
                        for i in range(logits.shape[1])], dim=1)


def process_with_the_token_itself(processors_, ids, logits):
    """A planted bug: a prefix that is one token too short."""
    first = ids.shape[1] - logits.shape[1]
    return torch.stack([processors.process(processors_, ids[:, :max(1, first + i)], logits[:, i].float())
                        for i in range(logits.shape[1])], dim=1)


def ask_at_the_end_of_a_step(self, emitted):
    """A planted bug: criteria look at the whole step, not at each of its tokens."""
    accepted, start = len(emitted) - 1, self.length
    self.ids[0, start:start + len(emitted)] = torch.tensor(emitted)
    end = next((i + 1 for i, token in enumerate(emitted) if token in self._eos_ids), None)
    emitted = emitted[:end]
    self.length = start + len(emitted)
    self.finished = self._end(emitted[-1:], self.length - 1) is not None or self.length == self.end
    self.target.rollback(self.length - 1)
    if self._draft is not None:
        self._draft.rollback(self.length - 1)
    return emitted, min(accepted, len(emitted))


@pytest.mark.parametrize("place, name, bug", [
    (decode, "process_rows", process_with_one_prefix), (decode, "process_rows", process_with_the_token_itself),
    (decode.Run, "_keep", ask_at_the_end_of_a_step), (drop_in._Row, "_shown", lambda self, ids: ids[:, 1:])],
    ids=["one prefix", "short prefix", "late criteria", "cut prompt"])
def test_the_test_above_fails_for_a_planted_bug(pair, monkeypatch, place, name, bug):
    monkeypatch.setattr(place, name, bug)
    assert mismatches(pair, range(50))[0]


# Both look at the tokens before: what stands just before is likely to come again, what stands at all is not.
DRAWN = {"sequence_bias": {(token, token): 3.0 for token in range(FEW)}, "repetition_penalty": 1.5,
         "temperature": 0.7, "top_k": 3, "min_p": 0.05}


def sampled_fit(target, drafter, settings, samples=900):
    """How well texts of three tokens fit what transformers' own scores say of each."""
    settings = {"do_sample": True, **settings}
    prompt = torch.tensor([[1, 2, 3]])

    def scores(prefix):
        ids = torch.tensor([prefix])
        output = write(target, ids, 1, attention_mask=torch.ones_like(ids), return_dict_in_generate=True,
                       output_scores=True, **settings)
        return output.scores[0][0].double().softmax(-1)
    step = functools.cache(scores)
    expected = torch.stack([
        torch.stack([step((1, 2, 3, *text[:i]))[text[i]] for i in range(3)]).prod()
        for text in itertools.product(range(FEW), repeat=3)])
    torch.manual_seed(0)
    texts = torch.cat([speculate((target, drafter), prompt, "fixed:2", max_new_tokens=3, num_return_sequences=6,
                                 fast=True, **settings) for _ in range(samples // 6)])
    index = (texts[:, 3:] * torch.tensor([FEW ** 2, FEW, 1])).sum(1)
    counts = index.bincount(minlength=FEW ** 3).float()
    return 0.0 if (counts[expected == 0] > 0).any() else fit(counts, expected)


@pytest.fixture(scope="module")
def few():
    small = {"vocab_size": FEW, "num_hidden_layers": 1}
    return tiny_model(seed=2, **small), tiny_model(seed=11, **small)


@pytest.mark.parametrize("more", [{}, {"typical_p": 0.95}], ids=["fused", "run as processors"])
def test_sampled_texts_have_the_distribution_of_transformers(few, more):
    assert sampled_fit(*few, DRAWN | more) > 1e-3


@pytest.mark.parametrize("bug", [process_with_one_prefix, process_with_the_token_itself])
def test_the_test_of_distributions_fails_for_a_wrong_prefix(few, bug, monkeypatch):
    monkeypatch.setattr(decode, "process_rows", bug)
    assert sampled_fit(*few, DRAWN) < 1e-3


@pytest.mark.parametrize("more, left", [({}, {"temperature": 0.7, "top_k": 3, "min_p": 0.05}), (
    {"typical_p": 0.95}, {"temperature": 1.0}), ({"return_dict_in_generate": True, "output_scores": True}, {
        "temperature": 1.0})], ids=["all", "typical", "scores"])
def test_the_ops_are_left_what_they_can_do_unless_scores_are_asked_for(few, monkeypatch, more, left):
    calls = []
    monkeypatch.setattr(drop_in, "generate_batch", lambda *args, **settings: calls.append(settings) or (
        speckv.generate_batch(*args, **settings)))
    speculate(few, torch.tensor([[1, 2]]), do_sample=True, **DRAWN, **more)
    assert [{name: value for name, value in call.items() if name in ("temperature", "top_k", "top_p", "min_p")}
            for call in calls] == [left]


T, K, P, M = TemperatureLogitsWarper(0.5), TopKLogitsWarper(7), TopPLogitsWarper(0.9), MinPLogitsWarper(0.1)


@pytest.mark.parametrize("given, rest, fused", [
    ([], 0, {}),
    ([T, K, P, M], 0, {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1}),
    ([T, M], 0, {"temperature": 0.5, "min_p": 0.1}),
    ([K, T], 1, {"temperature": 0.5}),
    ([T, P, K], 2, {"top_k": 7}),
    ([T, T], 1, {"temperature": 0.5}),
    ([T, len], 2, {}),
    ([len, P], 1, {"top_p": 0.9}),
    ([TopKLogitsWarper(7, min_tokens_to_keep=2)], 1, {}),
    ([TopPLogitsWarper(0.9, filter_value=-50.0)], 1, {})], ids=range(10))
def test_the_warpers_at_the_end_are_left_to_the_ops_in_their_order(given, rest, fused):
    assert drop_in._split_warpers(given) == (given[:rest], fused)


def test_scores_and_logits_are_those_of_transformers(pair):
    settings = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True,
                "repetition_penalty": 1.3, "suppress_tokens": [3, 4], "max_new_tokens": 20}
    expected = write(pair[0], prompt_ids(), **settings)
    output = speculate(pair, prompt_ids(), **settings)
    assert type(output) is type(expected)
    assert torch.equal(output.sequences, expected.sequences)
    for name in ("scores", "logits"):
        assert [step.dtype for step in output[name]] == [torch.float32] * 20
        torch.testing.assert_close(torch.stack(output[name]), torch.stack(expected[name]), rtol=1e-4, atol=1e-4)
    assert not torch.equal(output.scores[5], output.logits[5])
    output.scores[0].add_(1)  # which a tensor of inference mode would refuse


@pytest.mark.parametrize("wanted", ["output_scores", "output_logits", None])
def test_only_what_is_asked_for_is_returned(pair, wanted):
    output = speculate(pair, prompt_ids(), return_dict_in_generate=True, **({wanted: True} if wanted else {}))
    assert [name for name in ("scores", "logits") if output.get(name) is not None] == (
        [wanted.removeprefix("output_")] if wanted else [])
    assert isinstance(speculate(pair, prompt_ids(), **({wanted: True} if wanted else {})), torch.Tensor)


@pytest.mark.parametrize("settings", [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, {
    "encoder_repetition_penalty": 1.5, "encoder_no_repeat_ngram_size": 2, "min_new_tokens": 3}], ids=str)
def test_a_batch_is_that_of_transformers_and_each_row_that_of_its_own_call(pair, settings):
    ids, mask = padded_batch([6, 2, 9, 1])
    eos = early_end(pair[0], ids, 1, attention_mask=mask, **settings)
    settings = settings | {"eos_token_id": eos, "max_new_tokens": 16, "pad_token_id": 96}
    expected = write(pair[0], ids, attention_mask=mask, **settings)
    assert (expected[1, 9:] == 96).sum() > 1, "a row is filled up"
    batch = speculate(pair, ids, attention_mask=mask, **settings)
    assert torch.equal(batch, expected)
    for i, length in enumerate([6, 2, 9, 1]):
        alone = speculate(pair, ids[i:i + 1, -length:], **settings)[0, length:]
        assert torch.equal(batch[i, 9:9 + len(alone)], alone)
        assert (batch[i, 9 + len(alone):] == 96).all()


def test_scores_of_a_batch_are_0_behind_a_row(pair):
    ids, mask = padded_batch([4, 7])
    eos = early_end(pair[0], ids, 0, attention_mask=mask)
    settings = {"attention_mask": mask, "eos_token_id": eos, "return_dict_in_generate": True, "output_scores": True}
    expected, output = write(pair[0], ids, **settings), speculate(pair, ids, **settings)
    assert len(output.scores) == len(expected.scores) > 3
    for i, (ours, theirs) in enumerate(zip(output.scores, expected.scores, strict=True)):
        torch.testing.assert_close(ours[1], theirs[1], rtol=1e-4, atol=1e-4)
        if i > output.sequences[0, 7:].tolist().index(eos):
            assert (ours[0] == 0).all()
        else:
            torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-4)


def test_processors_that_tell_rows_apart_see_theirs(pair):
    allowed = [list(range(2, 30)), list(range(30, 60)), list(range(60, 97))]
    ids, mask = padded_batch([3, 5, 4])
    settings = {"attention_mask": mask, "prefix_allowed_tokens_fn": lambda row, ids: allowed[row]}
    assert torch.equal(speculate(pair, ids, **settings), write(pair[0], ids, **settings))


def test_criteria_that_tell_rows_apart_see_theirs(pair):
    def ends(ids, scores):
        return torch.tensor([ids.shape[1] == 9, ids.shape[1] == 11, False])
    ids, mask = padded_batch([3, 5, 4])
    texts = speculate(pair, ids, attention_mask=mask, stopping_criteria=[ends])[:, 5:]
    assert [(text != 0).sum().item() for text in texts] == [4, 6, 12]


def test_several_sequences_of_a_prompt_are_drawn_apart(pair):
    texts = speculate(pair, prompt_ids(), do_sample=True, num_return_sequences=3, seed=1)
    assert texts.shape == (3, PROMPT + 12)
    assert len({tuple(text) for text in texts.tolist()}) == 3


def test_seeds_are_those_of_torch_or_ones_own(pair):
    def text(manual=0, **settings):
        torch.manual_seed(manual)
        return speculate(pair, prompt_ids(), do_sample=True, top_k=0, **settings).tolist()
    assert text(0) == text(0) != text(1)
    assert text(0, seed=5) == text(1, seed=5) != text(0, seed=6)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    speculate(pair, prompt_ids(), policy="fixed:2")
    assert torch.equal(torch.get_rng_state(), before), "greedy decoding draws nothing"
    with pytest.raises(InputError, match=r"seed is 1\.5"):
        text(seed=1.5)


class Recorder(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard.append(value.tolist())

    def end(self):
        self.heard.append("end")


@pytest.mark.parametrize("function", [
    speckv.custom_generate, functools.partial(speckv.custom_generate, policy="fixed:2"),
    lambda *args, draft_model=None, policy=None, **kwargs: speckv.custom_generate(
        *args, draft_model=draft_model, policy=policy, **kwargs)], ids=["itself", "partial", "wrapped"])
def test_a_streamer_hears_what_it_hears_from_transformers(pair, function):
    expected, ours = Recorder(), Recorder()
    write(pair[0], prompt_ids(), streamer=expected)
    write(pair[0], prompt_ids(), streamer=ours, custom_generate=function, draft_model=pair[1], policy="fixed:2")
    assert ours.heard == expected.heard
    assert ours.heard[0] == prompt_ids().tolist() and ours.heard[-1] == "end" and len(ours.heard) == 14


def test_a_streamer_may_be_given_to_the_function_itself(pair):
    # As by a version of transformers that hands it on; the prompt is not for the function to put.
    streamer, steps = Recorder(), []
    text = write(pair[0], prompt_ids(), custom_generate=functools.partial(speckv.custom_generate, streamer=streamer),
                 draft_model=pair[1], policy="fixed:2", on_step=lambda tokens, record: steps.append((tokens, record)))
    assert streamer.heard == [[token] for token in text[0, PROMPT:].tolist()] + ["end"]
    assert [[token] for tokens, _ in steps for token in tokens] == streamer.heard[:-1]
    assert steps[0][1].gamma == 2


class Asked:
    """A criterion that keeps what it is asked, and ends the text at a length."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, ids, scores, **settings):
        self.asked.append((ids.tolist(), None if scores is None else [step.argmax().item() for step in scores]))
        return torch.tensor([ids.shape[1] >= self.length])


@pytest.mark.parametrize("settings", [{}, {"return_dict_in_generate": True, "output_scores": True}, {
    "return_dict_in_generate": True, "output_logits": True}], ids=str)
@pytest.mark.parametrize("length", [7, 9, 10, 40])
def test_criteria_are_asked_what_transformers_asks_them(pair, length, settings):
    theirs, ours = Asked(length), Asked(length)
    expected = write(pair[0], prompt_ids(), stopping_criteria=[theirs], **settings)
    text = speculate((pair[0], pair[0]), prompt_ids(), stopping_criteria=[ours], **settings)
    assert torch.equal(text[0], expected[0])
    assert ours.asked == theirs.asked


def test_a_stop_string_ends_the_text_in_mid_step(pair):
    tokenizer, ids = stopping_tokenizer(), prompt_ids()
    text = write(pair[0], ids)[0]
    strings = [tokenizer.decode([text[PROMPT + 4]]).strip()]
    expected = write(pair[0], ids, stop_strings=strings, tokenizer=tokenizer)
    output = speculate((pair[0], pair[0]), ids, "fixed:8", stopping_criteria=[StopStringCriteria(tokenizer, strings)])
    assert torch.equal(output, expected) and expected.shape[1] < PROMPT + 12
    # transformers stops what its own argument asks for before speckv is called.
    with pytest.raises(ValueError, match="could not locate a tokenizer"):
        speculate(pair, ids, stop_strings=strings, tokenizer=tokenizer)


@pytest.mark.parametrize("settings", [
    {"max_length": 10, "max_new_tokens": None}, {"max_time": 0.0}, {"max_new_tokens": 1},
    {"stopping_criteria": [MaxLengthCriteria(8)]}, {"stopping_criteria": [MaxLengthCriteria(3)]},
    {"max_new_tokens": None}, {"use_cache": False}, {"length_penalty": 2.0}], ids=lambda settings: ", ".join(settings))
def test_the_length_is_that_of_transformers(pair, settings):
    assert torch.equal(speculate(pair, prompt_ids(), **settings), write(pair[0], prompt_ids(), **settings))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_models_of_other_kinds_are_taken_in_batches(kind):
    target = tiny_model(kind)
    ids, mask = padded_batch([5, 3])
    settings = {"attention_mask": mask, "repetition_penalty": 1.2}
    assert torch.equal(speculate((target, noisy_copy(target)), ids, **settings), write(target, ids, **settings))


def test_a_drafter_is_taken_in_every_form(pair):
    expected = write(pair[0], prompt_ids())
    for draft_model in (pair[1], CausalLMDrafter(pair[1]), LookupDrafter(97), "lookup"):
        assert torch.equal(speculate((pair[0], draft_model), prompt_ids()), expected)
    assert torch.equal(speculate((pair[0], None), prompt_ids(), "off"), expected)
    with pytest.raises(InputError, match=r'draft_model is None.*\("lookup" needs no model\), or policy="off"'):
        speculate((pair[0], None), prompt_ids(), "adaptive")
    with pytest.raises(ModelError, match="neither a drafter folder nor"):
        speculate((pair[0], "no/such/model"), prompt_ids())
