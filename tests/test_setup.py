"""Building without a compiler fails at once, in words that tell the way out."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def setup(**environment):
    return subprocess.run([sys.executable, "setup.py", "--name"], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **environment})


def test_a_missing_compiler_is_named_with_the_way_out():
    result = setup(CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no C++ compiler (no-such-compiler is not found): install one, such as g++" in result.stderr
    assert "SPECKV_BUILD_CPP=0" in result.stderr and "Traceback" not in result.stderr


def test_the_extension_can_be_left_out():
    result = setup(CXX="no-such-compiler", SPECKV_BUILD_CPP="0")
    assert result.returncode == 0 and result.stdout.split()[-1] == "speckv"
