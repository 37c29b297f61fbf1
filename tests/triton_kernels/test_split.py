"""A row of logits read by several programs gives the bits that one program gives, in whatever order they run.

Run in a process of its own: TRITON_INTERPRET=1 SPECKV_BACKEND=triton pytest tests/triton_kernels
"""

import contextlib
import os
import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

from helpers_ops import TOLERANCE, random_controller, random_logits, random_signals, random_uniform, temperatures

from speckv.kernels import draft, reference, sampling, split

from .probe import in_order, watch

# The warnings are numpy's, of the interpreter, where infinities and NaN do what they are meant to do.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("no_workspace_yet")]

BLOCK_V = sampling.LARGEST_BLOCK_V
VOCABULARY = 4 * BLOCK_V + 100  # five blocks, the last one nearly empty
NAN, INF = float("nan"), float("inf")
OPS = ["draft_sample", "draft_step"]
NUM_PARTIALS = 4 * 8  # of a row: five blocks, rounded up


def values_of(op, rows=3, vocabulary=VOCABULARY, dtype=torch.float32):
    values = {"logits": random_logits(rows, vocabulary, dtype=dtype, seed=rows),
              "temperature": temperatures("mixed", rows), "uniform": random_uniform(rows, seed=rows)}
    if op == "draft_sample":
        return values
    w1, b1, w2, b2 = random_controller(5)
    return {**values, "signals": random_signals(rows), "drafted": torch.arange(rows), "w1": w1, "b1": b1, "w2": w2,
            "b2": b2, "gammas": torch.tensor([2, 4, 6]), "seconds": torch.tensor([1.0, 1.5, 2.1])}


def launched(op, values, parts):
    """The outputs, each row read by so many programs."""
    with mock.patch.object(split, "parts_of_a_row", lambda *_: parts):
        return getattr(draft, op)(**values)


def assert_same_bits(outputs, expected):
    for output, right in zip(outputs, expected, strict=True):
        assert torch.equal(output.view(torch.int64 if output.dtype == torch.int64 else torch.int32),
                           right.view(torch.int64 if right.dtype == torch.int64 else torch.int32))


def kept_workspace():
    return split._workspaces[None]


