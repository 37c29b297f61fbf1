#include "tile_products.h"

#include <algorithm>
#include <cstring>

#include "bf16_units.h"
#include "matrices.h"
#include "prefetch.h"

namespace speckv {

#if SPECKV_HAS_TILES
namespace {

// Columns of 16 rows of 16 words, which become the rows.
SPECKV_TILES inline void transpose(const __m512i (&rows)[kTileHeight], __m512i (&columns)[kTileWidth]) {
    __m512i pairs[kTileHeight], fours[kTileHeight];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // Of rows i to i + 3 the columns j, 4 + j, 8 + j and 12 + j, in fours[i + j].
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    constexpr int kEven = 0x88, kOdd = 0xdd;
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low_even = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kEven);
        const __m512i low_odd = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kOdd);
        const __m512i high_even = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kEven);
        const __m512i high_odd = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kOdd);
        columns[j] = _mm512_shuffle_i32x4(low_even, high_even, kEven);
        columns[4 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, kEven);
        columns[8 + j] = _mm512_shuffle_i32x4(low_even, high_even, kOdd);
        columns[12 + j] = _mm512_shuffle_i32x4(low_odd, high_odd, kOdd);
    }
}

// A group of inputs, or the first of it, as second factors of so many words a row.
SPECKV_TILES void arrange_group(const char* from, int64_t row_bytes, int64_t count, int64_t width, uint32_t* to) {
    const auto words = static_cast<__mmask16>((1u << width) - 1);
    for (int64_t byte = 0; byte < row_bytes; byte += kTileBytes, to += kTileHeight * width) {
        const int64_t left = std::min(kTileBytes, row_bytes - byte);
        const auto bytes = static_cast<__mmask64>(~uint64_t{0} >> (kTileBytes - left));
        __m512i rows[kTileHeight], columns[kTileWidth];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kTileWidth; ++i) {
            rows[i] = i < count ? _mm512_maskz_loadu_epi8(bytes, from + i * row_bytes + byte) : _mm512_setzero_si512();
        }
        transpose(rows, columns);
#pragma GCC unroll 16
        for (int64_t word = 0; word < kTileHeight; ++word) {
            _mm512_mask_storeu_epi32(to + word * width, words, columns[word]);
        }
    }
}

// What they differ in.
struct Pairs {
    using Sum = float;
    template <int sum, int first, int second>
    SPECKV_TILES static void add() { add_pairs<sum, first, second>(); }
};
struct SignedBytes {
    using Sum = int32_t;
    template <int sum, int first, int second>
    SPECKV_TILES static void add() { add_signed_bytes<sum, first, second>(); }
};
struct Bytes {
    using Sum = int32_t;
    template <int sum, int first, int second>
    SPECKV_TILES static void add() { add_bytes<sum, first, second>(); }
};

// 16 rows of weights or fewer. What is beyond their ends counts as zero and is not read.
struct Rows {
    const char* start;
    int64_t count, row_bytes;
};

template <int tile>
SPECKV_TILES __attribute__((noinline)) void load_edge(const Rows& rows, int64_t byte, int64_t width) {
    alignas(kTileBytes) char padded[kTileHeight * kTileBytes] = {};
    for (int64_t row = 0; row < rows.count; ++row) {
        std::memcpy(padded + row * kTileBytes, rows.start + row * rows.row_bytes + byte, width);
    }
    load_tile<tile>(padded, kTileBytes);
}

template <int tile>
SPECKV_TILES inline void load_weights(const Rows& rows, int64_t byte) {
    const int64_t width = std::min(kTileBytes, rows.row_bytes - byte);
    if (rows.count == kTileHeight && width == kTileBytes) {
        load_tile<tile>(rows.start + byte, rows.row_bytes);
    } else {
        load_edge<tile>(rows, byte, width);
    }
}

// Sums of 16 rows, or the first of them, to where they belong.
template <int tile, class Sum>
SPECKV_TILES inline void store_sums(int64_t rows, int64_t inputs, Sum* out, int64_t stride) {
    constexpr int64_t kGathered = 4;  // inputs: for so few, columns are gathered and not all 16 turned over
    alignas(kTileBytes) Sum sums[kTileHeight * kTileWidth];
    store_tile<tile>(sums, kTileBytes);
    const auto mask = static_cast<__mmask16>((1u << rows) - 1);
    if (inputs <= kGathered) {
        const __m512i at = _mm512_slli_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 4);
        for (int64_t input = 0; input < inputs; ++input) {
            _mm512_mask_storeu_epi32(out + input * stride, mask, _mm512_i32gather_epi32(at, sums + input, sizeof(Sum)));
        }
        return;
    }
    __m512i of_rows[kTileHeight], of_inputs[kTileWidth];
#pragma GCC unroll 16
    for (int64_t row = 0; row < kTileHeight; ++row) {
        of_rows[row] = _mm512_load_si512(sums + row * kTileWidth);
    }
    transpose(of_rows, of_inputs);
#pragma GCC unroll 16
    for (int64_t input = 0; input < kTileWidth; ++input) {
        if (input < inputs) {
            _mm512_mask_storeu_epi32(out + input * stride, mask, of_inputs[input]);
        }
    }
}

