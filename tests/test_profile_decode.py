"""Profiling a decode: the parts make up the wall time, and the text is that of a decode without it."""

import pytest
import torch
from test_models import needs_embedded
from tiny_models import noisy_copy, prompt_ids, tiny_model

from speckv import decode, generate, policy, profile_decode
from speckv.errors import NumericalError
from speckv.lookup import LookupDrafter
from speckv.profile_decode import DRAFT, OPS, PARTS, POLICY, PROMPT, REST, ROLLBACK, TARGET, profile, table


@pytest.fixture(scope="module")
def pair():
    target = tiny_model()
    return target, noisy_copy(target)


@pytest.mark.parametrize("fast", [False, True], ids=["PyTorch", "fast"])
@pytest.mark.parametrize("name", ["off", "fixed:3", "adaptive", "hf-confidence", "paper"])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9}, {"temperature": 0.9, "seed": 3}],
                         ids=["greedy", "sampled", "with a seed"])
def test_parts_make_up_the_wall_time_and_the_text_is_the_same(pair, name, sampling, fast):
    target, drafter = pair
    settings = {"policy": name, "max_new_tokens": 40, "fast": fast} | sampling
    torch.manual_seed(0)
    profiled = profile(target, drafter, prompt_ids(), **settings)
    if name != "adaptive" or sampling.keys() != {"temperature"}:  # 'adaptive' decides by the clock
        torch.manual_seed(0)
        assert torch.equal(profiled.output.sequences, generate(target, drafter, prompt_ids(), **settings).sequences)
    assert profiled.seconds.keys() == profiled.calls.keys() == set(PARTS)
    assert all(seconds >= 0 for seconds in profiled.seconds.values())
    assert sum(profiled.seconds.values()) == pytest.approx(profiled.wall_seconds)
    assert profiled.output.seconds <= profiled.wall_seconds
    steps = len(profiled.output.steps)
    for part in (TARGET, ROLLBACK):
        assert profiled.calls[part] == steps
    # With a seed the target draws each token that is written; and one more where a draft goes on behind the end.
    drawn, by_target = profiled.calls["draft_step"] + profiled.calls["draft_sample"], profiled.output.new_tokens
    if "seed" in sampling:
        assert profiled.calls["verify_chain"] == 0 and drawn >= profiled.output.drafted + by_target
    else:
        # A greedy text is verified by what the engine's passes say is best.
        assert profiled.calls["verify_chain"] == (0 if fast and not sampling else steps)
        assert drawn == profiled.output.drafted
    assert profiled.seconds[DRAFT] > 0
    assert all((profiled.seconds[op] > 0) == (profiled.calls[op] > 0) for op in OPS)
    assert profiled.calls[PROMPT] == 1 and profiled.calls[POLICY] >= 2 * steps
    assert 0 < profiled.share_outside_forwards < 1


def test_a_drafter_without_a_model_and_none_at_all(pair):
    target, _ = pair
    ids = prompt_ids().repeat(1, 3)
    for drafter, name in ((LookupDrafter(97), "fixed:2"), (None, "off")):
        profiled = profile(target, drafter, ids, policy=name, max_new_tokens=20)
        expected = generate(target, drafter, ids, policy=name, max_new_tokens=20)
        assert torch.equal(profiled.output.sequences, expected.sequences)
        assert (profiled.calls[DRAFT] == 0) == (drafter is None)


def test_what_was_replaced_is_put_back_also_after_an_error(pair):
    target, _ = pair
    before = decode.open_target, decode.Run.prefill, *(
        getattr(module, op) for op, module in profile_decode._OP_CALLERS)

    class Broken:
        name, vocabulary, context, rope_switch, wants_hidden = "broken", 97, None, None, ()

        def open(self):
            return self

        def next_logits(self, ids):
            return torch.full((1, 97), float("nan"))

        def rollback(self, length):
            pass
    with pytest.raises(NumericalError, match="step 0: draft_sample"):
        profile(target, Broken(), prompt_ids(), policy="fixed:2", max_new_tokens=8)
    assert before == (decode.open_target, decode.Run.prefill, *(
        getattr(module, op) for op, module in profile_decode._OP_CALLERS))
    assert {op for op, _ in profile_decode._OP_CALLERS} == set(OPS) and policy.draft_sample is before[3]


def test_the_table_has_a_row_for_what_was_called(pair):
    target, drafter = pair
    profiled = profile(target, drafter, prompt_ids(), policy="fixed:2", max_new_tokens=12)
    drawn = list(table(profiled).columns[0].cells)
    assert drawn == [PROMPT, TARGET, DRAFT, "draft_sample", "verify_chain", POLICY, ROLLBACK, REST,
                     "outside the models", "wall"]


@needs_embedded
def test_doctor_profiles_the_embedded_pair(capsys):
    from speckv.doctor import profile_decode as run

    profiled = run("bf16", "lookup+smollm2", "fixed:2", 6, fast=True)
    printed = capsys.readouterr().out
    assert profiled.output.new_tokens == 6
    assert "smollm2 at bf16, fixed:2 --fast" in printed and "target forward" in printed and "100.00%" in printed
