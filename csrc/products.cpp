#include "products.h"

#include <algorithm>
#include <cstring>

#include "bf16_units.h"
#include "linear_int8.h"
#include "matrices.h"
#include "prefetch.h"
#include "vectors.h"

namespace speckv {
namespace {

using UInt32s = uint32_t __attribute__((vector_size(64)));

// Calls loop<inputs> with up to kTileUnpacked of them, or with up to kWideTile.
#define SPECKV_BY_UP_TO_SIX(inputs, loop, ...) \
    switch (inputs) { \
        case 5: return loop<5>(__VA_ARGS__); \
        case 6: return loop<6>(__VA_ARGS__); \
        default: SPECKV_BY_INPUTS(inputs, loop, __VA_ARGS__) \
    }
#define SPECKV_BY_UP_TO_EIGHT(inputs, loop, ...) \
    switch (inputs) { \
        case 7: return loop<7>(__VA_ARGS__); \
        case 8: return loop<8>(__VA_ARGS__); \
        default: SPECKV_BY_UP_TO_SIX(inputs, loop, __VA_ARGS__) \
    }
static_assert(kTileUnpacked == 6 && kWideTile == 8);

SPECKV_INLINE Floats as_floats(const UInt32s& bits) {
    Floats values;
    std::memcpy(&values, &bits, sizeof(values));
    return values;
}

template <int inputs>
SPECKV_INLINE void rows_float32(
    const float* weights, int64_t rows, int64_t columns, const float* x, float* out, int64_t stride) {
    const int64_t whole = columns / kLanes * kLanes;
    const Fetch fetch = fetch_of(Walk::kFirst);
    for (int64_t row = 0; row < rows; ++row) {
        const float* const values = weights + row * columns;
        Floats sums[inputs] = {};
        for (int64_t i = 0; i < whole; i += kLanes) {
            prefetch(values + i, fetch);
            Floats weight;
            load(values + i, weight);
#pragma GCC unroll 4
            for (int input = 0; input < inputs; ++input) {
                Floats value;
                load(x + input * columns + i, value);
                sums[input] += weight * value;
            }
        }
#pragma GCC unroll 4
        for (int input = 0; input < inputs; ++input) {
            float sum = sum_lanes(sums[input]);
            for (int64_t i = whole; i < columns; ++i) {
                sum += values[i] * x[input * columns + i];
            }
            out[input * stride + row] = sum;
        }
    }
}

// The two bf16 of each 32 bits, those of even index and those of odd index, in fp32.
SPECKV_INLINE void load_pairs(const uint16_t* from, Floats& even, Floats& odd) {
    UInt32s bits;
    std::memcpy(&bits, from, sizeof(bits));
    even = as_floats(bits << 16);
    odd = as_floats(bits & 0xffff0000u);
}

template <int inputs>
SPECKV_INLINE void rows_bfloat16(
    const uint16_t* weights, int64_t rows, int64_t columns, const uint16_t* x, float* out, int64_t stride) {
    constexpr int64_t step = 2 * kLanes;
    const int64_t whole = columns / step * step;
    const Fetch fetch = fetch_of(Walk::kFirst);
    for (int64_t row = 0; row < rows; ++row) {
        const uint16_t* const values = weights + row * columns;
        Floats sums[inputs][2] = {};
        const auto add = [&](const uint16_t* from, const uint16_t* by, int64_t distance) SPECKV_INLINED {
            Floats even, odd;
            load_pairs(from, even, odd);
#pragma GCC unroll 4
            for (int input = 0; input < inputs; ++input) {
                Floats even_value, odd_value;
                load_pairs(by + input * distance, even_value, odd_value);
                sums[input][0] += even * even_value;
                sums[input][1] += odd * odd_value;
            }
        };
        for (int64_t i = 0; i < whole; i += step) {
            prefetch(values + i, fetch);
            add(values + i, x + i, columns);
        }
        if (whole < columns) {
            uint16_t padded[step] = {}, padded_x[inputs * step] = {};
            std::memcpy(padded, values + whole, (columns - whole) * sizeof(uint16_t));
            for (int input = 0; input < inputs; ++input) {
                std::memcpy(padded_x + input * step, x + input * columns + whole, (columns - whole) * sizeof(uint16_t));
            }
            add(padded, padded_x, step);
        }
#pragma GCC unroll 4
        for (int input = 0; input < inputs; ++input) {
            out[input * stride + row] = sum_lanes(sums[input][0] + sums[input][1]);
        }
    }
}

SPECKV_INLINE Floats look_up(const Floats& table, const UInt32s& index) {
#if defined(__GNUC__) && !defined(__clang__)
    return __builtin_shuffle(table, index);
#else
    Floats values;
    for (int64_t lane = 0; lane < kLanes; ++lane) {
        values[lane] = table[index[lane] & 15];
    }
    return values;
#endif
}

SPECKV_INLINE void load_scale(const uint16_t* from, Floats& scale) {
    using UInt16s = uint16_t __attribute__((vector_size(32)));
    UInt16s halves;
    std::memcpy(&halves, from, sizeof(halves));
    scale = as_floats(__builtin_convertvector(halves, UInt32s) << 16);
}

SPECKV_INLINE float from_half(uint16_t half) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

template <int inputs>
SPECKV_INLINE void block_four_bit(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table_values, int64_t columns,
    const uint16_t* x, float* out, int64_t stride) {
    using UInt16s = uint16_t __attribute__((vector_size(32)));
    constexpr int64_t pair_bytes = kBlockRows;
    const Fetch fetch = fetch_of(Walk::kFirst);
    Floats table;
    load(table_values, table);
    Floats totals[inputs][2] = {};
    for (int64_t first = 0; first < columns; first += kScaledColumns) {
        Floats sums[inputs][2] = {};
        for (int64_t column = first; column < first + kScaledColumns; column += 2) {
            const uint8_t* const from = indices + column / 2 * pair_bytes;
            prefetch(from, fetch);
            UInt16s bytes;
            std::memcpy(&bytes, from, sizeof(bytes));
            const UInt32s index = __builtin_convertvector(bytes, UInt32s);
            const Floats low[2] = {look_up(table, index & 15), look_up(table, index >> 8 & 15)};
            const Floats high[2] = {look_up(table, index >> 4 & 15), look_up(table, index >> 12)};
#pragma GCC unroll 4
            for (int input = 0; input < inputs; ++input) {
                const float values[2] = {
                    from_half(x[input * columns + column]), from_half(x[input * columns + column + 1])};
                sums[input][0] += low[0] * values[0];
                sums[input][0] += low[1] * values[1];
                sums[input][1] += high[0] * values[0];
                sums[input][1] += high[1] * values[1];
            }
        }
        Floats scales[2];
        const uint16_t* const row_scale = scale + first / kScaledColumns * scale_stride;
        load_scale(row_scale, scales[0]);
        load_scale(row_scale + kLanes, scales[1]);
#pragma GCC unroll 4
        for (int input = 0; input < inputs; ++input) {
            totals[input][0] += sums[input][0] * scales[0];
            totals[input][1] += sums[input][1] * scales[1];
        }
    }
#pragma GCC unroll 4
    for (int input = 0; input < inputs; ++input) {
        store(totals[input][0], out + input * stride);
        store(totals[input][1], out + input * stride + kLanes);
    }
}

#if defined(__x86_64__)
// The lanes of four vectors added up, in an order of its own for each.
SPECKV_BF16_UNITS inline __m128 sum_four(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 four = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 two = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(two), _mm256_extractf128_ps(two, 1));
}

// The same of integers.
SPECKV_BF16_UNITS inline __m128i sum_four(__m512i a, __m512i b, __m512i c, __m512i d) {
    const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
    const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
    const __m512i four = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
    const __m256i two = _mm256_add_epi32(_mm512_castsi512_si256(four), _mm512_extracti32x8_epi32(four, 1));
    return _mm_add_epi32(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
}

// Vectors of a row, one after the other. Weights lie where a file was mapped, mostly across cache lines; a load that
// takes two lines costs two, so whole lines are loaded and each vector is put together from two of them.
class Lines {
public:
    SPECKV_BF16_UNITS explicit Lines(const uint16_t* start) {
        const auto address = reinterpret_cast<uintptr_t>(start);
        next_ = reinterpret_cast<const char*>(address / kLineBytes * kLineBytes);
        const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
        from_ = _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int>(address % kLineBytes / 4)));
        line_ = _mm512_load_si512(next_);
    }

