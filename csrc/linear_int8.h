// Products with int8 weights that have one scale a row.

#pragma once

#include <cstddef>
#include <cstdint>

#include "rows.h"
#include "vectors.h"

namespace speckv {

constexpr int64_t kChunk = 4 * kLanes;  // weights in one vector
constexpr int64_t kTileInputs = 4;      // rows of x: their sums fill half of AVX-512's registers

// Returns loop<inputs>(...): the loops are built for each number of inputs. A macro, because the loops must be inlined
// into what is compiled for some vector units (see units.h).
#define SPECKV_BY_INPUTS(inputs, loop, ...) \
    switch (inputs) { \
        case 1: return loop<1>(__VA_ARGS__); \
        case 2: return loop<2>(__VA_ARGS__); \
        case 3: return loop<3>(__VA_ARGS__); \
        default: return loop<4>(__VA_ARGS__); \
    }
static_assert(kTileInputs == 4);

// 64 elements of x in fp32 times 2^-24, those of index 0, 4, 8, ... first, then those of index 1, 5, 9, ... and so on.
//
// 64 weights are read as 16 integers of 32 bits, each of which holds four. A weight that is shifted to the top byte is
// an integer of its own, 2^24 times the weight: no lane has to move, and every vector unit has the instructions.
struct alignas(64) Chunk {
    float values[kChunk];
};

// Rows of weights, each with a scale.
struct Int8Weights {
    const int8_t* start;
    int64_t stride;
    int64_t columns;
    const float* scale;
};

// chunks receives the row, and zeros behind it.
void arrange(const Row& row, Chunk* chunks);

// out[input * out_stride + row - begin] for up to kTileInputs inputs, whose chunks lie `stride` apart.
void multiply_tile(
    const Int8Weights& weights, int64_t begin, int64_t end, const Chunk* x, int64_t stride, int64_t inputs, float* out,
    int64_t out_stride);

}  // namespace speckv
