#include "matrices.h"

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "products.h"

namespace speckv {
namespace {

std::vector<float> as_floats(const Tensor& tensor) {
    const Tensor whole = as_contiguous(tensor);
    std::vector<float> out(whole.numel());
    const Row row{data<std::byte>(whole), as_logits(whole).dtype, static_cast<int64_t>(out.size())};
    BlockBuffer buffer;
    for (int64_t start = 0; start < row.size; start += kBlockSize) {
        const Block block = load_block(row, start, buffer.values);
        std::copy(block.values, block.values + block.size, out.data() + start);
    }
    return out;
}

void check_contiguous(const char* op, const char* name, const Tensor& tensor) {
    if (!tensor.is_contiguous()) {
        refuse(op, name, " must be contiguous");
    }
}

Format format_of(const char* op, const char* name, const Tensor& weight) {
    const int32_t dtype = dtype_of(weight);
    if (dtype == aoti_torch_dtype_float32()) return Format::kFloat32;
    if (dtype == aoti_torch_dtype_bfloat16()) return Format::kBFloat16;
    if (dtype == aoti_torch_dtype_int8()) return Format::kInt8;
    if (dtype == aoti_torch_dtype_uint8()) return Format::kFourBit;
    refuse(op, name, " must be float32, bfloat16, int8 or uint8");
}

}  // namespace

std::unique_ptr<Matrix> make_matrix(
    const char* op, const char* name, const Tensor& weight, const Tensor& scale, const Tensor& bias,
    const Tensor& table) {
    auto matrix = std::make_unique<Matrix>();
    if (weight.numel() == 0) {
        return matrix;
    }
    check_shape(op, name, weight, {kAnySize, kAnySize});
    check_contiguous(op, name, weight);
    matrix->format = format_of(op, name, weight);
    matrix->rows = weight.size(0);
    matrix->columns = weight.size(1);
    matrix->values = weight.const_data_ptr();
    matrix->owners = {weight, scale};
    if (matrix->format == Format::kInt8) {
        check_shape(op, "scale", scale, {matrix->rows});
        check_float32(op, "scale", scale);
        check_contiguous(op, "scale", scale);
        matrix->scale = scale.const_data_ptr();
    } else if (matrix->format == Format::kFourBit) {
        matrix->columns *= 2;
        if (matrix->rows % kBlockRows != 0 || matrix->columns % kScaledColumns != 0) {
            refuse(op, name, " of 4 bits must have a multiple of 32 rows and of 64 columns");
        }
        check_shape(op, "scale", scale, {matrix->columns / kScaledColumns, matrix->rows});
        if (dtype_of(scale) != aoti_torch_dtype_bfloat16()) {
            refuse(op, "scale must be bfloat16");
        }
        check_contiguous(op, "scale", scale);
        matrix->scale = scale.const_data_ptr();
        check_shape(op, "table", table, {kTable});
        check_floating(op, "table", table);
        matrix->own_table = as_floats(table);
        for (float& value : matrix->own_table) {  // as the products of bf16 units want it
            uint16_t half;
            store_bfloat16(&value, 1, &half);
            load_bfloat16(&half, 1, &value);
        }
        matrix->table = matrix->own_table.data();
    }
    if (bias.numel() > 0) {
        check_shape(op, "bias", bias, {matrix->rows});
        check_floating(op, "bias", bias);
        matrix->own_bias = as_floats(bias);
        matrix->bias = matrix->own_bias.data();
    }
    return matrix;
}

void Inputs::set(const float* values, int64_t count, int64_t columns) {
    values_ = values;
    count_ = count;
    columns_ = columns;
    has_halves_ = has_chunks_ = false;
}

void Inputs::arrange_for(Format format) {
    if ((format == Format::kBFloat16 || format == Format::kFourBit) && !has_halves_) {
        halves_.resize(count_ * columns_);
        store_bfloat16(values_, count_ * columns_, halves_.data());
        has_halves_ = true;
    } else if (format == Format::kInt8 && !has_chunks_) {
        chunks_.assign(count_ * chunk_stride(), Chunk{});
        for (int64_t i = 0; i < count_; ++i) {
            arrange({row(i), Dtype::kFloat32, columns_}, chunks_.data() + i * chunk_stride());
        }
        has_chunks_ = true;
    }
}

void multiply_block(const Matrix& matrix, int64_t block, const Inputs& inputs, float* out, int64_t stride) {
    const int64_t begin = block * kBlockRows;
    const int64_t end = std::min(begin + kBlockRows, matrix.rows);
    for (int64_t first = 0; first < inputs.count(); first += kTileInputs) {
        const int64_t count = std::min(kTileInputs, inputs.count() - first);
        float* const tile = out + first * stride + begin;
        switch (matrix.format) {
            case Format::kFloat32:
                multiply_float32(
                    static_cast<const float*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
                    inputs.row(first), count, tile, stride);
                break;
            case Format::kBFloat16:
                multiply_bfloat16(
                    static_cast<const uint16_t*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
                    inputs.half_row(first), count, tile, stride);
                break;
            case Format::kInt8:
                multiply_tile(
                    {static_cast<const int8_t*>(matrix.values), matrix.columns, matrix.columns,
                     static_cast<const float*>(matrix.scale)},
                    begin, end, inputs.chunks() + first * inputs.chunk_stride(), inputs.chunk_stride(), count, tile,
                    stride);
                break;
            case Format::kFourBit:
                multiply_four_bit(
                    static_cast<const uint8_t*>(matrix.values) + begin * matrix.columns / 2,
                    static_cast<const uint16_t*>(matrix.scale) + begin, matrix.rows, matrix.table, matrix.columns,
                    inputs.half_row(first), count, tile, stride);
                break;
        }
        for (int64_t input = 0; matrix.bias != nullptr && input < count; ++input) {
            for (int64_t row = begin; row < end; ++row) {
                tile[input * stride + row - begin] += matrix.bias[row];
            }
        }
    }
}

}  // namespace speckv
