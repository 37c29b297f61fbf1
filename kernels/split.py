"""A row of logits read by several programs in one launch: what draft.py does where a batch alone leaves units idle.

Each program of a row measures its share of the row's blocks, stores what it found of each and counts itself in. The
one that comes last loads what all of them found and finishes the row as if it had read it alone: the blocks and their
sums are the same, so the results have the same bits, whoever comes last. No program waits for another.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl

UNITS_OF_THE_INTERPRETER = 16  # splits rows of a few blocks in tests, at some milliseconds a program
PROGRAMS_OF_A_UNIT = 2  # that it holds at once: 80 registers by 256 threads leave room for a third
# An SM at its peak rate of exp takes a quarter of a microsecond a block, and meeting about one (both: bench/gpu.py).
LEAST_BLOCKS_SAVED = 6


@triton.jit
def share_of_blocks(blocks):
    """The first block of its row that this program reads, and the one after its last."""
    share = tl.cdiv(blocks, tl.num_programs(1))
    first = tl.program_id(1) * share
    return first, tl.minimum(first + share, blocks)


@triton.jit
def store_partials(partials_ptr, measures, NUM_BLOCKS: tl.constexpr):
    """The four measures of one block, into a row's [4, NUM_BLOCKS] from this block on."""
    for i in tl.static_range(4):
        tl.store(partials_ptr + i * NUM_BLOCKS, measures[i])


@triton.jit
def comes_last(counter_ptr):
    """Whether the other programs of the row have stored their partials; the counter is 0 before and after a launch."""
    # Partials are scalars, which one thread of a program stores, the one that counts: its release covers them. The
    # barrier is there should a compiler have others store them.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    is_last = arrived == tl.num_programs(1) - 1
    tl.store(counter_ptr, 0, mask=is_last)
    return is_last


@triton.jit
def load_partials(partials_ptr, blocks, NUM_BLOCKS: tl.constexpr):
    """The measures of the first `blocks` blocks of a row, as vectors [NUM_BLOCKS] that are empty behind those.

    Read past L1, which does not see what other units write.
    """
    index = tl.arange(0, NUM_BLOCKS)
    mask = index < blocks
    maxima = tl.load(partials_ptr + index, mask=mask, other=float("-inf"), cache_modifier=".cg")
    sums_at_temperature = tl.load(partials_ptr + NUM_BLOCKS + index, mask=mask, other=0.0, cache_modifier=".cg")
    sums = tl.load(partials_ptr + 2 * NUM_BLOCKS + index, mask=mask, other=0.0, cache_modifier=".cg")
    moments = tl.load(partials_ptr + 3 * NUM_BLOCKS + index, mask=mask, other=0.0, cache_modifier=".cg")
    return maxima, sums_at_temperature, sums, moments


@functools.cache
def parts_of_a_row(rows, blocks, units):
    """How many programs share a row of so many blocks, on a GPU of so many units (SMs or CUs).

    As many as leave the busiest unit the fewest blocks to read, and as few as do. A row stays whole where less would
    be saved than meeting costs.
    """
    def most_blocks(share):
        return triton.cdiv(rows * triton.cdiv(blocks, share), units) * share
    shares = [share for share in range(blocks, 0, -1)
              if rows * triton.cdiv(blocks, share) <= PROGRAMS_OF_A_UNIT * units]
    best = min(shares, key=most_blocks, default=blocks)
    return triton.cdiv(blocks, best) if most_blocks(blocks) - most_blocks(best) >= LEAST_BLOCKS_SAVED else 1


@functools.cache
def units_of(device):
    if device.type != "cuda":
        return UNITS_OF_THE_INTERPRETER
    return torch.cuda.get_device_properties(device).multi_processor_count


# Stream, None on a CPU -> counters [rows] i32, all 0, and partials f32. Launches of one stream run one after the other
# and so can share them; on two streams they may overlap. Zeroed once: the last program of a row puts its counter back.
_workspaces = {}


def new_workspace(device, rows, partials):
    return (torch.zeros(rows, dtype=torch.int32, device=device),
            torch.empty(partials, dtype=torch.float32, device=device))


def new_workspace_to_keep(device, stream, rows, partials):
    """A workspace for launches on this stream, also later ones.

    Allocated in a thread of its own: what the thread that warms up the CUDA graphs of torch.compile allocates is taken
    from the graphs' memory, of which they refuse to have anything kept.
    """
    def allocate():
        with torch.cuda.stream(stream):
            return new_workspace(device, rows, partials)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(allocate).result()


@contextlib.contextmanager
def split_rows(logits, filters, options):
    """For one launch over logits [B, V]: how many programs share a row, and the arguments with which they meet.

    Rows with filters stay whole: the measuring is one of some hundred passes over them.
    """
    rows, vocabulary = logits.shape
    device = logits.device
    parts = parts_of_a_row(rows, triton.cdiv(vocabulary, options["BLOCK_V"]), units_of(device))
    if parts == 1 or filters["IS_FILTERED"]:
        yield 1, {"counters_ptr": None, "partials_ptr": None, "IS_SPLIT": False}
        return

    num_partials = rows * 4 * options["NUM_BLOCKS"]
    is_captured = logits.is_cuda and torch.cuda.is_current_stream_capturing()
    if is_captured:
        # A graph can be replayed on any stream, beside launches of the one it was captured on. So it has counters of
        # its own, zeroed by the graph in each replay.
        counters, partials = new_workspace(device, rows, num_partials)
    else:
        stream = torch.cuda.current_stream(device) if logits.is_cuda else None
        # Taken out while in use: a launch that fails, as one can in the interpreter, leaves counters that are not 0
        # to nobody. (A kernel that aborts on a GPU takes the process's whole context with it.)
        workspace = _workspaces.pop(stream, None)
        most_rows, most_partials = map(torch.numel, workspace) if workspace else (0, 0)
        if most_rows < rows or most_partials < num_partials:
            workspace = new_workspace_to_keep(
                device, stream, max(rows, most_rows), max(num_partials, most_partials))
        counters, partials = workspace
    yield parts, {"counters_ptr": counters, "partials_ptr": partials, "IS_SPLIT": True}
    if not is_captured:
        _workspaces[stream] = workspace
