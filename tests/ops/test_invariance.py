"""What an op must not depend on (the neighbours of a row, their order, the threads) and what it must not touch."""

import pytest
import torch
from helpers_ops import (
    BACKEND,
    INTERPRETED,
    call,
    poisoned,
    same_bits,
    values_of,
)

ROWS = 7
OPS = ["draft_sample", "plan_gamma", "draft_step", "verify_chain", pytest.param("linear_int8", marks=pytest.mark.skipif(
    BACKEND != "cpu", reason="the reference is PyTorch's matrix product, which may sum in any order"))]
each_op = pytest.mark.parametrize("op", OPS)
SHARED = {"w1", "b1", "w2", "b2", "gammas", "seconds", "weight", "scale"}  # of no row in particular


def select_rows(values, rows):
    return {name: tensor if name in SHARED else tensor[rows] for name, tensor in values.items()}


def assert_same_bits(some, others):
    for one, other in zip(some, others, strict=True):
        assert same_bits(one, other)


@each_op
def test_a_row_does_not_change_when_its_neighbours_do(op):
    values, others = values_of(op), values_of(op, seed=1)
    before = call(op, values)
    for row in (0, 3, ROWS - 1):
        mixed = {name: tensor.clone() for name, tensor in others.items()}
        for name in mixed:
            if name in SHARED:
                mixed[name] = values[name]
            else:
                mixed[name][row] = values[name][row]
        assert_same_bits([out[row] for out in before], [out[row] for out in call(op, mixed)])


@each_op
def test_a_row_does_not_change_with_the_order_of_the_batch(op):
    values = values_of(op)
    order = torch.tensor([4, 6, 0, 5, 2, 1, 3])
    assert_same_bits([out[order] for out in call(op, values)], call(op, select_rows(values, order)))


@each_op
def test_a_row_draws_the_same_alone_as_in_a_batch(op):
    values = values_of(op)
    together = call(op, values)
    for row in range(ROWS):
        alone = call(op, select_rows(values, slice(row, row + 1)))
        for one, many in zip(alone, together, strict=True):
            if one.is_floating_point():
                torch.testing.assert_close(one[0], many[row], rtol=1e-5, atol=1e-6)
            else:
                assert torch.equal(one[0], many[row])


@each_op
def test_results_do_not_depend_on_the_number_of_threads(op):
    # Enough rows, and enough of a vocabulary, that work would be split.
    values = values_of(op, rows=3 if INTERPRETED else 64, vocabulary=1023 if INTERPRETED else 8193)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call(op, values))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_same_bits(results[0], result)


@each_op
def test_the_same_call_gives_the_same_bits(op):
    values = values_of(op)
    assert_same_bits(call(op, values), call(op, values))


@each_op
def test_inputs_and_the_memory_around_them_are_left_alone(op):
    values = {name: poisoned(tensor) for name, tensor in values_of(op).items()}
    # Of a poisoned view, _base is the whole buffer.
    buffers = {name: tensor._base.clone() for name, tensor in values.items()}
    outputs = call(op, values)
    for name, tensor in values.items():
        assert same_bits(tensor._base, buffers[name]), f"{name} was changed"
    storages = {tensor.untyped_storage().data_ptr() for tensor in values.values()}
    assert all(out.untyped_storage().data_ptr() not in storages for out in outputs), "an output shares memory"


@each_op
def test_outputs_are_contiguous_and_written_in_full(op):
    for out in call(op, values_of(op)):
        assert out.is_contiguous()
        # New memory is full of NaN and of the largest integers.
        assert not out.isnan().any() if out.is_floating_point() else (out != torch.iinfo(out.dtype).max).all()
