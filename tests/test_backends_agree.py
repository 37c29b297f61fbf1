"""The loop gives the same tokens on whichever backend serves as on the reference.

Run in a process of its own with TRITON_INTERPRET=1 SPECKV_BACKEND=triton, this proves the Triton kernels in the loop.
"""

import pytest
import torch
from tiny_models import noisy_copy, prompt_ids, tiny_model

import speckv
from speckv import adaptive, decode, randomness
from speckv import policy as policy_module
from speckv.kernels import reference

SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.8}, "with a seed": {"temperature": 0.8, "seed": 3},
            "filtered": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
            "filtered with a seed": {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "seed": 3}}


# How long 'adaptive' drafts follows the clock, and without a seed what is drawn follows that.
@pytest.mark.parametrize("policy, sampling", [
    (policy, sampling) for policy in ("off", "fixed:3", "hf-confidence", "adaptive") for sampling in SAMPLING
    if (policy != "adaptive" or sampling in ("greedy", "with a seed", "filtered with a seed"))
    and not (policy == "hf-confidence" and sampling.startswith("filtered"))])  # filtered as those of fixed:3
def test_the_loop_gives_the_same_tokens_as_on_the_reference(policy, sampling, monkeypatch):
    target = tiny_model()
    drafter = noisy_copy(target)

    def run():
        torch.manual_seed(3)
        return speckv.generate(target, drafter, prompt_ids(), max_new_tokens=16, policy=policy, **SAMPLING[sampling])
    served = run()
    monkeypatch.setattr(policy_module, "draft_sample", reference.draft_sample)
    monkeypatch.setattr(randomness, "draft_sample", reference.draft_sample)
    monkeypatch.setattr(adaptive, "draft_step", reference.draft_step)
    monkeypatch.setattr(decode, "verify_chain", reference.verify_chain)
    expected = run()
    assert torch.equal(served.sequences, expected.sequences)
    if policy != "adaptive":
        assert [step.accepted for step in served.steps] == [step.accepted for step in expected.steps]
