"""A row read by several programs in one launch: what draft.py and verify.py do where a batch alone leaves units idle.

Each program of a row measures its share of the row's blocks, stores what it found of each and counts itself in. The
one that comes last loads what all of them found and finishes the row as if it had read it alone: the blocks and their
sums are the same, so the results have the same bits, whoever comes last. No program waits for another. In verify.py
a row of the batch has many rows of logits, and a program reads its share of one of them.
"""

import contextlib
import functools
from concurrent.futures import ThreadPoolExecutor

import torch
import triton
import triton.language as tl

UNITS_OF_THE_INTERPRETER = 16  # splits rows of a few blocks in tests, at some milliseconds a program
PROGRAMS_OF_A_UNIT = 2  # that it holds at once: 65,536 registers, for 256 threads of at most 128
# An SM at its peak rate of exp takes a quarter of a microsecond a block, and meeting about one (both: bench/gpu.py).
LEAST_BLOCKS_SAVED = 6


@triton.jit
def share_of_blocks(blocks, part, parts):
    """The first block of a row that one of its parts is to read, and the one after its last."""
    share = tl.cdiv(blocks, parts)
    first = part * share
    return first, tl.minimum(first + share, blocks)


@triton.jit
def store_partials(partials_ptr, measures, NUM_BLOCKS: tl.constexpr):
    """The measures of one block, into a row's [measures, NUM_BLOCKS] from this block on."""
    for i in tl.static_range(len(measures)):
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
def load_partials(partials_ptr, measure: tl.constexpr, blocks, NUM_BLOCKS: tl.constexpr):
    """A measure of the first `blocks` blocks of a row, as a vector [NUM_BLOCKS] that is empty behind those.

    Measure 0 are the maxima, the others sums. Read past L1, which does not see what other units write.
    """
    index = tl.arange(0, NUM_BLOCKS)
    empty = float("-inf") if measure == 0 else 0.0
    return tl.load(
        partials_ptr + measure * NUM_BLOCKS + index, mask=index < blocks, other=empty, cache_modifier=".cg"
    )


def best_share(rows, blocks, units):
    """How many blocks of a row a program is to read, and how many the busiest unit then does."""
    def most_blocks(share):
        return triton.cdiv(rows * triton.cdiv(blocks, share), units) * share
    shares = [share for share in range(blocks, 0, -1)
              if rows * triton.cdiv(blocks, share) <= PROGRAMS_OF_A_UNIT * units]
    best = min(shares, key=most_blocks, default=blocks)
    return best, most_blocks(best)


@functools.cache
def parts_of_a_row(rows, blocks, units):
    """How many programs share a row of so many blocks, on a GPU of so many units (SMs or CUs).

    As many as leave the busiest unit the fewest blocks to read, and as few as do. A row stays whole where less would
    be saved than meeting costs.
    """
    share, most_blocks = best_share(rows, blocks, units)
    saved = triton.cdiv(rows, units) * blocks - most_blocks
    return triton.cdiv(blocks, share) if saved >= LEAST_BLOCKS_SAVED else 1


@functools.cache
def programs_of_a_chain(rows, chain, blocks, units):
    """How many programs share a row of the batch that has `chain` rows of logits, of the target and of the draft.

    As many for each row of logits as leave the busiest unit the fewest blocks. A chain stays whole, one program, unless
    that is less than one program reads at least: all of a target row and, where there is a draft, of a draft row. (A
    greedy row that rejects its first token reads half of that, and can lose what meeting costs.)
    """
    share, most_blocks = best_share(rows * chain, blocks, units)
    saved = triton.cdiv(rows, units) * min(chain, 2) * blocks - most_blocks
    return chain * triton.cdiv(blocks, share) if saved >= LEAST_BLOCKS_SAVED else 1


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
    """For one launch over logits [B, V], or target logits [B, K + 1, V]: how many programs share a row of the batch,
    and the arguments with which they meet.

    Rows with filters stay whole: the measuring is one of some hundred passes over them.
    """
    rows, *width, vocabulary = logits.shape
    device = logits.device
    blocks, units = triton.cdiv(vocabulary, options["BLOCK_V"]), units_of(device)
    if width:
        chain = 2 * width[0] - 1
        programs, measures = programs_of_a_chain(rows, chain, blocks, units), chain * 2
    else:
        programs, measures = parts_of_a_row(rows, blocks, units), 4
    if programs == 1 or filters["IS_FILTERED"]:
        yield 1, {"counters_ptr": None, "partials_ptr": None, "IS_SPLIT": False}
        return

    num_partials = rows * measures * options["NUM_BLOCKS"]
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
    yield programs, {"counters_ptr": counters, "partials_ptr": partials, "IS_SPLIT": True}
    if not is_captured:
        _workspaces[stream] = workspace
