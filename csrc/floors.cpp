// Not ops: what this machine does at best, for bench/ to hold the ops against. Both are called many times in one call,
// so that the call itself does not count.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "checks.h"
#include "units.h"
#include "views.h"

namespace speckv {
namespace {

using Words = uint64_t __attribute__((vector_size(64)));

constexpr int64_t kPrefetchBytes = 4096;
constexpr int64_t kStepBytes = 4 * sizeof(Words);

// The sum of the 8-byte words of a buffer; what is left behind the last whole step is not read.
uint64_t read_words(const std::byte* start, int64_t bytes) {
    return in_widest_units([=]() SPECKV_INLINED {
        Words sums[4] = {};
        for (int64_t i = 0; i + kStepBytes <= bytes; i += kStepBytes) {
#pragma GCC unroll 4
            for (int64_t part = 0; part < 4; ++part) {
                const std::byte* const from = start + i + part * sizeof(Words);
                __builtin_prefetch(from + kPrefetchBytes);
                Words words;
                std::memcpy(&words, from, sizeof(words));
                sums[part] += words;
            }
        }
        const Words sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        uint64_t total = 0;
        for (int64_t lane = 0; lane < 8; ++lane) {
            total += sum[lane];
        }
        return total;
    });
}

// Reads a contiguous buffer `repeats` times.
int64_t read_bytes(const Tensor& buffer, int64_t repeats) {
    int64_t bytes = element_bytes(as_logits(buffer).dtype);
    for (int64_t axis = 0; axis < buffer.dim(); ++axis) {
        bytes *= buffer.size(axis);
    }
    uint64_t total = 0;
    for (int64_t i = 0; i < repeats; ++i) {
        total += read_words(data<std::byte>(buffer), bytes);
    }
    return static_cast<int64_t>(total);
}

// The sum of exp(x) of fp32 values [n] <= 0, with the loop that the ops use, `repeats` times.
double sum_of_exp(const Tensor& values, int64_t repeats) {
    check_float32("sum_of_exp", "values", values);
    const auto* start = data<float>(values);
    double total = 0.0;
    for (int64_t i = 0; i < repeats; ++i) {
        for (int64_t begin = 0; begin < values.size(0); begin += kBlockSize) {
            total += exp_sum(start + begin, std::min(kBlockSize, values.size(0) - begin), Order::kPaired, 0.0f, 1.0f);
        }
    }
    return total;
}

}  // namespace

STABLE_TORCH_LIBRARY(speckv_bench, m) {
    m.def("read_bytes(Tensor buffer, int repeats) -> int");
    m.def("sum_of_exp(Tensor values, int repeats) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(speckv_bench, CPU, m) {
    m.impl("read_bytes", TORCH_BOX(&read_bytes));
    m.impl("sum_of_exp", TORCH_BOX(&sum_of_exp));
}

}  // namespace speckv
