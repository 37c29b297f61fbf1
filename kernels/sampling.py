"""Drawing from rows of logits in Triton: what draft.py and verify.py share.

A row is read in blocks of BLOCK_V logits, and each block leaves its maximum and the sum of its weights
exp((logit - maximum) / temperature). Those two vectors, [NUM_BLOCKS] in registers, are all it takes to normalize the
row and to find the block in which the running sum of probabilities passes a uniform; only that block is read again.

Sums within a block are fp32, everything that runs across blocks and every running sum is fp64: the boundaries of the
inverse CDF then lie within 1e-6 of the reference's.
"""

import triton
import triton.language as tl

LARGEST_BLOCK_V = 4096
LOGITS_PER_THREAD = 16  # two 16-byte loads of bf16, four of fp32: enough in flight, and no kernel spills

# A product is rounded before it is added or subtracted, as in the reference. Fused, p - q would not be 0 where p and
# q are the same distribution, and what is left, rounding, would be drawn from instead of p.
ROUNDED_PRODUCTS = {"enable_fp_fusion": False}


def launch_options(vocabulary):
    """The launch options of one program a row: BLOCK_V, NUM_BLOCKS, num_warps (of 32 threads) and how to round."""
    block_v = min(LARGEST_BLOCK_V, triton.next_power_of_2(vocabulary))
    return {
        "BLOCK_V": block_v,
        "NUM_BLOCKS": triton.next_power_of_2(triton.cdiv(vocabulary, block_v)),
        "num_warps": max(1, block_v // (32 * LOGITS_PER_THREAD)),
        **ROUNDED_PRODUCTS,
    }


@triton.jit
def is_finite(value):
    return tl.abs(value) < float("inf")


@triton.jit
def all_true(conditions):
    return tl.min(conditions.to(tl.int32), axis=0) == 1


@triton.jit
def usable(temperature):
    return (temperature >= 0) & is_finite(temperature)


@triton.jit
def inverse_temperature(temperature):
    """1 / temperature, and 1 where greedy; clamped so that neither 0 * inf nor -inf * 0 can arise in a weight."""
    return tl.clamp(1.0 / tl.where(temperature > 0, temperature, 1.0), 1e-37, 3e38)


@triton.jit
def load_logits(row_ptr, block, vocabulary, BLOCK_V: tl.constexpr):
    """One block of a row in fp32: -inf past the vocabulary, +inf for NaN.

    The maximum of a row, which would pass over a NaN, is then finite exactly where the row is a distribution.
    """
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(row_ptr + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    return tl.where(logits == logits, logits, float("inf"))


@triton.jit
def probability(logits, highest, scale, inverse_t):
    """softmax(logits * inverse_t), where highest and scale are what normalize() found of the row."""
    return tl.exp((logits - highest) * inverse_t) * scale


@triton.jit
def normalize(maxima, sums, inverse_t):
    """From the maxima and sums of a row's blocks: its highest logit, its scale and the probability of each block.

    maxima, sums [NUM_BLOCKS] f32. Returns highest and scale, scalars for probability(), and shares [NUM_BLOCKS] f64,
    which is 0 exactly where every token of the block has probability 0 in fp32.
    """
    highest = tl.max(maxima, axis=0)
    total = tl.sum(tl.exp((maxima - highest) * inverse_t).to(tl.float64) * sums, axis=0)
    scale = (1.0 / total).to(tl.float32)
    return highest, scale, probability(maxima, highest, scale, inverse_t).to(tl.float64) * sums


@triton.jit
def first_past(weights, threshold):
    """Index of the first weight at which the running sum exceeds threshold, and the threshold left at that weight.

    weights [N] >= 0, summed in fp64. A weight of 0 is never chosen, and a threshold that rounding put past the end is
    brought back to the last weight above 0.
    """
    index = tl.arange(0, weights.shape[0])
    weights = weights.to(tl.float64)
    last = tl.max(tl.where(weights > 0, index, 0), axis=0)
    passed = (tl.cumsum(weights, axis=0) > threshold) & (weights > 0)
    chosen = tl.min(tl.where(passed, index, last), axis=0)
    return chosen, threshold - tl.sum(tl.where(index < chosen, weights, 0.0), axis=0)


@triton.jit
def choose_block(shares, uniform):
    """The block that holds the token which `uniform` draws, and the threshold to pass within it."""
    return first_past(shares, uniform.to(tl.float64) * tl.sum(shares, axis=0))


@triton.jit
def choose_in_block(weights, threshold, BLOCK_V: tl.constexpr):
    """Index of the token within a block, weights [BLOCK_V] f32; a chunk first, so that no long vector is scanned."""
    CHUNK: tl.constexpr = min(64, BLOCK_V)
    chunks = tl.reshape(weights, [BLOCK_V // CHUNK, CHUNK])
    chunk, threshold = first_past(tl.sum(chunks, axis=1), threshold)
    is_chosen = tl.arange(0, BLOCK_V // CHUNK)[:, None] == chunk
    index, _ = first_past(tl.sum(tl.where(is_chosen, chunks, 0.0), axis=0), threshold)
    return chunk * CHUNK + index


@triton.jit
def first_highest(row_ptr, maxima, vocabulary, BLOCK_V: tl.constexpr):
    """Id of a row's highest logit, the lowest id on ties; reads one block."""
    block = tl.argmax(maxima, axis=0)
    return block * BLOCK_V + tl.argmax(load_logits(row_ptr, block, vocabulary, BLOCK_V), axis=0)