    SPECKV_BF16_UNITS __m512bh take(Fetch fetch) {
        next_ += kLineBytes;
        prefetch(next_, fetch);
        const __m512i following = _mm512_load_si512(next_);
        const __m512i values = _mm512_permutex2var_epi32(line_, from_, following);
        line_ = following;
        return (__m512bh)values;
    }

    // Whether rows of so many columns from here on can be taken so, and must be: not those at the start of a line.
    static bool serves(const uint16_t* start, int64_t columns) {
        const auto offset = reinterpret_cast<uintptr_t>(start) % kLineBytes;
        return offset != 0 && offset % 4 == 0 && columns % 64 == 0;
    }

private:
    static constexpr int64_t kLineBytes = 64;
    const char* next_;
    __m512i from_, line_;
};

// Vectors of a row from any address.
class Loads {
public:
    SPECKV_BF16_UNITS explicit Loads(const uint16_t* start) : next_(start) {}

    SPECKV_BF16_UNITS __m512bh take(Fetch fetch) {
        prefetch(next_, fetch);
        const auto values = (__m512bh)_mm512_loadu_si512(next_);
        next_ += 32;
        return values;
    }

private:
    const uint16_t* next_;
};

// `together` rows at a time, whose sums are those of a row alone.
template <class Stream, int together, int inputs>
SPECKV_BF16_UNITS inline void some_rows_in_units(
    const uint16_t* values, int64_t columns, const uint16_t* x, Fetch fetch, float* out, int64_t stride) {
    static_assert(together == 1 || together == 2);
    const int64_t whole = columns / 64 * 64;
    __m512 sums[together][inputs][2];
    for (auto& row : sums) {
        for (auto& sum : row) {
            sum[0] = sum[1] = _mm512_setzero_ps();
        }
    }
    Stream streams[2] = {Stream(values), Stream(values + (together - 1) * columns)};
    for (int64_t i = 0; i < whole; i += 64) {
#pragma GCC unroll 2
        for (int chain = 0; chain < 2; ++chain) {
            __m512bh weight[together];
#pragma GCC unroll 2
            for (int row = 0; row < together; ++row) {
                weight[row] = streams[row].take(fetch);
            }
#pragma GCC unroll 8
            for (int input = 0; input < inputs; ++input) {
                const auto value = (__m512bh)_mm512_loadu_si512(x + input * columns + i + 32 * chain);
#pragma GCC unroll 2
                for (int row = 0; row < together; ++row) {
                    sums[row][input][chain] = _mm512_dpbf16_ps(sums[row][input][chain], weight[row], value);
                }
            }
        }
    }
    for (int64_t i = whole; i < columns; i += 32) {
        const int64_t left = std::min<int64_t>(32, columns - i);
        const auto mask = static_cast<__mmask32>((uint64_t{1} << left) - 1);
        for (int row = 0; row < together; ++row) {
            const auto weight = (__m512bh)_mm512_maskz_loadu_epi16(mask, values + row * columns + i);
            for (int input = 0; input < inputs; ++input) {
                const auto value = (__m512bh)_mm512_maskz_loadu_epi16(mask, x + input * columns + i);
                sums[row][input][0] = _mm512_dpbf16_ps(sums[row][input][0], weight, value);
            }
        }
    }
#pragma GCC unroll 2
    for (int row = 0; row < together; ++row) {
#pragma GCC unroll 2
        for (int first = 0; first < inputs; first += 4) {
            __m512 wholes[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) {
                const int input = first + i;
                wholes[i] = input < inputs ? _mm512_add_ps(sums[row][input % inputs][0], sums[row][input % inputs][1])
                                           : _mm512_setzero_ps();
            }
            alignas(16) float four[4];
            _mm_store_ps(four, sum_four(wholes[0], wholes[1], wholes[2], wholes[3]));
            for (int input = first; input < inputs && input < first + 4; ++input) {
                out[input * stride + row] = four[input - first];
            }
        }
    }
}

