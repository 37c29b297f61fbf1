"""Chain verification in Triton: one launch, one program a row of the batch, or several where the batch is small.

reference.py is the specification. A program walks its row's draft one position at a time and stops at the first that
is not accepted, so logits behind the stop are never read. Where several programs share a row, they scan the logits of
all its positions before one of them walks: what they find behind the stop is never looked at. Where the reference
raises, a kernel cannot: every token of such a row is -1 and so is accepted, so that accepted + 1 counts the tokens in
every row. Other rows are not affected.
"""

import torch
import triton
import triton.language as tl

from speckv.kernels import checks
from speckv.kernels.sampling import (
    all_true,
    choose_block,
    choose_in_block,
    filter_arguments,
    first_highest,
    inverse_temperature,
    is_finite,
    keep_from,
    launch_options,
    load_filters,
    load_logits,
    lowest_kept,
    normalize,
    probability,
    scan_block,
    scan_row,
    usable,
    usable_filters,
)
from speckv.kernels.split import comes_last, load_partials, share_of_blocks, split_rows, store_partials


@triton.jit
def scan_part(
    row_ptr, partials_ptr, part, parts, vocabulary, inverse_t, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr
):
    """One part of scan_row(), whose two vectors it puts into partials [2, NUM_BLOCKS]."""
    first, stop = share_of_blocks(tl.cdiv(vocabulary, BLOCK_V), part, parts)
    for block in range(first, stop):
        store_partials(partials_ptr + block, scan_block(row_ptr, block, vocabulary, inverse_t, BLOCK_V), NUM_BLOCKS)


@triton.jit
def scanned_row(partials_ptr, vocabulary, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr):
    """What scan_row() returns, of a row all parts of which are scanned."""
    blocks = tl.cdiv(vocabulary, BLOCK_V)
    return load_partials(partials_ptr, 0, blocks, NUM_BLOCKS), load_partials(partials_ptr, 1, blocks, NUM_BLOCKS)


@triton.jit
def probability_of(token, row_ptr, highest, scale, inverse_t, least):
    logit = keep_from(tl.load(row_ptr + token).to(tl.float32), least)
    return probability(logit, highest, scale, inverse_t)


