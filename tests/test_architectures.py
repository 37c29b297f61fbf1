"""What transformers writes, speckv writes: every kind of decoder, of drafter and of policy, or a refusal by name."""

import warnings

import pytest
import torch
from test_head import tiny_head
from tiny_models import (
    ARCHITECTURES,
    MORE_ARCHITECTURES,
    REFUSED_ARCHITECTURES,
    VOCABULARY,
    noisy_copy,
    prompt_ids,
    tiny_model,
)

import speckv
from speckv import ModelError, SpecKVError
from speckv.cache import CachedModel
from speckv.lookup import LookupDrafter

NEW_TOKENS = 24
POLICIES = ("fixed:1", "fixed:4", "adaptive", "hf-confidence")
DRAFTERS = {"model": lambda target: noisy_copy(target, noise=0.06), "head": tiny_head,
            # One token is match enough: a short random text has few that are longer.
            "lookup": lambda target: LookupDrafter(VOCABULARY, shortest=1)}
WITHOUT_HEAD = {"opt": "has no plain list of decoder layers"}


def plain(target, ids):
    return target.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)


def compared(target, drafter, expected):
    """For each policy, whether the text is as expected, and the share of the draft that was accepted."""
    outputs = [speckv.generate(target, drafter, prompt_ids(), max_new_tokens=NEW_TOKENS, policy=policy)
               for policy in POLICIES]
    assert all(output.drafted > 0 for output in outputs)
    return ([torch.equal(output.sequences, expected) for output in outputs],
            sum(output.accepted for output in outputs) / sum(output.drafted for output in outputs))


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *MORE_ARCHITECTURES])
def test_greedy_output_is_that_of_transformers(architecture, record_property):
    target = tiny_model(architecture)
    expected = plain(target, prompt_ids())
    told, equal, without = [], [], {}
    for kind, make in DRAFTERS.items():
        try:
            drafter = make(target)
        except SpecKVError as error:
            without[kind] = str(error)
            told.append(f"{kind}: {error}")
            continue
        equals, acceptance = compared(target, drafter, expected)
        equal += equals
        told.append(f"{kind} {acceptance:.0%}")
        # A drafter that agrees now and then, or the loop could drop all drafts and pass.
        assert kind != "model" or 0 < acceptance < 1
    record_property("summary", f"{architecture:16}{sum(equal)} of {len(equal)} texts equal transformers'; accepted of "
                               f"{', '.join(told)}")
    assert all(equal)
    assert without.keys() == ({"head"} if architecture in WITHOUT_HEAD else set())
    assert WITHOUT_HEAD.get(architecture, "") in without.get("head", "")


@pytest.mark.parametrize("architecture", REFUSED_ARCHITECTURES)
def test_what_cannot_be_rolled_back_is_refused_by_name_as_target_and_as_drafter_and_for_a_head(architecture):
    model, other = tiny_model(architecture), tiny_model()
    name = type(model).__name__
    with pytest.raises(ModelError, match=f"target {name}"):
        speckv.generate(model, other, prompt_ids(), max_new_tokens=4)
    with pytest.raises(ModelError, match=f"drafter {name}"):
        speckv.generate(other, model, prompt_ids(), max_new_tokens=4)
    with pytest.raises(ModelError, match=name):
        tiny_head(model)


def keep_a_rejected_key(self, length):
    """A planted bug: one token is cut off in the wrong place."""
    layers = [layer for layer in self._cache.layers if layer.is_initialized] if length < self.length else []
    rejected = [layer.keys[:, :, -1].clone() for layer in layers]
    ROLLBACK(self, length)
    for layer, key in zip(layers, rejected, strict=True):
        layer.keys[:, :, -1] = key


ROLLBACK = CachedModel.rollback


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gpt-oss", "deepseek-v3", "mixtral"])
def test_the_test_above_fails_where_the_cache_is_cut_in_the_wrong_place(architecture, monkeypatch):
    target = tiny_model(architecture)
    expected = plain(target, prompt_ids())
    monkeypatch.setattr(CachedModel, "rollback", keep_a_rejected_key)
    with torch.inference_mode():
        equal, _ = compared(target, noisy_copy(target), expected)
    assert not all(equal)


@pytest.mark.parametrize("implementation", ["dynamic", "static", "sliding_window", "quantized"])
def test_a_cache_named_in_the_generation_config_is_ignored_and_said_to_be_where_the_text_would_change(implementation):
    # speckv.generate keeps a cache of its own; custom_generate refuses the setting by name (tests/test_drop_in.py).
    target = tiny_model()
    expected = plain(target, prompt_ids())
    target.generation_config.cache_implementation = implementation
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        output = speckv.generate(target, noisy_copy(target), prompt_ids(), max_new_tokens=NEW_TOKENS, policy="fixed:4")
    assert torch.equal(output.sequences, expected)
    said = [str(warning.message) for warning in caught if "cache_implementation='quantized'" in str(warning.message)]
    assert len(said) == (implementation == "quantized")
