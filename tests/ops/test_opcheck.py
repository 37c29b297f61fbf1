"""torch.library.opcheck: schemas, shape functions, tracing and dynamic shapes of the registered ops."""

import pytest
import torch
from helpers_ops import (
    arguments,
    random_attention,
    random_chain,
    random_controller,
    random_filters,
    random_linear,
    random_logits,
    random_signals,
    random_uniform,
)

W1, B1, W2, B2 = random_controller(5)
DRAFT = {"logits": random_logits(3, 100), "temperature": torch.tensor([0.0, 0.8, 1.0]), "uniform": random_uniform(3)}
PLAN = {"signals": random_signals(3), "w1": W1, "b1": B1, "w2": W2, "b2": B2, "gammas": torch.tensor([2, 4, 6]),
        "seconds": torch.tensor([1.0, 1.5, 2.0]), "rate": 1.5}
# The filters may be left out: draft_sample stands for the calls without them.
SAMPLES = {
    "draft_sample": DRAFT,
    "plan_gamma": PLAN,
    "draft_step": {**DRAFT, **PLAN, "drafted": torch.tensor([0, 1, 2]), **random_filters(3)},
    "verify_chain": {**random_chain((3, 2, 100)), **random_filters(3, names=("top_k", "min_p"))},
    "linear_int8": random_linear(3, 100, 7),
    "decode_attention": random_attention(2, 4, 2, 3, 10, 8, 6),
}


@pytest.fixture(autouse=True)
def ordinary_memory(poisoned_memory):
    """opcheck compiles, and the compiler's own buffers are none of our business."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("test", ["test_schema", "test_autograd_registration", "test_faketensor",
                                  "test_aot_dispatch_static", "test_aot_dispatch_dynamic"])
@pytest.mark.parametrize("op", SAMPLES)
def test_opcheck(op, test):
    torch.library.opcheck(getattr(torch.ops.speckv, op).default, arguments(op, **SAMPLES[op]), test_utils=test)


@pytest.mark.parametrize("op", SAMPLES)
def test_an_op_traces_into_a_graph_as_one_node(op):
    function = getattr(torch.ops.speckv, op).default
    values = arguments(op, **SAMPLES[op])
    graph = torch.export.export(Wrapper(function), tuple(values)).graph
    assert [node.target for node in graph.nodes if node.op == "call_function" and node.target is function] == [function]


class Wrapper(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *values):
        return self.function(*values)
