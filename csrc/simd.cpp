#include "simd.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "bits.h"
#include "exponential.h"
#include "units.h"
#include "vectors.h"

#if defined(SPECKV_AVX512)
#include <immintrin.h>
#endif

namespace speckv {
namespace {

constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

// Bit arithmetic because GCC does not vectorise the conversion. Sign, exponent and mantissa move to their places in
// fp32, a product corrects the bias (and normalises subnormals), and inf and NaN get fp32's exponent.
SPECKV_INLINE float float_from_float16(uint16_t half) {
    const auto shifted = static_cast<int32_t>(static_cast<uint32_t>(half) << 16) >> 3;
    const uint32_t bits = static_cast<uint32_t>(shifted) & 0x8fffffffu;
    const uint32_t exponent = (bits & 0x0f800000u) == 0x0f800000u ? 0x7f800000u : 0u;
    return from_bits(to_bits(from_bits(bits) * 0x1p112f) | exponent);
}

// Rounded to even. A NaN keeps none of its payload, which could vanish in the cut and leave an infinity.
SPECKV_INLINE uint16_t bfloat16_from_float(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

// Rounded to even. The products turn what is too large into infinity, and the sum with a power of two that matches the
// exponent lets the adder round at fp16's last bit, subnormals included (Marat Dukhan's FP16).
SPECKV_INLINE uint16_t float16_from_float(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint32_t exponent = magnitude & 0x7f800000u;
    const uint32_t matching = (exponent < 0x38800000u ? 0x38800000u : exponent) + 0x07800000u;
    const float scaled = (from_bits(magnitude) * 0x1p112f) * 0x1p-110f;
    const uint32_t sum = to_bits(from_bits(matching) + scaled);
    const uint32_t half = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (magnitude > 0x7f800000u ? 0x7e00u : half));
}

SPECKV_INLINE float float_from_bfloat16(uint16_t half) {
    return from_bits(static_cast<uint32_t>(half) << 16);
}

// What is left of a block after the first `begin` values, whose largest is `maximum`.
SPECKV_INLINE float load_rest(const uint16_t* src, int64_t begin, int64_t size, float* dst, float maximum) {
    for (int64_t i = begin; i < size; ++i) {
        dst[i] = float_from_bfloat16(src[i]);
        maximum = dst[i] > maximum ? dst[i] : maximum;
    }
    return maximum;
}

float load_and_compare(const uint16_t* src, int64_t size, float* dst) {
    return in_widest_units<Units::kAvx2>([=]() SPECKV_INLINED {
        const int64_t half = size / 2;
        float a = kNegativeInfinity;
        float b = a;
#pragma omp simd reduction(max : a, b)
        for (int64_t i = 0; i < half; ++i) {
            const float x = float_from_bfloat16(src[i]);
            const float y = float_from_bfloat16(src[i + half]);
            dst[i] = x;
            dst[i + half] = y;
            a = x > a ? x : a;
            b = y > b ? y : b;
        }
        return load_rest(src, 2 * half, size, dst, std::max(a, b));
    });
}

#ifdef SPECKV_AVX512
// a where it is larger, else b, also where one of them is NaN. GCC makes two instructions of a > b ? a : b.
SPECKV_AVX512 inline void larger(const Floats& a, const Floats& b, Floats& result) {
    result = _mm512_max_ps(a, b);
}

// bf16 of one register: a pair of them in 32 bits is two floats, one a shift away and the other a mask.
constexpr int64_t kPairedValues = 2 * kLanes;

SPECKV_AVX512 inline void load_pairs(const uint16_t* src, float* dst, __m512i& maxima) {
    const __m512i pairs = _mm512_loadu_si512(src);
    maxima = _mm512_max_epi16(maxima, pairs);
    _mm512_storeu_si512(dst, _mm512_slli_epi32(pairs, 16));
    _mm512_storeu_si512(dst + kLanes, _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// How the halves of a pair get their places in fp32. Shifting and masking them takes the units that exp takes; written
// each alone, shifted by where, they need none, but dst must hold zeros for the lower halves. On an Emerald Rapids core
// that makes a row of 98,304 8 % faster. On Zen cores, whose masked stores differ, it is untried.
enum class Halves { kMoved, kMasked };

template <Halves halves>
SPECKV_AVX512 inline void load_pairs(const uint16_t* src, float* dst, __m512i& maxima) {
    if constexpr (halves == Halves::kMoved) {
        load_pairs(src, dst, maxima);
    } else {
        const __m512i pairs = _mm512_loadu_si512(src);
        maxima = _mm512_max_epi16(maxima, pairs);
        _mm512_mask_storeu_epi16(reinterpret_cast<uint16_t*>(dst) + 1, 0x55555555u, pairs);
        _mm512_mask_storeu_epi16(dst + kLanes, 0xaaaaaaaau, pairs);
    }
}

constexpr int16_t kLeastInt16 = std::numeric_limits<int16_t>::min();

// The largest of loaded values from the largest of their bits as integers, which order floats that are not negative.
SPECKV_AVX512 inline float largest_loaded(__m512i maxima, const float* values, int64_t size) {
    constexpr int16_t kInfinityBits = 0x7f80;
    const __m256i sixteen = _mm256_max_epi16(_mm512_castsi512_si256(maxima), _mm512_extracti64x4_epi64(maxima, 1));
    const __m128i eight = _mm_max_epi16(_mm256_castsi256_si128(sixteen), _mm256_extracti128_si256(sixteen, 1));
    // There is one instruction for the least of eight, unsigned.
    const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(0x7fff)));
    const auto bits = static_cast<int16_t>(_mm_cvtsi128_si32(least) ^ 0x7fff);
    const bool is_ordered = bits >= 0 && bits <= kInfinityBits;
    return is_ordered ? float_from_bfloat16(static_cast<uint16_t>(bits)) : largest(values, size);
}

// Faster than the loop above, to which GCC gives half vectors.
SPECKV_AVX512 float load_and_compare_avx512(const uint16_t* src, int64_t size, float* dst) {
    __m512i maxima = _mm512_set1_epi16(kLeastInt16);
    int64_t i = 0;
    for (; i + kPairedValues <= size; i += kPairedValues) {
        load_pairs(src + i, dst + i, maxima);
    }
    return load_rest(src, i, size, dst, largest_loaded(maxima, dst, i));
}

// Of 32 values in a row those that load_pairs would have put first, and the others.
SPECKV_AVX512 inline void load_as_pairs(const float* values, Floats (&x)[2]) {
    const __m512 low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + kLanes);
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    x[0] = _mm512_permutex2var_ps(low, even, high);
    x[1] = _mm512_permutex2var_ps(low, _mm512_add_epi32(even, _mm512_set1_epi32(1)), high);
}

// Adds e = exp((values - shift) * scale) to sums, and (values - shift) * e where is_weighted, whose scale is 1, to
// weighted_sums; those of the values behind the last 32 to rest. On the way `next` is loaded, which beside exp takes less
// time than alone.
template <bool is_weighted, Order order, Halves halves>
SPECKV_AVX512 inline __attribute__((always_inline)) void add_exps(
    const float* values, int64_t size, float shift, float scale, Ahead* next, Floats (&sums)[2],
    Floats (&weighted_sums)[2], ExpSums& rest) {
    const int64_t ahead = next == nullptr ? 0 : std::min(size, next->size) / kPairedValues * kPairedValues;
    __m512i maxima = _mm512_set1_epi16(kLeastInt16);
    int64_t i = 0;
    for (; i + kPairedValues <= size; i += kPairedValues) {
        Floats x[2], e[2];
        if constexpr (order == Order::kPaired) {
            load(values + i, x[0]);
            load(values + i + kLanes, x[1]);
        } else {
            load_as_pairs(values + i, x);
        }
        if (i < ahead) {
            load_pairs<halves>(next->src + i, next->dst + i, maxima);
        }
#pragma GCC unroll 2
        for (int64_t part = 0; part < 2; ++part) {
            x[part] -= shift;
            if constexpr (!is_weighted) {
                x[part] *= scale;
            }
            larger(Floats{} + kSmallestExponent, x[part], x[part]);
        }
        exp_in_range(x[0], e[0]);
        exp_in_range(x[1], e[1]);
#pragma GCC unroll 2
        for (int64_t part = 0; part < 2; ++part) {
            sums[part] += e[part];
            if constexpr (is_weighted) {
                weighted_sums[part] += x[part] * e[part];
            }
        }
    }
    for (; i < size; ++i) {
        const float x = raise_to_range(is_weighted ? values[i] - shift : (values[i] - shift) * scale);
        const float e = exp_in_range(x);
        rest.sum += e;
        rest.weighted += x * e;
    }
    if (next != nullptr) {
        const float so_far = largest_loaded(maxima, next->dst, ahead);
        next->largest = load_rest(next->src, ahead, next->size, next->dst, so_far);
    }
}

template <bool is_weighted, Order order, Halves halves>
SPECKV_AVX512 ExpSums exp_sums_avx512(const float* values, int64_t size, float shift, float scale, Ahead* next) {
    Floats sums[2] = {}, weighted_sums[2] = {};
    ExpSums found;
    add_exps<is_weighted, order, halves>(values, size, shift, scale, next, sums, weighted_sums, found);
    found.sum += sum_lanes(sums[0] + sums[1]);
    if constexpr (is_weighted) {
        found.weighted += sum_lanes(weighted_sums[0] + weighted_sums[1]);
    }
    return found;
}

template <Order order, Halves halves>
SPECKV_AVX512 void add_exp_parts_avx512(const float* values, int64_t size, float shift, Ahead* next, ExpParts& parts) {
    Floats sums[2], weighted_sums[2];
    for (int64_t part = 0; part < 2; ++part) {
        load(parts.sums + part * kLanes, sums[part]);
        load(parts.weighted_sums + part * kLanes, weighted_sums[part]);
    }
    add_exps<true, order, halves>(values, size, shift, 1.0f, next, sums, weighted_sums, parts.rest);
    for (int64_t part = 0; part < 2; ++part) {
        store(sums[part], parts.sums + part * kLanes);
        store(weighted_sums[part], parts.weighted_sums + part * kLanes);
    }
}

// The one of these functions that is for this order and this machine.
template <class Function>
Function* chosen(Order order, Function* as_it_lies, Function* moved, Function* masked) {
    static const bool is_intel = __builtin_cpu_is("intel");
    return order == Order::kAsItLies ? as_it_lies : is_intel ? masked : moved;
}

SPECKV_AVX512 ExpSums sum_of_parts_avx512(const ExpParts& parts) {
    Floats sums[2], weighted_sums[2];
    for (int64_t part = 0; part < 2; ++part) {
        load(parts.sums + part * kLanes, sums[part]);
        load(parts.weighted_sums + part * kLanes, weighted_sums[part]);
    }
    return {parts.rest.sum + sum_lanes(sums[0] + sums[1]),
            parts.rest.weighted + sum_lanes(weighted_sums[0] + weighted_sums[1])};
}

// The conversion is an instruction, which GCC does not use by itself.
SPECKV_AVX512 void load_float16_avx512(const uint16_t* src, int64_t size, float* dst) {
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i));
        _mm512_storeu_ps(dst + i, _mm512_cvtph_ps(halves));
    }
    for (; i < size; ++i) {
        dst[i] = float_from_float16(src[i]);
    }
}
#endif

