// For which vector units the loops are built, and which build runs.

#pragma once

namespace speckv {

// Each has what those before it have. Names in the environment: plain, avx2, avx512, bf16, amx.
enum class Units {
    kPlain,   // the compiler's baseline: SSE2 on x86, NEON on ARM
    kAvx2,    // with fused multiply-add
    kAvx512,  // of F, BW, DQ and VL
    kBf16,    // with products of bf16 pairs and of bytes (BF16 and VNNI)
    kAmx,     // with tiles of them, see tiles.h
};

// The widest of this machine, or those that SPECKV_UNITS in the environment names; raises where they are not here.
Units units();

#define SPECKV_INLINE inline __attribute__((always_inline))
// Of a lambda.
#define SPECKV_INLINED __attribute__((always_inline))

#if defined(__x86_64__)
#define SPECKV_AVX2 __attribute__((target("avx2,fma,bmi2")))
#define SPECKV_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")))

template <class Loop>
SPECKV_AVX2 __attribute__((noinline)) auto in_avx2(Loop loop) {
    return loop();
}

template <class Loop>
SPECKV_AVX512 __attribute__((noinline)) auto in_avx512(Loop loop) {
    return loop();
}

// What `loop` returns, an SPECKV_INLINED lambda that captures by value: it is compiled for each kind of units up to
// `widest`, where wider ones have a loop of their own.
template <Units widest = Units::kAvx512, class Loop>
auto in_widest_units(Loop loop) {
    if constexpr (widest >= Units::kAvx512) {
        if (units() >= Units::kAvx512) {
            return in_avx512(loop);
        }
    }
    return units() >= Units::kAvx2 ? in_avx2(loop) : loop();
}
#else
template <Units widest = Units::kPlain, class Loop>
auto in_widest_units(Loop loop) {
    return loop();
}
#endif

}  // namespace speckv
