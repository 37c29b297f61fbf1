"""Microbenchmarks of the ops on CPU, one thread. Run them with bench/run.py.

Each test times one implementation in one group; its results are checked against the reference before it is timed. What
varies, varies alone: vocabulary, dtype, batch and temperature of draft_sample around one bf16 row at temperature 0.8.
"""

import functools
import statistics
import timeit

import pytest
import torch
from floors import measure_exp
from sklearn.neural_network import MLPRegressor
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.utils import _speculative_sampling

import speckv.kernels as kernels
from speckv.kernels import checks, reference

VOCABULARIES = (32000, 49152, 128256, 151936, 262144)
SMALL_VOCABULARY, CHAIN_VOCABULARY, LARGE_VOCABULARY = 49152, 128256, 151936
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.05}
TEMPERATURES = {"greedy": 0.0, "T=0.8": 0.8, "T=1": 1.0}
# mode, dtype, rows, vocabulary
DRAFTS = [
    *(("T=0.8", "bf16", 1, vocabulary) for vocabulary in VOCABULARIES),
    *(("greedy", "bf16", 1, vocabulary) for vocabulary in VOCABULARIES),
    ("T=1", "bf16", 1, LARGE_VOCABULARY),
    *(("T=0.8", dtype, 1, LARGE_VOCABULARY) for dtype in ("fp16", "fp32")),
    *(("T=0.8", "bf16", rows, LARGE_VOCABULARY) for rows in (8, 64)),
    *(("greedy", dtype, 64, LARGE_VOCABULARY) for dtype in ("bf16", "fp32")),
]
# gamma, vocabulary
CHAINS = [(8, CHAIN_VOCABULARY), *((gamma, SMALL_VOCABULARY) for gamma in (1, 4, 8, 16))]
STOPS = ("first", "middle", "none")  # where the draft is rejected
CONTROLLER_UNITS = 16
SECONDS, ROUND_SECONDS, MIN_ROUNDS = 0.4, 0.002, 5
UNCHECKED = ("sampling_values", "logit_values", "filter_values", "draft_values", "verified_values", "acceptance_values",
             "seconds_values")


def logits_like_a_model(*shape, dtype=torch.bfloat16):
    """Heavy-tailed logits: most of the mass on a few dozen tokens."""
    generator = torch.Generator().manual_seed(shape[-1])
    normal = torch.randn(shape, generator=generator)
    return (2.5 * normal + 0.4 * normal.abs().pow(2)).to(dtype)


@functools.cache
def compiled(op):
    return torch.compile(getattr(reference, op), dynamic=False)


def implementation(name, op, monkeypatch):
    if name == "torch.compile":
        # Without the checks of values, which would break the graph and slow it down.
        for check in UNCHECKED:
            monkeypatch.setattr(checks, check, lambda *args: None)
        torch._dynamo.config.recompile_limit = 64  # a graph for each shape
        return compiled(op)
    return getattr(kernels if name == "speckv" else reference, op)


