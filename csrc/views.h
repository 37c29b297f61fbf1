// From an op's inputs and outputs, whoever keeps them, to the raw pointers that the compute functions take.

#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "rows.h"
#include "tensors.h"

namespace speckv {

// What an op reads of an input, which somebody else keeps alive.
struct View {
    const void* start = nullptr;
    int32_t dtype = -1;  // libtorch's number
    int64_t dims = 0;
    const int64_t* sizes = nullptr;
    const int64_t* strides = nullptr;  // in elements

    View() = default;
    View(const Tensor& tensor)  // NOLINT: a tensor may stand wherever a view is asked for
        : start(tensor.const_data_ptr()), dtype(dtype_of(tensor)), dims(tensor.dim()), sizes(tensor.sizes().data()),
          strides(tensor.strides().data()) {}

    int64_t dim() const { return dims; }
    int64_t size(int64_t axis) const { return sizes[axis]; }
    int64_t stride(int64_t axis) const { return strides[axis]; }

    int64_t elements() const {
        int64_t count = 1;
        for (int64_t axis = 0; axis < dims; ++axis) {
            count *= sizes[axis];
        }
        return count;
    }

    bool is_contiguous() const {
        int64_t expected = 1;
        for (int64_t axis = dims - 1; axis >= 0; --axis) {
            if (sizes[axis] != 1 && strides[axis] != expected) {
                return elements() == 0;
            }
            expected *= sizes[axis];
        }
        return true;
    }
};

// A small input as an array: where it lies if it is contiguous, else copied, which is rare.
template <class T>
class Array {
public:
    explicit Array(const View& view) : start_(static_cast<const T*>(view.start)) {
        if (view.is_contiguous()) {
            return;
        }
        const int64_t count = view.elements();
        copy_.reserve(count);
        for (int64_t i = 0; i < count; ++i) {
            int64_t offset = 0;
            for (int64_t axis = view.dim() - 1, rest = i; axis >= 0; rest /= view.size(axis--)) {
                offset += rest % view.size(axis) * view.stride(axis);
            }
            copy_.push_back(start_[offset]);
        }
        start_ = copy_.data();
    }
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;

    const T* data() const { return start_; }
    const T& operator[](int64_t i) const { return start_[i]; }

private:
    const T* start_;
    std::vector<T> copy_;
};

// Makes the outputs of an op in the order of its schema, as whoever calls it wants them: contiguous, not filled.
class Outputs {
public:
    virtual float* add_float32(std::initializer_list<int64_t> sizes) = 0;
    virtual int64_t* add_int64(std::initializer_list<int64_t> sizes) = 0;

protected:
    ~Outputs() = default;
};

// The COUNT outputs of an op as the dispatcher takes them.
template <size_t COUNT>
class TensorOutputs final : public Outputs {
public:
    float* add_float32(std::initializer_list<int64_t> sizes) override {
        return mutable_data<float>(add(sizes, aoti_torch_dtype_float32()));
    }
    int64_t* add_int64(std::initializer_list<int64_t> sizes) override {
        return mutable_data<int64_t>(add(sizes, aoti_torch_dtype_int64()));
    }

    auto as_tuple() const { return as_tuple(std::make_index_sequence<COUNT>()); }

private:
    const Tensor& add(std::initializer_list<int64_t> sizes, int32_t dtype) {
        auto& output = outputs_.at(count_++);
        if (sizes.size() == 1) {
            output = empty<1>({*sizes.begin()}, dtype);
        } else {
            output = empty<2>({*sizes.begin(), *(sizes.begin() + 1)}, dtype);
        }
        return *output;
    }

    template <size_t... I>
    auto as_tuple(std::index_sequence<I...>) const {
        return std::make_tuple(*outputs_[I]...);
    }

    size_t count_ = 0;
    std::array<std::optional<Tensor>, COUNT> outputs_;
};

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

inline Logits as_logits(const View& tensor) {
    const int32_t number = tensor.dtype;
    const Dtype dtype = number == aoti_torch_dtype_float32()   ? Dtype::kFloat32
                        : number == aoti_torch_dtype_float16() ? Dtype::kFloat16
                                                               : Dtype::kBFloat16;
    const int64_t bytes = element_bytes(dtype);
    const int64_t last = tensor.dim() - 1;
    return {
        static_cast<const std::byte*>(tensor.start),
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
