// A row of logits: reading it block by block, its softmax in one pass, and the inverse CDF over its blocks.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "simd.h"

namespace speckv {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

constexpr int64_t element_bytes(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? 4 : 2;
}

struct Row {
    const void* logits;  // [size], unit stride
    Dtype dtype;
    int64_t size;
};

struct Block {
    const float* values;
    int64_t size;
};

// buffer holds kBlockSize floats; fp32 rows are read in place and leave it untouched.
inline Block load_block(const Row& row, int64_t start, float* buffer) {
    const int64_t size = std::min(kBlockSize, row.size - start);
    if (row.dtype == Dtype::kFloat32) {
        const float* values = static_cast<const float*>(row.logits) + start;
        return {values, size};
    }
    const uint16_t* halves = static_cast<const uint16_t*>(row.logits) + start;
    const auto load = row.dtype == Dtype::kBFloat16 ? load_bfloat16 : load_float16;
    load(halves, size, buffer);
    return {buffer, size};
}

struct BlockAndLargest {
    Block block;
    float largest;  // NaN passed over; -inf where there is nothing else
};

inline BlockAndLargest load_block_and_largest(const Row& row, int64_t start, float* buffer) {
    if (row.dtype == Dtype::kBFloat16) {
        const int64_t size = std::min(kBlockSize, row.size - start);
        return {{buffer, size},
                load_bfloat16_and_largest(static_cast<const uint16_t*>(row.logits) + start, size, buffer)};
    }
    const Block block = load_block(row, start, buffer);
    return {block, largest(block.values, block.size)};
}

// The blocks of a row in order, each with its largest logit. Within a block values stand in order().
class Blocks {
public:
    explicit Blocks(const Row& row) : row_(row), current_(load_block_and_largest(row, 0, first_.values)) {
        if (row.dtype == Dtype::kBFloat16 && row.size > kBlockSize) {
            std::fill(second_.values, second_.values + kBlockSize, 0.0f);  // Ahead wants it; the first holds bf16 by now
        }
    }
    Blocks(const Blocks&) = delete;
    Blocks& operator=(const Blocks&) = delete;

    bool are_over() const { return start_ >= row_.size; }
    int64_t start() const { return start_; }
    const float* values() const { return current_.block.values; }
    int64_t size() const { return current_.block.size; }
    Order order() const { return row_.dtype == Dtype::kBFloat16 ? Order::kPaired : Order::kAsItLies; }
    float largest() const { return current_.largest; }

    // The next block, for a sum, which must load it; null where advance() has to.
    Ahead* ahead() {
        const int64_t next = start_ + kBlockSize;
        if (row_.dtype != Dtype::kBFloat16 || next >= row_.size) {
            return nullptr;
        }
        is_ahead_ = true;
        ahead_ = {static_cast<const uint16_t*>(row_.logits) + next, std::min(kBlockSize, row_.size - next),
                  buffer_of(next), 0.0f};
        return &ahead_;
    }

    void advance() {
        start_ += kBlockSize;
        if (is_ahead_) {
            current_ = {{ahead_.dst, ahead_.size}, ahead_.largest};
        } else if (!are_over()) {
            current_ = load_block_and_largest(row_, start_, buffer_of(start_));
        }
        is_ahead_ = false;
    }

private:
    float* buffer_of(int64_t start) { return start / kBlockSize % 2 == 0 ? first_.values : second_.values; }