def measure(benchmark, group, name, function, args, expected, read_bytes=0, exps=0, **info):
    """Times function(*args) after a look at what it gives; read_bytes and exps are what no implementation can avoid."""
    for actual, wanted in zip(function(*args), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    time_beside_exp(benchmark, function, args, group=group, implementation=name, bytes=read_bytes, exps=exps, **info)


def time_beside_exp(benchmark, function, args, group, **info):
    """Times function(*args) for SECONDS, and how fast exp is after each ROUND_SECONDS of that. A core of a shared
    machine may be half as fast as a second ago: what counts is the median of a round's time over that of exp."""
    call = functools.partial(function, *args)  # pytest-benchmark's own call, with arguments, takes 0.2 µs more
    seconds = min(timeit.repeat(call, number=1, repeat=10))
    iterations = max(1, round(ROUND_SECONDS / seconds))
    rounds = max(MIN_ROUNDS, round(SECONDS / (iterations * seconds)))
    exps = []
    benchmark.group = group
    benchmark.pedantic(call, iterations=iterations, rounds=rounds, warmup_rounds=2,
                       teardown=lambda: exps.append(measure_exp(passes=500, repeats=3)))
    times = benchmark.stats.stats.data
    in_exps = [time * exp for time, exp in zip(times, exps[-len(times):], strict=True)]
    benchmark.extra_info.update(info, threads=1, exp=statistics.median(in_exps) / statistics.median(times))


@pytest.mark.parametrize("mode, dtype, rows, vocabulary", DRAFTS)
@pytest.mark.parametrize("name", ["speckv", "reference", "torch.compile"])
def test_draft_sample(benchmark, monkeypatch, mode, dtype, rows, vocabulary, name):
    if name == "torch.compile" and (dtype, rows) != ("bf16", 1):
        pytest.skip("compiled for the vocabularies only: each takes seconds")
    temperature = torch.full((rows,), TEMPERATURES[mode])
    args = logits_like_a_model(rows, vocabulary, dtype=DTYPES[dtype]), temperature, torch.full((rows,), 0.37)
    expected = reference.draft_sample(*args)
    function = implementation(name, "draft_sample", monkeypatch)
    # Entropy and confidence are of softmax(logits); a token at another temperature takes an exp of its own.
    exps = rows * vocabulary * (2 if mode == "T=0.8" else 1)
    measure(benchmark, f"draft_sample {mode} {dtype} B={rows} V={vocabulary}", name, function, args, expected,
            args[0].nbytes, exps, op="draft_sample", mode=mode, dtype=dtype, rows=rows, vocabulary=vocabulary)


def warp_and_draw(logits, temperature, uniform):
    """transformers' warpers in its order, then the draw of the reference, so that the token can be compared."""
    scores = logits.float() / temperature
    for warper in (TopKLogitsWarper(FILTERS["top_k"]), TopPLogitsWarper(FILTERS["top_p"]),
                   MinPLogitsWarper(FILTERS["min_p"])):
        scores = warper(None, scores)
    q = torch.softmax(scores, dim=-1)
    token = reference.sample_inverse_cdf(q, uniform)
    return token, q.gather(-1, token.unsqueeze(-1)).squeeze(-1)


@pytest.mark.parametrize("name", ["speckv", "unfiltered", "reference", "transformers"])
def test_draft_sample_filtered(benchmark, name):
    args = logits_like_a_model(1, LARGE_VOCABULARY).float(), torch.tensor([0.8]), torch.tensor([0.37])
    filters = [torch.tensor([value]) for value in FILTERS.values()]
    function, args = {"speckv": (kernels.draft_sample, (*args, *filters)), "unfiltered": (kernels.draft_sample, args),
                      "reference": (reference.draft_sample, (*args, *filters)),
                      "transformers": (warp_and_draw, args)}[name]
    expected = reference.draft_sample(*args) if name == "unfiltered" else reference.draft_sample(*args[:3], *filters)
    group = f"draft_sample top-k, top-p, min-p, T=0.8 fp32 V={LARGE_VOCABULARY}"
    if name == "transformers":
        expected = expected[:2]
    measure(benchmark, group, name, function, args, expected, 4 * LARGE_VOCABULARY, LARGE_VOCABULARY)


def chain_that_stops_at(stop, gamma, vocabulary):
    """Inputs of verify_chain where the target agrees with the draft before `stop` and rules its token out there."""
    draft = logits_like_a_model(1, gamma, vocabulary)
    target = torch.cat([draft, draft[:, :1]], dim=1)
    temperature = torch.tensor([0.8])
    uniform = torch.full((1,), 0.37)
    tokens = torch.stack([reference.draft_sample(draft[:, i], temperature, uniform)[0] for i in range(gamma)], dim=1)
    if stop < gamma:
        target[0, stop, tokens[0, stop]] = -torch.inf
    return target, draft, tokens, torch.tensor([gamma]), temperature, torch.full((1, gamma + 1), 0.37)


def speculative_sampling(target, draft, tokens, num_draft, temperature, uniform):
    """transformers' verification of the same chain, from the logits as the models give them: it is handed scores in
    fp32 at the temperature. It draws its own numbers, so only how many were accepted can be compared."""
    gamma = tokens.shape[1]
    valid, accepted = _speculative_sampling(tokens, draft.float() / temperature, gamma, target.float() / temperature)
    return accepted.reshape(1), torch.tensor([valid.shape[1] - 1])


@pytest.mark.parametrize("gamma, vocabulary", CHAINS)
@pytest.mark.parametrize("rejected", STOPS)
@pytest.mark.parametrize("name", ["speckv", "reference", "torch.compile", "transformers"])
def test_verify_chain(benchmark, monkeypatch, gamma, vocabulary, rejected, name):
    stop = {"first": 0, "middle": gamma // 2, "none": gamma}[rejected]
    if rejected == "middle" and gamma == 1:
        pytest.skip("a draft of one token has no middle")
    if name == "torch.compile" and vocabulary != CHAIN_VOCABULARY:
        pytest.skip("compiled for one shape only: it takes half a minute")
    args = chain_that_stops_at(stop, gamma, vocabulary)
    expected = reference.verify_chain(*args)
    assert expected[1].item() == stop
    if name == "transformers":
        function, expected = speculative_sampling, (expected[1], expected[1])
    else:
        function = implementation(name, "verify_chain", monkeypatch)
    # The target's rows up to the stop and the draft's that were judged. The residual of a rejection takes the exp of
    # both rows again: their sums are known only then (see docs/limits.md).
    rows_read = min(stop + 1, gamma) + stop + 1
    exps = vocabulary * (rows_read + (2 if stop < gamma else 0))
    group = f"verify_chain gamma={gamma} rejected: {rejected} V={vocabulary}"
    measure(benchmark, group, name, function, args, expected, 2 * vocabulary * rows_read, exps)


def controller():
    generator = torch.Generator().manual_seed(0)
    units = CONTROLLER_UNITS
    shapes = ((6, units), (units,), (units, 1), (1,))
    weights = [torch.randn(shape, generator=generator) / units for shape in shapes]
    return *weights, torch.tensor([2, 4, 6, 8]), torch.ones(4)


def sklearn_controller(w1, b1, w2, b2):
    """The same network in scikit-learn, as the paper's controller is."""
    units = b1.shape[0]
    model = MLPRegressor(hidden_layer_sizes=(units,))
    model.partial_fit(torch.zeros(2, w1.shape[0]).numpy(), [0.0, 1.0])  # which lays it out
    model.coefs_, model.intercepts_ = [w1.numpy(), w2.numpy()], [b1.numpy(), b2.numpy()]
    return model


@pytest.mark.parametrize("name", ["speckv", "reference", "sklearn"])
def test_plan_gamma(benchmark, monkeypatch, name):
    args = torch.tensor([[2.0, 0.6, 4.0, 0.2, 1.0]]), *controller()
    expected = reference.plan_gamma(*args)
    if name == "sklearn":
        model, candidates = sklearn_controller(*args[1:5]), args[5].float().unsqueeze(1)
        function, expected = model.predict, expected[1][0].numpy()
        args = (torch.cat([args[0].expand(len(candidates), -1), candidates], dim=1).numpy(),)
    else:
        function = implementation(name, "plan_gamma", monkeypatch)
    measure(benchmark, "plan_gamma 6-16-1", name, function, args, expected)


@pytest.mark.parametrize("vocabulary", [SMALL_VOCABULARY, LARGE_VOCABULARY])
@pytest.mark.parametrize("name", ["speckv", "reference"])
def test_draft_step(benchmark, monkeypatch, vocabulary, name):
    sampling = logits_like_a_model(1, vocabulary), torch.tensor([0.8]), torch.tensor([0.37])
    args = *sampling, torch.tensor([[2.0, 0.6, 4.0, 0.2, 1.0]]), torch.tensor([3]), *controller()
    expected = reference.draft_step(*args)
    function = implementation(name, "draft_step", monkeypatch)
    measure(benchmark, f"draft_step T=0.8 V={vocabulary}", name, function, args, expected, 2 * vocabulary,
            2 * vocabulary)


@pytest.mark.parametrize("columns, rows", [(576, 16384), (1536, 576)])
@pytest.mark.parametrize("name", ["speckv", "reference", "bf16"])
def test_linear_int8(benchmark, columns, rows, name):
    """Against PyTorch's own product with bf16 weights. The weights stay in the cache: in a draft they seldom do."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    x, scale = torch.randn(1, columns, generator=generator).bfloat16(), torch.full((rows,), 2.0**-7)
    expected = reference.linear_int8(x, weight, scale)
    dense = weight.bfloat16() * 2.0**-7
    function, args = {"speckv": (kernels.linear_int8, (x, weight, scale)),
                      "reference": (reference.linear_int8, (x, weight, scale)),
                      "bf16": (torch.nn.functional.linear, (x, dense))}[name]
    torch.testing.assert_close(function(*args), expected, rtol=2**-7, atol=1e-3)
    time_beside_exp(benchmark, function, args, group=f"linear_int8 K={columns} N={rows}", implementation=name,
                    bytes=args[1].nbytes, exps=0)
