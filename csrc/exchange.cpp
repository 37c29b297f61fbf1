#include "exchange.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "dlpack.h"

namespace speckv {
namespace {

const dlpack::ExchangeApi* exchange = nullptr;
PyObject* tensor_type = nullptr;

int32_t number_of(dlpack::DataType dtype) {
    if (dtype.lanes != 1) {
        return -1;
    }
    switch (dtype.code << 8 | dtype.bits) {
        case dlpack::kFloat << 8 | 32: return aoti_torch_dtype_float32();
        case dlpack::kFloat << 8 | 16: return aoti_torch_dtype_float16();
        case dlpack::kBfloat << 8 | 16: return aoti_torch_dtype_bfloat16();
        case dlpack::kInt << 8 | 64: return aoti_torch_dtype_int64();
        default: return -1;  // none that an op takes
    }
}

}  // namespace

bool open_exchange(PyObject* type) {
    PyObject* const capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    const void* const pointer = capsule == nullptr ? nullptr : PyCapsule_GetPointer(capsule, dlpack::kCapsule);
    Py_XDECREF(capsule);  // what it points to lives as long as the process
    const auto* const found = static_cast<const dlpack::ExchangeApi*>(pointer);
    if (found == nullptr || found->version.major != dlpack::kMajor || found->lend == nullptr) {
        PyErr_Clear();
        return false;
    }
    exchange = found;
    tensor_type = Py_NewRef(type);
    return true;
}

View view_of(PyObject* object) {
    dlpack::Tensor lent;
    if (reinterpret_cast<PyObject*>(Py_TYPE(object)) != tensor_type || exchange->lend(object, &lent) != 0 ||
        lent.device_type != dlpack::kCpu) {
        PyErr_Clear();
        throw NotForUs{};
    }
    View view;
    view.start = static_cast<const std::byte*>(lent.data) + lent.byte_offset;
    view.dtype = number_of(lent.dtype);
    view.dims = lent.ndim;
    view.sizes = lent.shape;
    view.strides = lent.strides;
    // DLPack says nothing of wrappers, as torch.func.functionalize makes them, which have no numbers of their own, nor
    // of conjugates' imaginary parts, which are to be negated; these have a stride.
    const bool is_wrapper = lent.data == nullptr && view.elements() > 0;
    const bool may_be_negated = view.dim() > 0 && view.stride(view.dim() - 1) != 1;
    if (is_wrapper || may_be_negated) {
        throw NotForUs{};
    }
    return view;
}

// An output: DLPack's description of it, and its numbers behind that, in one piece of memory.
struct Output {
    static constexpr size_t kAlignment = 64;  // of the numbers, as PyTorch's own

    dlpack::ManagedTensor managed;
    int64_t sizes[2];
    int64_t strides[2];

    static Output* allocate(std::initializer_list<int64_t> sizes, dlpack::DataType dtype) {
        int64_t elements = 1;
        for (const int64_t size : sizes) {
            elements *= size;
        }
        // Not aligned_alloc(), which passes over glibc's cache of freed pieces: 0.6 us for four outputs.
        void* const memory = std::malloc(sizeof(Output) + kAlignment + elements * dtype.bits / 8);
        if (memory == nullptr) {
            throw std::bad_alloc();
        }
        auto* const output = new (memory) Output{};
        const auto behind = reinterpret_cast<uintptr_t>(output + 1);
        void* const numbers = reinterpret_cast<void*>((behind + kAlignment - 1) / kAlignment * kAlignment);
        const auto dims = static_cast<int32_t>(sizes.size());
        std::copy(sizes.begin(), sizes.end(), output->sizes);
        output->strides[dims - 1] = 1;
        if (dims == 2) {
            output->strides[0] = std::max<int64_t>(output->sizes[1], 1);
        }
        output->managed = {
            {dlpack::kMajor, 0},
            output,
            [](dlpack::ManagedTensor* managed) { std::free(managed->manager); },
            0,
            {numbers, dlpack::kCpu, 0, dims, dtype, output->sizes, output->strides, 0},
        };
        return output;
    }
};

PythonOutputs::~PythonOutputs() {
    for (size_t i = taken_; i < count_; ++i) {
        std::free(outputs_[i]);
    }
}

float* PythonOutputs::add_float32(std::initializer_list<int64_t> sizes) {
    Output*& output = outputs_.at(count_);
    output = Output::allocate(sizes, {dlpack::kFloat, 32, 1});
    ++count_;
    return static_cast<float*>(output->managed.tensor.data);
}

int64_t* PythonOutputs::add_int64(std::initializer_list<int64_t> sizes) {
    Output*& output = outputs_.at(count_);
    output = Output::allocate(sizes, {dlpack::kInt, 64, 1});
    ++count_;
    return static_cast<int64_t*>(output->managed.tensor.data);
}

PyObject* PythonOutputs::take() {
    PyObject* const tuple = PyTuple_New(static_cast<Py_ssize_t>(count_));
    while (tuple != nullptr && taken_ < count_) {
        void* tensor = nullptr;
        if (exchange->take(&outputs_[taken_]->managed, &tensor) != 0) {
            Py_DECREF(tuple);
            return nullptr;
        }
        PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(taken_++), static_cast<PyObject*>(tensor));
    }
    return tuple;
}

}  // namespace speckv
