"""What cannot be decoded is refused before any work, in words that name it and the way out."""

import pytest
import torch
import transformers
from tiny_models import COMMON, NARROW, prompt_ids, tiny_model

import speckv
from speckv import InputError, ModelError, NumericalError


class Untouchable(torch.nn.Module):
    """Stands in for a model's layers; running it is a failure."""

    def forward(self, *args, **kwargs):
        raise AssertionError("work was done before the error")


@pytest.fixture
def target():
    return tiny_model()


@pytest.fixture
def idle_target():
    model = tiny_model()
    model.model.layers = torch.nn.ModuleList([Untouchable()] * 3)
    return model


@pytest.mark.parametrize("settings, words", [
    ({"policy": "fixed:-1"}, "gamma is -1"),
    ({"policy": "fixed:many"}, "unknown policy 'fixed:many'"),
    ({"policy": "sometimes"}, "unknown policy 'sometimes'"),
    ({"temperature": -0.5}, "temperature is -0.5"),
    ({"temperature": float("nan")}, "temperature is nan"),
    ({"temperature": float("inf")}, "temperature is inf"),
    ({"max_new_tokens": -1}, "max_new_tokens is -1"),
    ({"max_new_tokens": 123}, "need 129 positions, the models have 128"),
    ({"input_ids": torch.ones(2, 3, dtype=torch.int64)}, "2 sequences"),
    ({"input_ids": torch.ones(1, 0, dtype=torch.int64)}, "at least one token"),
    ({"input_ids": torch.ones(3, dtype=torch.int64)}, r"\[1, n\]"),
    ({"attention_mask": torch.ones(1, 5, dtype=torch.int64)}, "attention_mask has shape"),
    ({"attention_mask": torch.zeros(1, 6, dtype=torch.int64)}, "hides the whole prompt"),
], ids=lambda value: "" if isinstance(value, dict) else value)
def test_a_bad_argument_is_named_before_any_work(idle_target, settings, words):
    arguments = {"input_ids": prompt_ids(), "max_new_tokens": 4} | settings
    with pytest.raises(InputError, match=words):
        speckv.generate(idle_target, idle_target, **arguments)


def test_a_prompt_longer_than_the_model_allows_is_refused(idle_target):
    with pytest.raises(InputError, match="shorten the prompt"):
        speckv.generate(idle_target, idle_target, prompt_ids(length=200), max_new_tokens=1)


def test_a_policy_that_drafts_needs_a_drafter(idle_target):
    with pytest.raises(InputError, match="give a drafter"):
        speckv.generate(idle_target, None, prompt_ids(), policy="fixed:2")


def test_a_drafter_with_another_vocabulary_is_refused(idle_target):
    with pytest.raises(ModelError, match=r"draft vocabulary is 50, target 97.*speckv distill"):
        speckv.generate(idle_target, tiny_model(vocab_size=50), prompt_ids())


def test_a_recurrent_cache_is_refused_by_name(target):
    config = transformers.MambaConfig(vocab_size=97, hidden_size=16, num_hidden_layers=2, state_size=4)
    mamba = transformers.MambaForCausalLM(config).eval()
    with pytest.raises(ModelError, match="target MambaForCausalLM"):
        speckv.generate(mamba, target, prompt_ids())
    with pytest.raises(ModelError, match="drafter MambaForCausalLM"):
        speckv.generate(target, mamba, prompt_ids())


def test_a_hybrid_cache_is_refused_by_name(target):
    settings = {key: value for key, value in NARROW.items() if key != "num_hidden_layers"}
    config = transformers.Qwen3NextConfig(
        **COMMON, **settings, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
    hybrid = transformers.Qwen3NextForCausalLM(config).eval()
    with pytest.raises(ModelError, match=r"target Qwen3NextForCausalLM.*rolled back"):
        speckv.generate(hybrid, target, prompt_ids())


def test_an_encoder_decoder_is_refused_by_name(target):
    config = transformers.T5Config(vocab_size=97, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        speckv.generate(transformers.T5ForConditionalGeneration(config).eval(), target, prompt_ids())


def poisoned(model, after_calls):
    """The model gives NaN logits from its n-th forward on."""
    forward, calls = model.forward, []

    def bad(*args, **kwargs):
        calls.append(None)
        output = forward(*args, **kwargs)
        if len(calls) > after_calls:
            output.logits[..., 3] = float("nan")
        return output
    model.forward = bad
    return model


@pytest.mark.parametrize("policy", ["off", "fixed:2"])
def test_nan_logits_of_the_target_are_named_with_their_step(policy):
    target = poisoned(tiny_model(), after_calls=3)  # the prompt and two steps pass
    with pytest.raises(NumericalError, match="step 2: verify_chain: row 0"):
        speckv.generate(target, tiny_model(), prompt_ids(), max_new_tokens=20, policy=policy)


def test_nan_logits_of_the_drafter_are_named_with_their_step():
    drafter = poisoned(tiny_model(seed=5), after_calls=3)  # the prompt and the first step's two
    with pytest.raises(NumericalError, match="step 1: draft_sample: row 0"):
        speckv.generate(tiny_model(), drafter, prompt_ids(), max_new_tokens=20, policy="fixed:2")