# Four parts of five blocks are shares of two, the last of which is empty: more programs than needed do no harm.
@pytest.mark.parametrize("parts", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("op", OPS)
def test_split_rows_have_the_bits_of_whole_ones(op, dtype, parts):
    values = values_of(op, dtype=dtype)
    assert_same_bits(launched(op, values, parts), launched(op, values, 1))


@pytest.mark.parametrize("vocabulary", [1, 1023, BLOCK_V, BLOCK_V + 1, 50257])
def test_split_rows_of_any_length_have_the_bits_of_whole_ones(vocabulary):
    values = values_of("draft_step", vocabulary=vocabulary)
    whole = launched("draft_step", values, 1)
    for parts in (2, 7):
        assert_same_bits(launched("draft_step", values, parts), whole)


@pytest.mark.parametrize("op", OPS)
def test_whichever_part_comes_last_the_bits_are_the_same(op):
    values = values_of(op)
    whole = launched(op, values, 1)
    for order in ([4, 3, 2, 1, 0], *([part for part in range(5) if part != last] + [last] for last in range(5))):
        with in_order(order):
            assert_same_bits(launched(op, values, 5), whole)


def test_what_is_launched_splits_a_row_and_agrees_with_the_reference():
    values = values_of("draft_step", rows=2, vocabulary=50257)
    with watch() as probe:
        outputs = draft.draft_step(**values)
    assert "partials_ptr" in probe.arguments
    for output, right in zip(outputs, reference.draft_step(**values), strict=True):
        torch.testing.assert_close(output, right, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("block", range(5))
def test_a_bad_logit_in_any_part_is_answered_with_minus_one(block, value):
    values = values_of("draft_step")
    values["logits"][1, block * BLOCK_V + 50] = value
    outputs = launched("draft_step", values, 5)
    assert outputs[0][1] == outputs[-1][1] == -1 and outputs[1][1].isnan()
    assert_same_bits(outputs, launched("draft_step", values, 1))


def test_masked_parts_are_empty_and_a_masked_row_is_answered_with_minus_one():
    values = values_of("draft_sample", rows=6)
    for block in range(5):
        values["logits"][block] = -INF
        values["logits"][block, block * BLOCK_V + 50 : block * BLOCK_V + 60] = 1.0
    values["logits"][5] = -INF
    token, prob, *rest = launched("draft_sample", values, 5)
    assert (token[:5] // BLOCK_V).tolist() == [0, 1, 2, 3, 4] and token[5] == -1
    assert_same_bits((token, prob, *rest), launched("draft_sample", values, 1))


def test_each_partial_is_written_once_and_the_logits_are_read_as_by_one_program():
    values = values_of("draft_step")
    with watch() as probe:
        token, *_ = launched("draft_step", values, 3)
    assert probe.launches == ["draft_step_kernel"]
    partials = probe.writes("partials_ptr").reshape(3, 4, 8)
    assert (partials[..., :5] == 1).all() and (partials[..., 5:] == 0).all()
    assert (probe.reads("partials_ptr").reshape(3, 4, 8)[..., :5] == 1).all()
    assert (probe.writes("token_ptr") == 1).all() and (probe.writes("updated_signals_ptr") == 1).all()
    again = sum(min(BLOCK_V, VOCABULARY - block * BLOCK_V) for block in (token // BLOCK_V).tolist())
    assert probe.reads("logits_ptr").sum() == 3 * VOCABULARY + again and probe.reads("logits_ptr").min() == 1


def test_one_workspace_serves_launches_of_any_size_one_after_the_other():
    addresses = []
    for rows, vocabulary, parts in ((3, VOCABULARY, 5), (3, VOCABULARY, 5), (1, VOCABULARY, 2), (2, 20 * BLOCK_V, 4),
                                    (7, VOCABULARY, 3), (2, VOCABULARY, 5), (5, VOCABULARY, 2)):
        values = values_of("draft_sample", rows, vocabulary)
        assert_same_bits(launched("draft_sample", values, parts), launched("draft_sample", values, 1))
        counters, partials = kept_workspace()
        assert (counters == 0).all() and counters.numel() >= rows and partials.numel() >= rows * NUM_PARTIALS
        addresses.append(counters.data_ptr())
    assert addresses[0] == addresses[1] == addresses[2]
    assert addresses[4] == addresses[5] == addresses[6]
    assert (counters.numel(), partials.numel()) == (7, 2 * 4 * 32)  # the most rows, and the most partials


def test_a_launch_that_fails_halfway_leaves_its_counters_to_nobody():
    values = values_of("draft_sample")
    whole = launched("draft_sample", values, 1)
    launched("draft_sample", values, 5)
    with pytest.raises(Exception, match="out of range"), in_order([0, 1]):
        launched("draft_sample", values, 5)
    assert not split._workspaces
    assert_same_bits(launched("draft_sample", values, 5), whole)


def arguments_on_a_gpu(stream, is_capturing=False):
    """What split_rows() gives a launch on this stream of a GPU, memory for which is taken on the CPU."""
    logits = SimpleNamespace(shape=(2, 50257), device=torch.device("cpu"), is_cuda=True)
    with (
        mock.patch.object(torch.cuda, "current_stream", lambda _: stream),
        mock.patch.object(torch.cuda, "stream", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: is_capturing),
        split.split_rows(logits, {"IS_FILTERED": False}, sampling.launch_options(50257)) as (parts, arguments),
    ):
        assert parts == 7
        return arguments["counters_ptr"]


def test_each_stream_has_its_own_counters():
    first, second = arguments_on_a_gpu(stream=1), arguments_on_a_gpu(stream=2)
    assert first is not second
    assert arguments_on_a_gpu(stream=1) is first and arguments_on_a_gpu(stream=2) is second


def test_a_launch_that_a_graph_captures_has_counters_of_its_own():
    kept = arguments_on_a_gpu(stream=1)
    captured = arguments_on_a_gpu(stream=1, is_capturing=True)
    assert captured is not kept and (captured == 0).all()
    assert arguments_on_a_gpu(stream=1) is kept


def test_what_is_kept_is_not_allocated_by_the_thread_that_launches():
    threads = []

    def recorded(*sizes, new_workspace=split.new_workspace):
        threads.append(threading.get_ident())
        return new_workspace(*sizes)
    with mock.patch.object(split, "new_workspace", recorded):
        arguments_on_a_gpu(stream=1)
        arguments_on_a_gpu(stream=1)
        arguments_on_a_gpu(stream=1, is_capturing=True)
    assert len(threads) == 2 and threads[0] != threads[1] == threading.get_ident()


def test_rows_with_filters_stay_whole():
    values = values_of("draft_sample", rows=1, vocabulary=7)
    with watch() as probe:
        launched("draft_sample", {**values, "top_p": torch.ones(1)}, 5)
    assert "counters_ptr" not in probe.arguments


@pytest.mark.parametrize(("rows", "blocks", "units", "parts"), [
    (1, 38, 132, 38), (8, 38, 132, 13), (64, 38, 132, 2), (67, 38, 132, 3), (100, 38, 132, 1), (1000, 38, 132, 1),
    (64, 38, 108, 3), (1, 12, 132, 12), (1, 7, 132, 7), (1, 6, 132, 1), (1, 1, 132, 1), (0, 38, 132, 1),
    (1, 38, 16, 13), (2, 13, 16, 7),
])
def test_a_row_has_as_many_parts_as_leave_the_busiest_unit_least(rows, blocks, units, parts):
    assert split.parts_of_a_row(rows, blocks, units) == parts


def test_a_split_leaves_no_part_without_blocks_and_pays():
    for rows in range(1, 140, 3):
        for blocks in (1, 4, 7, 12, 32, 38, 64):
            for units in (16, 108, 132, 304):
                parts = split.parts_of_a_row(rows, blocks, units)
                share = -(-blocks // parts)
                busiest = -(-rows * parts // units) * share
                assert (parts - 1) * share < blocks <= parts * share
                assert parts == 1 or busiest <= blocks - split.LEAST_BLOCKS_SAVED
