#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "checks.h"
#include "linear_int8.h"
#include "prefetch.h"
#include "views.h"

namespace speckv {
namespace {

using Int32s = int32_t __attribute__((vector_size(64)));
using UInt32s = uint32_t __attribute__((vector_size(64)));

constexpr int64_t kTileRows = 64;       // weight rows: with K = 576 they stay in L1, with K = 1,536 in L2

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the order of Chunk is that of a little-endian machine");

// sums[input] += the products of 64 weights with a chunk of each input, in an order that does not depend on `inputs`.
template <int inputs>
SPECKV_INLINE void add_products(const int8_t* weights, const Chunk* x, int64_t stride, Floats (&sums)[inputs][2]) {
    UInt32s bits;
    std::memcpy(&bits, weights, sizeof(bits));
    const Floats wide[4] = {
        __builtin_convertvector(reinterpret_cast<Int32s>(bits << 24), Floats),
        __builtin_convertvector(reinterpret_cast<Int32s>((bits << 16) & 0xff000000u), Floats),
        __builtin_convertvector(reinterpret_cast<Int32s>((bits << 8) & 0xff000000u), Floats),
        __builtin_convertvector(reinterpret_cast<Int32s>(bits & 0xff000000u), Floats),
    };
#pragma GCC unroll 4
    for (int input = 0; input < inputs; ++input) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            Floats values;
            load(x[input * stride].values + part * kLanes, values);
            sums[input][part % 2] += wide[part] * values;
        }
    }
}

template <int inputs>
SPECKV_INLINE void multiply_rows(
    const Int8Weights& weights, int64_t begin, int64_t end, const Chunk* x, int64_t stride, float* out,
    int64_t out_stride) {
    const int64_t whole = weights.columns / kChunk * kChunk;
    const int64_t rest = weights.columns - whole;
    const Fetch fetch = fetch_of(Walk::kFirst);
    for (int64_t row = begin; row < end; ++row) {
        const int8_t* values = weights.start + row * weights.stride;
        Floats sums[inputs][2] = {};
        for (int64_t i = 0; i < whole; i += kChunk) {
            prefetch(values + i, fetch);
            add_products<inputs>(values + i, x + i / kChunk, stride, sums);
        }
        if (rest > 0) {
            int8_t padded[kChunk] = {};
            std::memcpy(padded, values + whole, rest);
            add_products<inputs>(padded, x + whole / kChunk, stride, sums);
        }
#pragma GCC unroll 4
        for (int input = 0; input < inputs; ++input) {
            out[input * out_stride + row - begin] = sum_lanes(sums[input][0] + sums[input][1]) * weights.scale[row];
        }
    }
}

}  // namespace

void multiply_tile(
    const Int8Weights& weights, int64_t begin, int64_t end, const Chunk* x, int64_t stride, int64_t inputs, float* out,
    int64_t out_stride) {
    in_widest_units([=]() SPECKV_INLINED {
        SPECKV_BY_INPUTS(inputs, multiply_rows, weights, begin, end, x, stride, out, out_stride)
    });
}

void arrange(const Row& row, Chunk* chunks) {
    BlockBuffer buffer;
    for (int64_t start = 0; start < row.size; start += kBlockSize) {
        const Block block = load_block(row, start, buffer.values);
        Chunk* to = chunks + start / kChunk;
        for (int64_t i = 0; i < block.size; ++i) {
            to[i / kChunk].values[i % 4 * kLanes + i % kChunk / 4] = block.values[i] * 0x1p-24f;
        }
    }
}

namespace {

// out [inputs, rows] of the inputs' dtype, contiguous. Weight rows are split over threads where they are many.
void multiply(const Logits& inputs, int64_t num_inputs, const Int8Weights& weights, int64_t rows, std::byte* out) {
    constexpr int64_t kElementsPerThread = int64_t{1} << 20;
    thread_local std::vector<Chunk> chunks;
    const int64_t stride = (weights.columns + kChunk - 1) / kChunk;
    chunks.assign(num_inputs * stride, Chunk{});
    for (int64_t i = 0; i < num_inputs; ++i) {
        arrange(inputs.row(i), chunks.data() + i * stride);
    }
    const auto run = [&, x = chunks.data()](int64_t first, int64_t last) {
        BlockBuffer results;
        static_assert(kTileInputs * kTileRows <= kBlockSize);
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t begin = tile * kTileRows;
            const int64_t end = std::min(begin + kTileRows, rows);
            for (int64_t i = 0; i < num_inputs; i += kTileInputs) {
                const int64_t count = std::min(kTileInputs, num_inputs - i);
                multiply_tile(weights, begin, end, x + i * stride, stride, count, results.values, kTileRows);
                for (int64_t j = 0; j < count; ++j) {
                    narrow(results.values + j * kTileRows, end - begin, inputs.dtype,
                           out + ((i + j) * rows + begin) * element_bytes(inputs.dtype));
                }
            }
        }
    };
    const int64_t tiles = (rows + kTileRows - 1) / kTileRows;
    if (rows * weights.columns < kElementsPerThread) {
        run(0, tiles);
    } else {
        torch::stable::parallel_for(
            0, tiles, std::max<int64_t>(1, kElementsPerThread / (kTileRows * weights.columns)), run);
    }
}

void check_matrix(const char* op, const char* name, const Tensor& matrix) {
    if (matrix.stride(1) != 1 && matrix.size(1) != 1) {
        refuse(op, name, " must be contiguous in its last dimension");
    }
}

void check_linear_int8(const char* op, const Tensor& x, const Tensor& weight, const Tensor& scale) {
    check_shape(op, "x", x, {kAnySize, kAnySize});
    check_floating(op, "x", x);
    if (x.size(1) < 1) {
        refuse(op, "x must have at least one column");
    }
    check_matrix(op, "x", x);
    check_shape(op, "weight", weight, {kAnySize, x.size(1)});
    if (dtype_of(weight) != aoti_torch_dtype_int8()) {
        refuse(op, "weight must be int8");
    }
    if (weight.size(0) < 1) {
        refuse(op, "weight must have at least one row");
    }
    check_matrix(op, "weight", weight);
    check_shape(op, "scale", scale, {weight.size(0)});
    check_float32(op, "scale", scale);
}

Tensor linear_int8(const Tensor& x, const Tensor& weight, const Tensor& scale) {
    check_linear_int8("linear_int8", x, weight, scale);
    const Tensor scales = as_contiguous(scale);
    const int64_t rows = weight.size(0);
    Tensor out = empty<2>({x.size(0), rows}, dtype_of(x));
    const Int8Weights weights{data<int8_t>(weight), weight.stride(0), weight.size(1), data<float>(scales)};
    multiply(as_logits(x), x.size(0), weights, rows, mutable_data<std::byte>(out));
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("linear_int8", TORCH_BOX(&linear_int8));
}

}  // namespace speckv
