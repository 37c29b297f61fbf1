// Vectors of 16 floats, in the compiler's own notation: one register with AVX-512, two or four elsewhere.

#pragma once

#include <cstdint>
#include <cstring>

#include "units.h"

namespace speckv {

using Floats = float __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;

SPECKV_INLINE void load(const void* src, Floats& dst) {
    std::memcpy(&dst, src, sizeof(dst));
}

SPECKV_INLINE void store(const Floats& src, void* dst) {
    std::memcpy(dst, &src, sizeof(src));
}

SPECKV_INLINE void shift_bits(const Floats& values, int count, Floats& shifted) {
    using UInt32s = uint32_t __attribute__((vector_size(64)));
    UInt32s bits;
    std::memcpy(&bits, &values, sizeof(bits));
    bits <<= count;
    std::memcpy(&shifted, &bits, sizeof(shifted));
}

template <class Half, class Whole>
SPECKV_INLINE Half add_halves(const Whole& whole) {
    static_assert(sizeof(Whole) == 2 * sizeof(Half));
    Half low, high;
    std::memcpy(&low, &whole, sizeof(low));
    std::memcpy(&high, reinterpret_cast<const char*>(&whole) + sizeof(low), sizeof(high));
    return low + high;
}

// Lane i is added to lane i + 8, then i + 4, 2, 1: an order that does not depend on the machine.
SPECKV_INLINE float sum_lanes(const Floats& vector) {
    using Eight = float __attribute__((vector_size(32)));
    using Four = float __attribute__((vector_size(16)));
    using Two = float __attribute__((vector_size(8)));
    const Two two = add_halves<Two>(add_halves<Four>(add_halves<Eight>(vector)));
    return two[0] + two[1];
}

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SPECKV_SHUFFLES 1
#endif
#endif

// Eight vectors folded, two into one at each step, so that lanes 2 i and 2 i + 1 add up to sum_lanes(vectors[i]), and two
// of those so that lane i is sum_lanes of vector i, to the last bit.
#if SPECKV_SHUFFLES
#define SPECKV_FOLD(a, b, low, high) \
    (__builtin_shufflevector(a, b, SPECKV_UNPACK low) + __builtin_shufflevector(a, b, SPECKV_UNPACK high))
#define SPECKV_UNPACK(...) __VA_ARGS__
SPECKV_INLINE void fold_eight(Floats (&vectors)[8], Floats& folded) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        vectors[i] = SPECKV_FOLD(vectors[2 * i], vectors[2 * i + 1],
                                 (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                                 (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        vectors[i] = SPECKV_FOLD(vectors[2 * i], vectors[2 * i + 1],
                                 (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                                 (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31));
    }
    folded = SPECKV_FOLD(vectors[0], vectors[1], (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
                         (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31));
}

SPECKV_INLINE void fold_two(const Floats& first, const Floats& second, Floats& sums) {
    sums = SPECKV_FOLD(first, second, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                       (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
}
#undef SPECKV_UNPACK
#undef SPECKV_FOLD
#else
SPECKV_INLINE void fold_eight(Floats (&vectors)[8], Floats& folded) {
    for (int i = 0; i < 8; ++i) {
        folded[2 * i] = sum_lanes(vectors[i]);
        folded[2 * i + 1] = 0;
    }
}

SPECKV_INLINE void fold_two(const Floats& first, const Floats& second, Floats& sums) {
    for (int i = 0; i < 8; ++i) {
        sums[i] = first[2 * i] + first[2 * i + 1];
        sums[8 + i] = second[2 * i] + second[2 * i + 1];
    }
}
#endif

}  // namespace speckv
