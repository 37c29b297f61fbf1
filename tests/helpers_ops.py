"""What the tests of the ops share: named shapes, tolerances, poisoned inputs, and how each backend refuses a row."""

import inspect

import pytest
import torch

from speckv import kernels
from speckv.kernels import reference

BACKEND = kernels.serving()["cpu"][0]
INTERPRETED = BACKEND == "triton"  # on CPU tensors Triton runs in its interpreter, about a thousand times slower

SHAPES = [(1, 1, 7), (3, 5, 1023), (2, 4, 32001), (2, 8, 50257), (1, 8, 151936)]  # batch, gamma, vocabulary
SHAPE_IDS = [f"batch{batch}-gamma{gamma}-vocabulary{vocabulary}" for batch, gamma, vocabulary in SHAPES]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPE_IDS = ["fp32", "fp16", "bf16"]

# rtol, atol. The same for all: every backend widens the logits, exactly, and computes in fp32; what is left is the
# order of the sums and the last bits of exp.
TOLERANCE = {dtype: {"rtol": 1e-5, "atol": 1e-6} for dtype in DTYPES}

# Uniforms are multiples of 2^-GRID_BITS where a test integrates over them, and the integral is exact to about that.
GRID_BITS = 12 if INTERPRETED else 24
EXACT = 4 * 2**-GRID_BITS + 1e-6

LARGEST_UNIFORM = 1 - 2**-24  # the largest float32 below 1
INT_SENTINEL = 2**62  # as an index it is far outside of any allocation
SPREAD = 5.0  # standard deviation of random logits: as peaked as a language model's, so few uniforms meet a boundary


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_IDS)


def skip_in_the_interpreter(too_slow, what):
    """Skip a case that the Triton interpreter, at 50 ms a row, would take too long for."""
    if INTERPRETED and too_slow:
        pytest.skip(f"{what}: too slow in the Triton interpreter")


def skip_repeated_large_shapes(shape, dtype):
    """In the interpreter, run each large vocabulary in one dtype only."""
    chosen = {32001: torch.float16, 50257: torch.float32, 151936: torch.bfloat16}
    skip_in_the_interpreter(chosen.get(shape[-1], dtype) != dtype, "a large vocabulary in every dtype")


def generator(seed):
    return torch.Generator().manual_seed(seed)


def temperatures(rows, count):
    """A temperature for each of `count` rows: all greedy, all sampled, or both kinds in turn."""
    cycle = {"greedy": [0.0], "sampled": [0.7, 1.0, 0.9], "mixed": [0.8, 0.0, 1.0]}[rows]
    return torch.tensor([cycle[row % len(cycle)] for row in range(count)])


def random_logits(*shape, dtype=torch.float32, seed=0):
    return (torch.randn(*shape, generator=generator(seed)) * SPREAD).to(dtype)


def random_uniform(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed))


def poisoned(tensor):
    """The same values as a view into a larger buffer whose other elements are NaN, or a huge integer.

    Two dimensions and more keep a unit stride in the last one, as logits must; one dimension gets a stride of 2.
    """
    poison = float("nan") if tensor.is_floating_point() else min(INT_SENTINEL, torch.iinfo(tensor.dtype).max)
    if tensor.dim() == 1:
        buffer = torch.full((tensor.shape[0] + 1, 2), poison, dtype=tensor.dtype)
        view = buffer[1:, 1]
    else:
        # 3 columns before and 10 behind: no row starts where a vector load would like it to.
        buffer = torch.full([size + 1 for size in tensor.shape[:-1]] + [tensor.shape[-1] + 13], poison,
                            dtype=tensor.dtype)
        view = buffer[tuple(slice(1, None) for _ in tensor.shape[:-1]) + (slice(3, -10),)]
    view.copy_(tensor)
    return view


def random_controller(features, hidden=16, seed=0):
    """Weights w1, b1, w2, b2 of an MLP whose acceptance of gamma 0 to 8 lies mostly between 0 and 1."""
    source = generator(seed)
    w1 = torch.randn(features + 1, hidden, generator=source) * 0.3
    b1 = torch.randn(hidden, generator=source) * 0.3
    w2 = torch.randn(hidden, 1, generator=source) * 0.2
    return w1, b1, w2, torch.tensor([0.5])


