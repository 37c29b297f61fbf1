"""The way from Python to an op past PyTorch's dispatcher: the same results, and not taken where it would be noticed."""

import gc
import threading

import psutil
import pytest
import torch
from helpers_ops import BACKEND, arguments, call, random_filters, same_bits, values_of
from torch._subclasses import FakeTensorMode

from speckv import kernels
from speckv.kernels import ops

if BACKEND != "cpu":
    pytest.skip("only the C++ extension has a short way", allow_module_level=True)
from speckv.kernels import _C

if not _C.open(torch.Tensor, ops.WATCHERS, vars(ops._dispatched)):
    pytest.skip("this PyTorch does not lend its tensors to C code", allow_module_level=True)

each_op = pytest.mark.parametrize("op", ops.SHORT_WAY_OPS)
FILTERED = ("draft_sample", "draft_step", "verify_chain")
ROWS = 7


def plain_values_of(op, **settings):
    return {name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in values_of(op, **settings).items()}


def short(op, values):
    """What the plain function gives by itself: None where it leaves the call to the dispatcher."""
    _C.open(torch.Tensor, ops.WATCHERS, dict.fromkeys(ops.SHORT_WAY_OPS, lambda *args: None))
    try:
        return getattr(_C, op)(*arguments(op, **values))
    finally:
        _C.open(torch.Tensor, ops.WATCHERS, vars(ops._dispatched))


def dispatched(op, values):
    return getattr(torch.ops.speckv, op).default(*arguments(op, **values))


def assert_equal(some, others):
    for one, other in zip(some, others, strict=True):
        assert same_bits(one, other) and one.stride() == other.stride()


@each_op
@pytest.mark.parametrize("rows", [0, 1, ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_ways_give_the_same_bits(op, rows, dtype):
    values = plain_values_of(op, rows=rows)
    values = {name: tensor.to(dtype) if name.endswith("logits") else tensor for name, tensor in values.items()}
    assert_equal(call(op, values), dispatched(op, values))
    assert rows == 0 or short(op, values) is not None
    if op in FILTERED and rows:
        values |= random_filters(rows)
        assert_equal(short(op, values), dispatched(op, values))


@each_op
def test_both_ways_read_rows_that_lie_apart(op):
    values = plain_values_of(op)
    for name, tensor in values.items():
        if name.endswith("logits"):
            values[name] = torch.cat([tensor, tensor], dim=-1)[..., : tensor.shape[-1]]
            assert not values[name].is_contiguous()
    assert_equal(short(op, values), dispatched(op, values))


@each_op
def test_both_ways_refuse_in_the_same_words(op):
    good = plain_values_of(op)
    for name, tensor in good.items():
        for bad in (tensor[..., :0], tensor.unsqueeze(0), tensor.double(), torch.full_like(tensor, -3)):
            words = []
            for way in (short, dispatched):
                try:
                    words.append(str(way(op, good | {name: bad})))
                except RuntimeError as error:
                    words.append(str(error))
            assert words[0] == words[1], name


class Subclass(torch.Tensor):
    pass


STRANGERS = {
    "a number": lambda tensor: 0.5,
    "a parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
    "a subclass": lambda tensor: tensor.as_subclass(Subclass),
    "another device": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "a functional wrapper": lambda tensor: torch._to_functional_tensor(tensor),
    # Its numbers lie in memory with the other sign, of which DLPack says nothing.
    "an imaginary part": lambda tensor: torch.complex(torch.zeros_like(tensor), -tensor).conj().imag,
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_no_plain_tensor_is_left_to_the_dispatcher(stranger):
    values = plain_values_of("draft_sample")
    for name in values:
        assert short("draft_sample", values | {name: STRANGERS[stranger](values[name])}) is None
    values["uniform"] = STRANGERS["an imaginary part"](values["uniform"])
    assert_equal(call("draft_sample", values), dispatched("draft_sample", values))


def test_another_number_of_arguments_is_left_to_the_dispatcher():
    for args in ((), [torch.zeros(1)] * 20):
        with pytest.raises(RuntimeError, match=r"draft_sample.* argument"):
            _C.draft_sample(*args)


def test_compilers_modes_tracers_and_profilers_see_the_op():
    values = plain_values_of("draft_sample")
    expected = call("draft_sample", values)
    args = arguments("draft_sample", **values)

    graphs = []
    compiled = torch.compile(kernels.draft_sample, fullgraph=True,
                             backend=lambda graph, example: graphs.append(graph) or graph.forward)
    assert_equal(compiled(*args), expected)
    assert any(node.target is torch.ops.speckv.draft_sample.default for node in graphs[0].graph.nodes)

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(kernels.draft_sample(*args)[0], torch._subclasses.FakeTensor)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        kernels.draft_sample(*args)
    assert "speckv::draft_sample" in {event.key for event in profile.key_averages()}

    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Watch():
        kernels.draft_sample(*args)
    assert torch.ops.speckv.draft_sample.default in seen

    with pytest.warns(DeprecationWarning):
        traced = torch.jit.trace(lambda logits: kernels.draft_sample(logits, *args[1:])[2], (args[0],))
    other = values_of("draft_sample", seed=1)["logits"]
    assert same_bits(traced(other), kernels.draft_sample(other, *args[1:])[2])


def test_outputs_live_on_without_their_inputs_and_are_written_like_any_tensor():
    values = plain_values_of("draft_step", vocabulary=49152)
    outputs = call("draft_step", values)
    kept = [output.clone() for output in outputs]
    del values
    gc.collect()
    call("draft_step", values_of("draft_step", seed=1))
    assert_equal(outputs, kept)
    for output in outputs:
        assert output.data_ptr() % 64 == 0 and not output.requires_grad
        output.fill_(3)
        assert bool((output + output.new_ones(()) == 4).all())


def test_memory_is_given_back():
    good = plain_values_of("draft_step", rows=64)
    bad = good | {"seconds": torch.zeros(4)}  # found out when half of the outputs are made
    process = psutil.Process()

    def run(times):
        for _ in range(times):
            call("draft_step", good)
            with pytest.raises(RuntimeError, match="seconds must be finite"):
                call("draft_step", bad)
        gc.collect()
        return process.memory_info().rss

    before = run(200)
    assert run(2000) - before < 2**20  # 2,000 calls make 4 MB of outputs


def test_threads_call_at_once():
    values = plain_values_of("verify_chain", vocabulary=32000)
    expected = call("verify_chain", values)
    wrong = []

    def run():
        for _ in range(50):
            for one, other in zip(call("verify_chain", values), expected, strict=True):
                if not same_bits(one, other):
                    wrong.append(one)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
