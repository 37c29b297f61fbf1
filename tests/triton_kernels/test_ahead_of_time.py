"""Every kernel compiles for the GPUs it is meant for, without a GPU, and spills no register there.

Compiled by bench/ahead_of_time.py, which bench/gpu.py prints the figures of.
"""

import os
import re
from importlib.metadata import version

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton: pip install 'speckv[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("needs a process without TRITON_INTERPRET, which replaces the compiler", allow_module_level=True)

from ahead_of_time import ALL_CASES, CASES, TARGETS, compiled, resources

# Three numbers wait in memory while a filtered draft_step looks for its threshold in 16-bit logits.
STACK_BYTES = {"filtered draft_step": 16}
# Of a split verify_chain on AMD, where scalars go to lanes of a vector register: no memory is touched.
SCALAR_SPILLS = {"split verify_chain": 11}
if tuple(map(int, version("triton").split(".")[:2])) < (3, 9):  # 3.7 comes with PyTorch 2.13 for CUDA
    STACK_BYTES = {"filtered draft_sample": 16, "filtered draft_step": 32, "filtered verify_chain": 176}
    SCALAR_SPILLS = {"verify_chain": 2, "split verify_chain": 12, "filtered verify_chain": 25}
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
    assert used.pop("sgpr_spills", 0) <= SCALAR_SPILLS.get(op, 0)
    assert not any(used.values()), f"spills: {used}"


def test_verify_chain_rounds_a_probability_before_subtracting():
    """Fused into one instruction, p - q leaves a residual between equal distributions; the interpreter never fuses."""
    binary, _ = compiled("sm_90", "verify_chain", torch.bfloat16, 151936)
    assert "sub.f32" in binary.asm["ptx"] or "sub.rn.f32" in binary.asm["ptx"]
    assert "fma.rn.f32" not in binary.asm["ptx"]
    assert not binary.metadata.enable_fp_fusion  # which keeps the assembler from fusing later


@pytest.mark.parametrize("op", ["split draft_sample", "split draft_step", "split verify_chain"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_programs_of_a_row_meet_in_the_order_that_the_memory_model_asks_for(target, op):
    """Partials stored, barrier, an atomic that releases and acquires for the whole GPU, loads that pass over L1."""
    binary, _ = compiled(target, op, torch.bfloat16, 151936)
    steps = re.findall(r"\bst\.global|\bbar\.sync|\batom\S*|\bld\.global\.cg", binary.asm["ptx"])
    [atomic] = [place for place, step in enumerate(steps) if step.startswith("atom")]
    assert steps[atomic] == "atom.global.gpu.acq_rel.add.u32"
    assert steps[:atomic].count("st.global") == 4 and "ld.global.cg" not in steps[:atomic]
    last_store = max(place for place in range(atomic) if steps[place] == "st.global")
    assert "bar.sync" in steps[last_store:atomic]
    assert steps[atomic + 1 : atomic + 3] == ["bar.sync", "st.global"]  # the counter's 0
    assert steps.count("ld.global.cg") == 4


@pytest.mark.parametrize("op", ["split draft_sample", "split verify_chain"])
def test_programs_of_a_row_write_caches_back_and_drop_them_on_amd(op):
    binary, _ = compiled("gfx942", op, torch.bfloat16, 151936)
    steps = re.findall(r"\bbuffer_wbl2 sc1|\bglobal_atomic_add\b|\bbuffer_inv sc1", binary.asm["amdgcn"])
    assert steps == ["buffer_wbl2 sc1", "global_atomic_add", "buffer_inv sc1"]


@pytest.mark.parametrize("op", ["draft_step", "verify_chain"])
@pytest.mark.parametrize("target", TARGETS)
def test_blocks_and_partials_are_summed_by_the_threads_that_sum_those_of_a_whole_row(target, op):
    """Else the order of the sums, and with it the last bit, would depend on the parts."""
    layouts = []
    for kind in ("", "split "):
        ir = compiled(target, kind + op, torch.bfloat16, 151936)[0].asm["ttgir"]
        definitions = dict(re.findall(r"^(#\w+) = (.*)$", ir, re.MULTILINE))
        sums = set(re.findall(r"\(tensor<(\d+)xf(32|64), (#\w+)>\) -> f", ir))
        layouts.append({(size, bits, definitions[name]) for size, bits, name in sums})
    assert layouts[0] == layouts[1]
    assert {(size, bits) for size, bits, _ in layouts[0]} >= {("4096", "32"), ("64", "32"), ("64", "64")}
