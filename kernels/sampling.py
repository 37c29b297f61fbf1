"""Drawing from rows of logits in Triton: what draft.py and verify.py share.

A row is read in blocks of BLOCK_V logits, and each block leaves its maximum and the sum of its weights
exp((logit - maximum) / temperature). Those two vectors, [NUM_BLOCKS] in registers, are all it takes to normalize the
row and to find the block in which the running sum of probabilities passes a uniform; only that block is read again.

A filter (top_k, top_p, min_p) keeps the logits from a threshold on, which is found by bisection on the bits of a
number: each pass over the row sums the weights from some number on. Where no row has a filter, none of it is compiled.

Sums within a block are fp32, everything that runs across blocks and every running sum is fp64: the boundaries of the
inverse CDF then lie within 1e-6 of the reference's.
"""

import triton
import triton.language as tl

LARGEST_BLOCK_V = 4096
LOWEST_KEY = tl.constexpr(-(2**31))  # of key_of()
LOGITS_PER_THREAD = 16  # two 16-byte loads of bf16, four of fp32: enough in flight, and no kernel spills

# A product is rounded before it is added or subtracted, as in the reference. Fused, p - q would not be 0 where p and
# q are the same distribution, and what is left, rounding, would be drawn from instead of p.
ROUNDED_PRODUCTS = {"enable_fp_fusion": False}


def launch_options(vocabulary):
    """The launch options for rows of logits: BLOCK_V, NUM_BLOCKS, num_warps (of 32 threads) and how to round."""
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
    """1 / temperature, and 1 where greedy; held to COLDEST and HOTTEST, so that no weight is 0 * inf or -inf * 0."""
    return tl.clamp(1.0 / tl.where(temperature > 0, temperature, 1.0), 1e-37, 3e38)


@triton.jit
def keep_from(logits, least):
    """-inf for the logits below `least`, the lowest one kept; None keeps all."""
    if least is not None:
        logits = tl.where(logits >= least, logits, float("-inf"))
    return logits


