// Weight matrices as models hold them, multiplied with the few rows of a decoding step.
//
// Such a product is a walk through the weights, so they are read as they lie, from the formats below, and every row of
// inputs is served on the way. The sum that makes an output has an order of its own, which depends on neither how many
// inputs there are nor on how many threads share the work: a token has the same logits to the last bit whether it is
// decoded alone or verified together with others.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffers.h"
#include "linear_int8.h"
#include "team.h"
#include "tensors.h"
#include "tile_products.h"

namespace speckv {

enum class Format {
    kFloat32,   // [rows, columns]
    kBFloat16,  // [rows, columns]; inputs are rounded to bf16 too
    // [rows, columns], one fp32 scale a row. In tiles inputs are rounded to 24 bits by the largest of their row.
    kInt8,
    // The same with inputs of 8 bits too, LLM.int8() of bitsandbytes (Dettmers et al., arXiv 2208.07339): each row of
    // inputs is rounded to int8 by its largest value, except for values of at least the threshold, which count as they
    // are. Sums are exact.
    kInt8Inputs,
    // Indices of 4 bits into a table of 16 values, one bf16 scale for 64 columns [columns / 64, rows], as bitsandbytes
    // packs them for a CPU: blocks of 32 rows, in which byte j of column pair c holds row j / 2 in its low bits and
    // row 16 + j / 2 in its high ones, of column 2c + j % 2. Table and inputs are rounded to bf16.
    kFourBit,
};

constexpr int64_t kBlockRows = 32;  // the least that a thread computes
constexpr int64_t kScaledColumns = 64;
constexpr int64_t kTable = 16;

struct Matrix {
    Format format = Format::kFloat32;
    int64_t rows = 0;
    int64_t columns = 0;
    const void* values = nullptr;
    const void* scale = nullptr;
    const float* bias = nullptr;  // [rows], or null
    const float* table = nullptr;  // of kFourBit
    std::vector<Tensor> owners;    // keep the memory
    float threshold = 0;             // of kInt8Inputs
    std::vector<int32_t> row_sums;   // of kInt8Inputs
    std::vector<float> own_bias, own_table;

    bool is_empty() const { return rows == 0; }
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
};

// From a weight and what its format wants, in table the 16 values of 4 bits or the one threshold of 8-bit inputs; empty
// tensors stand for what there is not. An empty weight gives an empty
// matrix. Refuses, in the name of op, what does not fit together.
std::unique_ptr<Matrix> make_matrix(
    const char* op, const char* name, const Tensor& weight, const Tensor& scale, const Tensor& bias,
    const Tensor& table);

// Rows of inputs, in the forms that the formats want them.
class Inputs {
public:
    struct Outlier {
        int64_t column;
        float value;
    };

    // values [count, columns] stay where they are and must not change until the next call.
    void set(const float* values, int64_t count, int64_t columns);
    // Before the first product with a matrix of this format.
    void arrange_for(const Matrix& matrix, Team& team);

    int64_t count() const { return count_; }
    int64_t columns() const { return columns_; }
    const float* row(int64_t input) const { return values_ + input * columns_; }
    const uint16_t* half_row(int64_t input) const { return halves_.data() + input * columns_; }
    const TileInputs& tiled_halves() const { return tiled_halves_; }
    const TileInputs& tiled_bytes() const { return tiled_bytes_; }
    const uint8_t* byte_row(int64_t input) const { return bytes_.data() + input * columns_; }
    float byte_scale(int64_t input) const { return byte_scales_[input]; }
    const std::vector<Outlier>& outliers(int64_t input) const { return outliers_[input]; }
    // Of kInt8 in tiles: three digits of each input, one row of bytes after the other, the highest first.
    const TileInputs& tiled_digits() const { return tiled_digits_; }
    float digit_scale(int64_t input) const { return digit_scales_[input]; }
    const Chunk* chunks() const { return chunks_.data(); }
    int64_t chunk_stride() const { return (columns_ + kChunk - 1) / kChunk; }

private:
    const float* values_ = nullptr;
    int64_t count_ = 0, columns_ = 0;
    void round_to_halves(Team& team);
    void round_to_bytes(float threshold, Team& team);
    void round_row_to_bytes(float threshold, int64_t i);
    void split_into_digits(Team& team);
    void split_row_into_digits(int64_t i);

    bool has_halves_ = false, has_chunks_ = false, has_tiled_halves_ = false, has_digits_ = false;
    float bytes_threshold_ = -1;  // that bytes_ were made with
    Buffer<uint16_t> halves_;
    TileInputs tiled_halves_, tiled_bytes_, tiled_digits_;
    Buffer<int8_t> digits_;
    std::vector<float> digit_scales_;
    std::vector<Chunk> chunks_;
    Buffer<uint8_t> bytes_;  // 128 more than the rounded values
    std::vector<float> byte_scales_;
    std::vector<std::vector<Outlier>> outliers_;
};

// out[input * stride + row] for the rows of a block: the product, and the bias.
void multiply_block(const Matrix& matrix, int64_t block, const Inputs& inputs, float* out, int64_t stride);

}  // namespace speckv
