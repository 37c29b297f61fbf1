"""Microbenchmarks of the ops on CPU: one row, bf16 logits, one thread. Run them with bench/run.py.

Each test times one implementation in one group; its results are checked against the reference before it is timed.
"""

import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import speckv.kernels as kernels
from speckv.kernels import checks, reference

VOCABULARIES = (49152, 128256)
LARGE_VOCABULARY = 151936
FILTERS = {"top_k": 50, "top_p": 0.9, "min_p": 0.05}
TEMPERATURES = {"greedy": 0.0, "T=0.8": 0.8, "T=1": 1.0}
GAMMA = 8
STOPS = {"reject first": 0, "reject middle": GAMMA // 2, "accept all": GAMMA}
CONTROLLER_UNITS = 16


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
    assert kernels.serving()["cpu"][0] == "cpu", kernels.serving()["cpu"][1]


def logits_like_a_model(*shape):
    """Heavy-tailed bf16 logits: most of the mass on a few dozen tokens."""
    generator = torch.Generator().manual_seed(shape[-1])
    normal = torch.randn(shape, generator=generator)
    return (2.5 * normal + 0.4 * normal.abs().pow(2)).bfloat16()


def compiled_reference(name, monkeypatch):
    """torch.compile of the reference without its value checks, which would break the graph and slow it down."""
    for check in ("sampling_values", "logit_values"):
        monkeypatch.setattr(checks, check, lambda *args: None)
    return torch.compile(getattr(reference, name))


def implementation(name, op, monkeypatch):
    if name == "torch.compile":
        return compiled_reference(op, monkeypatch)
    return getattr(kernels if name == "speckv" else reference, op)


def measure(benchmark, group, name, function, args, expected, bytes_read):
    for actual, wanted in zip(function(*args), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    benchmark.group = group
    benchmark.extra_info.update(implementation=name, rows=1, bytes=bytes_read, threads=1)
    benchmark(function, *args)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("mode", TEMPERATURES)
@pytest.mark.parametrize("name", ["speckv", "reference", "torch.compile"])
def test_draft_sample(benchmark, monkeypatch, vocabulary, mode, name):
    args = logits_like_a_model(1, vocabulary), torch.tensor([TEMPERATURES[mode]]), torch.tensor([0.37])
    expected = reference.draft_sample(*args)
    function = implementation(name, "draft_sample", monkeypatch)
    measure(benchmark, f"draft_sample {mode} V={vocabulary}", name, function, args, expected, 2 * vocabulary)


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
    measure(benchmark, group, name, function, args, expected, 4 * LARGE_VOCABULARY)


def chain_that_stops_at(stop, vocabulary):
    """Inputs of verify_chain where the target agrees with the draft before `stop` and rules its token out there."""
    draft = logits_like_a_model(1, GAMMA, vocabulary)
    target = torch.cat([draft, draft[:, :1]], dim=1)
    temperature = torch.tensor([0.8])
    uniform = torch.full((1,), 0.37)
    tokens = torch.stack([reference.draft_sample(draft[:, i], temperature, uniform)[0] for i in range(GAMMA)], dim=1)
    if stop < GAMMA:
        target[0, stop, tokens[0, stop]] = -torch.inf
    return target, draft, tokens, torch.tensor([GAMMA]), temperature, torch.full((1, GAMMA + 1), 0.37)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("name", ["speckv", "reference"])
def test_verify_chain(benchmark, monkeypatch, vocabulary, stop, name):
    args = chain_that_stops_at(STOPS[stop], vocabulary)
    expected = reference.verify_chain(*args)
    assert expected[1].item() == STOPS[stop]
    function = implementation(name, "verify_chain", monkeypatch)
    rows_read = min(STOPS[stop] + 1, GAMMA) + STOPS[stop] + 1
    group = f"verify_chain gamma={GAMMA} {stop} V={vocabulary}"
    measure(benchmark, group, name, function, args, expected, 2 * vocabulary * rows_read)


def controller():
    generator = torch.Generator().manual_seed(0)
    units = CONTROLLER_UNITS
    shapes = ((6, units), (units,), (units, 1), (1,))
    weights = [torch.randn(shape, generator=generator) / units for shape in shapes]
    return *weights, torch.tensor([2, 4, 6, 8]), torch.ones(4)


@pytest.mark.parametrize("name", ["speckv", "reference"])
def test_plan_gamma(benchmark, monkeypatch, name):
    args = torch.tensor([[2.0, 0.6, 4.0, 0.2, 1.0]]), *controller()
    expected = reference.plan_gamma(*args)
    function = implementation(name, "plan_gamma", monkeypatch)
    measure(benchmark, "plan_gamma 6-16-1", name, function, args, expected, 0)


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("name", ["speckv", "reference"])
def test_draft_step(benchmark, monkeypatch, vocabulary, name):
    sampling = logits_like_a_model(1, vocabulary), torch.tensor([0.8]), torch.tensor([0.37])
    args = *sampling, torch.tensor([[2.0, 0.6, 4.0, 0.2, 1.0]]), torch.tensor([3]), *controller()
    expected = reference.draft_step(*args)
    function = implementation(name, "draft_step", monkeypatch)
    measure(benchmark, f"draft_step T=0.8 V={vocabulary}", name, function, args, expected, 2 * vocabulary)


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
    benchmark.group = f"linear_int8 K={columns} N={rows}"
    benchmark.extra_info.update(implementation=name, rows=1, bytes=args[1].nbytes, threads=1)
    benchmark(function, *args)
