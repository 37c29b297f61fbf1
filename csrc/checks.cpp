#include "checks.h"

#include <cmath>

#include "simd.h"

namespace speckv {

void check_shape(const char* op, const char* name, const View& tensor, std::initializer_list<int64_t> expected) {
    if (tensor.dim() != static_cast<int64_t>(expected.size())) {
        refuse(op, name, " must have ", expected.size(), " dimensions, got ", tensor.dim());
    }
    int64_t axis = 0;
    for (const int64_t size : expected) {
        if (size != kAnySize && tensor.size(axis) != size) {
            refuse(op, name, " must have size ", size, " in dimension ", axis, ", got ", tensor.size(axis));
        }
        ++axis;
    }
}

void check_float32(const char* op, const char* name, const View& tensor) {
    if (tensor.dtype != aoti_torch_dtype_float32()) {
        refuse(op, name, " must be float32");
    }
}

void check_int64(const char* op, const char* name, const View& tensor) {
    if (tensor.dtype != aoti_torch_dtype_int64()) {
        refuse(op, name, " must be int64");
    }
}

void check_floating(const char* op, const char* name, const View& tensor) {
    const int32_t dtype = tensor.dtype;
    if (dtype != aoti_torch_dtype_float32() && dtype != aoti_torch_dtype_float16() &&
        dtype != aoti_torch_dtype_bfloat16()) {
        refuse(op, name, " must be float32, float16 or bfloat16");
    }
}

void check_logits(const char* op, const char* name, const View& logits) {
    check_floating(op, name, logits);
    const int64_t last = logits.dim() - 1;
    if (logits.size(last) < 1) {
        refuse(op, name, " must have a vocabulary of at least 1");
    }
    if (logits.stride(last) != 1 && logits.size(last) != 1) {
        refuse(op, name, " must be contiguous in its last dimension");
    }
}

void check_sampling_values(
    const char* op, const float* temperature, const float* uniform, int64_t rows, int64_t columns) {
    for (int64_t row = 0; row < rows; ++row) {
        if (!(std::isfinite(temperature[row]) && temperature[row] >= 0)) {
            refuse(op, "row ", row, ": temperature must be finite and >= 0");
        }
    }
    for (int64_t i = 0; i < rows * columns; ++i) {
        if (!(uniform[i] >= 0 && uniform[i] < 1)) {
            refuse(op, "row ", i / columns, ": uniform must be in [0, 1)");
        }
    }
}

const char* reason(const Row& row) {
    BlockBuffer buffer;
    bool positive_infinity = false;
    for (int64_t start = 0; start < row.size; start += kBlockSize) {
        const Block block = load_block(row, start, buffer.values);
        if (has_nan(block.values, block.size)) {
            return "a logit is NaN";
        }
        positive_infinity = positive_infinity || largest(block.values, block.size) == kInfinity;
    }
    return positive_infinity ? "a logit is +inf" : "every logit is -inf";
}

}  // namespace speckv
