"""The draft side in Triton: draft_sample, plan_gamma, and draft_step, which is both in one launch.

reference.py is the specification. Where it raises, a kernel cannot: token is -1 (prob, entropy and confidence NaN)
in a row whose logits, temperature or uniform it would refuse, and gamma is -1 in a row whose acceptance, drafted or
seconds it would refuse, or whose token is -1. Other rows are not affected.
"""

import torch
import triton
import triton.language as tl

from speckv.kernels import checks
from speckv.kernels.sampling import (
    ROUNDED_PRODUCTS,
    all_true,
    choose_block,
    choose_in_block,
    filter_arguments,
    first_highest,
    inverse_temperature,
    is_finite,
    launch_options,
    load_filters,
    load_logits,
    lowest_kept,
    normalize,
    probability,
    scan_row,
    usable,
    usable_filters,
)
from speckv.kernels.split import comes_last, load_partials, share_of_blocks, split_rows, store_partials

NATS_TO_BITS = tl.constexpr(1.4426950408889634)  # 1 / ln 2


@triton.jit
def measure_block(row_ptr, block, vocabulary, inverse_t, BLOCK_V: tl.constexpr):
    """The maximum of a block of a row, and sums over its shifted logits x = logit - maximum.

    These are of exp(x * inverse_t) for drawing, of exp(x) and of x * exp(x) for confidence and entropy. Blocks meet
    only in the end, so nothing is rescaled on the way.
    """
    logits = load_logits(row_ptr, block, vocabulary, BLOCK_V)
    maximum = tl.max(logits, axis=0)
    shifted = logits - tl.where(tl.abs(maximum) < float("inf"), maximum, 0.0)  # all -inf: weights 0, not NaN
    weights = tl.exp(shifted)
    moment = weights * tl.where(weights > 0, shifted, 0.0)  # 0 log 0 is 0, not NaN
    return maximum, tl.sum(tl.exp(shifted * inverse_t), axis=0), tl.sum(weights, axis=0), tl.sum(moment, axis=0)


