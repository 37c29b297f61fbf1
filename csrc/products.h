// The inner loops of a product of weights with a few rows of inputs, one for each format of weights: up to kWideTile
// of them for bf16 and for int8 with 8-bit inputs, kTileUnpacked for 4 bits, kTileInputs for fp32.
//
// Where a processor multiplies pairs of bf16 there are loops of their own for all but fp32 (see units.h); where sums are
// not exact they round differently.

#pragma once

#include <cstdint>

#include "prefetch.h"

namespace speckv {

constexpr int64_t kWideTile = 8;
constexpr int64_t kTileUnpacked = 6, kTilePaired = 6;

// out[input * stride + row] for weights [rows, columns] and x [inputs, columns].
void multiply_float32(
    const float* weights, int64_t rows, int64_t columns, const float* x, int64_t inputs, float* out, int64_t stride);
// The same of bf16.
void multiply_bfloat16(
    const uint16_t* weights, int64_t rows, int64_t columns, const uint16_t* x, int64_t inputs, Walk walk,
    float* out, int64_t stride);
// The same of a block of 32 rows of indices; scale[columns / 64 * scale_stride + row] is bf16. See matrices.h.
void multiply_four_bit(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table, int64_t columns,
    const uint16_t* x, int64_t inputs, Walk walk, float* out, int64_t stride);

// The same of int8 weights and inputs from 0 to 255, summed exactly.
void multiply_bytes(
    const int8_t* weights, int64_t rows, int64_t columns, const uint8_t* x, int64_t inputs, Walk walk, int32_t* out,
    int64_t stride);

}  // namespace speckv