// Row after row: with several at a time a core reads less fast. But where the rows lie in a cache already, two at a time
// share what is loaded of a few inputs.
template <class Stream, int inputs>
SPECKV_BF16_UNITS void all_rows_in_units(
    const uint16_t* weights, int64_t rows, int64_t columns, const uint16_t* x, Walk walk, float* out,
    int64_t stride) {
    const Fetch fetch = fetch_of(walk);
    int64_t row = 0;
    if constexpr (inputs <= kTilePaired) {
        for (; walk == Walk::kLater && row + 2 <= rows; row += 2) {
            some_rows_in_units<Stream, 2, inputs>(weights + row * columns, columns, x, fetch, out + row, stride);
        }
    }
    for (; row < rows; ++row) {
        some_rows_in_units<Stream, 1, inputs>(weights + row * columns, columns, x, fetch, out + row, stride);
    }
}

template <int inputs>
void rows_in_units(
    const uint16_t* weights, int64_t rows, int64_t columns, const uint16_t* x, Walk walk, float* out,
    int64_t stride) {
    // To one input an Intel core reads whole lines faster too, others do not.
    if ((inputs > 1 || fetch_of(walk) == Fetch::kIntoL2) && Lines::serves(weights, columns)) {
        return all_rows_in_units<Lines, inputs>(weights, rows, columns, x, walk, out, stride);
    }
    return all_rows_in_units<Loads, inputs>(weights, rows, columns, x, walk, out, stride);
}

