"""A chain verified by several programs gives the bits that one program gives, in whatever order they run.

Run in a process of its own: TRITON_INTERPRET=1 SPECKV_BACKEND=triton pytest tests/triton_kernels
"""

import os
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from helpers_ops import LARGEST_UNIFORM, random_chain, random_logits, random_uniform

from speckv.kernels import draft, reference, sampling, split, verify

from .probe import in_order, watch

# The warnings are numpy's, of the interpreter, where infinities and NaN do what they are meant to do.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("no_workspace_yet")]

BLOCK_V = sampling.LARGEST_BLOCK_V
VOCABULARY = 2 * BLOCK_V + 100  # three blocks, the last one nearly empty
NAN, INF = float("nan"), float("inf")


def launched(values, parts):
    """The outputs, each row of logits read by so many programs, or, at 0, one program a row of the batch."""
    with mock.patch.object(split, "programs_of_a_chain", lambda _, chain, *__: chain * parts or 1):
        return verify.verify_chain(**values)


def assert_equal(outputs, expected):
    assert all(map(torch.equal, outputs, expected))


def accepted_chain(rows, max_draft, vocabulary=VOCABULARY, temperature=1.0):
    """A chain that is accepted as a whole: the target's most probable tokens, from its own distribution."""
    target = random_logits(rows, max_draft + 1, vocabulary)
    return {"target_logits": target, "draft_logits": target[:, :-1].clone(),
            "draft_tokens": target[:, :-1].argmax(-1), "num_draft": torch.full((rows,), max_draft),
            "temperature": torch.full((rows,), temperature), "uniform": random_uniform(rows, max_draft + 1)}


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_split_chains_have_the_tokens_of_whole_ones(dtype, parts):
    values = random_chain((4, 2, VOCABULARY), dtype=dtype, seed=parts)
    assert_equal(launched(values, parts), launched(values, 0))


@pytest.mark.parametrize("shape", [(2, 0, VOCABULARY), (3, 1, 1), (2, 5, 1023), (1, 1, 20000)])
def test_split_chains_of_any_size_have_the_tokens_of_whole_ones(shape):
    values = random_chain(shape, seed=shape[2])
    for parts in (1, 2):
        assert_equal(launched(values, parts), launched(values, 0))


def test_split_chains_of_two_dtypes_have_the_tokens_of_whole_ones():
    values = random_chain((4, 2, VOCABULARY))
    values["draft_logits"] = values["draft_logits"].bfloat16()
    assert_equal(launched(values, 2), launched(values, 0))


def test_whichever_program_comes_last_the_tokens_are_the_same():
    values = random_chain((3, 1, BLOCK_V + 100))  # three rows of logits, of two blocks each
    whole = launched(values, 0)
    for last in range(6):
        with in_order([program for program in range(6) if program != last] + [last]):
            assert_equal(launched(values, 2), whole)


def test_what_is_launched_splits_a_chain_and_agrees_with_the_reference():
    values = accepted_chain(1, 2, vocabulary=50257)
    values["draft_tokens"][0, 1] = values["target_logits"][0, 1].argmin()
    values["draft_logits"][0, 1] *= -1
    with watch() as probe:
        outputs = verify.verify_chain(**values)
    assert probe.launches == ["verify_chain_kernel"] and "partials_ptr" in probe.arguments
    assert outputs[1].item() == 1
    assert_equal(outputs, reference.verify_chain(**values))


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("block", range(3))
def test_bad_logits_in_any_part_are_answered_with_minus_one_where_they_decide(block, value, temperature):
    clean = accepted_chain(2, 1, temperature=temperature)
    for name, position, decides in (("target_logits", 0, True), ("target_logits", 1, True),
                                    ("draft_logits", 0, temperature > 0)):
        values = {**clean, name: clean[name].clone()}
        values[name][1, position, block * BLOCK_V + 50] = value
        tokens, accepted = outputs = launched(values, 3)
        assert (accepted[1] == -1 and (tokens[1] == -1).all()) == decides
        assert_equal(outputs, launched(values, 0))


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_bad_logits_behind_the_stop_decide_nothing(value, temperature):
    values = accepted_chain(2, 2, temperature=temperature)
    values["uniform"][:, 0] = LARGEST_UNIFORM  # rejects the first token, an improbable one
    values["draft_tokens"][:, 0] = values["target_logits"][:, 0].argmin(-1)
    values["draft_logits"][:, 0] *= -1
    clean = launched(values, 0)
    assert (clean[1] == 0).all()
    values["target_logits"][:, 1:] = value
    values["draft_logits"][:, 1:] = value
    assert_equal(launched(values, 2), clean)


def test_only_what_may_decide_is_read_and_each_partial_of_it_written_once():
    """Row 0 accepts everything, row 1 is greedy, row 2 has no draft, row 3 a padded one, row 4 is out of range."""
    values = accepted_chain(5, 2)
    values["temperature"][1] = 0.0
    values["num_draft"][2] = 0
    values["draft_tokens"][3, 1] = -1
    values["num_draft"][4] = 3
    with watch() as probe:
        _, accepted = launched(values, 2)
    assert accepted.tolist() == [2, 2, 0, 1, -1]
    read = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 1, 0], [0, 0, 0, 0, 0]])
    partials = torch.from_numpy(probe.writes("partials_ptr")).reshape(5, 5, 2, 4)
    assert (partials == read[:, :, None, None] * torch.tensor([1, 1, 1, 0])).all()
    reads = [torch.from_numpy(probe.reads(name)).amin(-1) for name in ("target_logits_ptr", "draft_logits_ptr")]
    assert torch.equal(torch.cat(reads, dim=1), read)
    assert (probe.writes("tokens_ptr") == 1).all() and (probe.writes("accepted_ptr") == 1).all()


def test_chains_and_drafts_of_any_size_share_a_workspace():
    drawn = {"logits": random_logits(6, VOCABULARY), "temperature": torch.ones(6), "uniform": random_uniform(6)}
    for rows, max_draft in ((1, 1), (4, 2), (2, 0)):
        values = random_chain((rows, max_draft, VOCABULARY))
        assert_equal(launched(values, 3), launched(values, 0))
        with mock.patch.object(split, "parts_of_a_row", lambda *_: 3):
            token, *_ = draft.draft_sample(**drawn)
        assert torch.equal(token, reference.draft_sample(**drawn)[0])
        [(counters, _)] = split._workspaces.values()
        assert (counters == 0).all()


def test_chains_with_filters_stay_whole():
    values = random_chain((2, 1, 7))
    with watch() as probe:
        launched({**values, "top_k": torch.tensor([3, 0])}, 1)
    assert "counters_ptr" not in probe.arguments


@pytest.mark.parametrize(("rows", "max_draft", "blocks", "units", "programs"), [
    (1, 4, 32, 132, 9 * 11), (8, 4, 32, 132, 9 * 3), (14, 4, 32, 132, 9), (29, 4, 32, 132, 1), (64, 4, 32, 132, 1),
    (1, 0, 32, 132, 32), (1, 0, 6, 132, 1), (1, 4, 3, 132, 1), (1, 4, 4, 132, 9 * 4), (0, 4, 32, 132, 1),
    (1, 200, 32, 132, 1), (8, 4, 32, 304, 9 * 4),
])
def test_a_chain_is_split_where_the_busiest_unit_reads_less_than_a_whole_chain_does_at_least(
    rows, max_draft, blocks, units, programs
):
    assert split.programs_of_a_chain(rows, 2 * max_draft + 1, blocks, units) == programs
