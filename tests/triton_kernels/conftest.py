"""What the tests of split rows share."""

import pytest
import torch


@pytest.fixture
def no_workspace_yet():
    """New memory is full of NaN, so a partial that is read without having been written shows."""
    from speckv.kernels import split

    split._workspaces.clear()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    split._workspaces.clear()