template <int inputs>
SPECKV_BF16_UNITS void bytes_in_units(
    const int8_t* weights, int64_t rows, int64_t columns, const uint8_t* x, Walk walk, int32_t* out, int64_t stride) {
    constexpr int padded = (inputs + 3) / 4 * 4;
    const Fetch fetch = fetch_of(walk);
    const int64_t whole = columns / 64 * 64;
    for (int64_t row = 0; row < rows; ++row) {
        const int8_t* const values = weights + row * columns;
        __m512i sums[padded];
        for (auto& sum : sums) {
            sum = _mm512_setzero_si512();
        }
        for (int64_t i = 0; i < whole; i += 64) {
            prefetch(values + i, fetch);
            __m512i weight = _mm512_loadu_si512(values + i);
            asm("" : "+v"(weight));  // or it is loaded once for each input, and each of them misses the cache
#pragma GCC unroll 8
            for (int input = 0; input < inputs; ++input) {
                const __m512i value = _mm512_loadu_si512(x + input * columns + i);
                sums[input] = _mm512_dpbusd_epi32(sums[input], value, weight);
            }
        }
        if (whole < columns) {
            const auto mask = static_cast<__mmask64>(~uint64_t{0} >> (64 - (columns - whole)));
            const __m512i weight = _mm512_maskz_loadu_epi8(mask, values + whole);
#pragma GCC unroll 8
            for (int input = 0; input < inputs; ++input) {
                const __m512i value = _mm512_maskz_loadu_epi8(mask, x + input * columns + whole);
                sums[input] = _mm512_dpbusd_epi32(sums[input], value, weight);
            }
        }
#pragma GCC unroll 2
        for (int first = 0; first < padded; first += 4) {
            alignas(16) int32_t four[4];
            _mm_store_si128(reinterpret_cast<__m128i*>(four),
                            sum_four(sums[first], sums[first + 1], sums[first + 2], sums[first + 3]));
            for (int input = first; input < inputs && input < first + 4; ++input) {
                out[input * stride + row] = four[input - first];
            }
        }
    }
}

template <int inputs>
SPECKV_BF16_UNITS void block_in_units(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table_values, int64_t columns,
    const uint16_t* x, Walk walk, float* out, int64_t stride) {
    const __m512i table = doubled_table(table_values);
    const Fetch fetch = fetch_of(walk);
    __m512 totals[inputs][2];
    for (auto& total : totals) {
        total[0] = total[1] = _mm512_setzero_ps();
    }
    for (int64_t first = 0; first < columns; first += kScaledColumns) {
        // Two chains for each half of the block: one would wait for its own result.
        __m512 sums[inputs][2][2];
        for (auto& sum : sums) {
            sum[0][0] = sum[0][1] = sum[1][0] = sum[1][1] = _mm512_setzero_ps();
        }
#pragma GCC unroll 2
        for (int64_t column = first; column < first + kScaledColumns; column += 4) {
            const uint8_t* const from = indices + column / 2 * kBlockRows;
            prefetch(from, fetch);
#pragma GCC unroll 2
            for (int chain = 0; chain < 2; ++chain) {
                const __m512i index = _mm512_cvtepu8_epi16(
                    _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + chain * kBlockRows)));
                const auto low = (__m512bh)_mm512_permutexvar_epi16(index, table);
                const auto high = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi16(index, 4), table);
#pragma GCC unroll 6
                for (int input = 0; input < inputs; ++input) {
                    int32_t pair;
                    std::memcpy(&pair, x + input * columns + column + 2 * chain, sizeof(pair));
                    const auto value = (__m512bh)_mm512_set1_epi32(pair);
                    sums[input][0][chain] = _mm512_dpbf16_ps(sums[input][0][chain], low, value);
                    sums[input][1][chain] = _mm512_dpbf16_ps(sums[input][1][chain], high, value);
                }
            }
        }
        const uint16_t* const row_scale = scale + first / kScaledColumns * scale_stride;
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const __m512 scales = widen_scale(row_scale + half * kLanes);
#pragma GCC unroll 6
            for (int input = 0; input < inputs; ++input) {
                const __m512 sum = _mm512_add_ps(sums[input][half][0], sums[input][half][1]);
                totals[input][half] = _mm512_fmadd_ps(sum, scales, totals[input][half]);
            }
        }
    }