// Asks for what a few steps ahead takes of all rows, or of those of the next block.
SPECKV_TILES inline void prefetch_step(const Rows (&halves)[2], int64_t step, int64_t steps) {
    constexpr int64_t kStepsAhead = 3;
    const int64_t rows = halves[0].count + halves[1].count, row_bytes = halves[0].row_bytes;
    int64_t at = step + kStepsAhead;
    const char* from = halves[0].start;
    if (at >= steps) {
        at -= steps;
        from += rows * row_bytes;
    }
    for (int64_t row = 0; row < rows; ++row) {
        _mm_prefetch(from + row * row_bytes + at * kTileBytes, _MM_HINT_T1);
    }
}

// Both halves of a block with one group of inputs or two.
template <class Kind, int groups>
SPECKV_TILES void block_with_groups(
    const Rows (&halves)[2], const TileInputs& inputs, int64_t group, int64_t count, typename Kind::Sum* out,
    int64_t stride) {
    clear_tile<0>();
    clear_tile<1>();
    if constexpr (groups == 2) {
        clear_tile<2>();
        clear_tile<3>();
    }
    for (int64_t step = 0; step < inputs.steps(); ++step) {
        const int64_t byte = step * kTileBytes;
        if (group == 0) {
            prefetch_step(halves, step, inputs.steps());
        }
        load_tile<6>(inputs.step(group, step), inputs.stride_bytes());
        load_weights<4>(halves[0], byte);
        Kind::template add<0, 4, 6>();
        load_weights<5>(halves[1], byte);
        Kind::template add<1, 5, 6>();
        if constexpr (groups == 2) {
            load_tile<7>(inputs.step(group + 1, step), inputs.stride_bytes());
            Kind::template add<2, 4, 7>();
            Kind::template add<3, 5, 7>();
        }
    }
    const int64_t here = std::min(count, kTileWidth);
    store_sums<0>(halves[0].count, here, out, stride);
    store_sums<1>(halves[1].count, here, out + kTileHeight, stride);
    if constexpr (groups == 2) {
        out += kTileWidth * stride;
        store_sums<2>(halves[0].count, count - kTileWidth, out, stride);
        store_sums<3>(halves[1].count, count - kTileWidth, out + kTileHeight, stride);
    }
}

template <class Kind>
SPECKV_TILES void block_by_groups(
    const void* weights, int64_t rows, int64_t row_bytes, const TileInputs& inputs, int64_t count,
    typename Kind::Sum* out, int64_t stride) {
    shape_tiles(Shape::kWeightsFirst, inputs.in_group());
    const auto* const start = static_cast<const char*>(weights);
    const int64_t high = std::min(rows, kTileHeight);
    const Rows halves[2] = {{start, high, row_bytes}, {start + high * row_bytes, rows - high, row_bytes}};
    for (int64_t first = 0; first < count; first += 2 * kTileWidth) {
        const int64_t here = std::min(2 * kTileWidth, count - first);
        if (here > kTileWidth) {
            block_with_groups<Kind, 2>(halves, inputs, first / kTileWidth, here, out + first * stride, stride);
        } else {
            block_with_groups<Kind, 1>(halves, inputs, first / kTileWidth, here, out + first * stride, stride);
        }
    }
}

// 64 columns of a block of 32 rows of 4 bits as four second factors: the columns' first half of the low rows and of the
// high ones, and the second half.
struct Unpacked {
    alignas(kTileBytes) uint16_t tiles[4][kTileHeight * kTileBytes / sizeof(uint16_t)];
};

SPECKV_TILES inline void unpack(const uint8_t* indices, __m512i table, Unpacked& to) {
#pragma GCC unroll 8
    for (int64_t pair = 0; pair < kScaledColumns / 2; ++pair) {
        const uint8_t* const from = indices + pair * kBlockRows;
        if (pair % 2 == 0) {
            prefetch(from, Fetch::kIntoL2);
        }
        const __m512i index = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
        const int64_t at = pair % kTileHeight * 32;
        uint16_t(*const tiles)[512] = to.tiles + pair / kTileHeight * 2;
        _mm512_store_si512(tiles[0] + at, _mm512_permutexvar_epi16(index, table));
        _mm512_store_si512(tiles[1] + at, _mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table));
    }
}

