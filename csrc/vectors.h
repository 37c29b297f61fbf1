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

}  // namespace speckv
