#include "matrices.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "checks.h"
#include "products.h"
#include "units.h"

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

Format format_of(const char* op, const char* name, const Tensor& weight, const Tensor& table) {
    const int32_t dtype = dtype_of(weight);
    if (dtype == aoti_torch_dtype_float32()) return Format::kFloat32;
    if (dtype == aoti_torch_dtype_bfloat16()) return Format::kBFloat16;
    if (dtype == aoti_torch_dtype_int8()) return table.numel() == 0 ? Format::kInt8 : Format::kInt8Inputs;
    if (dtype == aoti_torch_dtype_uint8()) return Format::kFourBit;
    refuse(op, name, " must be float32, bfloat16, int8 or uint8");
}

constexpr int64_t kFewInputs = 2;  // of 8 bits, for which walks are faster than tiles
constexpr int64_t kDigits = 3;     // of a byte each, that an input of kInt8 becomes in tiles

bool goes_in_tiles(Format format) {
    return units() == Units::kAmx && format != Format::kFloat32;
}

// What a first factor of tiles reads of so many rows; those beyond them count for nothing.
int64_t rows_of_tiles(int64_t count) {
    return count <= kTileWidth ? count : (count + kTileWidth - 1) / kTileWidth * kTileWidth;
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
    matrix->format = format_of(op, name, weight, table);
    matrix->rows = weight.size(0);
    matrix->columns = weight.size(1);
    matrix->values = weight.const_data_ptr();
    matrix->owners = {weight, scale};
    if (matrix->format == Format::kInt8 || matrix->format == Format::kInt8Inputs) {
        check_shape(op, "scale", scale, {matrix->rows});
        check_float32(op, "scale", scale);
        check_contiguous(op, "scale", scale);
        matrix->scale = scale.const_data_ptr();
        if (matrix->format == Format::kInt8Inputs) {
            check_shape(op, "table", table, {1});
            check_float32(op, "table", table);
            matrix->threshold = *data<float>(table);
            const auto* const values = static_cast<const int8_t*>(matrix->values);
            for (int64_t row = 0; row < matrix->rows; ++row) {
                matrix->row_sums.push_back(std::accumulate(
                    values + row * matrix->columns, values + (row + 1) * matrix->columns, int32_t{0}));
            }
        }
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
    has_halves_ = has_chunks_ = has_tiled_halves_ = has_digits_ = false;
    bytes_threshold_ = -1;
}

void Inputs::arrange_for(const Matrix& matrix, Team& team) {
    const Format format = matrix.format;
    if (format == Format::kInt8Inputs && bytes_threshold_ != matrix.threshold) {
        round_to_bytes(matrix.threshold, team);
    } else if ((format == Format::kBFloat16 || format == Format::kFourBit) && !has_halves_) {
        round_to_halves(team);
    } else if (format == Format::kInt8 && goes_in_tiles(format)) {
        if (!has_digits_) {
            split_into_digits(team);
        }
    } else if (format == Format::kInt8 && !has_chunks_) {
        chunks_.assign(count_ * chunk_stride(), Chunk{});
        for_rows(team, count_, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                arrange({row(i), Dtype::kFloat32, columns_}, chunks_.data() + i * chunk_stride());
            }
        });
        has_chunks_ = true;
    }
    if (format == Format::kBFloat16 && goes_in_tiles(format) && !has_tiled_halves_) {
        tiled_halves_.arrange(halves_.data(), columns_ * int64_t{sizeof(uint16_t)}, count_, team);
        has_tiled_halves_ = true;
    }
}

void Inputs::round_to_halves(Team& team) {
    halves_.resize(rows_of_tiles(count_) * columns_);
    for_rows(team, count_, [&](int64_t begin, int64_t end) {
        store_bfloat16(row(begin), (end - begin) * columns_, halves_.data() + begin * columns_);
    });
    has_halves_ = true;
}

