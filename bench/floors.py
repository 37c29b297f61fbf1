"""What an op cannot be faster than on this machine, in one thread: reading its logits, and taking their exp.

How fast a buffer is read depends on the cache that it fits into, and a row of logits that is read again and again, or
that a matrix product has just written, comes from there: 49,152 bf16 logits are 98 kB. So the rate is measured at
several sizes, and the floor of a call takes that of the smallest buffer measured which holds all that the call reads.
"""

import time

import torch

import speckv.kernels  # noqa: F401  whose library brings torch.ops.speckv_bench

READ_KIB = (16, 128, 512, 2048, 8192, 16384, 262144)
REPEATS = 5            # the best counts: a floor is what the machine can do
READ_BYTES = 2**28     # of a measurement, all passes over the buffer together
EXP_VALUES = 4096      # fp32 that stay in L1
EXP_PASSES = 2000


def _best_seconds(function, *args, repeats=REPEATS):
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function(*args)
        times.append(time.perf_counter() - started)
    return min(times)


def measure():
    """{"read": [[KiB, GB/s], ...] by ascending size, "exp": elements/s}."""
    read = []
    for kib in READ_KIB:
        buffer = torch.zeros(kib * 256)
        passes = max(1, READ_BYTES // buffer.nbytes)
        read.append([kib, passes * buffer.nbytes / _best_seconds(torch.ops.speckv_bench.read_bytes, buffer, passes)
                     / 1e9])
    return {"read": read, "exp": measure_exp()}


def measure_exp(passes=EXP_PASSES, repeats=REPEATS):
    """Elements/s, in a few milliseconds, or as many fewer as there are fewer passes and repeats."""
    values = torch.linspace(-80, 0, EXP_VALUES)
    return EXP_VALUES * passes / _best_seconds(torch.ops.speckv_bench.sum_of_exp, values, passes, repeats=repeats)


def floor_us(floors, read_bytes, exps):
    """The larger of the two in microseconds, and which it is: "exp", or "read N KiB", N the buffer measured."""
    kib, rate = next((pair for pair in floors["read"] if read_bytes <= pair[0] * 1024), floors["read"][-1])
    read, exp = read_bytes / rate / 1e3, exps / floors["exp"] * 1e6
    return (exp, "exp") if exp >= read else (read, f"read {kib} KiB")


def sentence(floors):
    rates = ", ".join(f"{rate:.0f} ({kib:,} KiB)" for kib, rate in floors["read"])
    return f"This machine, one thread: reads {rates} GB/s; {floors['exp'] / 1e9:.2f} exp/ns."
