"""The C++ loops in every build: each is forced in a process of its own, where the tests of the ops and of the engine
run. Elsewhere it is the widest build of this machine.
"""

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from speckv.kernels import serving
from speckv.kernels.ops import VECTOR_UNITS, vector_units

if serving()["cpu"][0] != "cpu" or os.environ.keys() & {"SPECKV_BACKEND", "SPECKV_UNITS"}:
    pytest.skip("needs the C++ backend, and to force its build itself", allow_module_level=True)

HERE = Path(__file__).parent
WIDEST = VECTOR_UNITS.index(vector_units())
NARROWER = [pytest.param(units, marks=pytest.mark.skipif(index >= WIDEST, reason=f"this machine has {vector_units()}"))
            for index, units in enumerate(VECTOR_UNITS[:-1])]

# Tests of what is above the loops, some of which start processes of their own.
OF_THE_SCHEMA = ("test_backends.py", "test_opcheck.py", "test_shape_functions.py")


def python(*arguments, units):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=HERE.parent,
                          env=os.environ | {"SPECKV_UNITS": units})


@pytest.mark.parametrize("units", NARROWER)
def test_the_ops_and_the_engine_pass_their_tests(units):
    ops = HERE.glob("ops/test_*.py") if units in ("plain", "avx2") else ()  # their loops for AVX-512 are the widest
    files = [*sorted(ops), HERE / "test_engine.py", HERE / "test_head_engine.py"]
    files = [str(file) for file in files if file.name not in OF_THE_SCHEMA]
    result = python("-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *files, units=units)
    assert result.returncode == 0 and re.search(r"\d{3} passed", result.stdout), result.stdout[-5000:]


def test_the_build_is_the_one_asked_for():
    code = "from speckv.kernels import serving; print(serving()['cpu'][1])"
    for units in VECTOR_UNITS[:WIDEST + 1]:
        assert python("-c", code, units=units).stdout.strip() == f"the C++ extension is loaded, its {units} loops"


@pytest.mark.parametrize("units", ["avx9", *VECTOR_UNITS[WIDEST + 1:]])
def test_units_that_are_not_here_are_refused_with_those_that_are(units):
    result = python("-c", "import speckv.kernels", units=units)
    assert result.returncode != 0
    assert (f"ImportError: SPECKV_UNITS: {units}: must be plain, avx2, avx512, bf16 or amx, and no wider than "
            f"{vector_units()}, which this machine has") in result.stderr


@pytest.mark.parametrize("units", NARROWER)
def test_matrices_come_out_as_in_the_widest_build(units):
    code = textwrap.dedent("""
        import torch
        from speckv.kernels import serving
        torch.manual_seed(0)
        no, x, threshold = torch.empty(0), torch.randn(37, 576), torch.tensor([2.5])
        table = torch.linspace(-1, 1, 16)
        matrices = [
            (torch.randn(100, 576).bfloat16(), no, no, no),
            (torch.randint(0, 256, (96, 288), dtype=torch.uint8), torch.rand(9, 96).bfloat16(), no, table),
            (torch.randint(-128, 128, (100, 576), dtype=torch.int8), torch.rand(100), no, threshold),
            (torch.randint(-128, 128, (100, 576), dtype=torch.int8), torch.rand(100), no, no),
            (torch.randn(37, 91).bfloat16(), no, torch.randn(37), no),
            (torch.randint(-128, 128, (37, 91), dtype=torch.int8), torch.rand(37), torch.randn(37), no),
            (torch.randint(-128, 128, (37, 91), dtype=torch.int8), torch.rand(37), torch.randn(37), threshold),
        ]
        numbers = [torch.ops.speckv.open_matrix(*parts) for parts in matrices]
        for number, (weight, *_) in zip(numbers, matrices):
            columns = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
            products = [torch.ops.speckv.multiply_matrix(number, x[:count, :columns]) for count in (1, 3, 6, 16, 37)]
            for some in products[:-1]:
                assert torch.equal(some, products[-1][:len(some)])  # whatever others there are
            print(products[-1].tolist())
    """)
    builds = [python("-c", code, units=each).stdout.splitlines() for each in (vector_units(), units)]
    assert len(builds[0]) == 7
    for widest, narrower in zip(*builds, strict=True):
        both = (torch.tensor(json.loads(line)) for line in (widest, narrower))
        torch.testing.assert_close(*both, rtol=1e-4, atol=1e-3)
