// What of DLPack 1.x csrc/exchange.cpp needs: how PyTorch lends a tensor to C code, and takes one from it, without a
// call into Python. PyTorch's own header may not stand beside its stable ABI.
//
// Source: the DLPack specification, dmlc.github.io/dlpack.

#pragma once

#include <cstdint>

namespace speckv::dlpack {

constexpr uint32_t kMajor = 1;  // of the versions with this layout
constexpr int32_t kCpu = 1;
enum Code : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct Version {
    uint32_t major, minor;
};

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // in elements
    uint64_t byte_offset;
};

struct ManagedTensor {
    Version version;
    void* manager;
    void (*deleter)(ManagedTensor*);
    uint64_t flags;
    Tensor tensor;
};

// What the attribute __dlpack_c_exchange_api__ of the type torch.Tensor holds, a capsule of the name kCapsule.
constexpr const char* kCapsule = "dlpack_exchange_api";
struct ExchangeApi {
    Version version;
    void* older;
    void* allocate;
    void* lend_managed;
    int (*take)(ManagedTensor*, void** object);  // -1 with a Python error; else the new object owns the tensor
    int (*lend)(void* object, Tensor*);          // -1 with a Python error; else valid for as long as the object is
    void* stream;
};

}  // namespace speckv::dlpack