def random_signals(rows, features=5, seed=0):
    scale = torch.tensor([4.0, 1.0, 8.0, 1.0, 2.0, *[1.0] * (features - 5)])
    return torch.rand(rows, features, generator=generator(seed)) * scale


def random_chain(shape, dtype=torch.float32, rows="mixed", seed=0):
    """Arguments of verify_chain in which the draft is close to the target, poisoned wherever it must not be read.

    Row 0 has a full draft, the others one of random length. What is not read: padding columns, draft tokens and
    draft logits from num_draft on, and all draft logits of greedy rows.
    """
    batch, gamma, vocabulary = shape
    source = generator(seed)
    base = random_logits(batch, gamma + 1, vocabulary, seed=seed)
    noise = torch.randn(batch, gamma, vocabulary, generator=source)
    target, draft = base.to(dtype), (base[:, :gamma] + noise).to(dtype)
    temperature = temperatures(rows, batch)
    greedy = temperature == 0

    q = torch.softmax(draft.float(), dim=-1).reshape(-1, vocabulary)
    tokens = torch.multinomial(q, 1, generator=source).reshape(batch, gamma) if gamma and batch else torch.zeros(
        batch, gamma, dtype=torch.int64)
    take_best = (torch.rand(batch, gamma, generator=source) < 0.4) | greedy.unsqueeze(1)
    take_best &= torch.rand(batch, gamma, generator=source) < 0.8
    tokens = torch.where(take_best, target[:, :gamma].float().argmax(dim=-1), tokens)

    num_draft = torch.randint(0, gamma + 1, (batch,), generator=source)
    num_draft[:1] = gamma
    unread = torch.arange(gamma) >= num_draft.unsqueeze(1)
    draft[unread | greedy.unsqueeze(1)] = float("nan")
    tokens[unread] = INT_SENTINEL
    return {
        "target_logits": poisoned(target), "draft_logits": poisoned(draft), "draft_tokens": poisoned(tokens),
        "num_draft": poisoned(num_draft), "temperature": poisoned(temperature),
        "uniform": poisoned(random_uniform(batch, gamma + 1, seed=seed + 1)),
    }


def random_linear(inputs, columns, rows, dtype=torch.float32, seed=0):
    """Arguments of linear_int8: x [inputs, columns] and a matrix of int8 [rows, columns], the extremes included."""
    source = generator(seed)
    x = torch.randn(inputs, columns, generator=source).to(dtype)
    weight = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=source)
    scale = (torch.rand(rows, generator=source) + 0.5) / 128
    return {"x": x, "weight": weight, "scale": scale}


def random_attention(batch, heads, groups, tokens, positions, key_size, value_size, dtype=torch.float32, seed=0):
    """Arguments of decode_attention."""
    source = generator(seed)
    query, key, value = (torch.randn(batch, *shape, generator=source).to(dtype) for shape in (
        (heads, tokens, key_size), (groups, positions, key_size), (groups, positions, value_size)))
    return {"query": query, "key": key, "value": value, "scale": key_size ** -0.5}


def values_of(op, seed=0, rows=7, vocabulary=1023):
    """Inputs of any of the ops, by name."""
    if op == "verify_chain":
        return random_chain((rows, 3, vocabulary), seed=seed)
    if op == "linear_int8":
        return {**random_linear(rows, 300, vocabulary), "x": random_linear(rows, 300, 1, seed=seed)["x"]}
    w1, b1, w2, b2 = random_controller(5, seed=0)
    draft = {"logits": random_logits(rows, vocabulary, seed=seed), "temperature": temperatures("mixed", rows),
             "uniform": random_uniform(rows, seed=seed)}
    plan = {"signals": random_signals(rows, seed=seed), "w1": w1, "b1": b1, "w2": w2, "b2": b2,
            "gammas": torch.tensor([2, 4, 6, 8]), "seconds": torch.tensor([1.0, 1.3, 1.6, 1.9])}
    if op == "draft_sample":
        return draft
    if op == "plan_gamma":
        return plan
    return {**draft, **plan, "drafted": torch.arange(rows) % 3}


