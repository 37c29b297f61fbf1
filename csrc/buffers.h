// Scratch memory that vectors are loaded from.

#pragma once

#include <cstddef>
#include <new>
#include <vector>

namespace speckv {

constexpr size_t kCacheLine = 64;

template <class T>
struct LineAllocator {
    using value_type = T;

    LineAllocator() = default;
    template <class U>
    LineAllocator(const LineAllocator<U>&) {}

    T* allocate(size_t count) {
        return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{kCacheLine}));
    }
    void deallocate(T* start, size_t) { ::operator delete(start, std::align_val_t{kCacheLine}); }

    template <class U>
    bool operator==(const LineAllocator<U>&) const { return true; }
    template <class U>
    bool operator!=(const LineAllocator<U>&) const { return false; }
};

// A vector that starts at a cache line. One that malloc places starts 16 bytes behind, and every load of 64 bytes takes
// two lines: a product of bf16 weights with 4 rows of inputs then takes twice as long.
template <class T>
using Buffer = std::vector<T, LineAllocator<T>>;

}  // namespace speckv