namespace {

float largest_magnitude(const float* values, int64_t size) {
    return in_widest_units([=]() SPECKV_INLINED {
        float found = 0;
#pragma omp simd reduction(max : found)
        for (int64_t i = 0; i < size; ++i) {
            const float magnitude = std::fabs(values[i]);
            found = magnitude > found ? magnitude : found;
        }
        return found;
    });
}

// out[i] = 128 + values[i] * factor, rounded to even. The product is rounded first, as in PyTorch: half the largest value
// makes it 63.5, and a fused multiply-add would tell from the last bit of factor which way that goes.
void round_to_byte(const float* values, int64_t size, float factor, uint8_t* out) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = static_cast<uint8_t>(static_cast<int32_t>(std::rint(values[i] * factor)) + 128);
        }
    });
}

}  // namespace

// As bitsandbytes does for one row; where it has several, it takes the outliers of each for those of all.
void Inputs::round_to_bytes(float threshold, Team& team) {
    bytes_.resize(count_ * columns_);
    byte_scales_.resize(count_);
    outliers_.resize(count_);
    round_to_halves(team);
    for_rows(team, count_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            round_row_to_bytes(threshold, i);
        }
    });
    if (goes_in_tiles(Format::kInt8Inputs)) {
        tiled_bytes_.arrange(bytes_.data(), columns_, count_, team);
    }
    bytes_threshold_ = threshold;
}

void Inputs::round_row_to_bytes(float threshold, int64_t i) {
    static thread_local Buffer<float> kept;
    kept.resize(columns_);
    load_bfloat16(half_row(i), columns_, kept.data());
    outliers_[i].clear();
    float largest = largest_magnitude(kept.data(), columns_);
    if (threshold > 0 && largest >= threshold) {
        for (int64_t column = 0; column < columns_; ++column) {
            if (std::fabs(kept[column]) >= threshold) {
                outliers_[i].push_back({column, kept[column]});
                kept[column] = 0;
            }
        }
        largest = largest_magnitude(kept.data(), columns_);
    }
    if (!std::isfinite(largest) || has_nan(kept.data(), columns_)) {
        std::fill_n(bytes_.data() + i * columns_, columns_, uint8_t{128});
        byte_scales_[i] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float factor = largest > 0 ? std::min(127.0f / largest, std::numeric_limits<float>::max()) : 0.0f;
    round_to_byte(kept.data(), columns_, factor, bytes_.data() + i * columns_);
    byte_scales_[i] = largest;
}

// What three signed digits of a byte each make of the largest value of a row, and one more of which still fits.
constexpr float kLargestDigits = 127 << 16;

void Inputs::split_into_digits(Team& team) {
    digits_.resize(kDigits * count_ * columns_);
    digit_scales_.resize(count_);
    for_rows(team, count_, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            split_row_into_digits(i);
        }
    });
    tiled_digits_.arrange(digits_.data(), columns_, kDigits * count_, team);
    has_digits_ = true;
}

void Inputs::split_row_into_digits(int64_t i) {
    int8_t* const digits = digits_.data() + kDigits * i * columns_;
    const float largest = largest_magnitude(row(i), columns_);
    if (!std::isfinite(largest) || has_nan(row(i), columns_)) {
        std::fill_n(digits, kDigits * columns_, int8_t{0});
        digit_scales_[i] = std::numeric_limits<float>::quiet_NaN();
        return;
    }
    const float factor = largest > 0 ? std::min(kLargestDigits / largest, std::numeric_limits<float>::max()) : 0.0f;
    in_widest_units([values = row(i), columns = columns_, factor, digits]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t column = 0; column < columns; ++column) {
            const auto whole = static_cast<int32_t>(std::rint(values[column] * factor));
            const int32_t low = static_cast<int8_t>(whole), rest = (whole - low) >> 8;
            const int32_t middle = static_cast<int8_t>(rest);
            digits[column] = static_cast<int8_t>((rest - middle) >> 8);
            digits[columns + column] = static_cast<int8_t>(middle);
            digits[2 * columns + column] = static_cast<int8_t>(low);
        }
    });
    digit_scales_[i] = largest / kLargestDigits;
}