@triton.jit
def load_logits(row_ptr, block, vocabulary, BLOCK_V: tl.constexpr, least=None):
    """One block of a row in fp32: -inf past the vocabulary and below `least`, +inf for NaN.

    The maximum of a row, which would pass over a NaN, is then finite exactly where the row is a distribution.
    """
    token = block * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(row_ptr + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    return keep_from(tl.where(logits == logits, logits, float("inf")), least)


@triton.jit
def scan_block(row_ptr, block, vocabulary, inverse_t, BLOCK_V: tl.constexpr, least=None):
    """The maximum of a block of a row, and its sum of exp((logit - maximum) * inverse_t)."""
    logits = load_logits(row_ptr, block, vocabulary, BLOCK_V, least)
    maximum = tl.max(logits, axis=0)
    shifted = logits - tl.where(tl.abs(maximum) < float("inf"), maximum, 0.0)  # all -inf: weights 0, not NaN
    return maximum, tl.sum(tl.exp(shifted * inverse_t), axis=0)


@triton.jit
def scan_row(row_ptr, vocabulary, inverse_t, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr, least=None):
    """One pass over a row: what scan_block() says of each block, as two vectors [NUM_BLOCKS] f32."""
    index = tl.arange(0, NUM_BLOCKS)
    maxima = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    sums = tl.zeros([NUM_BLOCKS], tl.float32)
    for block in range(tl.cdiv(vocabulary, BLOCK_V)):
        maximum, weight = scan_block(row_ptr, block, vocabulary, inverse_t, BLOCK_V, least)
        maxima = tl.where(index == block, maximum, maxima)
        sums = tl.where(index == block, weight, sums)
    return maxima, sums


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


@triton.jit
def key_of(value):
    """int32 in the order of the fp32 numbers (-0 before +0)."""
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value_of(key):
    """The number of a key; -inf for the keys below that of -inf, which would be NaN."""
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return tl.where((key < 0) & (value != value), float("-inf"), value)


@triton.jit
def weight_from(
    key, least, row_ptr, highest, inverse_t, vocabulary, IS_COUNT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """What the logits from this key and from `least` on weigh: their number, or the sum of their weights; f64."""
    total = tl.full((), 0.0, tl.float64)
    for block in range(tl.cdiv(vocabulary, BLOCK_V)):
        logits = load_logits(row_ptr, block, vocabulary, BLOCK_V, least)
        weights = tl.where(logits > float("-inf"), 1.0, 0.0) if IS_COUNT else tl.exp((logits - highest) * inverse_t)
        total += tl.sum(tl.where(key_of(logits) >= key, weights, 0.0), axis=0).to(tl.float64)
    return total


@triton.jit
def value_reaching(
    limit, least, row_ptr, highest, inverse_t, vocabulary, IS_COUNT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The logit at which the weights from the highest down to it first reach limit > 0; -inf where they never do.

    Its key is the largest that has weights of limit from it on, and is found bit by bit, the sign first. Keys of
    16-bit logits differ in the upper bits only.
    """
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    LAST_BIT: tl.constexpr = 0 if DTYPE == tl.float32 else (16 if DTYPE == tl.bfloat16 else 13)
    key = tl.full((), LOWEST_KEY, tl.int32)
    if weight_from(0, least, row_ptr, highest, inverse_t, vocabulary, IS_COUNT, BLOCK_V) >= limit:
        key = tl.full((), 0, tl.int32)
    for i in range(31 - LAST_BIT):
        raised = key | (1 << (30 - i))
        weight = weight_from(raised, least, row_ptr, highest, inverse_t, vocabulary, IS_COUNT, BLOCK_V)
        key = tl.where(weight >= limit, raised, key)
    return value_of(key)


@triton.jit
def lowest_by_min_p(min_p, highest, inverse_t):
    """The lowest number x with (x - highest) * inverse_t >= log(min_p): one above the largest key that falls short."""
    log_min_p = tl.log(min_p)
    key = tl.full((), LOWEST_KEY, tl.int32)
    key = tl.where((0.0 - highest) * inverse_t < log_min_p, 0, key)
    for i in range(31):
        raised = key | (1 << (30 - i))
        key = tl.where((value_of(raised) - highest) * inverse_t < log_min_p, raised, key)
    return value_of(key + 1)


@triton.jit
def lowest_kept(row_ptr, highest, inverse_t, top_k, top_p, min_p, vocabulary, BLOCK_V: tl.constexpr):
    """The lowest logit that the filters keep of a row, -inf where they keep all; highest is the row's highest logit.

    Sources: top-k, Fan et al., arXiv 1805.04833; top-p, Holtzman et al., arXiv 1904.09751; min-p, Nguyen et al.,
    arXiv 2407.01082.
    """
    least = float("-inf")
    if top_k > 0:
        least = value_reaching(
            top_k.to(tl.float64), least, row_ptr, highest, inverse_t, vocabulary, True, BLOCK_V
        )
    if top_p < 1:
        mass = weight_from(LOWEST_KEY, least, row_ptr, highest, inverse_t, vocabulary, False, BLOCK_V)
        limit = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)  # at top_p = 0 the highest logits still stay
        nucleus = value_reaching(limit, least, row_ptr, highest, inverse_t, vocabulary, False, BLOCK_V)
        least = tl.maximum(least, nucleus)
    if min_p > 0:
        least = tl.maximum(least, lowest_by_min_p(min_p, highest, inverse_t))
    return least


@triton.jit
def load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr):
    """top_k, top_p and min_p of a row; those without a pointer are off."""
    top_k = tl.full((), 0, tl.int64)
    top_p = tl.full((), 1.0, tl.float32)
    min_p = tl.full((), 0.0, tl.float32)
    if top_k_ptr is not None:
        top_k = tl.load(top_k_ptr + row)
    if top_p_ptr is not None:
        top_p = tl.load(top_p_ptr + row)
    if min_p_ptr is not None:
        min_p = tl.load(min_p_ptr + row)
    return top_k, top_p, min_p


@triton.jit
def usable_filters(top_k, top_p, min_p):
    return (top_k >= 0) & (top_p >= 0) & (top_p <= 1) & (min_p >= 0) & (min_p <= 1)


def filter_arguments(top_k, top_p, min_p):
    """The kernel arguments that load_filters() takes; no copy where the settings are stored one after another."""
    filters = {"top_k_ptr": top_k, "top_p_ptr": top_p, "min_p_ptr": min_p}
    filters = {name: None if values is None else values.contiguous() for name, values in filters.items()}
    return {**filters, "IS_FILTERED": any(values is not None for values in filters.values())}
