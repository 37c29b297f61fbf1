// What the loops for bf16 units (products.cpp) and those for tiles of them (tile_products.cpp) have in common.

#pragma once

#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace speckv {

#define SPECKV_BF16_UNITS \
    __attribute__((target( \
        "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni,prefer-vector-width=512")))

// Scales of 16 rows, from bf16.
SPECKV_BF16_UNITS inline __m512 widen_scale(const uint16_t* from) {
    const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

// The 16 values of 4 bits in bf16, twice: a lookup reads five bits, of which the highest belongs to another row.
SPECKV_BF16_UNITS inline __m512i doubled_table(const float* values) {
    alignas(64) uint16_t halves[32];
    for (int i = 0; i < 32; ++i) {
        uint32_t bits;
        std::memcpy(&bits, values + i % 16, sizeof(bits));
        halves[i] = static_cast<uint16_t>(bits >> 16);
    }
    return _mm512_load_si512(halves);
}

}  // namespace speckv
#endif
