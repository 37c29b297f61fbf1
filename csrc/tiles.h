// The tile registers of AMX: eight of up to 16 rows of 64 bytes, and products of two of them added to a third.
//
// A product takes up to 16 rows of weights by up to 16 inputs, whichever of them is its first factor, and 16 cycles
// however few there are of either: no longer than the units for vectors take for one input (measured on an Emerald
// Rapids core).

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define SPECKV_HAS_TILES 1
#else
#define SPECKV_HAS_TILES 0
#endif

namespace speckv {

constexpr int64_t kTileHeight = 16;  // rows of a tile
constexpr int64_t kTileBytes = 64;   // of a row

// Whether this process may use them, for which it asks the system's kernel.
bool may_use_tiles();

// What a thread does with tiles it does between the two ends of such an object: before, others may have shaped them.
class TileUse {
public:
    TileUse();
    ~TileUse();
    TileUse(const TileUse&) = delete;
    TileUse& operator=(const TileUse&) = delete;
};

// Tiles 0 to 3 hold sums, 4 and 5 first factors, 6 and 7 second ones.
enum class Shape {
    kWeightsFirst,  // sums [16 rows of weights, inputs], second factors [16, inputs]
    kInputsFirst,   // sums [inputs, 16 rows of weights], first factors [inputs, 64 bytes]
};

// Shapes them for up to 16 inputs, unless they are so already.
void shape_tiles(Shape shape, int64_t inputs);

#if SPECKV_HAS_TILES
#define SPECKV_TILES \
    __attribute__((target( \
        "amx-tile,amx-bf16,amx-int8,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni," \
        "prefer-vector-width=512")))

// The intrinsics do not tell the compiler which memory they read and write.
template <int tile>
SPECKV_TILES inline void load_tile(const void* from, int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride_bytes), "i"(tile) : "memory");
}

template <int tile>
SPECKV_TILES inline void store_tile(void* to, int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride_bytes), "i"(tile) : "memory");
}

template <int tile>
SPECKV_TILES inline void clear_tile() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}

// sum += first * second, of pairs of bf16.
template <int sum, int first, int second>
SPECKV_TILES inline void add_pairs() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(first), "i"(second));
}

// The same of four signed bytes.
template <int sum, int first, int second>
SPECKV_TILES inline void add_signed_bytes() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(first), "i"(second));
}

// The same of four bytes, signed ones and unsigned ones.
template <int sum, int first, int second>
SPECKV_TILES inline void add_bytes() {
    asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sum), "i"(first), "i"(second));
}
#endif

}  // namespace speckv