void load_ahead(Ahead* next) {
    if (next != nullptr) {
        next->largest = load_bfloat16_and_largest(next->src, next->size, next->dst);
    }
}

}  // namespace

void load_bfloat16(const uint16_t* src, int64_t size, float* dst) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            dst[i] = float_from_bfloat16(src[i]);
        }
    });
}

void load_float16(const uint16_t* src, int64_t size, float* dst) {
#ifdef SPECKV_AVX512
    if (units() >= Units::kAvx512) {
        return load_float16_avx512(src, size, dst);
    }
#endif
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            dst[i] = float_from_float16(src[i]);
        }
    });
}

void store_bfloat16(const float* src, int64_t size, uint16_t* dst) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            dst[i] = bfloat16_from_float(src[i]);
        }
    });
}

void store_float16(const float* src, int64_t size, uint16_t* dst) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            dst[i] = float16_from_float(src[i]);
        }
    });
}

float load_bfloat16_and_largest(const uint16_t* src, int64_t size, float* dst) {
#ifdef SPECKV_AVX512
    if (units() >= Units::kAvx512) {
        return load_and_compare_avx512(src, size, dst);
    }
#endif
    return load_and_compare(src, size, dst);
}

// Four chains of comparisons side by side: one would wait for its own result at every step.
float largest(const float* values, int64_t size) {
    return in_widest_units([=]() SPECKV_INLINED {
        const int64_t quarter = size / 4;
        float a = kNegativeInfinity;
        float b = a;
        float c = a;
        float d = a;
#pragma omp simd reduction(max : a, b, c, d)
        for (int64_t i = 0; i < quarter; ++i) {
            a = values[i] > a ? values[i] : a;
            b = values[i + quarter] > b ? values[i + quarter] : b;
            c = values[i + 2 * quarter] > c ? values[i + 2 * quarter] : c;
            d = values[i + 3 * quarter] > d ? values[i + 3 * quarter] : d;
        }
        for (int64_t i = 4 * quarter; i < size; ++i) {
            a = values[i] > a ? values[i] : a;
        }
        return std::max(std::max(a, b), std::max(c, d));
    });
}

