// The Python module speckv.kernels._C: the ops as plain functions. The dispatcher's way from Python to an op and back
// takes 5 to 10 µs, as long as the op itself on a small vocabulary; through DLPack's exchange it is 2 to 4.
// kernels/ops.py says when this way may be taken.

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <array>
#include <cstdlib>
#include <exception>
#include <new>
#include <optional>

#include "dlpack.h"
#include "ops.h"

namespace speckv {
namespace {

PyObject* tensor_type = nullptr;                // torch.Tensor itself: a subclass may have its own idea of an op
const dlpack::ExchangeApi* exchange = nullptr;  // null where this PyTorch has none

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

// Thrown where an argument is not for this way; the dispatcher then has the last word on it.
struct NotForUs {};

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

std::optional<View> view_if_any(PyObject* object) {
    return object == Py_None ? std::nullopt : std::optional(view_of(object));
}

double number(PyObject* object) {
    const double value = PyFloat_AsDouble(object);
    if (PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        throw NotForUs{};
    }
    return value;
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

class PythonOutputs final : public Outputs {
public:
    ~PythonOutputs() {
        for (size_t i = taken_; i < count_; ++i) {
            std::free(outputs_[i]);
        }
    }

    float* add_float32(std::initializer_list<int64_t> sizes) override {
        return static_cast<float*>(add(sizes, {dlpack::kFloat, 32, 1}));
    }
    int64_t* add_int64(std::initializer_list<int64_t> sizes) override {
        return static_cast<int64_t*>(add(sizes, {dlpack::kInt, 64, 1}));
    }

    // A tuple of tensors; null with a Python error.
    PyObject* take() {
        PyObject* tuple = PyTuple_New(static_cast<Py_ssize_t>(count_));
        if (tuple == nullptr) {
            return nullptr;
        }
        while (taken_ < count_) {
            void* tensor = nullptr;
            if (exchange->take(&outputs_[taken_]->managed, &tensor) != 0) {
                Py_DECREF(tuple);
                return nullptr;
            }
            PyTuple_SetItem(tuple, static_cast<Py_ssize_t>(taken_++), static_cast<PyObject*>(tensor));
        }
        return tuple;
    }

private:
    void* add(std::initializer_list<int64_t> sizes, dlpack::DataType dtype) {
        auto*& output = outputs_.at(count_);
        output = Output::allocate(sizes, dtype);
        ++count_;
        return output->managed.tensor.data;
    }

    std::array<Output*, 6> outputs_{};
    size_t count_ = 0;
    size_t taken_ = 0;
};

// Runs compute(outputs) without Python's lock, for an op that was given as many arguments as it takes. read(outputs)
// returns compute with what it reads of the arguments. None is returned where this way does not serve.
template <class Read>
PyObject* call(Py_ssize_t given, Py_ssize_t wanted, const Read& read) {
    PythonOutputs outputs;
    try {
        if (exchange == nullptr || given != wanted) {
            throw NotForUs{};
        }
        const auto compute = read();
        std::exception_ptr failed;
        PyThreadState* const state = PyEval_SaveThread();
        try {
            compute(outputs);
        } catch (...) {
            failed = std::current_exception();
        }
        PyEval_RestoreThread(state);
        if (failed) {
            std::rethrow_exception(failed);
        }
        return outputs.take();
    } catch (const NotForUs&) {
        Py_RETURN_NONE;
    } catch (const std::bad_alloc&) {
        return PyErr_NoMemory();
    } catch (const std::exception& error) {
        PyErr_SetString(PyExc_RuntimeError, error.what());
        return nullptr;
    }
}

FilterTensors filters_from(PyObject* const* args) {
    return {view_if_any(args[0]), view_if_any(args[1]), view_if_any(args[2])};
}

ControllerViews controller_from(PyObject* const* args) {
    return {view_of(args[0]), view_of(args[1]), view_of(args[2]),
            view_of(args[3]), view_of(args[4]), view_of(args[5]), number(args[6])};
}

PyObject* call_draft_sample(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(count, 6, [&] {
        return [logits = view_of(args[0]), temperature = view_of(args[1]), uniform = view_of(args[2]),
                filters = filters_from(args + 3)](Outputs& outputs) {
            draft_sample(logits, temperature, uniform, filters, outputs);
        };
    });
}

PyObject* call_plan_gamma(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(count, 8, [&] {
        return [signals = view_of(args[0]), controller = controller_from(args + 1)](Outputs& outputs) {
            plan_gamma(signals, controller, outputs);
        };
    });
}

PyObject* call_draft_step(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(count, 15, [&] {
        return [logits = view_of(args[0]), temperature = view_of(args[1]), uniform = view_of(args[2]),
                signals = view_of(args[3]), drafted = view_of(args[4]), controller = controller_from(args + 5),
                filters = filters_from(args + 12)](Outputs& outputs) {
            draft_step(logits, temperature, uniform, signals, drafted, controller, filters, outputs);
        };
    });
}

PyObject* call_verify_chain(PyObject*, PyObject* const* args, Py_ssize_t count) {
    return call(count, 9, [&] {
        return [target_logits = view_of(args[0]), draft_logits = view_of(args[1]), draft_tokens = view_of(args[2]),
                num_draft = view_of(args[3]), temperature = view_of(args[4]), uniform = view_of(args[5]),
                filters = filters_from(args + 6)](Outputs& outputs) {
            verify_chain(
                target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, filters, outputs);
        };
    });
}

// Whether this PyTorch lends its tensors; until it does the ops return None.
PyObject* open(PyObject*, PyObject* type) {
    PyObject* const capsule = PyObject_GetAttrString(type, "__dlpack_c_exchange_api__");
    if (capsule == nullptr) {
        PyErr_Clear();
        Py_RETURN_FALSE;
    }
    const auto* const found =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, dlpack::kCapsule));
    Py_DECREF(capsule);  // what it points to lives as long as the process
    if (found == nullptr || found->version.major != dlpack::kMajor || found->lend == nullptr) {
        PyErr_Clear();
        Py_RETURN_FALSE;
    }
    exchange = found;
    tensor_type = Py_NewRef(type);
    Py_RETURN_TRUE;
}

template <PyObject* (*FUNCTION)(PyObject*, PyObject* const*, Py_ssize_t)>
constexpr PyMethodDef op(const char* name) {
    return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(FUNCTION)), METH_FASTCALL, nullptr};
}

}  // namespace
}  // namespace speckv

PyMODINIT_FUNC PyInit__C() {
    static PyMethodDef methods[] = {
        speckv::op<speckv::call_draft_sample>("draft_sample"),
        speckv::op<speckv::call_plan_gamma>("plan_gamma"),
        speckv::op<speckv::call_draft_step>("draft_step"),
        speckv::op<speckv::call_verify_chain>("verify_chain"),
        {"open", speckv::open, METH_O, "Whether the ops may be called with tensors of this type."},
        {nullptr, nullptr, 0, nullptr},
    };
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