def share_of_uniforms(holds, rows):
    """For each row, the share of [0, 1) from 0 up on which holds(uniform [rows]) is False, by bisection."""
    low, high = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 2**GRID_BITS)
    while (low < high).any():
        middle = (low + high) // 2
        true = holds((middle.clamp(max=2**GRID_BITS - 1).double() / 2**GRID_BITS).float())
        low, high = torch.where(true | (low == high), low, middle + 1), torch.where(true & (low < high), middle, high)
    return low.double() / 2**GRID_BITS


def measure_of_tokens(token_at, rows, vocabulary=4):
    """[rows, vocabulary]: the measure of the uniforms at which token_at(row [n], uniform [n]) gives each token.

    An inverse CDF in vocabulary order is a staircase, so bisection finds every step of it.
    """
    row = torch.arange(rows).repeat_interleave(vocabulary - 1)
    token = torch.arange(vocabulary - 1).repeat(rows)
    up_to = share_of_uniforms(lambda uniform: token_at(row, uniform) > token, len(row)).reshape(rows, -1)
    return torch.nn.functional.pad(up_to, (1, 1)).index_fill(1, torch.tensor([vocabulary]), 1.0).diff(dim=1)


def random_filters(rows, seed=0, names=("top_k", "top_p", "min_p")):
    """A setting of these filters for each row: off, ordinary, and at the ends of what is allowed."""
    source = generator(seed)
    settings = {"top_k": torch.tensor([0, 1, 5, 50, 3000, 2**62]), "top_p": torch.tensor([1.0, 0.9, 0.5, 0.95, 0.0]),
                "min_p": torch.tensor([0.0, 0.05, 0.3, 1.0])}
    return {name: settings[name][torch.randint(len(settings[name]), (rows,), generator=source)] for name in names}


def arguments(op, **values):
    """The arguments of an op in the order of its schema; one that has a default may be left out."""
    return [values[name] if parameter.default is parameter.empty else values.get(name, parameter.default)
            for name, parameter in inspect.signature(getattr(reference, op)).parameters.items()]


def call(op, values):
    """The outputs of the op of whichever backend serves, called with arguments by name."""
    return _as_tuple(getattr(kernels, op)(*arguments(op, **values)))


def call_reference(op, values):
    return _as_tuple(getattr(reference, op)(*arguments(op, **values)))


def _as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def same_bits(one, other):
    """Equality bit for bit, so that NaN equals itself."""
    if one.is_floating_point():
        integers = {4: torch.int32, 2: torch.int16, 8: torch.int64}[one.element_size()]
        one, other = one.contiguous().view(integers), other.contiguous().view(integers)
    return torch.equal(one, other)


def refused_rows(op, outputs):
    """True for the rows in which a backend that cannot raise says that its input was bad."""
    if op == "draft_sample":
        return outputs[0] == -1
    if op == "plan_gamma":
        return outputs[0] == -1
    if op == "draft_step":
        return (outputs[0] == -1) | (outputs[-1] == -1)
    return (outputs[0] == -1).all(dim=1)


def assert_refused(op, good, changes, row, words):
    """`good` arguments with `changes` are refused for `row`: an error in these words, or -1 in that row alone.

    `row` None means that the bad value belongs to every row.
    """
    bad = {**good, **changes}
    if BACKEND != "triton":
        assert_raises(BACKEND, call, op, bad, words)
    else:
        healthy, outputs = call(op, good), call(op, bad)
        refused = refused_rows(op, outputs)
        expected = torch.ones_like(refused) if row is None else torch.arange(refused.shape[0]) == row
        assert not refused_rows(op, healthy).any()
        assert torch.equal(refused, expected)
        for before, after in zip(healthy, outputs, strict=True):
            assert same_bits(before[~expected], after[~expected])
    assert_raises("reference", call_reference, op, bad, words)


def assert_raises(backend, function, op, values, words):
    with pytest.raises(RuntimeError) as error:
        function(op, values)
    assert str(error.value).splitlines()[0] == words, f"error of {backend}"
