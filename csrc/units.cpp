#include "units.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iterator>
#include <string_view>

#include "checks.h"
#include "tiles.h"

namespace speckv {
namespace {

constexpr std::string_view kNames[] = {"plain", "avx2", "avx512", "bf16", "amx"};

Units widest() {
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !__builtin_cpu_supports("bmi2")) {
        return Units::kPlain;
    }
    if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
        return Units::kAvx2;
    }
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vnni")) {
        return Units::kAvx512;
    }
    return may_use_tiles() ? Units::kAmx : Units::kBf16;
#else
    return Units::kPlain;
#endif
}

Units chosen() {
    const char* const wanted = std::getenv("SPECKV_UNITS");
    if (wanted == nullptr || *wanted == '\0') {
        return widest();
    }
    const auto* const found = std::find(std::begin(kNames), std::end(kNames), wanted);
    const auto number = static_cast<Units>(found - kNames);
    if (found == std::end(kNames) || number > widest()) {
        refuse("SPECKV_UNITS", wanted, ": must be plain, avx2, avx512, bf16 or amx, and no wider than ",
               kNames[static_cast<int>(widest())], ", which this machine has");
    }
    return number;
}

int64_t vector_units() {
    return static_cast<int64_t>(units());
}

}  // namespace

Units units() {
    static const Units found = chosen();
    return found;
}

STABLE_TORCH_LIBRARY_FRAGMENT(speckv, m) {
    m.def("vector_units() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CompositeExplicitAutograd, m) {
    m.impl("vector_units", TORCH_BOX(&vector_units));
}

}  // namespace speckv
