// Vectors of 16 floats, in the compiler's own notation: one register with AVX-512, two or four elsewhere.

#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"

namespace speckv {

using Floats = float __attribute__((vector_size(64)));

constexpr int64_t kLanes = 16;

SPECKV_INLINE void load(const void* src, Floats& dst) {
    std::memcpy(&dst, src, sizeof(dst));
}

SPECKV_INLINE void store(const Floats& src, void* dst) {
    std::memcpy(dst, &src, sizeof(src));
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

// sums[i] is sum_lanes(vectors[i]), to the last bit: at each step two vectors are folded into one.
SPECKV_INLINE void sum_lanes_of_all(Floats (&vectors)[kLanes], Floats& sums) {
#if SPECKV_SHUFFLES
#define SPECKV_FOLD(count, low, high) \
    for (int i = 0; i < (count); ++i) { \
        const Floats &a = vectors[2 * i], &b = vectors[2 * i + 1]; \
        vectors[i] = __builtin_shufflevector(a, b, SPECKV_UNPACK low) + __builtin_shufflevector(a, b, SPECKV_UNPACK high); \
    }
#define SPECKV_UNPACK(...) __VA_ARGS__
    SPECKV_FOLD(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
                (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    SPECKV_FOLD(4, (0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27),
                (4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31))
    SPECKV_FOLD(2, (0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29),
                (2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31))
    SPECKV_FOLD(1, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31))
#undef SPECKV_UNPACK
#undef SPECKV_FOLD
    sums = vectors[0];
#else
    for (int64_t i = 0; i < kLanes; ++i) {
        sums[i] = sum_lanes(vectors[i]);
    }
#endif
}

}  // namespace speckv