@triton.jit
def residual_block(
    p_row_ptr, p_highest, p_scale, p_least, q_row_ptr, q_highest, q_scale, q_least, inverse_t, block,
    vocabulary, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """max(0, p - q) in one block: what the target has and the draft has not; q is not read where q_scale is 0."""
    p_logits = load_logits(p_row_ptr, block, vocabulary, BLOCK_V, p_least)
    q_logits = load_logits(q_row_ptr, block, tl.where(q_scale > 0, vocabulary, 0), BLOCK_V, q_least)
    p = probability(p_logits, p_highest, p_scale, inverse_t)
    q = probability(q_logits, q_highest, q_scale, inverse_t)
    return tl.maximum(p - q, 0.0)


@triton.jit
def residual_shares(
    p_row_ptr, p_highest, p_scale, p_least, q_row_ptr, q_highest, q_scale, q_least, inverse_t, vocabulary,
    BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """One pass over both rows: the sum of max(0, p - q) in each block, [NUM_BLOCKS] f64."""
    index = tl.arange(0, NUM_BLOCKS)
    shares = tl.zeros([NUM_BLOCKS], tl.float32)
    for block in range(tl.cdiv(vocabulary, BLOCK_V)):
        residual = residual_block(
            p_row_ptr, p_highest, p_scale, p_least, q_row_ptr, q_highest, q_scale, q_least, inverse_t, block,
            vocabulary, BLOCK_V,
        )  # fmt: skip
        shares = tl.where(index == block, tl.sum(residual, axis=0), shares)
    return shares.to(tl.float64)


@triton.jit
def draw_next(
    p_row_ptr, p_highest, p_scale, p_least, p_shares, q_row_ptr, q_highest, q_scale, q_least, inverse_t,
    uniform, vocabulary, BLOCK_V: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """The token after the accepted ones, drawn from max(0, p - q), or from p where that is zero everywhere.

    q_scale is 0 where nothing was proposed: q is then zero, its row is not read, and p's shares are at hand.
    """
    shares = p_shares
    if q_scale > 0:
        shares = residual_shares(
            p_row_ptr, p_highest, p_scale, p_least, q_row_ptr, q_highest, q_scale, q_least, inverse_t,
            vocabulary, BLOCK_V, NUM_BLOCKS,
        )  # fmt: skip
        if tl.sum(shares, axis=0) == 0:
            shares = p_shares
            q_scale = 0.0
    block, threshold = choose_block(shares, uniform)
    residual = residual_block(
        p_row_ptr, p_highest, p_scale, p_least, q_row_ptr, q_highest, q_scale, q_least, inverse_t, block,
        vocabulary, BLOCK_V,
    )  # fmt: skip
    return block * BLOCK_V + choose_in_block(residual, threshold, BLOCK_V)


@triton.jit
def verify_chain_kernel(
    target_logits_ptr,  # [B, K + 1, V]
    draft_logits_ptr,  # [B, K, V]
    draft_tokens_ptr,  # [B, K]
    num_draft_ptr,  # [B]
    temperature_ptr,  # [B]
    uniform_ptr,  # [B, K + 1]
    tokens_ptr,  # [B, K + 1]
    accepted_ptr,  # [B]
    target_logits_stride_row,
    target_logits_stride_position,
    draft_logits_stride_row,
    draft_logits_stride_position,
    draft_tokens_stride_row,
    draft_tokens_stride_position,
    num_draft_stride_row,
    temperature_stride_row,
    uniform_stride_row,
    uniform_stride_position,
    max_draft,
    vocabulary,
    top_k_ptr,  # [B], or None
    top_p_ptr,  # [B], or None
    min_p_ptr,  # [B], or None
    counters_ptr,  # [B], or None where a row of the batch is one program
    partials_ptr,  # [B, K + 1 + K, 2, NUM_BLOCKS], of target_logits and then of draft_logits, or None
    BLOCK_V: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_FILTERED: tl.constexpr,
    IS_SPLIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, BLOCK_K)
    temperature = tl.load(temperature_ptr + row * temperature_stride_row)
    num_draft = tl.load(num_draft_ptr + row * num_draft_stride_row)
    draft_tokens = tl.load(
        draft_tokens_ptr + row * draft_tokens_stride_row + position * draft_tokens_stride_position,
        mask=position < max_draft,
        other=-1,
    )
    uniform = tl.load(
        uniform_ptr + row * uniform_stride_row + position * uniform_stride_position,
        mask=position <= max_draft,
        other=0.0,
    )

    top_k, top_p, min_p = load_filters(row, top_k_ptr, top_p_ptr, min_p_ptr)

    # A draft ends at num_draft or before its first negative id, whichever comes first.
    proposed = tl.min(tl.where((position >= num_draft) | (draft_tokens < 0), position, max_draft), axis=0)
    valid = (
        usable(temperature)
        & usable_filters(top_k, top_p, min_p)
        & (num_draft >= 0)
        & (num_draft <= max_draft)
        & all_true((uniform >= 0) & (uniform < 1))
        & all_true((position >= proposed) | (draft_tokens < vocabulary))
    )

    greedy = temperature == 0
    inverse_t = inverse_temperature(temperature)
    if IS_SPLIT:
        chain = 2 * max_draft + 1  # rows of logits
        chain_partials_ptr = partials_ptr + row * chain * 2 * NUM_BLOCKS
        parts = tl.num_programs(1) // chain
        part = tl.program_id(1) % parts
        scanned = (tl.program_id(1) // parts).to(tl.int64)
        scanned_partials_ptr = chain_partials_ptr + scanned * 2 * NUM_BLOCKS
        if valid & (scanned <= proposed):
            scan_part(
                target_logits_ptr + row * target_logits_stride_row + scanned * target_logits_stride_position,
                scanned_partials_ptr, part, parts, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS,
            )  # fmt: skip
        drafted = scanned - max_draft - 1
        if valid & ~greedy & (drafted >= 0) & (drafted < proposed):
            scan_part(
                draft_logits_ptr + row * draft_logits_stride_row + drafted * draft_logits_stride_position,
                scanned_partials_ptr, part, parts, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS,
            )  # fmt: skip
        if not comes_last(counters_ptr + row):
            return

    next_uniform = tl.sum(tl.where(position == num_draft, uniform, 0.0), axis=0)
    next_token = -1
    accepted = tl.full((), 0, tl.int64)
    deciding = valid
    while deciding:
        p_row_ptr = target_logits_ptr + row * target_logits_stride_row + accepted * target_logits_stride_position
        q_row_ptr = draft_logits_ptr + row * draft_logits_stride_row + accepted * draft_logits_stride_position
        judged = accepted < proposed
        token = tl.sum(tl.where(position == accepted, draft_tokens, 0), axis=0)

        if IS_SPLIT:
            p_maxima, p_sums = scanned_row(
                chain_partials_ptr + accepted * 2 * NUM_BLOCKS, vocabulary, BLOCK_V, NUM_BLOCKS
            )
        else:
            p_maxima, p_sums = scan_row(p_row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS)
        valid = is_finite(tl.max(p_maxima, axis=0))
        keep = False
        if valid & greedy:
            next_token = first_highest(p_row_ptr, p_maxima, vocabulary, BLOCK_V)
            keep = judged & (token == next_token)
        elif valid:
            p_least = None
            q_least = None
            if IS_FILTERED:
                q_least = float("-inf")
                p_least = lowest_kept(
                    p_row_ptr, tl.max(p_maxima, axis=0), inverse_t, top_k, top_p, min_p, vocabulary, BLOCK_V
                )
                p_maxima, p_sums = scan_row(p_row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS, p_least)
            p_highest, p_scale, p_shares = normalize(p_maxima, p_sums, inverse_t)
            q_highest = 0.0
            q_scale = 0.0
            if judged:
                if IS_SPLIT:
                    q_maxima, q_sums = scanned_row(
                        chain_partials_ptr + (max_draft + 1 + accepted) * 2 * NUM_BLOCKS,
                        vocabulary, BLOCK_V, NUM_BLOCKS,
                    )  # fmt: skip
                else:
                    q_maxima, q_sums = scan_row(q_row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS)
                valid = is_finite(tl.max(q_maxima, axis=0))
                if IS_FILTERED:
                    q_least = lowest_kept(
                        q_row_ptr, tl.max(q_maxima, axis=0), inverse_t, top_k, top_p, min_p, vocabulary, BLOCK_V
                    )
                    q_maxima, q_sums = scan_row(q_row_ptr, vocabulary, inverse_t, BLOCK_V, NUM_BLOCKS, q_least)
                q_highest, q_scale, _ = normalize(q_maxima, q_sums, inverse_t)
                # Accept with probability min(1, p/q). Multiplying keeps q = 0 harmless, and the strict comparison
                # keeps p = 0 out even when the uniform is 0.
                u = tl.sum(tl.where(position == accepted, uniform, 0.0), axis=0)
                p_token = probability_of(token, p_row_ptr, p_highest, p_scale, inverse_t, p_least)
                q_token = probability_of(token, q_row_ptr, q_highest, q_scale, inverse_t, q_least)
                keep = u * q_token < p_token
            if valid & ~keep:
                next_token = draw_next(
                    p_row_ptr, p_highest, p_scale, p_least, p_shares, q_row_ptr, q_highest, q_scale, q_least,
                    inverse_t, next_uniform, vocabulary, BLOCK_V, NUM_BLOCKS,
                )  # fmt: skip
        deciding = valid & keep
        accepted += deciding

    tokens = tl.where(position < accepted, draft_tokens, tl.where(position == accepted, next_token, -1))
    tl.store(
        tokens_ptr + row * (max_draft + 1) + position, tl.where(valid, tokens, -1), mask=position <= max_draft
    )
    tl.store(accepted_ptr + row, tl.where(valid, accepted, -1))


def verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                 top_k=None, top_p=None, min_p=None):
    checks.verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform,
                        top_k, top_p, min_p)
    rows, width, vocabulary = target_logits.shape
    tokens = draft_tokens.new_empty(rows, width)
    accepted = draft_tokens.new_empty(rows)
    filters, options = filter_arguments(top_k, top_p, min_p), launch_options(vocabulary)
    with torch.cuda.device_of(target_logits), split_rows(target_logits, filters, options) as (programs, meeting):
        verify_chain_kernel[(rows, programs)](
            target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, tokens, accepted,
            target_logits.stride(0), target_logits.stride(1),
            draft_logits.stride(0), draft_logits.stride(1),
            draft_tokens.stride(0), draft_tokens.stride(1),
            num_draft.stride(0), temperature.stride(0), uniform.stride(0), uniform.stride(1),
            width - 1, vocabulary,
            **filters, **meeting, **options,
            BLOCK_K=triton.next_power_of_2(width),
        )  # fmt: skip
    return tokens, accepted
