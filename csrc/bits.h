// The bits of an fp32 number as an integer, and back.

#pragma once

#include <cstdint>
#include <cstring>

#include "units.h"

namespace speckv {

SPECKV_INLINE float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

SPECKV_INLINE uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

SPECKV_INLINE void shift_bits(float value, int count, float& shifted) {
    shifted = from_bits(to_bits(value) << count);
}

}  // namespace speckv
