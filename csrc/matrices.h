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

#include "linear_int8.h"
#include "tensors.h"

namespace speckv {

enum class Format {
    kFloat32,   // [rows, columns]
    kBFloat16,  // [rows, columns]; inputs are rounded to bf16 too
    kInt8,      // [rows, columns], one fp32 scale a row
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
    std::vector<float> own_bias, own_table;

    bool is_empty() const { return rows == 0; }
    int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
};

// From a weight and what its format wants; empty tensors stand for what there is not. An empty weight gives an empty
// matrix. Refuses, in the name of op, what does not fit together.
std::unique_ptr<Matrix> make_matrix(
    const char* op, const char* name, const Tensor& weight, const Tensor& scale, const Tensor& bias,
    const Tensor& table);

// Rows of inputs, in the forms that the formats want them.
class Inputs {
public:
    // values [count, columns] stay where they are and must not change until the next call.
    void set(const float* values, int64_t count, int64_t columns);
    // Before the first product with a matrix of this format.
    void arrange_for(Format format);

    int64_t count() const { return count_; }
    int64_t columns() const { return columns_; }
    const float* row(int64_t input) const { return values_ + input * columns_; }
    const uint16_t* half_row(int64_t input) const { return halves_.data() + input * columns_; }
    const Chunk* chunks() const { return chunks_.data(); }
    int64_t chunk_stride() const { return (columns_ + kChunk - 1) / kChunk; }

private:
    const float* values_ = nullptr;
    int64_t count_ = 0, columns_ = 0;
    bool has_halves_ = false, has_chunks_ = false;
    std::vector<uint16_t> halves_;
    std::vector<Chunk> chunks_;
};

// out[input * stride + row] for the rows of a block: the product, and the bias.
void multiply_block(const Matrix& matrix, int64_t block, const Inputs& inputs, float* out, int64_t stride);

}  // namespace speckv
