// From tensors to the raw pointers that the compute functions take.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>

#include "rows.h"

namespace speckv {

using torch::stable::Tensor;

// Small inputs may have any strides; the copy is rare.
inline Tensor as_contiguous(const Tensor& tensor) {
    return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// libtorch's own number of the dtype: Tensor::scalar_type() asks it for one dtype after another until one matches.
inline int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

template <class T>
const T* data(const Tensor& tensor) {
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// An uninitialised contiguous CPU tensor. Going through the dispatcher, as torch::stable::empty does, costs a look-up
// by name for each output, more than plan_gamma's arithmetic.
template <size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, int32_t dtype) {
    std::array<int64_t, N> strides;
    int64_t stride = 1;
    for (size_t axis = N; axis-- > 0;) {
        strides[axis] = stride;
        stride *= std::max<int64_t>(sizes[axis], 1);
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        N, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

template <size_t N>
Tensor empty_float32(const std::array<int64_t, N>& sizes) {
    return empty(sizes, aoti_torch_dtype_float32());
}

template <size_t N>
Tensor empty_int64(const std::array<int64_t, N>& sizes) {
    return empty(sizes, aoti_torch_dtype_int64());
}

// Rows of logits [..., V], addressed by the strides of the leading dimensions.
struct Logits {
    const std::byte* start;
    Dtype dtype;
    int64_t vocabulary;
    std::array<int64_t, 2> stride_bytes;  // of the dimensions before the last; the second is 0 where there is one

    Row row(int64_t index, int64_t position = 0) const {
        return {start + index * stride_bytes[0] + position * stride_bytes[1], dtype, vocabulary};
    }
};

inline Logits as_logits(const Tensor& tensor) {
    const int32_t number = dtype_of(tensor);
    const Dtype dtype = number == aoti_torch_dtype_float32()   ? Dtype::kFloat32
                        : number == aoti_torch_dtype_float16() ? Dtype::kFloat16
                                                               : Dtype::kBFloat16;
    const int64_t bytes = element_bytes(dtype);
    const int64_t last = tensor.dim() - 1;
    return {
        data<std::byte>(tensor),
        dtype,
        tensor.size(last),
        {tensor.stride(0) * bytes, last > 1 ? tensor.stride(1) * bytes : 0},
    };
}

// Calls compute(row) for each row: in this thread for a single row, otherwise one thread a row, in chunks that are
// worth waking a thread for. A row is always computed by one thread, so results do not depend on how many there are.
template <class Compute>
void for_each_row(int64_t rows, int64_t elements_per_row, const Compute& compute) {
    constexpr int64_t kElementsPerThread = 32768;
    const auto run = [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            compute(row);
        }
    };
    const int64_t grain = std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements_per_row));
    if (rows <= grain) {
        run(0, rows);
    } else {
        torch::stable::parallel_for(0, rows, grain, run);
    }
}

}  // namespace speckv
