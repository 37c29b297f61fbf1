"""What cannot be decoded is refused before any work, in words that name it and the way out."""

import pytest
import torch
import transformers
from tiny_models import COMMON, NARROW, prompt_ids, tiny_model

import speckv
from speckv import InputError, ModelError, NumericalError
from speckv.policy import PolicySession


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
    ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "in the middle of the prompt"),
    ({"attention_mask": [[1] * 6]}, "attention_mask has shape"),
    ({"input_ids": [[1, 2]]}, "input_ids is a list"),
    ({"input_ids": torch.ones(1, 3)}, "whole numbers"),
    ({"input_ids": torch.tensor([[1, 97]])}, "input_ids holds 97: the target's ids are 0 to 96"),
    ({"input_ids": torch.tensor([[1, -3]])}, "input_ids holds -3"),
    ({"max_new_tokens": 4.0}, "max_new_tokens is 4.0"),
    ({"max_new_tokens": None}, "max_new_tokens is None"),
    ({"seed": 2 ** 64}, "must fit in 64 bits"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"temperature": 1e39}, "temperature is 1e[+]39"),
    ({"temperature": 1e-42}, "temperature is 1e-42"),
    ({"temperature": "warm"}, "temperature is warm"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 2.5}, "top_k is 2.5"),
    ({"top_k": 2 ** 63}, "top_k is 9223372036854775808"),
    ({"top_p": 1.5}, "top_p is 1.5"),
    ({"top_p": float("nan")}, "top_p is nan"),
    ({"top_p": None}, "top_p is None"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": True}, "min_p is True"),
    ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
    ({"eos_token_id": 2.0}, "eos_token_id is 2.0"),
    ({"policy": 4}, "policy is 4"),
    ({"policy": None}, "policy is None"),
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


def test_nan_logits_under_adaptive_are_named_too():
    with pytest.raises(NumericalError, match="step 1: draft_step: row 0"):  # after a first step that is plain
        speckv.generate(tiny_model(), poisoned(tiny_model(seed=5), after_calls=1), prompt_ids(), max_new_tokens=20)


def test_nan_logits_of_the_drafter_are_named_with_their_step():
    drafter = poisoned(tiny_model(seed=5), after_calls=3)  # the prompt and the first step's two
    with pytest.raises(NumericalError, match="step 1: draft_sample: row 0"):
        speckv.generate(tiny_model(), drafter, prompt_ids(), max_new_tokens=20, policy="fixed:2")


class Odd(PolicySession):
    """A policy that answers something else from its second question on."""

    name = "odd"

    def __init__(self, *answers):
        self._answers = list(answers)

    def open(self, compression):
        return self

    def max_draft(self):
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.mark.parametrize("answer, words", [(None, "is None"), (-1, "asks for -1"), (2.5, "is 2.5"), ("3", "is '3'")],
                         ids=str)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "in mid-decode"])
def test_a_policy_that_answers_nonsense_is_named(target, answer, words, late):
    policy = Odd(*([0, 0, 0] if late else []), answer)
    with pytest.raises(InputError, match=words):
        speckv.generate(target, target, prompt_ids(), max_new_tokens=9, policy=policy)


def test_a_policy_that_drafts_late_needs_a_drafter_too(target):
    with pytest.raises(InputError, match="give a drafter"):
        speckv.generate(target, None, prompt_ids(), max_new_tokens=9, policy=Odd(0, 0, 0, 2))


@pytest.mark.parametrize(
    "thing", ["smollm2", ("model", "tokenizer"), torch.nn.Linear(2, 2)], ids=["name", "pair", "module"])
def test_something_that_is_no_model_is_refused(target, thing):
    with pytest.raises(ModelError, match="it must be a causal language model"):
        speckv.generate(thing, target, prompt_ids())
    with pytest.raises(ModelError, match="it must be a causal language model"):
        speckv.generate(target, thing, prompt_ids())


def test_train_mode_is_refused(target):
    with pytest.raises(ModelError, match="train mode"):
        speckv.generate(tiny_model().train(), target, prompt_ids())


def test_a_model_that_does_not_keep_its_cache_is_refused(target):
    config = transformers.OpenAIGPTConfig(vocab_size=97, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    forgetful = transformers.OpenAIGPTLMHeadModel(config).eval()
    with pytest.raises(ModelError, match="does not keep what it reads"):
        speckv.generate(forgetful, target, prompt_ids(), policy="off", max_new_tokens=3)


def test_a_run_across_a_change_of_position_encoding_is_refused(target):
    settings = {key: value for key, value in NARROW.items() if key != "head_dim"}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 16}
    longrope = transformers.Phi3ForCausalLM(transformers.Phi3Config(
        **COMMON, **settings, original_max_position_embeddings=16, rope_parameters=rope)).eval()
    with pytest.raises(InputError, match=r"changes its position encoding after 16 tokens.*lower max_new_tokens to 10"):
        speckv.generate(longrope, target, prompt_ids(), max_new_tokens=20)
    assert speckv.generate(longrope, target, prompt_ids(), max_new_tokens=10, policy="fixed:2").new_tokens == 10


def test_a_drafter_on_logits_the_ops_do_not_take_is_no_numerical_error(target):
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16") as raised:
        speckv.generate(tiny_model().double(), target, prompt_ids(), max_new_tokens=3, policy="off")
    assert not isinstance(raised.value, NumericalError)
