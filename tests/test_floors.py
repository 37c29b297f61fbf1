"""What bench/ holds the ops against: the floors' own loops are right, and the larger floor is found."""

import floors
import plot_ops
import pytest
import torch

import speckv.kernels as kernels

FLOORS = {"read": [[128, 100.0], [1024, 50.0]], "exp": 5e9}
needs_extension = pytest.mark.skipif(kernels.serving()["cpu"][0] != "cpu", reason="the C++ extension is not in use")


@needs_extension
def test_the_loops_read_everything_and_add_it_up():
    words = torch.arange(1000 * 32)
    assert torch.ops.speckv_bench.read_bytes(words.view(torch.float32), 3) == 3 * words.sum()
    values = -torch.rand(2500)
    total = torch.ops.speckv_bench.sum_of_exp(values, 2)
    assert total == pytest.approx(2 * values.double().exp().sum().item(), rel=1e-6)


@pytest.mark.parametrize("read_bytes, exps, expected", [
    (100_000, 0, (1.0, "read 128 KiB")),
    (500_000, 0, (10.0, "read 1024 KiB")),
    (5_000_000, 0, (100.0, "read 1024 KiB")),  # more than any buffer measured: the rate of the largest
    (100_000, 50_000, (10.0, "exp")),
], ids=["in the first cache", "in the second", "beyond", "exp"])
def test_the_larger_floor(read_bytes, exps, expected):
    microseconds, bound = floors.floor_us(FLOORS, read_bytes, exps)
    assert (pytest.approx(microseconds), bound) == expected


def test_the_plot_is_drawn_with_and_without_rivals(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'speckv[plots]'")
    info = {"op": "draft_sample", "mode": "greedy", "dtype": "bf16", "rows": 1}
    rows = {f"V={size}": {"floor": size / 1e3, "bound": "exp", "speckv": size / 500,
                          "info": info | {"vocabulary": size}} for size in (32000, 49152)}
    rows["V=32000"]["reference"] = 900.0
    rows["plan_gamma"] = {"floor": None, "bound": "", "speckv": 4.0, "info": {}}
    plot_ops.draw(rows, tmp_path / plot_ops.PLOT)
    assert (tmp_path / plot_ops.PLOT).read_bytes().startswith(b"\x89PNG")
