"""Every kernel compiles for the GPUs it is meant for, without a GPU, and spills no register there.

Compiled by bench/ahead_of_time.py, which bench/gpu.py prints the figures of.
"""

import os

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET, which replaces the compiler", allow_module_level=True)

from ahead_of_time import ALL_CASES, CASES, TARGETS, compiled, resources

# Three numbers wait in memory while a filtered draft_step looks for its threshold in 16-bit logits.
STACK_BYTES = {"filtered draft_step": 16}
# A case takes a second for each target: the full grid is on request.
if os.environ.get("SPECKV_COMPILE_ALL") == "1":
    CASES = ALL_CASES


@pytest.mark.parametrize(("op", "dtype", "vocabulary"), CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_compiles_without_spills(target, op, dtype, vocabulary):
    binary, options = compiled(target, op, dtype, vocabulary)
    used = resources(binary)
    shared = binary.metadata.shared
    print(f"{target} {op} {dtype} {vocabulary}: {options['num_warps']} warps, {shared} B shared, {used}")
    registers = used.pop("registers")
    assert 0 < registers <= 255
    assert used.pop("stack", 0) <= STACK_BYTES.get(op, 0)
    assert not any(used.values()), f"spills: {used}"


def test_verify_chain_rounds_a_probability_before_subtracting():
    """Fused into one instruction, p - q leaves a residual between equal distributions; the interpreter never fuses."""
    binary, _ = compiled("sm_90", "verify_chain", torch.bfloat16, 151936)
    assert "sub.f32" in binary.asm["ptx"] or "sub.rn.f32" in binary.asm["ptx"]
    assert "fma.rn.f32" not in binary.asm["ptx"]
    assert not binary.metadata.enable_fp_fusion  # which keeps the assembler from fusing later