    Row row_;
    int64_t start_ = 0;
    // Not 4 KiB apart: where the low twelve bits of their addresses agree, a core may take a load for one of what was
    // just stored and wait. Of fourteen processes one took 40 % longer for a row.
    BlockBuffer first_;
    std::byte apart_[kBlockSize * sizeof(float) / 2];
    BlockBuffer second_;
    BlockAndLargest current_;
    Ahead ahead_;
    bool is_ahead_ = false;
};

// out[i] = values[i], rounded to nearest even.
inline void narrow(const float* values, int64_t size, Dtype dtype, void* out) {
    if (dtype == Dtype::kFloat32) {
        std::copy(values, values + size, static_cast<float*>(out));
    } else {
        const auto store = dtype == Dtype::kBFloat16 ? store_bfloat16 : store_float16;
        store(values, size, static_cast<uint16_t*>(out));
    }
}

inline float logit_at(const Row& row, int64_t index) {
    float value;
    const Row one{static_cast<const std::byte*>(row.logits) + index * element_bytes(row.dtype), row.dtype, 1};
    return *load_block(one, 0, &value).values;
}

inline int64_t block_count(int64_t vocabulary) {
    return (vocabulary + kBlockSize - 1) / kBlockSize;
}

// 1 / temperature, kept normal so that neither 0 * inf nor -inf * 0 can appear in (x - shift) * scale: temperatures
// count as COLDEST or HOTTEST of kernels/reference.py beyond those.
inline float scale_of(float temperature) {
    return std::clamp(1.0f / temperature, 1e-37f, 3e38f);
}

struct Argmax {
    bool is_valid;
    int64_t token;
};
Argmax argmax(const Row& row);

// The largest logit of some of a row, which starts at a block.
struct Largest {
    bool has_nan;
    float value;    // -inf where there is nothing else
    int64_t start;  // of the first block that holds it
};
Largest largest_of(const Row& row, int64_t start, int64_t end);

// The argmax of a row from the largest logits of all its parts, in order.
Argmax argmax_of_parts(const Row& row, const Largest* parts, int64_t count);

// The index of the first element equal to the row's maximum, which lies in the block that starts at `start`.
int64_t find_maximum(const Row& row, int64_t start, float maximum);

struct Distribution {
    bool is_valid;  // false where a logit is NaN or +inf, or all are -inf
    Softmax softmax;
    double total;  // of the masses
};
// softmax(row * scale) in one pass. masses[block_count] receives the sum of exp((x - shift) * scale) over each block.
Distribution distribution(const Row& row, float scale, std::vector<double>& masses);

// Brings the sums of blocks, each taken against the maximum known when it was read (shifts), to the row's maximum.
// Returns their total.
double rescale_masses(std::vector<double>& masses, const std::vector<float>& shifts, float shift, float scale);

float probability_at(const Row& row, const Softmax& softmax, int64_t token);

// Index of the first weight > 0 whose running sum exceeds threshold; else the last weight > 0; else -1.
int64_t search_block(const float* weights, int64_t size, double threshold);

// The first element whose running sum exceeds uniform * total, where masses are the sums of the blocks and
// fill(start, out) writes the weights of one block. An element of weight 0 is never returned: rounding may make a
// block's mass disagree with the sum of its weights, so the search goes on to the next weight, or back to the last one.
template <class Fill>
int64_t sample_inverse_cdf(
    const std::vector<double>& masses, double total, float uniform, int64_t vocabulary, const Fill& fill) {
    const auto blocks = static_cast<int64_t>(masses.size());
    double threshold = uniform * total;
    int64_t chosen = 0;
    while (chosen + 1 < blocks && masses[chosen] <= threshold) {
        threshold -= masses[chosen++];
    }
    BlockBuffer weights;
    const auto search = [&](int64_t block, double above) {
        const int64_t start = block * kBlockSize;
        const int64_t size = std::min(kBlockSize, vocabulary - start);
        fill(start, weights.values);
        const int64_t found = search_block(weights.values, size, above);
        return found < 0 ? found : start + found;
    };
    int64_t token = search(chosen, threshold);
    for (int64_t block = chosen + 1; token < 0 && block < blocks; ++block) {
        token = search(block, 0.0);
    }
    for (int64_t block = chosen - 1; token < 0 && block >= 0; --block) {
        token = search(block, kInfinity);
    }
    return token;
}

// Draws from softmax(row * scale).
int64_t sample(const Row& row, const Softmax& softmax, const std::vector<double>& masses, double total, float uniform);

}  // namespace speckv
