"""Which backend serves, SPECKV_BACKEND, and what importing speckv.kernels does and does not do."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speckv import kernels

SOURCE = Path(kernels.__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None
BUILD_ADVICE = "build it with 'pip install --no-build-isolation -e .' in the source tree (needs a C++17 compiler)"
NOT_BUILT = f"the C++ extension is not built: {BUILD_ADVICE}"

pytestmark = pytest.mark.skipif(
    "SPECKV_BACKEND" in os.environ, reason="every test here starts processes with a SPECKV_BACKEND of their own: "
                                           "run once, without it")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
needs_extension = pytest.mark.skipif(not list(SOURCE.glob("_C*.so")), reason=NOT_BUILT)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without a GPU is wanted")

SERVING = "import speckv.kernels as k; print(k.serving()['cpu'])"
CALL = "import torch; print(k.draft_sample(torch.zeros(1, 4), torch.ones(1), torch.tensor([.6]))[0])"


def python(code, path=None, cwd="/", **environment):
    """Run code in a fresh process: with only these settings of ours, and `path` before the installed packages."""
    inherited = {name: value for name, value in os.environ.items()
                 if name not in ("SPECKV_BACKEND", "TRITON_INTERPRET", "PYTHONPATH", "PYTHONWARNINGS")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env={**inherited, **environment},
                          capture_output=True, text=True, timeout=120)


@pytest.fixture
def without_extension(tmp_path):
    """A folder from which speckv.kernels is imported as built without a compiler."""
    package = tmp_path / "speckv"
    shutil.copytree(SOURCE, package / "kernels", ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    (package / "__init__.py").touch()
    return tmp_path


def assert_import_error(result, words):
    assert result.returncode != 0
    assert f"ImportError: {words}" in result.stderr


def test_an_unknown_backend_is_an_error_that_names_the_known_ones():
    assert_import_error(python(SERVING, SPECKV_BACKEND="fast"),
                        "SPECKV_BACKEND=fast: must be one of reference, triton, cpu")


def test_the_reference_can_be_forced_and_does_not_warn():
    result = python(f"{SERVING}; {CALL}", SPECKV_BACKEND="reference")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "('reference', 'SPECKV_BACKEND=reference')\ntensor([2])\n"
    assert "UserWarning" not in result.stderr


@needs_extension
def test_the_extension_serves_by_default_and_can_be_forced():
    for environment, why in (({}, "the C++ extension is loaded"), ({"SPECKV_BACKEND": "cpu"}, "SPECKV_BACKEND=cpu")):
        result = python(f"{SERVING}; {CALL}", **environment)
        assert result.returncode == 0, result.stderr
        assert re.fullmatch(rf"\('cpu', '{re.escape(why)}, its \w+ loops'\)\ntensor\(\[2\]\)\n", result.stdout)
        assert "UserWarning" not in result.stderr


@needs_triton
@needs_no_gpu
def test_triton_forced_without_gpu_or_interpreter_is_an_error_that_says_why():
    assert_import_error(
        python(SERVING, SPECKV_BACKEND="triton"),
        "SPECKV_BACKEND=triton: Triton needs a CUDA or ROCm GPU, or TRITON_INTERPRET=1 to run in its interpreter")


def test_triton_forced_where_it_is_not_installed_is_an_error_that_says_why():
    hide = ("import importlib.util as u; find = u.find_spec;"
            "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest);")
    assert_import_error(python(hide + SERVING, SPECKV_BACKEND="triton", TRITON_INTERPRET="1"),
                        "SPECKV_BACKEND=triton: Triton is not installed: pip install 'speckv[triton]'")


@needs_triton
def test_triton_can_be_forced_in_its_interpreter():
    result = python(f"{SERVING}; {CALL}", SPECKV_BACKEND="triton", TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    assert result.stdout == "('triton', 'SPECKV_BACKEND=triton')\ntensor([2])\n"


def test_the_extension_forced_where_it_is_not_built_is_an_error_that_says_what_to_do(without_extension):
    assert_import_error(python(SERVING, path=without_extension, SPECKV_BACKEND="cpu"),
                        f"SPECKV_BACKEND=cpu: {NOT_BUILT}")


def test_without_the_extension_the_reference_serves_and_one_warning_says_so(without_extension):
    again = "import importlib, speckv.kernels.ops; from speckv.kernels import draft_sample"
    result = python(f"{SERVING}; {CALL}; {CALL}; {again}", path=without_extension, PYTHONWARNINGS="always")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("('reference', ") and result.stdout.endswith("tensor([2])\ntensor([2])\n")
    assert result.stderr.count(f"speckv runs its CPU ops in the slower PyTorch reference: {NOT_BUILT}") == 1


def test_an_extension_that_does_not_load_is_told_apart_from_one_that_is_missing(without_extension):
    (without_extension / "speckv" / "kernels" / "_C.abi3.so").write_bytes(b"not a shared library")
    words = "the C++ extension does not load"
    result = python(f"{SERVING}; {CALL}", path=without_extension)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("('reference', ") and words in result.stdout
    assert result.stderr.count(words) == 1 and BUILD_ADVICE in result.stderr
    assert_import_error(python(SERVING, path=without_extension, SPECKV_BACKEND="cpu"), f"SPECKV_BACKEND=cpu: {words}")


def test_the_folder_of_the_sources_is_not_taken_for_hugging_faces_kernels():
    assert SOURCE.name == "kernels"
    result = python("import sys; sys.path.insert(0, ''); from kernels import get_kernel", cwd=SOURCE.parent)
    assert_import_error(result, "this folder is the source of speckv.kernels, not Hugging Face's 'kernels' library: "
                                "import speckv.kernels, and to import the library start Python outside the repository "
                                "root")


def test_python_started_in_the_repository_root_works():
    # There, transformers and bitsandbytes find the folder where they look for the library.
    result = python("import sys; sys.path.insert(0, ''); import speckv.kernels, transformers.integrations; "
                    "from transformers.utils import is_kernels_available; assert not is_kernels_available(); "
                    "from speckv import generate, load_target; from transformers import LlamaForCausalLM",
                    cwd=SOURCE.parent)
    assert result.returncode == 0, result.stderr


IMPORT = """
import sys
reached = []
sys.addaudithook(lambda event, args: reached.append((event, args)) if event.startswith("socket.") else None)
import torch
before = set(sys.modules)
import speckv.kernels
new = set(sys.modules) - before
assert not reached, reached
loaded = sorted(new & {"triton", "transformers", "bitsandbytes", "safetensors", "huggingface_hub"})
assert not loaded, f"loaded {loaded}"
print(*sorted(name for name in new if name.startswith("speckv")))
"""


def test_importing_the_kernels_touches_no_network_and_loads_neither_triton_nor_a_model_library():
    result = python(IMPORT)
    assert result.returncode == 0, result.stderr


def test_the_kernels_import_nothing_of_the_rest_of_speckv(without_extension):
    # With an empty speckv/__init__.py, and nothing else of speckv there to import.
    result = python(IMPORT, path=without_extension)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["speckv", "speckv.kernels", "speckv.kernels.checks", "speckv.kernels.ops",
                                     "speckv.kernels.reference"]


def test_the_public_names_are_the_ops_and_serving():
    assert kernels.__all__ == ["decode_attention", "draft_sample", "draft_step", "linear_int8", "plan_gamma",
                               "serving", "verify_chain"]
    for name in kernels.__all__:
        assert getattr(kernels, name).__doc__
