// Tensors from and to Python without PyTorch's Python code: DLPack's exchange with C.

#pragma once

#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

#include <array>
#include <initializer_list>

#include "views.h"

namespace speckv {

// With the type torch.Tensor, before anything else. False where this PyTorch lends nothing.
bool open_exchange(PyObject* type);

// Thrown where an object is not for this way.
struct NotForUs {};

// Of a CPU tensor of exactly the type torch.Tensor, since a subclass may have its own idea of an op, with unit stride in
// its last dimension.
View view_of(PyObject* object);

// Memory that a tensor will own.
struct Output;

class PythonOutputs final : public Outputs {
public:
    PythonOutputs() = default;
    ~PythonOutputs();
    PythonOutputs(const PythonOutputs&) = delete;
    PythonOutputs& operator=(const PythonOutputs&) = delete;

    float* add_float32(std::initializer_list<int64_t> sizes) override;
    int64_t* add_int64(std::initializer_list<int64_t> sizes) override;

    // A tuple of tensors; null with a Python error.
    PyObject* take();

private:
    std::array<Output*, 6> outputs_{};
    size_t count_ = 0;
    size_t taken_ = 0;
};

}  // namespace speckv
