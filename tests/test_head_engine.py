"""A feature head in the C++ engine: what it drafts is what it drafts in PyTorch, and misuse is refused."""

import gc

import pytest
import torch
from test_head import features_of, int8_head
from tiny_models import prompt_ids, tiny_model

from speckv import head
from speckv.head import _Reader
from speckv.kernels import serving

pytestmark = pytest.mark.skipif(serving()["cpu"][0] != "cpu", reason="the engine is of the C++ kernels")


def sessions(drafter):
    """One in the engine, one in PyTorch."""
    engine = drafter.open()
    assert not isinstance(engine._reader, _Reader)
    return engine, head._HeadSession(drafter, _Reader(drafter))


@torch.inference_mode()
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("window", [3, 20])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_head_drafts_what_it_drafts_in_pytorch(architecture, window, num_layers, monkeypatch):
    monkeypatch.setattr(head, "WINDOW", window)
    target = tiny_model(architecture)
    both, ids = sessions(int8_head(target, num_layers=num_layers)), prompt_ids(30)
    features = features_of(target, ids)

    def agree(length):
        (logits, token_ids), (expected, others) = (session.next_logits(ids[:, :length]) for session in both)
        torch.testing.assert_close(logits, expected.float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(token_ids, others)
    stands = 0
    # Steps of a loop: the target has read all but the last token, a draft is made, and some of it stands. Of the step
    # that drafts nothing the states wait for the next.
    for length, drafted, accepted in ((1, 3, 0), (2, 4, 4), (7, 1, 0), (8, 0, 0), (9, 5, 2), (21, 2, 2), (24, 4, 1)):
        for session in both:
            session.observe(features[:, stands:length - 1], stands)
        for i in range(drafted):
            agree(length + i)
        for session in both:
            session.observe(features[:, length - 1:length + drafted], length - 1)
            session.rollback(length + accepted)
        stands = length + accepted


def test_what_does_not_fit_is_refused():
    target = tiny_model("llama")
    session = int8_head(target).open()
    session.observe(torch.randn(1, 4, 96), 0)
    number, cache = session._reader._engine.number, session._reader._session
    keys, values = torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8)
    brought, state, none = torch.zeros(6, 32), torch.zeros(32), torch.zeros(0, 96)
    fine = {"head": number, "ids": prompt_ids(2)[0], "start": 0, "brought": brought, "state": state, "states": none,
            "first": 0, "goes_on": False, "keys": keys, "values": values, "length": 0}
    assert torch.ops.speckv.read_head(*fine.values()).shape == (1, len(session._token_ids))
    for change, words in (
            ({"head": 10**9}, "none of number"), ({"ids": torch.tensor([-1])}, "ids must be in"),
            ({"ids": torch.tensor([10**6])}, "ids must be in"), ({"ids": prompt_ids(2)[0].int()}, "int64"),
            ({"ids": prompt_ids(9)[0]}, "room for 8 tokens"), ({"length": 7}, "room for 8 tokens"),
            ({"length": -1}, "room for 8 tokens"), ({"ids": prompt_ids(0)[0]}, "room for 8 tokens"),
            ({"start": -1}, "a row for every position"), ({"start": 5}, "a row for every position"),
            ({"start": 2**62}, "a row for every position"), ({"first": -1}, "a row for every position"),
            ({"first": 4, "states": torch.zeros(3, 96)}, "a row for every position"),
            ({"goes_on": True}, "nothing is before"), ({"brought": brought.T.contiguous().T}, "contiguous"),
            ({"state": torch.zeros(64)[::2]}, "contiguous"), ({"brought": brought.double()}, "float32"),
            ({"states": torch.zeros(1, 95)}, "size 96"), ({"keys": keys[:, :1]}, "size 2")):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.speckv.read_head(*(fine | change).values())
    assert cache.length == 0


def test_a_head_is_let_go_with_its_drafter():
    target = tiny_model("llama")
    drafter = int8_head(target)
    number = drafter.open()._reader._engine.number
    del drafter
    gc.collect()
    with pytest.raises(RuntimeError, match="none of number"):
        torch.ops.speckv.read_head(
            number, prompt_ids(2)[0], 0, torch.zeros(4, 32), torch.zeros(32), torch.zeros(0, 96), 0, False,
            torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 8, 8), 0)
