"""The Triton kernels on a GPU: python bench/gpu.py

On a GPU it checks every op against the reference, then times it and prints the time beside what a roofline expects;
those that read logits twice, with rows split over several programs, as they are launched, and with one program a row.
Without one there are two things that need none: --compile-only compiles the kernels ahead of time and prints what they
take of each GPU, --expected prints the roofline of three.
"""

import argparse
import contextlib
import math
import sys
from dataclasses import dataclass
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

LAUNCH_US = 4.0  # assumed: from one kernel of a stream to the next, with nothing to do; of the host's side nothing
MEETING_US = 1.0  # assumed: programs of a row hand over: partials to L2, the counter there and back, partials back
UNIT_BYTES_PER_CLOCK = 64  # assumed: what one SM or CU takes in from L2


@dataclass(frozen=True)
class GPU:
    """Peaks of a card; units are SMs or CUs, on one of which a program runs."""

    name: str
    bandwidth: float        # bytes/s
    units: int
    clock: float            # Hz
    lanes: int              # fp32 operations a clock in a unit; a fused multiply-add is one
    exps_per_clock: int     # in a unit

    def expected_us(self, work):
        """Launch, meeting, and the slowest of memory, intake of the busy units, exp and arithmetic at their peaks."""
        meeting = 0.0 if work.share is None else MEETING_US
        after = self.busy_us(work.after_meeting) if work.after_meeting else 0.0
        return LAUNCH_US + meeting + self.busy_us(work) + after

    def busy_us(self, work):
        busy = min(work.rows / (work.share or 1), self.units)
        return 1e6 * max(
            work.memory_bytes / self.bandwidth,
            work.unit_bytes / (busy * UNIT_BYTES_PER_CLOCK * self.clock),
            work.exps / (busy * self.exps_per_clock * self.clock),
            work.operations / (busy * self.lanes * self.clock))

    def memory_us(self, work):
        """The same were it only for the memory, all units at work."""
        return LAUNCH_US + 1e6 * work.memory_bytes / self.bandwidth


# Bandwidth and units: NVIDIA A100 80GB (SXM) and H100 (SXM) data sheets, AMD Instinct MI300X data sheet. Clocks are the
# boost clocks behind the fp32 peaks of the same sheets: 19.5, 67 and 163.4 TFLOPS. exp: NVIDIA's CUDA C++ Programming
# Guide, throughput of arithmetic instructions (16 a clock in an SM of 8.0 and 9.0); for AMD a quarter of 64 lanes.
GPUS = (
    GPU("A100", 2.039e12, 108, 1.41e9, 64, 16),
    GPU("H100", 3.35e12, 132, 1.98e9, 128, 16),
    GPU("MI300X", 5.3e12, 304, 2.1e9, 128, 16),
)


@dataclass(frozen=True)
class Work:
    """What a call does; unit_bytes are what the units take in, rows read again from a cache among it."""

    rows: int
    memory_bytes: float
    unit_bytes: float
    exps: float
    operations: float
    share: float | None = None  # rows of logits that the busiest unit reads where they are split, else None
    after_meeting: "Work | None" = None  # what the last program of a row does alone


# Operations a logit, counted in the source: max, shift, two exps with their sums and the moment; max, exp, sum; both
# probabilities, difference and sum.
DRAFT_OPERATIONS, SCAN_OPERATIONS, RESIDUAL_OPERATIONS = 14, 8, 12
GAMMA, UNITS, CANDIDATES, SIGNALS = 4, 16, 4, 5
CHAIN = 2 * GAMMA + 1  # rows of logits, of the target and of the draft
VOCABULARIES = (49152, 128256, 151936)
ROWS = (1, 8, 64)
# op, rows, vocabulary, after how many accepted tokens verify_chain rejects
SHAPES = [
    *(("draft_sample", rows, vocabulary, None) for vocabulary in VOCABULARIES for rows in ROWS),
    *(("draft_step", rows, 151936, None) for rows in ROWS),
    *(("plan_gamma", rows, None, None) for rows in ROWS),
    *(("verify_chain", rows, 128256, stop) for stop in (0, GAMMA) for rows in ROWS),
]


def share_of_a_row(op, rows, vocabulary, units):
    """How many rows of logits the busiest unit reads, as the op is launched on a GPU of so many units; None: whole."""
    if op == "plan_gamma":
        return None
    from speckv.kernels import sampling, split

    block_v = sampling.launch_options(vocabulary)["BLOCK_V"]
    blocks = math.ceil(vocabulary / block_v)
    chain = CHAIN if op == "verify_chain" else 1
    if op == "verify_chain":
        programs = split.programs_of_a_chain(rows, chain, blocks, units)
    else:
        programs = split.parts_of_a_row(rows, blocks, units)
    if programs == 1:
        return None
    return math.ceil(blocks * chain / programs) * math.ceil(rows * programs / units) * block_v / vocabulary


