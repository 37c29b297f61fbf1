"""Every test of the ops runs with new memory full of NaN and of the largest integers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN or the largest integer, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan() and torch.empty(1, dtype=torch.int64) == torch.iinfo(torch.int64).max
    yield
    torch.use_deterministic_algorithms(False)
