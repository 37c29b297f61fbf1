"""The floors are measured in the run that is held against them, and kept in its JSON."""

import floors
import pytest
import torch

import speckv.kernels as kernels

MEASURED = {}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(1)
    assert kernels.serving()["cpu"][0] == "cpu", kernels.serving()["cpu"][1]
    MEASURED.update(floors.measure())


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["floors"] = MEASURED
