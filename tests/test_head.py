"""The feature head drafts in the loop what it was trained to draft, and is lossless like any drafter."""

import pytest
import torch
from tiny_models import VOCABULARY, prompt_ids, tiny_model

import speckv
from speckv import ModelError, drafter_folder, head
from speckv.cache import hidden_states
from speckv.students import MATCH_GAMMA, HeadStudent

ARCHITECTURES = ["llama", "qwen2", "gemma", "gpt2", "mistral-sliding"]


def tiny_head(target, seed=0, drafts=60):
    """A head with random joining weights that can draft `drafts` of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    token_ids = torch.randperm(VOCABULARY, generator=generator)[:drafts].sort().values
    return head.build(target, random_tensors(target, token_ids, generator))


def random_tensors(target, token_ids, generator=None):
    """Weights of a head that mixes features and embeddings at random."""
    size = 32 * len(head.feature_layers(target))
    center, scale = (torch.rand(size, generator=generator) for _ in range(2))
    tensors = head.initial_tensors(target, token_ids, center, scale)
    for key in (head.COMBINE, head.FUSE):
        tensors[key] = tensors[key] + 0.2 * torch.randn(tensors[key].shape, generator=generator)
    return tensors


def features_of(target, ids):
    """What the loop shows the head of ids."""
    return hidden_states(target(ids, output_hidden_states=True), head.feature_layers(target))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("policy", ["off", "fixed:1", "fixed:3", "fixed:6"])
@pytest.mark.parametrize("length", [1, 12])
def test_greedy_output_is_that_of_plain_decoding(architecture, policy, length):
    target = tiny_model(architecture)
    ids = prompt_ids(length)
    output = speckv.generate(target, tiny_head(target), ids, max_new_tokens=30, policy=policy)
    assert torch.equal(output.sequences, target.generate(ids, do_sample=False, max_new_tokens=30, pad_token_id=0))


@torch.inference_mode()
@pytest.mark.parametrize("architecture", ["llama", "gemma"])
def test_training_sees_what_the_loop_drafts(architecture):
    """Pass d at position j is what a session makes of it that has the target's features up to j - d."""
    target = tiny_model(architecture)
    drafter = tiny_head(target, drafts=VOCABULARY)
    student = HeadStudent(target, 3, random_tensors(target, drafter.token_ids))
    student._head = drafter
    ids = prompt_ids(20)
    features = features_of(target, ids)
    passes = student._passes(ids, features, MATCH_GAMMA)
    for start in (3, 9, 16):
        session = drafter.open()
        session.observe(features[:, :start], 0)
        for depth in range(MATCH_GAMMA):
            logits = session.next_logits(ids[:, :start + 1 + depth])
            expected = drafter.logits(passes[depth][:, start + depth])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_rollback_leaves_nothing_of_the_rejected_draft():
    target = tiny_model()
    drafter = tiny_head(target)
    ids = prompt_ids(20)
    features = features_of(target, ids)

    def drafted(session):
        session.observe(features[:, 9:15], 9)
        session.rollback(15)
        return [session.next_logits(ids[:, :16 + i]) for i in range(3)]
    fresh, used = drafter.open(), drafter.open()
    for session in (fresh, used):
        session.observe(features[:, :9], 0)
        session.next_logits(ids[:, :9])
    for i in range(4):  # a draft of other tokens, guessed features and all, of which none stands
        used.next_logits(torch.cat([ids[:, :9], prompt_ids(i + 1, seed=5)], dim=1))
    used.rollback(9)
    for a, b in zip(drafted(fresh), drafted(used), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_head_never_drafts_outside_its_tokens():
    target = tiny_model()
    drafter = tiny_head(target, drafts=7)
    session = drafter.open()
    session.observe(torch.randn(1, 4, 96), 0)
    logits = session.next_logits(prompt_ids(5))
    assert logits.isfinite().nonzero()[:, 1].tolist() == drafter.token_ids.tolist()


def test_a_head_survives_its_folder(tmp_path):
    target = tiny_model()
    drafter = tiny_head(target)
    head.save(tmp_path, drafter, {})
    again = speckv.load_drafter(str(tmp_path), target)
    session, other = drafter.open(), again.open()
    for each in (session, other):
        each.observe(torch.ones(1, 4, 96), 0)
    torch.testing.assert_close(session.next_logits(prompt_ids(5)), other.next_logits(prompt_ids(5)),
                               rtol=0.05, atol=0.05)  # stored in bf16


@pytest.mark.parametrize("change, words", [
    (lambda tensors: tensors.pop(head.COMBINE), "lack"),
    (lambda tensors: tensors.pop(head.FUSE), "lack"),
    (lambda tensors: tensors.update({head.COMBINE: torch.zeros(2, 2)}), "do not fit this target"),
    (lambda tensors: tensors.update({head.FUSE: torch.zeros(32, 2)}), "do not fit this target"),
    (lambda tensors: tensors.update({head.LAYERS: torch.tensor([1, 9, -1])}), "it has 3 layers"),
    (lambda tensors: tensors.update({head.TOKEN_IDS: torch.tensor([1, 1])}), "must be ascending"),
    (lambda tensors: tensors.update({head.TOKEN_IDS: torch.tensor([5, VOCABULARY])}), "must be ascending"),
    (lambda tensors: tensors.update({head.TOKEN_IDS: torch.zeros(0)}), "must be ascending"),
], ids=["missing", "of before", "shape", "fewer layers", "no such layer", "twice", "too large", "none"])
def test_a_head_that_does_not_fit_is_refused(tmp_path, change, words):
    target = tiny_model()
    tensors = tiny_head(target).own_tensors()
    change(tensors)
    drafter_folder.write(tmp_path, head.KIND, tensors, {})
    with pytest.raises(ModelError, match=words):
        speckv.load_drafter(str(tmp_path), target)