def work_of(op, rows, vocabulary, stop, share=None):
    """bf16 logits, temperature 0.8."""
    if op == "plan_gamma":
        weights = 4 * ((SIGNALS + 3) * UNITS + 1 + 3 * CANDIDATES)
        return Work(rows, weights + 4 * rows * SIGNALS, rows * weights, 0, rows * UNITS * (SIGNALS + 2 * CANDIDATES))
    logits = rows * vocabulary
    if op != "verify_chain":
        return Work(rows, 2 * logits, 2 * logits, 2 * logits, DRAFT_OPERATIONS * logits, share)
    again = 2 if stop < GAMMA else 0
    if share is not None:
        residual = Work(rows, 0, 2 * logits * again, logits * again, RESIDUAL_OPERATIONS * logits * (again > 0))
        scanned = logits * CHAIN
        return Work(rows * CHAIN, 2 * scanned, 2 * scanned, scanned, SCAN_OPERATIONS * scanned, share, residual)
    read = min(stop + 1, GAMMA) + stop + 1
    return Work(rows, 2 * logits * read, 2 * logits * (read + again), logits * (read + again),
                logits * (SCAN_OPERATIONS * read + RESIDUAL_OPERATIONS * (again > 0)))


def label(op, rows, vocabulary, stop, is_split=True):
    words = [op, f"B={rows}"]
    if vocabulary:
        words.append(f"V={vocabulary}")
    if stop is not None:
        words.append(f"gamma={GAMMA}, {'none rejected' if stop == GAMMA else 'first rejected'}")
    if not is_split:
        words.append("one program a row")
    return " ".join(words)


def variants():
    """(shape, is_split): each shape as it is launched, and once more with whole rows where that differs."""
    return [(shape, is_split) for shape in SHAPES for is_split in (True, False) if is_split or shape[0] != "plan_gamma"]


def work_on(gpu, shape, is_split):
    return work_of(*shape, share=share_of_a_row(*shape[:3], gpu.units) if is_split else None)


def new_table(title, *columns):
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right", no_wrap=True)
    return table


def expected():
    """What the roofline says of the kernels as they are launched, with one program a row, and bound by memory alone."""
    table = new_table("expected microseconds a call, bf16 logits, T=0.8 (were memory the only limit)",
                      "call", "MB", "M exp", "M operations", *(gpu.name for gpu in GPUS))
    for shape, is_split in variants():
        work = work_of(*shape)
        table.add_row(label(*shape, is_split), f"{work.memory_bytes / 1e6:.2f}", f"{work.exps / 1e6:.2f}",
                      f"{work.operations / 1e6:.2f}",
                      *(f"{gpu.expected_us(work_on(gpu, shape, is_split)):.1f} ({gpu.memory_us(work):.1f})"
                        for gpu in GPUS))
    return table


def compiled_table(targets, ops, everything):
    """Registers a thread, bytes of shared memory and spilled registers of each kernel."""
    from ahead_of_time import ALL_CASES, CASES, compiled, resources

    table = new_table("registers a thread / bytes of shared memory / spills, compiled ahead of time",
                      "kernel", "logits", "V", "warps", *targets)
    for op, dtype, vocabulary in ALL_CASES if everything else CASES:
        if ops and op not in ops:
            continue
        cells = []
        for target in targets:
            binary, options = compiled(target, op, dtype, vocabulary)
            used = resources(binary)
            registers = used.pop("registers")
            spills = ", ".join(f"{amount} {'B stack' if name in ('stack', 'local') else name.replace('_', ' ')}"
                               for name, amount in used.items() if amount)
            cells.append(f"{registers} / {binary.metadata.shared} / {spills or 'none'}")
        table.add_row(op, str(dtype).removeprefix("torch.") if dtype else "–", f"{vocabulary or '–'}",
                      str(options["num_warps"]), *cells)
    return table