@triton.jit
def measure_row(row_ptr, vocabulary, inverse_t, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """The one pass over a row: what measure_block() says of each block, as four vectors [NUM_BLOCKS] f32."""
    index = tl.arange(0, NUM_BLOCKS)
    maxima = tl.full([NUM_BLOCKS], float("-inf"), tl.float32)
    sums_at_temperature = tl.zeros([NUM_BLOCKS], tl.float32)
    sums = tl.zeros([NUM_BLOCKS], tl.float32)
    moments = tl.zeros([NUM_BLOCKS], tl.float32)
    for block in range(tl.cdiv(vocabulary, BLOCK_V)):
        measures = measure_block(row_ptr, block, vocabulary, inverse_t, BLOCK_V)
        here = index == block
        maxima = tl.where(here, measures[0], maxima)
        sums_at_temperature = tl.where(here, measures[1], sums_at_temperature)
        sums = tl.where(here, measures[2], sums)
        moments = tl.where(here, measures[3], moments)
    return maxima, sums_at_temperature, sums, moments


@triton.jit
def measure_split_row(
    row, row_ptr, counters_ptr, partials_ptr, vocabulary, inverse_t, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    """This program's share of measure_row(): whether it is the one to finish the row, and then what that returns."""
    blocks = tl.cdiv(vocabulary, BLOCK_V)
    row_partials_ptr = partials_ptr + row * 4 * NUM_BLOCKS
    first, stop = share_of_blocks(blocks, tl.program_id(1), tl.num_programs(1))
    for block in range(first, stop):
        measures = measure_block(row_ptr, block, vocabulary, inverse_t, BLOCK_V)
        store_partials(row_partials_ptr + block, measures, NUM_BLOCKS)
    is_last = comes_last(counters_ptr + row)
    blocks = tl.where(is_last, blocks, 0)
    maxima = load_partials(row_partials_ptr, 0, blocks, NUM_BLOCKS)
    sums_at_temperature = load_partials(row_partials_ptr, 1, blocks, NUM_BLOCKS)
    sums = load_partials(row_partials_ptr, 2, blocks, NUM_BLOCKS)
    moments = load_partials(row_partials_ptr, 3, blocks, NUM_BLOCKS)
    return is_last, (maxima, sums_at_temperature, sums, moments)


@triton.jit
def uncertainty(maxima, sums, moments):
    """Entropy in bits and confidence of softmax(logits), from what measure_row() left of the row."""
    highest = tl.max(maxima, axis=0)
    gap = tl.where(maxima > float("-inf"), maxima - highest, 0.0)
    factor = tl.exp(gap)
    total = tl.sum(factor * sums, axis=0)
    mean_shifted = tl.sum(factor * (moments + gap * sums), axis=0) / total
    return (tl.log(total) - mean_shifted) * NATS_TO_BITS, 1.0 / total


@triton.jit
def draw_token(row_ptr, maxima, sums, inverse_t, least, uniform, vocabulary, BLOCK_V: tl.constexpr):
    """The token at `uniform` in the inverse CDF, and its probability; reads one block."""
    highest, scale, shares = normalize(maxima, sums, inverse_t)
    block, threshold = choose_block(shares, uniform)
    logits = load_logits(row_ptr, block, vocabulary, BLOCK_V, least)
    probabilities = probability(logits, highest, scale, inverse_t)
    chosen = choose_in_block(probabilities, threshold, BLOCK_V)
    prob = tl.sum(tl.where(tl.arange(0, BLOCK_V) == chosen, probabilities, 0.0), axis=0)
    return block * BLOCK_V + chosen, prob


@triton.jit
def sample_row(
    row_ptr, measures, temperature, inverse_t, uniform, top_k, top_p, min_p, vocabulary,
    BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr, IS_FILTERED: tl.constexpr,
):  # fmt: skip
    """draft_sample of one row, measured by measure_row(): token, prob, entropy, confidence."""
    maxima, sums_at_temperature, sums, moments = measures
    token = -1
    prob = float("nan")
    entropy = float("nan")
    confidence = float("nan")
    valid = usable(temperature) & usable_filters(top_k, top_p, min_p) & (uniform >= 0) & (uniform < 1)
    if is_finite(tl.max(maxima, axis=0)) & valid:
        entropy, confidence = uncertainty(maxima, sums, moments)
        if temperature == 0:
            token = first_highest(row_ptr, maxima, vocabulary, BLOCK_V)
            prob = 1.0
        else:
            least = None
            if IS_FILTERED:
                least = lowest_kept(
                    row_ptr, tl.max(maxima, axis=0), inverse_t, top_k, top_p, min_p, vocabulary, BLOCK_V
                )
                maxima, sums_at_temperature = scan_row(
                    row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS, least
                )
            token, prob = draw_token(
                row_ptr, maxima, sums_at_temperature, inverse_t, least, uniform, vocabulary, BLOCK_V
            )
    return token, prob, entropy, confidence


@triton.jit
def update_signals(signals, drafted, entropy, confidence, BLOCK_F: tl.constexpr):
    """The running signals [BLOCK_F] with one more draft token: mean entropy, mean confidence, max entropy, min
    confidence; the columns after those stay as they are."""
    column = tl.arange(0, BLOCK_F)
    fresh = tl.where((column == 0) | (column == 2), entropy, confidence)
    count = drafted.to(tl.float32)
    mean = (signals * count + fresh) / (count + 1)
    highest = tl.maximum(signals, fresh, propagate_nan=tl.PropagateNan.ALL)
    lowest = tl.minimum(signals, fresh, propagate_nan=tl.PropagateNan.ALL)
    running = tl.where(column < 2, mean, tl.where(column == 2, highest, lowest))
    return tl.where(column < 4, tl.where(drafted == 0, fresh, running), signals)


@triton.jit
def best_gamma(
    signals,
    w1_ptr,  # [F + 1, H]
    b1_ptr,  # [H]
    w2_ptr,  # [H, 1]
    b2_ptr,  # [1]
    gammas_ptr,  # [G]
    seconds_ptr,  # [G]
    rate,  # tokens per second, or 0
    num_signals,
    num_hidden,
    num_candidates,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """plan_gamma of one row, signals [BLOCK_F] being 0 past F: gamma, and acceptance [BLOCK_G]."""
    feature = tl.arange(0, BLOCK_F)
    unit = tl.arange(0, BLOCK_H)
    candidate = tl.arange(0, BLOCK_G)
    is_unit = unit < num_hidden
    is_candidate = candidate < num_candidates

    w1 = tl.load(
        w1_ptr + feature[:, None] * num_hidden + unit[None, :],
        mask=(feature < num_signals)[:, None] & is_unit[None, :],
        other=0.0,
    )
    w1_gamma = tl.load(w1_ptr + num_signals * num_hidden + unit, mask=is_unit, other=0.0)
    b1 = tl.load(b1_ptr + unit, mask=is_unit, other=0.0)
    w2 = tl.load(w2_ptr + unit, mask=is_unit, other=0.0)
    gammas = tl.load(gammas_ptr + candidate, mask=is_candidate, other=0)
    seconds = tl.load(seconds_ptr + candidate, mask=is_candidate, other=1.0)

    # Only the last input differs between candidates, so the first layer is computed once for the others.
    from_signals = tl.sum(signals[:, None] * w1, axis=0) + b1
    hidden = from_signals[None, :] + gammas.to(tl.float32)[:, None] * w1_gamma[None, :]
    hidden = tl.where((hidden < 0) | ~is_unit[None, :], 0.0, hidden)  # a relu that, unlike tl.maximum, keeps NaN
    acceptance = tl.sum(hidden * w2[None, :], axis=1) + tl.load(b2_ptr)

    expected_tokens = tl.minimum(tl.maximum(acceptance, 0.0), 1.0) * gammas.to(tl.float32) + 1
    usable_candidate = is_finite(acceptance) & is_finite(seconds) & (seconds > 0)
    score = tl.where(rate > 0, expected_tokens - rate * seconds, tl.div_rn(expected_tokens, seconds))
    score = tl.where(usable_candidate & is_candidate, score, float("-inf"))
    best = tl.argmax(score, axis=0)
    gamma = tl.sum(tl.where(candidate == best, gammas, 0), axis=0)
    return tl.where(all_true(usable_candidate | ~is_candidate), gamma, -1), acceptance


@triton.jit
def draft_sample_kernel(
    logits_ptr,  # [B, V]
    temperature_ptr,  # [B]
    uniform_ptr,  # [B]
    token_ptr,  # [B]
    prob_ptr,  # [B]
    entropy_ptr,  # [B]
    confidence_ptr,  # [B]
    logits_stride_row,
    temperature_stride_row,
    uniform_stride_row,
    vocabulary,
    top_k_ptr,  # [B], or None
    top_p_ptr,  # [B], or None
    min_p_ptr,  # [B], or None
    counters_ptr,  # [B], or None where a row is one program
    partials_ptr,  # [B, 4, NUM_BLOCKS], or None
    BLOCK_V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * temperature_stride_row)
    uniform = tl.load(uniform_ptr + row * uniform_stride_row)
    top_k, top_p, min_p = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr)
    row_ptr = logits_ptr + row * logits_stride_row
    inverse_t = inverse_temperature(temperature)
    if IS_SPLIT:
        is_last, measures = measure_split_row(
            row, row_ptr, counters_ptr, partials_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS
        )
        if not is_last:
            return
    else:
        measures = measure_row(row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS)
    token, prob, entropy, confidence = sample_row(
        row_ptr, measures, temperature, inverse_t, uniform, top_k, top_p, min_p, vocabulary,
        BLOCK_V, NUM_BLOCKS, IS_FILTERED,
    )  # fmt: skip
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(prob_ptr + row, prob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(confidence_ptr + row, confidence)


@triton.jit
def plan_gamma_kernel(
    signals_ptr,  # [B, F]
    w1_ptr,  # [F + 1, H]
    b1_ptr,  # [H]
    w2_ptr,  # [H, 1]
    b2_ptr,  # [1]
    gammas_ptr,  # [G]
    seconds_ptr,  # [G]
    rate,  # tokens per second, or 0
    gamma_ptr,  # [B]
    acceptance_ptr,  # [B, G]
    signals_stride_row,
    signals_stride_column,
    num_signals,
    num_hidden,
    num_candidates,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_F)
    signals = tl.load(
        signals_ptr + row * signals_stride_row + column * signals_stride_column, mask=column < num_signals, other=0.0
    )
    gamma, acceptance = best_gamma(
        signals, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gammas_ptr, seconds_ptr, rate,
        num_signals, num_hidden, num_candidates, BLOCK_F, BLOCK_H, BLOCK_G,
    )  # fmt: skip
    candidate = tl.arange(0, BLOCK_G)
    tl.store(gamma_ptr + row, gamma)
    tl.store(acceptance_ptr + row * num_candidates + candidate, acceptance, mask=candidate < num_candidates)


@triton.jit
def draft_step_kernel(
    logits_ptr,  # [B, V]
    temperature_ptr,  # [B]
    uniform_ptr,  # [B]
    signals_ptr,  # [B, F]
    drafted_ptr,  # [B]
    w1_ptr,  # [F + 1, H]
    b1_ptr,  # [H]
    w2_ptr,  # [H, 1]
    b2_ptr,  # [1]
    gammas_ptr,  # [G]
    seconds_ptr,  # [G]
    rate,  # tokens per second, or 0
    token_ptr,  # [B]
    prob_ptr,  # [B]
    entropy_ptr,  # [B]
    confidence_ptr,  # [B]
    updated_signals_ptr,  # [B, F]
    gamma_ptr,  # [B]
    logits_stride_row,
    temperature_stride_row,
    uniform_stride_row,
    signals_stride_row,
    signals_stride_column,
    drafted_stride_row,
    vocabulary,
    num_signals,
    num_hidden,
    num_candidates,
    top_k_ptr,  # [B], or None
    top_p_ptr,  # [B], or None
    min_p_ptr,  # [B], or None
    counters_ptr,  # [B], or None where a row is one program
    partials_ptr,  # [B, 4, NUM_BLOCKS], or None
    BLOCK_V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row * temperature_stride_row)
    uniform = tl.load(uniform_ptr + row * uniform_stride_row)
    top_k, top_p, min_p = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr)
    row_ptr = logits_ptr + row * logits_stride_row
    inverse_t = inverse_temperature(temperature)
    if IS_SPLIT:
        is_last, measures = measure_split_row(
            row, row_ptr, counters_ptr, partials_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS
        )
        if not is_last:
            return
    else:
        measures = measure_row(row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS)
    token, prob, entropy, confidence = sample_row(
        row_ptr, measures, temperature, inverse_t, uniform, top_k, top_p, min_p, vocabulary,
        BLOCK_V, NUM_BLOCKS, IS_FILTERED,
    )  # fmt: skip
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(prob_ptr + row, prob)
    tl.store(entropy_ptr + row, entropy)
    tl.store(confidence_ptr + row, confidence)

    column = tl.arange(0, BLOCK_F)
    signals = tl.load(
        signals_ptr + row * signals_stride_row + column * signals_stride_column, mask=column < num_signals, other=0.0
    )
    drafted = tl.load(drafted_ptr + row * drafted_stride_row)
    signals = update_signals(signals, drafted, entropy, confidence, BLOCK_F)
    gamma, _ = best_gamma(
        signals, w1_ptr, b1_ptr, w2_ptr, b2_ptr, gammas_ptr, seconds_ptr, rate,
        num_signals, num_hidden, num_candidates, BLOCK_F, BLOCK_H, BLOCK_G,
    )  # fmt: skip
    gamma = tl.where((token >= 0) & (drafted >= 0), gamma, -1)
    tl.store(updated_signals_ptr + row * num_signals + column, signals, mask=column < num_signals)
    tl.store(gamma_ptr + row, gamma)


def controller_sizes(signals, w1, gammas):
    """The scalar and block arguments of best_gamma()."""
    num_signals, num_hidden, num_candidates = signals.shape[1], w1.shape[1], gammas.shape[0]
    return {
        "num_signals": num_signals,
        "num_hidden": num_hidden,
        "num_candidates": num_candidates,
        "BLOCK_F": triton.next_power_of_2(num_signals),
        "BLOCK_H": triton.next_power_of_2(num_hidden),
        "BLOCK_G": triton.next_power_of_2(num_candidates),
    }


def contiguous(*weights):
    """A controller's weights as its kernel reads them; no copy where they are stored so."""
    return [weight.contiguous() for weight in weights]


def new_tokens(logits):
    """Unwritten token, prob, entropy, confidence."""
    rows = logits.shape[0]
    return (logits.new_empty(rows, dtype=torch.int64), *(logits.new_empty(rows, dtype=torch.float32) for _ in range(3)))


def draft_sample(logits, temperature, uniform, top_k=None, top_p=None, min_p=None):
    checks.draft_sample(logits, temperature, uniform, top_k, top_p, min_p)
    rows, vocabulary = logits.shape
    outputs = new_tokens(logits)
    filters, options = filter_arguments(top_k, top_p, min_p), launch_options(vocabulary)
    with torch.cuda.device_of(logits), split_rows(logits, filters, options) as (parts, meeting):
        draft_sample_kernel[(rows, parts)](
            logits, temperature, uniform, *outputs,
            logits.stride(0), temperature.stride(0), uniform.stride(0),
            vocabulary, **filters, **meeting, **options,
        )  # fmt: skip
    return outputs


def plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate=0.0):
    checks.plan_gamma(signals, w1, b1, w2, b2, gammas, seconds, rate)
    rows = signals.shape[0]
    gamma = gammas.new_empty(rows)
    acceptance = signals.new_empty(rows, gammas.shape[0])
    with torch.cuda.device_of(signals):
        plan_gamma_kernel[(rows,)](
            signals, *contiguous(w1, b1, w2, b2, gammas, seconds), float(rate), gamma, acceptance,
            signals.stride(0), signals.stride(1),
            **controller_sizes(signals, w1, gammas), num_warps=1, **ROUNDED_PRODUCTS,
        )  # fmt: skip
    return gamma, acceptance


def draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate=0.0,
               top_k=None, top_p=None, min_p=None):
    checks.draft_step(logits, temperature, uniform, signals, drafted, w1, b1, w2, b2, gammas, seconds, rate,
                      top_k, top_p, min_p)
    rows, vocabulary = logits.shape
    token, prob, entropy, confidence = new_tokens(logits)
    updated_signals = signals.new_empty(signals.shape)
    gamma = gammas.new_empty(rows)
    filters, options = filter_arguments(top_k, top_p, min_p), launch_options(vocabulary)
    with torch.cuda.device_of(logits), split_rows(logits, filters, options) as (parts, meeting):
        draft_step_kernel[(rows, parts)](
            logits, temperature, uniform, signals, drafted, *contiguous(w1, b1, w2, b2, gammas, seconds),
            float(rate), token, prob, entropy, confidence, updated_signals, gamma,
            logits.stride(0), temperature.stride(0), uniform.stride(0),
            signals.stride(0), signals.stride(1), drafted.stride(0),
            vocabulary, **controller_sizes(signals, w1, gammas), **filters, **meeting, **options,
        )  # fmt: skip
    return token, prob, entropy, confidence, updated_signals, gamma
