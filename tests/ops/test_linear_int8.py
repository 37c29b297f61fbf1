"""linear_int8: a linear map whose weights are int8 with one scale a row."""

import pytest
import torch
from helpers_ops import BACKEND, call, call_reference, each_dtype, generator, poisoned, random_linear, same_bits

from speckv.kernels import linear_int8

# inputs, columns, rows: around a vector of 64 weights, a tile of 64 rows and a tile of 4 inputs
SHAPES = [(1, 1, 1), (1, 63, 65), (2, 64, 64), (3, 65, 63), (4, 3, 130), (5, 200, 7), (8, 576, 192), (9, 1023, 129),
          (33, 130, 20)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, shape)) for shape in SHAPES])
of_the_kernel = pytest.mark.skipif(
    BACKEND != "cpu", reason="the reference is PyTorch's matrix product, which may sum in any order")
# Of the result, for the cast to the dtype of x; what a long sum in fp32 rounds away comes on top.
ERROR = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def products64(x, weight, scale):
    """The result in fp64, and the sum of the absolute values of what was added up."""
    x, weight, scale = x.double(), weight.double(), scale.double()
    return x @ weight.T * scale, x.abs() @ weight.T.abs() * scale


@each_dtype
@each_shape
def test_it_matches_fp64_and_the_reference(shape, dtype):
    values = random_linear(*shape, dtype=dtype)
    (out,), (expected,) = call("linear_int8", values), call_reference("linear_int8", values)
    assert out.dtype == dtype and out.shape == (shape[0], shape[2]) and out.is_contiguous()
    exact, absolute = products64(**values)
    for result in (out, expected):
        assert ((result.double() - exact).abs() <= ERROR[dtype] * exact.abs() + 1e-6 * absolute).all()


def agree(out, expected):
    """The same bits from the kernel; from the reference, whose matrix product may sum in another order, close."""
    if BACKEND == "cpu":
        return same_bits(out, expected)
    return torch.allclose(out.float(), expected.float(), rtol=2 * ERROR[out.dtype], atol=1e-5)


@each_dtype
def test_rows_may_lie_any_distance_apart(dtype):
    values = random_linear(3, 130, 67, dtype=dtype)
    expected = call("linear_int8", values)[0]
    scattered = {name: poisoned(tensor) for name, tensor in values.items()}
    assert agree(call("linear_int8", scattered)[0], expected)
    # One row of x for all, and the weights as a slice of wider rows.
    wide = torch.cat([values["weight"], values["weight"]], dim=1)
    out = linear_int8(values["x"][1:2].expand(4, -1), wide[:, 130:], values["scale"])
    assert all(agree(row, expected[1]) for row in out)


@each_dtype
def test_columns_of_one_need_no_unit_stride(dtype):
    values = random_linear(3, 1, 5, dtype=dtype)
    wide = {"x": torch.zeros(3, 4, dtype=dtype), "weight": torch.zeros(5, 3, dtype=torch.int8)}
    for name, tensor in wide.items():
        tensor[:, :1] = values[name]
    out = linear_int8(wide["x"][:, ::4], wide["weight"][:, ::3], values["scale"])
    assert same_bits(out, call("linear_int8", values)[0])


@each_dtype
def test_no_rows_of_x_give_none(dtype):
    out = linear_int8(**random_linear(0, 100, 7, dtype=dtype))
    assert out.shape == (0, 7) and out.dtype == dtype


def test_every_weight_counts_at_every_place():
    """x picks one column at a time: the weights come back as they are, all 256 values."""
    weight = (torch.randperm(256 * 3, generator=generator(0)) % 256 - 128).to(torch.int8).reshape(4, -1)
    out = linear_int8(torch.eye(192), weight, torch.ones(4))
    assert torch.equal(out, weight.T.float())


@of_the_kernel
@each_dtype
def test_a_row_of_x_gives_the_same_bits_however_many_there_are(dtype):
    values = random_linear(9, 1023, 129, dtype=dtype)
    together = call("linear_int8", values)[0]
    for count in range(1, 9):
        assert same_bits(linear_int8(values["x"][:count], values["weight"], values["scale"]), together[:count])


@of_the_kernel
def test_many_weights_give_the_same_bits_on_any_number_of_threads():
    values = random_linear(3, 576, 4099)  # 2.4 million, which are split
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call("linear_int8", values)[0])
    finally:
        torch.set_num_threads(threads)
    exact, absolute = products64(**values)
    assert ((results[0].double() - exact).abs() <= 1e-6 * absolute).all()
    assert all(same_bits(result, results[0]) for result in results[1:])


@each_dtype
def test_nan_and_infinity_stay_in_their_row(dtype):
    values = random_linear(3, 70, 66, dtype=dtype)
    healthy = call("linear_int8", values)[0]
    values["x"][0, 69] = float("nan")
    values["x"][2, 3] = float("inf")
    values["weight"][:, 3] = torch.arange(66) % 2 * 2 - 1
    values["weight"][5, 3] = 0
    out, expected = call("linear_int8", values)[0], call_reference("linear_int8", values)[0]
    assert out[0].isnan().all()
    assert torch.equal(out[2].isnan(), torch.arange(66) == 5) and torch.equal(out[2].isinf(), torch.arange(66) != 5)
    torch.testing.assert_close(out, expected, equal_nan=True, rtol=0.02, atol=1e-5)
    assert not same_bits(out[1], healthy[1]) and out[1].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_results_are_rounded_to_nearest_even_like_pytorch_rounds(dtype):
    """Scales of every magnitude, subnormal and too large results included: the cast is PyTorch's, bit for bit."""
    source = generator(0)
    magnitude = torch.randint(-40, 40, (4096,), generator=source)
    scale = (1 + torch.rand(4096, generator=source)) * torch.ldexp(torch.ones(4096), magnitude)
    scale[:512] = (torch.arange(512) * 2 + 1) * 2.0**-25 * 64  # halfway between two of fp16's subnormals or normals
    scale[512:1024] = 1 + (torch.arange(512) * 2 + 1) * 2.0**-12  # and of fp16 or, every eighth, of bf16
    weight = (torch.arange(4096) % 2 * 2 - 1).to(torch.int8).unsqueeze(1)
    out = linear_int8(torch.ones(1, 1, dtype=dtype), weight, scale)
    assert same_bits(out[0], (weight[:, 0] * scale).to(dtype))
