"""speckv's attention inside transformers' models: the same logits as sdpa, wherever it takes its place."""

import pytest
import torch
from tiny_models import ARCHITECTURES, tiny_model
from transformers import DynamicCache, StaticCache

from speckv import attention
from speckv.cache import cached
from speckv.kernels import serving

pytestmark = pytest.mark.skipif(serving()["cpu"][0] != "cpu", reason="needs the C++ kernels")


def both(family):
    """Two equal models, one of which attends through the kernel; skips where the family attends by itself."""
    plain, own = tiny_model(family, seed=3), tiny_model(family, seed=3)
    if not attention.use(own):
        pytest.skip(f"{family} does not attend through sdpa")
    return plain, own


def differences(plain, own, calls, **settings):
    """The largest difference of logits over a run of calls on a cache each."""
    caches, largest = [DynamicCache(config=model.config) for model in (plain, own)], 0.0
    for ids in calls:
        logits = []
        for i, model in enumerate((plain, own)):
            logits.append(model(ids, **cached(model, caches[i]), **settings).logits)
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
    return largest


@torch.inference_mode()
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits_are_those_of_sdpa_through_prompt_draft_and_step(family):
    plain, own = both(family)
    source = torch.Generator().manual_seed(0)
    calls = [torch.randint(0, 60, (1, n), generator=source) for n in (40, 1, 4, 1, 33, 2)]
    assert differences(plain, own, calls) < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_padding_is_still_masked(family):
    plain, own = both(family)
    ids, mask = torch.arange(12).reshape(2, 6), torch.ones(2, 6, dtype=torch.int64)
    mask[0, :2] = 0
    expected, out = (model(ids, attention_mask=mask).logits for model in (plain, own))
    torch.testing.assert_close(out[0, 2:], expected[0, 2:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out[1], expected[1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_static_cache_has_positions_that_are_not_seen():
    plain, own = both("llama")
    logits = []
    for model in (plain, own):
        cache = StaticCache(config=model.config, max_cache_len=32)
        model(torch.arange(5).unsqueeze(0), **cached(model, cache))
        logits.append(model(torch.arange(3).unsqueeze(0), **cached(model, cache)).logits)
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_sdpa():
    plain, own = both("llama")
    ids = torch.arange(8).unsqueeze(0)
    for model in (plain, own):
        model(ids).logits.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_that_attends_in_another_way_is_left_alone():
    model = tiny_model("llama", seed=0)
    model.set_attn_implementation("eager")
    assert not attention.use(model) and model.config._attn_implementation == "eager"