#pragma GCC unroll 6
    for (int input = 0; input < inputs; ++input) {
        _mm512_storeu_ps(out + input * stride, totals[input][0]);
        _mm512_storeu_ps(out + input * stride + kLanes, totals[input][1]);
    }
}
#endif

void bfloat16_anywhere(
    const uint16_t* weights, int64_t rows, int64_t columns, const uint16_t* x, int64_t inputs, float* out,
    int64_t stride) {
    in_widest_units([=]() SPECKV_INLINED {
        SPECKV_BY_INPUTS(inputs, rows_bfloat16, weights, rows, columns, x, out, stride)
    });
}

void four_bit_anywhere(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table, int64_t columns,
    const uint16_t* x, int64_t inputs, float* out, int64_t stride) {
    in_widest_units([=]() SPECKV_INLINED {
        SPECKV_BY_INPUTS(inputs, block_four_bit, indices, scale, scale_stride, table, columns, x, out, stride)
    });
}

void bytes_anywhere(
    const int8_t* weights, int64_t rows, int64_t columns, const uint8_t* x, int64_t inputs, int32_t* out,
    int64_t stride) {
    in_widest_units([=]() SPECKV_INLINED {
        for (int64_t row = 0; row < rows; ++row) {
            const int8_t* const values = weights + row * columns;
            for (int64_t input = 0; input < inputs; ++input) {
                const uint8_t* const by = x + input * columns;
                int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
                for (int64_t i = 0; i < columns; ++i) {
                    sum += static_cast<int16_t>(values[i]) * static_cast<int16_t>(by[i]);
                }
                out[input * stride + row] = sum;
            }
        }
    });
}

}  // namespace

void multiply_float32(
    const float* weights, int64_t rows, int64_t columns, const float* x, int64_t inputs, float* out, int64_t stride) {
    in_widest_units([=]() SPECKV_INLINED {
        SPECKV_BY_INPUTS(inputs, rows_float32, weights, rows, columns, x, out, stride)
    });
}

void multiply_bfloat16(
    const uint16_t* weights, int64_t rows, int64_t columns, const uint16_t* x, int64_t inputs, Walk walk,
    float* out, int64_t stride) {
#if defined(__x86_64__)
    if (units() >= Units::kBf16) {
        SPECKV_BY_UP_TO_EIGHT(inputs, rows_in_units, weights, rows, columns, x, walk, out, stride)
    }
#endif
    for (int64_t first = 0; first < inputs; first += kTileInputs) {
        bfloat16_anywhere(weights, rows, columns, x + first * columns, std::min(kTileInputs, inputs - first),
                          out + first * stride, stride);
    }
}

void multiply_four_bit(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table, int64_t columns,
    const uint16_t* x, int64_t inputs, Walk walk, float* out, int64_t stride) {
#if defined(__x86_64__)
    if (units() >= Units::kBf16) {
        SPECKV_BY_UP_TO_SIX(inputs, block_in_units, indices, scale, scale_stride, table, columns, x, walk, out, stride)
    }
#endif
    for (int64_t first = 0; first < inputs; first += kTileInputs) {
        four_bit_anywhere(indices, scale, scale_stride, table, columns, x + first * columns,
                          std::min(kTileInputs, inputs - first), out + first * stride, stride);
    }
}

void multiply_bytes(
    const int8_t* weights, int64_t rows, int64_t columns, const uint8_t* x, int64_t inputs, Walk walk, int32_t* out,
    int64_t stride) {
#if defined(__x86_64__)
    if (units() >= Units::kBf16) {
        SPECKV_BY_UP_TO_EIGHT(inputs, bytes_in_units, weights, rows, columns, x, walk, out, stride)
    }
#endif
    bytes_anywhere(weights, rows, columns, x, inputs, out, stride);
}

}  // namespace speckv
