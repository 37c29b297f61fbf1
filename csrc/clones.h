// How loops for vector units are built.

#pragma once

// GCC builds each loop three times and the dynamic linker picks one for the machine; that takes glibc's ifunc.
// Elsewhere there is one build, for the compiler's baseline, which on ARM includes NEON.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define SPECKV_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
// For a loop that the compiler does better by hand where there are 512-bit units.
#define SPECKV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))
#else
#define SPECKV_CLONES
#endif

#define SPECKV_INLINE inline __attribute__((always_inline))