namespace {

// From exact sums of three digits to outputs.
void finish_digits(
    const Matrix& matrix, int64_t begin, int64_t end, float input_scale, const int32_t* sums, float* out) {
    const int64_t rows = end - begin;
    const auto* const scale = static_cast<const float*>(matrix.scale) + begin;
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t row = 0; row < rows; ++row) {
            const auto high = static_cast<float>(sums[row]), middle = static_cast<float>(sums[kBlockRows + row]),
                       low = static_cast<float>(sums[2 * kBlockRows + row]);
            out[row] = (high * 65536.0f + (middle * 256.0f + low)) * (input_scale * scale[row]);
        }
    });
}

// From exact sums to outputs, and the outliers.
void finish_bytes(
    const Matrix& matrix, int64_t begin, int64_t end, const Inputs& inputs, int64_t input, const int32_t* sums,
    float* out) {
    constexpr float kStep = 1.0f / 127;
    const int64_t rows = end - begin;
    const float input_scale = inputs.byte_scale(input);
    const auto* const scale = static_cast<const float*>(matrix.scale) + begin;
    const int32_t* const row_sums = matrix.row_sums.data() + begin;
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t row = 0; row < rows; ++row) {
            const auto sum = static_cast<float>(sums[row] - 128 * row_sums[row]);
            out[row] = sum * (input_scale * scale[row]) * (kStep * kStep);
        }
    });
    const auto* const values = static_cast<const int8_t*>(matrix.values) + begin * matrix.columns;
    for (const Inputs::Outlier& outlier : inputs.outliers(input)) {
        for (int64_t row = 0; row < rows; ++row) {
            const auto weight = static_cast<float>(values[row * matrix.columns + outlier.column]);
            out[row] += outlier.value * (weight * scale[row] * kStep);
        }
    }
}

int64_t widest_tile(Format format, int64_t inputs) {
    switch (format) {
        // Walks after the first take two rows at a time, for which as many sums as kTilePaired make find registers.
        case Format::kBFloat16: return inputs > 2 * kWideTile ? kTilePaired : kWideTile;
        case Format::kInt8Inputs: return kWideTile;
        case Format::kFourBit: return kTileUnpacked;
        default: return kTileInputs;
    }
}

// Some inputs, in one walk through the block.
void multiply_walk(
    const Matrix& matrix, int64_t begin, int64_t end, const Inputs& inputs, int64_t first, int64_t count, Walk walk,
    float* out, int64_t stride) {
    switch (matrix.format) {
        case Format::kFloat32:
            return multiply_float32(
                static_cast<const float*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
                inputs.row(first), count, out, stride);
        case Format::kBFloat16:
            return multiply_bfloat16(
                static_cast<const uint16_t*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
                inputs.half_row(first), count, walk, out, stride);
        case Format::kInt8:
            return multiply_tile(
                {static_cast<const int8_t*>(matrix.values), matrix.columns, matrix.columns,
                 static_cast<const float*>(matrix.scale)},
                begin, end, inputs.chunks() + first * inputs.chunk_stride(), inputs.chunk_stride(), count, out, stride);
        case Format::kInt8Inputs: {
            int32_t sums[kWideTile * kBlockRows];
            multiply_bytes(
                static_cast<const int8_t*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
                inputs.byte_row(first), count, walk, sums, kBlockRows);
            for (int64_t input = 0; input < count; ++input) {
                finish_bytes(matrix, begin, end, inputs, first + input, sums + input * kBlockRows,
                             out + input * stride);
            }
            return;
        }
        case Format::kFourBit:
            return multiply_four_bit(
                static_cast<const uint8_t*>(matrix.values) + begin * matrix.columns / 2,
                static_cast<const uint16_t*>(matrix.scale) + begin, matrix.rows, matrix.table, matrix.columns,
                inputs.half_row(first), count, walk, out, stride);
    }
}

