// exp(x) for x of at most 0, without a branch: a loop over it is done in vectors.

#pragma once

#include "bits.h"
#include "units.h"
#include "vectors.h"

namespace speckv {

constexpr float kSmallestExponent = -87.0f;  // exp(-87) is 1.6e-38, still a normal number

// exp(x) for -87 <= x <= 0; exp(0) is exactly 1. With fused multiply-add within 2 ulp above -40 and 4 below, without it
// (x86 before AVX2) within 35. x = n ln2 + r with |r| <= ln2/2: the sum with kRound leaves n + 127 in the low bits, 2^n
// is those bits moved to the exponent, and e^r is a polynomial fitted to relative error 9.2e-8. One product is enough
// for r because float(ln2) is within 2e-9 of ln2.
template <class T>  // float, or Floats
SPECKV_INLINE void exp_in_range(const T& x, T& result) {
    constexpr float kRound = 12582912.0f + 127.0f;  // 1.5 * 2^23 and the exponent's bias
    const T rounded = x * 1.44269504f + kRound;
    const T n = rounded - kRound;
    const T r = x - n * 0.693147181f;
    T e = r * 0.008290272206068039f + 0.04189816117286682f;
    e = e * r + 0.1666763871908188f;
    e = e * r + 0.4999914765357971f;
    e = e * r + 0.9999997019767761f;
    e = e * r + 1.0f;
    T power;
    shift_bits(rounded, 23, power);
    result = e * power;
}

SPECKV_INLINE float exp_in_range(float x) {
    float result;
    exp_in_range(x, result);
    return result;
}

// The comparison is written so that a NaN stays one.
SPECKV_INLINE float raise_to_range(float x) {
    return kSmallestExponent > x ? kSmallestExponent : x;
}

SPECKV_INLINE float exp_or_zero(float x) {
    return x < kSmallestExponent ? 0.0f : exp_in_range(x);
}

}  // namespace speckv