// One group of up to kTileWidth inputs or two, for which the weights are unpacked once. x has rows enough for as many
// as the tiles are shaped for.
template <int groups>
SPECKV_TILES void four_bit_with_groups(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, __m512i table, int64_t columns,
    const uint16_t* x, int64_t inputs, float* out, int64_t stride) {
    constexpr int64_t block_bytes = kScaledColumns / 2 * kBlockRows;
    Unpacked unpacked[2];
    alignas(kTileBytes) float sums[2][groups * kTileWidth * kTileHeight];
    __m512 totals[groups * kTileWidth][2];
    for (int64_t input = 0; input < inputs; ++input) {
        totals[input][0] = totals[input][1] = _mm512_setzero_ps();
    }
    const int64_t x_bytes = columns * int64_t{sizeof(uint16_t)};
    const int64_t blocks = columns / kScaledColumns;
    unpack(indices, table, unpacked[0]);
    for (int64_t block = 0; block < blocks; ++block) {
        const Unpacked& weights = unpacked[block % 2];
        const uint16_t* const values = x + block * kScaledColumns;
        clear_tile<0>();
        clear_tile<1>();
        if constexpr (groups == 2) {
            clear_tile<2>();
            clear_tile<3>();
        }
#pragma GCC unroll 2
        for (int part = 0; part < 2; ++part) {
            load_tile<4>(values + part * kScaledColumns / 2, x_bytes);
            load_tile<6>(weights.tiles[2 * part], kTileBytes);
            add_pairs<0, 4, 6>();
            load_tile<7>(weights.tiles[2 * part + 1], kTileBytes);
            add_pairs<1, 4, 7>();
            if constexpr (groups == 2) {
                load_tile<5>(values + kTileWidth * columns + part * kScaledColumns / 2, x_bytes);
                add_pairs<2, 5, 6>();
                add_pairs<3, 5, 7>();
            }
        }
        if (block + 1 < blocks) {  // beside the products
            unpack(indices + (block + 1) * block_bytes, table, unpacked[(block + 1) % 2]);
        }
        store_tile<0>(sums[0], kTileBytes);
        store_tile<1>(sums[1], kTileBytes);
        if constexpr (groups == 2) {
            store_tile<2>(sums[0] + kTileWidth * kTileHeight, kTileBytes);
            store_tile<3>(sums[1] + kTileWidth * kTileHeight, kTileBytes);
        }
        const uint16_t* const row_scale = scale + block * scale_stride;
        _mm_prefetch(reinterpret_cast<const char*>(row_scale + 2 * kBlockRows), _MM_HINT_T1);  // two blocks of rows on
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 scales = widen_scale(row_scale + half * kTileHeight);
            for (int64_t input = 0; input < inputs; ++input) {
                const __m512 sum = _mm512_load_ps(sums[half] + input * kTileHeight);
                totals[input][half] = _mm512_fmadd_ps(sum, scales, totals[input][half]);
            }
        }
    }
    for (int64_t input = 0; input < inputs; ++input) {
        _mm512_storeu_ps(out + input * stride, totals[input][0]);
        _mm512_storeu_ps(out + input * stride + kTileHeight, totals[input][1]);
    }
}

SPECKV_TILES void four_bit_by_groups(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table, int64_t columns,
    const uint16_t* x, int64_t inputs, float* out, int64_t stride) {
    const __m512i doubled = doubled_table(table);
    shape_tiles(Shape::kInputsFirst, std::min(inputs, kTileWidth));
    for (int64_t first = 0; first < inputs; first += 2 * kTileWidth) {
        const int64_t count = std::min(2 * kTileWidth, inputs - first);
        const auto multiply = count > kTileWidth ? four_bit_with_groups<2> : four_bit_with_groups<1>;
        multiply(
            indices, scale, scale_stride, doubled, columns, x + first * columns, count, out + first * stride, stride);
    }
}

}  // namespace

void TileInputs::arrange(const void* rows, int64_t row_bytes, int64_t count, Team& team) {
    in_group_ = std::min(count, kTileWidth);
    for (width_ = 1; width_ < in_group_; width_ *= 2) {  // a row of them crosses no line
    }
    steps_ = (row_bytes + kTileBytes - 1) / kTileBytes;
    const int64_t groups = (count + kTileWidth - 1) / kTileWidth, group_words = steps_ * kTileHeight * width_;
    words_.resize(groups * group_words);
    team.run(groups, [&](int64_t group) {
        const int64_t first = group * kTileWidth;
        arrange_group(static_cast<const char*>(rows) + first * row_bytes, row_bytes, std::min(kTileWidth, count - first),
                      width_, words_.data() + group * group_words);
    });
}

void multiply_bfloat16_in_tiles(
    const uint16_t* weights, int64_t rows, int64_t columns, const TileInputs& inputs, int64_t count, float* out,
    int64_t stride) {
    block_by_groups<Pairs>(weights, rows, columns * int64_t{sizeof(uint16_t)}, inputs, count, out, stride);
}

void multiply_bytes_in_tiles(
    const int8_t* weights, int64_t rows, int64_t columns, const TileInputs& inputs, int64_t count, int32_t* out,
    int64_t stride) {
    block_by_groups<Bytes>(weights, rows, columns, inputs, count, out, stride);
}

void multiply_signed_bytes_in_tiles(
    const int8_t* weights, int64_t rows, int64_t columns, const TileInputs& inputs, int64_t count, int32_t* out,
    int64_t stride) {
    block_by_groups<SignedBytes>(weights, rows, columns, inputs, count, out, stride);
}

void multiply_four_bit_in_tiles(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table, int64_t columns,
    const uint16_t* x, int64_t inputs, float* out, int64_t stride) {
    four_bit_by_groups(indices, scale, scale_stride, table, columns, x, inputs, out, stride);
}
#else
void TileInputs::arrange(const void*, int64_t, int64_t, Team&) {}  // no tiles, no inputs of theirs
#endif

}  // namespace speckv