// As few walks through the block as serve all inputs, with about as many in each.
void multiply_in_walks(
    const Matrix& matrix, int64_t begin, int64_t end, const Inputs& inputs, float* out, int64_t stride) {
    const int64_t most = widest_tile(matrix.format, inputs.count());
    const int64_t walks = (inputs.count() + most - 1) / most;
    const int64_t in_walk = walks > 0 ? (inputs.count() + walks - 1) / walks : 0;
    for (int64_t first = 0; first < inputs.count(); first += in_walk) {
        const int64_t count = std::min(in_walk, inputs.count() - first);
        const Walk walk = first > 0 ? Walk::kLater : count == inputs.count() ? Walk::kOnly : Walk::kFirst;
        multiply_walk(matrix, begin, end, inputs, first, count, walk, out + first * stride, stride);
    }
}

void multiply_in_tiles(
    const Matrix& matrix, int64_t begin, int64_t end, const Inputs& inputs, float* out, int64_t stride) {
#if SPECKV_HAS_TILES
    if (matrix.format == Format::kBFloat16) {
        multiply_bfloat16_in_tiles(
            static_cast<const uint16_t*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
            inputs.tiled_halves(), inputs.count(), out, stride);
    } else if (matrix.format == Format::kInt8Inputs) {
        static thread_local Buffer<int32_t> sums;
        sums.resize(inputs.count() * kBlockRows);
        multiply_bytes_in_tiles(
            static_cast<const int8_t*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
            inputs.tiled_bytes(), inputs.count(), sums.data(), kBlockRows);
        for (int64_t input = 0; input < inputs.count(); ++input) {
            finish_bytes(matrix, begin, end, inputs, input, sums.data() + input * kBlockRows, out + input * stride);
        }
    } else if (matrix.format == Format::kInt8) {
        static thread_local Buffer<int32_t> sums;
        sums.resize(kDigits * inputs.count() * kBlockRows);
        multiply_signed_bytes_in_tiles(
            static_cast<const int8_t*>(matrix.values) + begin * matrix.columns, end - begin, matrix.columns,
            inputs.tiled_digits(), kDigits * inputs.count(), sums.data(), kBlockRows);
        for (int64_t input = 0; input < inputs.count(); ++input) {
            finish_digits(matrix, begin, end, inputs.digit_scale(input), sums.data() + kDigits * input * kBlockRows,
                          out + input * stride);
        }
    } else {
        multiply_four_bit_in_tiles(
            static_cast<const uint8_t*>(matrix.values) + begin * matrix.columns / 2,
            static_cast<const uint16_t*>(matrix.scale) + begin, matrix.rows, matrix.table, matrix.columns,
            inputs.half_row(0), inputs.count(), out, stride);
    }
#endif
}

}  // namespace

void multiply_block(const Matrix& matrix, int64_t block, const Inputs& inputs, float* out, int64_t stride) {
    const int64_t begin = block * kBlockRows;
    const int64_t end = std::min(begin + kBlockRows, matrix.rows);
    out += begin;
    // Sums of bytes are exact and come out the same either way; the other formats must not change with the count.
    const bool is_few = matrix.format == Format::kInt8Inputs && inputs.count() <= kFewInputs;
    const bool in_tiles = goes_in_tiles(matrix.format) && !is_few;
    (in_tiles ? multiply_in_tiles : multiply_in_walks)(matrix, begin, end, inputs, out, stride);
    for (int64_t input = 0; matrix.bias != nullptr && input < inputs.count(); ++input) {
        for (int64_t row = begin; row < end; ++row) {
            out[input * stride + row - begin] += matrix.bias[row];
        }
    }
}

}  // namespace speckv
