"""Builds the C++ CPU kernels and places the folder kernels/ as the package speckv.kernels.

SPECKV_BUILD_CPP=0 leaves the kernels out; CPU tensors are then served by the PyTorch reference.
"""

import os
import platform
import shlex
import shutil
import sys
import sysconfig
from pathlib import Path

from setuptools import find_packages, setup

NO_EXTENSION = (
    "set SPECKV_BUILD_CPP=0 to install without the C++ kernels (CPU ops then run in the slower PyTorch reference)"
)


def compiler():
    """The C++ compiler that the build will call."""
    command = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    return shlex.split(command)[0]


def compile_arguments():
    # Vector pragmas without the OpenMP runtime; neither math flag changes a result or hides a NaN.
    arguments = ["-std=c++17", "-O3", "-g0", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math",
                 "-fvisibility=hidden"]
    if platform.machine().lower() in ("x86_64", "amd64") and sys.platform == "linux":
        arguments.append("-mprefer-vector-width=512")
    return arguments


def extension():
    """The extension module and the build command that compiles it."""
    if sys.platform == "win32":
        raise SystemExit(f"speckv: the C++ kernels need GCC or Clang on Linux or macOS: {NO_EXTENSION}")
    if shutil.which(compiler()) is None:
        raise SystemExit(
            f"speckv: no C++ compiler ({compiler()} is not found): install one, such as g++, or {NO_EXTENSION}"
        )
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        raise SystemExit(
            f"speckv: building the C++ kernels needs PyTorch ({error}): install torch first and pass "
            f"--no-build-isolation, or {NO_EXTENSION}"
        ) from error
    module = CppExtension(
        "speckv.kernels._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        # The stable ABI of torch 2.10, which later releases keep, and of Python: one build serves them all.
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        py_limited_api=True,
        extra_compile_args={"cxx": compile_arguments()},
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["speckv", "speckv.*"]), "speckv.kernels"],
    package_dir={"speckv.kernels": "kernels"},
    package_data={"speckv": ["weights/*/*"]},
    **(extension() if os.environ.get("SPECKV_BUILD_CPP", "1") != "0" else {}),
)