def inputs_of(op, rows, vocabulary, stop):
    """Arguments of an op on the CPU."""
    generator = torch.Generator().manual_seed(rows)
    controller = (*(torch.randn(shape, generator=generator) / UNITS
                    for shape in ((SIGNALS + 1, UNITS), (UNITS,), (UNITS, 1), (1,))),
                  torch.arange(2, 2 * CANDIDATES + 1, 2), torch.ones(CANDIDATES))
    signals = torch.rand(rows, SIGNALS, generator=generator)
    if op == "plan_gamma":
        return signals, *controller
    temperature, uniform = torch.full((rows,), 0.8), torch.rand(rows, generator=generator)

    def logits(*shape):
        return (3 * torch.randn(shape, generator=generator)).bfloat16()
    if op == "draft_sample":
        return logits(rows, vocabulary), temperature, uniform
    if op == "draft_step":
        drafted = torch.full((rows,), 3)
        return logits(rows, vocabulary), temperature, uniform, signals, drafted, *controller
    draft = logits(rows, GAMMA, vocabulary)
    target = torch.cat([draft, draft[:, :1]], dim=1)
    tokens = draft.argmax(dim=-1)
    if stop < GAMMA:
        target[torch.arange(rows), stop, tokens[:, stop]] = -math.inf
    return target, draft, tokens, torch.full((rows,), GAMMA), temperature, torch.rand(rows, GAMMA + 1,
                                                                                     generator=generator)


def wrong_outputs(outputs, wanted):
    """Which outputs differ from the reference's, by number."""
    return [number for number, (output, right) in enumerate(zip(outputs, wanted, strict=True))
            if not torch.allclose(output.cpu().double(), right.double(), rtol=1e-3, atol=1e-5)]


def whole_rows():
    """Launches with one program a row."""
    from speckv.kernels import split

    return mock.patch.multiple(split, parts_of_a_row=lambda *_: 1, programs_of_a_chain=lambda *_: 1)


def launched_otherwise(call):
    """The outputs of many calls on two streams at once, and of a call that a graph replays."""
    outputs, streams = [], (torch.cuda.Stream(), torch.cuda.Stream())
    torch.cuda.synchronize()
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(call())
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return [*outputs, captured]


def measured(console):
    """Check and time on the GPU that is there; 1 where an op is wrong."""
    from triton.testing import do_bench

    import speckv.kernels as kernels
    from speckv.kernels import reference

    name = torch.cuda.get_device_name()
    gpu = next((gpu for gpu in GPUS if gpu.name in name), None)
    table = new_table(f"median microseconds a call on {name}, caches cleared between calls", "call", "measured",
                      "expected", "measured / expected", "GB/s")
    failed = False
    for shape, is_split in variants():
        op, inputs, title = shape[0], inputs_of(*shape), label(*shape, is_split)
        on_gpu = [tensor.cuda() for tensor in inputs]

        def call(op=op, on_gpu=on_gpu):
            return getattr(kernels, op)(*on_gpu)
        with whole_rows():
            whole = call()
        with contextlib.nullcontext() if is_split else whole_rows():
            outputs = call()
            if wrong := wrong_outputs(outputs, getattr(reference, op)(*inputs)):
                console.print(f"{title}: output {wrong} is not the reference's: not timed", style="red")
                failed = True
                continue
            microseconds = 1e3 * do_bench(call, return_mode="median")
            others = [outputs, call(), *launched_otherwise(call)]
        if not all(torch.equal(one, right) for other in others for one, right in zip(other, whole, strict=True)):
            console.print(f"{title}: launches differ in bits from one program a row", style="red")
            failed = True
        work = work_of(*shape)
        wanted = gpu.expected_us(work_on(gpu, shape, is_split)) if gpu else None
        table.add_row(title, f"{microseconds:.1f}", f"{wanted:.1f}" if wanted else "unknown card",
                      f"{microseconds / wanted:.2f}" if wanted else "", f"{work.memory_bytes / microseconds / 1e3:.0f}")
    console.print(table)
    return int(failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true",
                        help="registers, shared memory and spills of each kernel")
    parser.add_argument("--expected", action="store_true", help="the roofline of three GPUs")
    parser.add_argument("--targets", default="sm_80,sm_90,sm_100,gfx942", help="what --compile-only compiles for")
    parser.add_argument("--ops", help="which of them --compile-only compiles, comma-separated; all if not given")
    parser.add_argument("--all", action="store_true", help="every dtype and vocabulary of each kernel")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.width = max(console.width, 160)  # a table folded to 80 columns, as in a log, cannot be read
    if arguments.compile_only:
        ops = arguments.ops and arguments.ops.split(",")
        console.print(compiled_table(arguments.targets.split(","), ops, arguments.all))
    if arguments.expected:
        console.print(expected())
    if arguments.compile_only or arguments.expected:
        return 0
    if not torch.cuda.is_available():
        print("bench/gpu.py: no GPU here: --compile-only says what the kernels take of one, --expected what a roofline "
              "promises", file=sys.stderr)
        return 2
    return measured(console)


if __name__ == "__main__":
    sys.exit(main())
