"""decode_attention: the last few tokens of a sequence attend to all of it."""

import pytest
import torch
from helpers_ops import BACKEND, call, call_reference, each_dtype, poisoned, random_attention, same_bits

from speckv.kernels import decode_attention

# batch, heads, groups, tokens, positions, size of a key, size of a value: around a vector of 16 and a tile of 32 keys
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (2, 3, 1, 1, 31, 16, 16), (1, 9, 3, 3, 33, 64, 64), (3, 4, 4, 5, 5, 17, 15),
          (1, 8, 2, 2, 300, 80, 64), (2, 2, 1, 9, 65, 128, 130)]
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=["x".join(map(str, shape)) for shape in SHAPES])
of_the_kernel = pytest.mark.skipif(
    BACKEND != "cpu", reason="the reference is PyTorch's matrix product, which may sum in any order")
ERROR = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def attention64(query, key, value, scale):
    """The result in fp64, head by head and token by token."""
    batch, heads, tokens, _ = query.shape
    group, positions = heads // key.shape[1], key.shape[2]
    out = torch.empty(batch, tokens, heads, value.shape[3], dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            for token in range(tokens):
                seen = positions - tokens + token + 1
                scores = key[b, head // group, :seen].double() @ query[b, head, token].double() * scale
                out[b, token, head] = scores.softmax(0) @ value[b, head // group, :seen].double()
    return out


@each_dtype
@each_shape
def test_it_matches_fp64_and_the_reference(shape, dtype):
    values = random_attention(*shape, dtype=dtype)
    (out,), (expected,) = call("decode_attention", values), call_reference("decode_attention", values)
    exact = attention64(**values)
    assert out.dtype == dtype and out.shape == exact.shape and out.is_contiguous()
    for result in (out, expected):
        torch.testing.assert_close(result.double(), exact, rtol=ERROR[dtype], atol=ERROR[dtype])


@each_dtype
def test_all_may_be_views_and_only_what_is_seen_is_read(dtype):
    values = random_attention(2, 6, 2, 3, 70, 33, 40, dtype=dtype)
    expected = call("decode_attention", values)[0]
    scattered = {name: value if name == "scale" else poisoned(value) for name, value in values.items()}
    assert same_bits(call("decode_attention", scattered)[0], expected)
    # As transformers gives it: [B, n, H, D] with two dimensions swapped.
    swapped = values["query"].transpose(1, 2).contiguous().transpose(1, 2)
    assert same_bits(decode_attention(swapped, values["key"], values["value"], values["scale"]), expected)


@of_the_kernel
@each_dtype
@pytest.mark.parametrize("positions", [200, 130])  # at 130 the first tokens do not see the second chunk of 128 keys
def test_a_token_gets_the_same_bits_however_many_are_asked_with_it(dtype, positions):
    values = random_attention(1, 9, 3, 7, positions, 64, 64, dtype=dtype)
    together = call("decode_attention", values)[0]
    for token in range(7):
        seen = positions - 7 + token + 1
        alone = decode_attention(values["query"][:, :, token:token + 1], values["key"][:, :, :seen],
                                 values["value"][:, :, :seen], values["scale"])
        assert same_bits(alone[:, 0], together[:, token])


@of_the_kernel
def test_long_caches_give_the_same_bits_on_any_number_of_threads():
    values = random_attention(8, 9, 3, 2, 700, 64, 64)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(call("decode_attention", values)[0])
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results[1:])


@each_dtype
def test_nan_stays_with_the_tokens_that_see_it(dtype):
    values = random_attention(2, 2, 1, 4, 40, 16, 16, dtype=dtype)
    healthy = call("decode_attention", values)[0]
    values["key"][1, 0, 38] = float("nan")
    out = call("decode_attention", values)[0]
    assert same_bits(out[0], healthy[0]) and same_bits(out[1, :2], healthy[1, :2]) and out[1, 2:].isnan().all()


@each_dtype
def test_large_scores_do_not_overflow(dtype):
    values = random_attention(1, 2, 2, 2, 50, 32, 32, dtype=dtype)
    values["query"] *= 300
    torch.testing.assert_close(call("decode_attention", values)[0].double(), attention64(**values),
                               rtol=4 * ERROR[dtype], atol=4 * ERROR[dtype])


@each_dtype
def test_no_tokens_and_no_sequences_give_none(dtype):
    assert call("decode_attention", random_attention(0, 2, 1, 3, 5, 4, 4, dtype=dtype))[0].shape == (0, 3, 2, 4)
    assert call("decode_attention", random_attention(2, 2, 1, 0, 5, 4, 4, dtype=dtype))[0].shape == (2, 0, 2, 4)