void group_maxima(const float* values, int64_t size, float* out) {
    in_widest_units([=]() SPECKV_INLINED {
        for (int64_t start = 0; start < size; start += kGroupSize) {
            const float* group = values + start;
            float maximum = kNegativeInfinity;
            if (size - start >= kGroupSize) {
#pragma omp simd reduction(max : maximum)
                for (int64_t i = 0; i < kGroupSize; ++i) {
                    maximum = group[i] > maximum ? group[i] : maximum;
                }
            } else {
                for (int64_t i = 0; i < size - start; ++i) {
                    maximum = group[i] > maximum ? group[i] : maximum;
                }
            }
            out[start / kGroupSize] = maximum;
        }
    });
}

bool has_nan(const float* values, int64_t size) {
    return in_widest_units([=]() SPECKV_INLINED {
        int32_t found = 0;
#pragma omp simd reduction(| : found)
        for (int64_t i = 0; i < size; ++i) {
            found |= (to_bits(values[i]) & 0x7fffffffu) > 0x7f800000u;
        }
        return found != 0;
    });
}

int64_t find_first(const float* values, int64_t size, float value) {
    return in_widest_units([=]() SPECKV_INLINED {
        int32_t first = std::numeric_limits<int32_t>::max();
#pragma omp simd reduction(min : first)
        for (int32_t i = 0; i < static_cast<int32_t>(size); ++i) {
            const int32_t candidate = values[i] == value ? i : std::numeric_limits<int32_t>::max();
            first = candidate < first ? candidate : first;
        }
        return first < size ? first : size;
    });
}

