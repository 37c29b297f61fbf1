"""The Triton kernels as their launchers would have them compiled, for GPUs that are not there, and what they take.

The launchers themselves supply the arguments, so what is compiled is what they launch. For processes without
TRITON_INTERPRET, which replaces the compiler.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from speckv.kernels import draft, split, verify

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
         torch.int32: "*i32"}
KERNELS = {
    "draft_sample": (draft, "draft_sample_kernel"),
    "plan_gamma": (draft, "plan_gamma_kernel"),
    "draft_step": (draft, "draft_step_kernel"),
    "verify_chain": (verify, "verify_chain_kernel"),
}
# These cover every kernel, dtype and vocabulary; ALL_CASES is the full grid.
CASES = [
    ("draft_sample", torch.float16, 151936),
    ("split draft_sample", torch.float16, 151936),
    ("plan_gamma", None, None),  # takes no logits
    ("draft_step", torch.bfloat16, 151936),
    ("draft_step", torch.float32, 49152),
    ("split draft_step", torch.bfloat16, 151936),
    ("split draft_step", torch.float32, 49152),
    ("verify_chain", torch.bfloat16, 151936),
    ("verify_chain", torch.float32, 49152),
    ("split verify_chain", torch.bfloat16, 151936),
    ("split verify_chain", torch.float32, 49152),
    ("filtered draft_sample", torch.float16, 151936),
    ("filtered draft_step", torch.bfloat16, 151936),
    ("filtered verify_chain", torch.float32, 49152),
]
ALL_CASES = [("plan_gamma", None, None)] + [
    (op, dtype, vocabulary)
    for kind in ("", "split ", "filtered ")
    for op in (f"{kind}draft_sample", f"{kind}draft_step", f"{kind}verify_chain")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for vocabulary in (49152, 151936)
]


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.args, self.kwargs = args, kwargs
        return launch


def launch(op, dtype, vocabulary, rows=2, max_draft=4):
    """Call a launcher with a model's shapes, the paper's controller, and contents that do not matter.

    An op with "filtered " before its name is launched with all three filters, one with "split " with several programs
    a row, the others with one.
    """
    one_a_row = torch.ones(rows)
    count = torch.ones(rows, dtype=torch.int64)
    signals = torch.ones(rows, 5)
    controller = (
        torch.ones(6, 16), torch.ones(16), torch.ones(16, 1), torch.ones(1), torch.tensor([2, 4, 6, 8]), torch.ones(4),
    )  # fmt: skip
    *kind, op = op.split()
    filters = {"top_k": count, "top_p": one_a_row, "min_p": one_a_row} if kind == ["filtered"] else {}
    if op == "plan_gamma":
        draft.plan_gamma(signals, *controller)
        return
    target = torch.empty(rows, max_draft + 1, vocabulary, dtype=dtype)
    drafts = torch.empty(rows, max_draft, vocabulary, dtype=dtype)
    if op == "draft_sample":
        draft.draft_sample(drafts[:, 0], one_a_row, one_a_row, **filters)
    elif op == "draft_step":
        draft.draft_step(drafts[:, 0], one_a_row, one_a_row, signals, count, *controller, **filters)
    else:
        tokens = torch.ones(rows, max_draft, dtype=torch.int64)
        verify.verify_chain(target, drafts, tokens, count, one_a_row, torch.ones(rows, max_draft + 1), **filters)


def source(kernel, recorder):
    """The kernel specialized as a launch would: None and integers of 1 are constants, multiples of 16 known as such."""
    options = {name: value for name, value in recorder.kwargs.items() if name not in kernel.arg_names}
    values = dict(zip(kernel.arg_names, recorder.args, strict=False)) | recorder.kwargs
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        is_tensor = isinstance(value, torch.Tensor)
        if parameter.is_constexpr or value is None or (not is_tensor and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = TYPES[value.dtype] if is_tensor else "i32"
        if (value.data_ptr() if is_tensor else value) % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def resources(binary):
    """Registers, and what was spilled of them, as the assembler reports it."""
    if "cubin" in binary.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            report = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report.stdout + report.stderr))
        names = {"REG": "registers", "STACK": "stack", "LOCAL": "local"}
    else:
        usage = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count):\s+(\d+)", binary.asm["amdgcn"]))
        names = {"vgpr_count": "registers", "vgpr_spill_count": "vgpr_spills", "sgpr_spill_count": "sgpr_spills"}
    return {words: int(usage[name]) for name, words in names.items()}


def compiled(target, op, dtype, vocabulary):
    """The kernel of an op as its launcher would have it compiled for a target; returns it and its options."""
    module, name = KERNELS[op.split()[-1]]
    kernel, recorder = getattr(module, name), Recorder()
    with (
        mock.patch.object(module, name, recorder),
        mock.patch.object(split, "parts_of_a_row", lambda *_: 2 if op.startswith("split ") else 1),
        mock.patch.object(split, "programs_of_a_chain", lambda _, chain, *__: chain if op.startswith("split ") else 1),
    ):
        launch(op, dtype, vocabulary)
    kernel_source, options = source(kernel, recorder)
    return triton.compile(kernel_source, target=TARGETS[target], options=options), options
