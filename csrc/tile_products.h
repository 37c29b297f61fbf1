// The products of products.h in AMX tiles. Up to kTileWidth inputs take as many products of tiles as one; what grows with
// them is to arrange inputs and to put the sums where they belong.
//
// Of bf16 and int8 the weights are the first factor, as they lie; the inputs' words of 4 bytes are transposed once a
// pass. Of 4 bits the weights are the second factor, in the order in which they are unpacked anyway.

#pragma once

#include <cstdint>

#include "buffers.h"
#include "team.h"
#include "tiles.h"

namespace speckv {

constexpr int64_t kTileWidth = 16;

// From rows of row_bytes each to the second factors of their products: [steps, 16, width] words of 4 bytes, a step for
// 64 bytes of a row; what is beyond its end is zero.
class TileInputs {
public:
    void arrange(const void* rows, int64_t row_bytes, int64_t count, Team& team);

    // A step of a group of kTileWidth inputs.
    const uint32_t* step(int64_t group, int64_t number) const {
        return words_.data() + (group * steps_ + number) * kTileHeight * width_;
    }
    int64_t steps() const { return steps_; }
    int64_t stride_bytes() const { return width_ * int64_t{sizeof(uint32_t)}; }
    int64_t in_group() const { return in_group_; }  // all of a single group, else kTileWidth

private:
    Buffer<uint32_t> words_;
    int64_t steps_ = 0, width_ = 0, in_group_ = 0;
};

// out[input * stride + row] for up to 32 rows of weights [rows, columns] and all inputs.
void multiply_bfloat16_in_tiles(
    const uint16_t* weights, int64_t rows, int64_t columns, const TileInputs& inputs, int64_t count, float* out,
    int64_t stride);
void multiply_bytes_in_tiles(
    const int8_t* weights, int64_t rows, int64_t columns, const TileInputs& inputs, int64_t count, int32_t* out,
    int64_t stride);
// The same of signed bytes.
void multiply_signed_bytes_in_tiles(
    const int8_t* weights, int64_t rows, int64_t columns, const TileInputs& inputs, int64_t count, int32_t* out,
    int64_t stride);
// As multiply_four_bit; of x as many rows are read as the groups of kTileWidth have, where there is more than one.
void multiply_four_bit_in_tiles(
    const uint8_t* indices, const uint16_t* scale, int64_t scale_stride, const float* table, int64_t columns,
    const uint16_t* x, int64_t inputs, float* out, int64_t stride);

}  // namespace speckv
