// libtorch's tensors without the dispatcher.

#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>

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

}  // namespace speckv