ExpSums exp_sums(const float* values, int64_t size, Order order, float shift, Ahead* next) {
#ifdef SPECKV_AVX512
    if (units() >= Units::kAvx512) {
        const auto sums = chosen(order, exp_sums_avx512<true, Order::kAsItLies, Halves::kMoved>,
                                 exp_sums_avx512<true, Order::kPaired, Halves::kMoved>,
                                 exp_sums_avx512<true, Order::kPaired, Halves::kMasked>);
        return sums(values, size, shift, 1.0f, next);
    }
#endif
    load_ahead(next);
    return in_widest_units<Units::kAvx2>([=]() SPECKV_INLINED {
        float sum = 0.0f;
        float weighted = 0.0f;
#pragma omp simd reduction(+ : sum, weighted)
        for (int64_t i = 0; i < size; ++i) {
            const float x = raise_to_range(values[i] - shift);
            const float e = exp_in_range(x);
            sum += e;
            weighted += x * e;
        }
        return ExpSums{sum, weighted};
    });
}

void add_exp_parts(const float* values, int64_t size, Order order, float shift, Ahead* next, ExpParts& parts) {
#ifdef SPECKV_AVX512
    if (units() >= Units::kAvx512) {
        const auto add = chosen(order, add_exp_parts_avx512<Order::kAsItLies, Halves::kMoved>,
                                add_exp_parts_avx512<Order::kPaired, Halves::kMoved>,
                                add_exp_parts_avx512<Order::kPaired, Halves::kMasked>);
        return add(values, size, shift, next, parts);
    }
#endif
    const ExpSums sums = exp_sums(values, size, order, shift, next);
    parts.rest.sum += sums.sum;
    parts.rest.weighted += sums.weighted;
}

ExpSums sum_of_parts(const ExpParts& parts) {
#ifdef SPECKV_AVX512
    if (units() >= Units::kAvx512) {
        return sum_of_parts_avx512(parts);
    }
#endif
    return parts.rest;
}

float exp_sum(const float* values, int64_t size, Order order, float shift, float scale, Ahead* next) {
#ifdef SPECKV_AVX512
    if (units() >= Units::kAvx512) {
        const auto sums = chosen(order, exp_sums_avx512<false, Order::kAsItLies, Halves::kMoved>,
                                 exp_sums_avx512<false, Order::kPaired, Halves::kMoved>,
                                 exp_sums_avx512<false, Order::kPaired, Halves::kMasked>);
        return sums(values, size, shift, scale, next).sum;
    }
#endif
    load_ahead(next);
    return in_widest_units<Units::kAvx2>([=]() SPECKV_INLINED {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            sum += exp_in_range(raise_to_range((values[i] - shift) * scale));
        }
        return sum;
    });
}

void exp_weights(const float* values, int64_t size, float shift, float scale, float* out) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = exp_or_zero((values[i] - shift) * scale);
        }
    });
}

void multiply_by_silu(float* gate, const float* up, int64_t size) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            // exp(-|x|), whose argument is never above 0, serves both signs.
            const float e = exp_or_zero(-std::fabs(gate[i]));
            gate[i] = gate[i] * ((gate[i] >= 0 ? 1.0f : e) / (1.0f + e)) * up[i];
        }
    });
}

float residual_weights(
    const float* p_values, const float* q_values, int64_t size, Softmax p, Softmax q, float* out) {
    return in_widest_units([=]() SPECKV_INLINED {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            const float p_i = exp_or_zero((p_values[i] - p.shift) * p.scale) * p.inverse;
            const float q_i = exp_or_zero((q_values[i] - q.shift) * q.scale) * q.inverse;
            const float residual = p_i > q_i ? p_i - q_i : 0.0f;
            out[i] = residual;
            sum += residual;
        }
        return sum;
    });
}

double sum_double(const float* values, int64_t size) {
    return in_widest_units([=]() SPECKV_INLINED {
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            sum += values[i];
        }
        return sum;
    });
}

}  // namespace speckv
