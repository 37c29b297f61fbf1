#include "attention.h"

#include <algorithm>

namespace speckv {
namespace {

constexpr int64_t kTileKeys = 32;  // brought to fp32 together: with 64 values each they take a quarter of L1

// The row in fp32; what is behind it up to `width` is left as it is.
void widen(const Row& row, float* out) {
    for (int64_t start = 0; start < row.size; start += kBlockSize) {
        const Block block = load_block(row, start, out + start);
        if (block.values != out + start) {
            std::copy(block.values, block.values + block.size, out + start);
        }
    }
}

SPECKV_INLINE float dot(const float* a, const float* b, int64_t width) {
    Floats sum = {};
    for (int64_t i = 0; i < width; i += kLanes) {
        Floats x, y;
        load(a + i, x);
        load(b + i, y);
        sum += x * y;
    }
    return sum_lanes(sum);
}

// scores[row * stride + key] = queries[row] . keys[key]
SPECKV_CLONES void add_scores(
    const float* queries, int64_t rows, const float* keys, int64_t count, int64_t width, float* scores,
    int64_t stride) {
    for (int64_t key = 0; key < count; ++key) {
        for (int64_t row = 0; row < rows; ++row) {
            scores[row * stride + key] = dot(queries + row * width, keys + key * width, width);
        }
    }
}

// out[row] += weights[row * stride + key] * values[key], key by key in their order.
SPECKV_CLONES void add_values(
    const float* weights, int64_t stride, int64_t rows, const float* values, int64_t count, int64_t width, float* out) {
    for (int64_t row = 0; row < rows; ++row) {
        for (int64_t i = 0; i < width; i += kLanes) {
            Floats sum;
            load(out + row * width + i, sum);
            for (int64_t key = 0; key < count; ++key) {
                Floats value;
                load(values + key * width + i, value);
                sum += weights[row * stride + key] * value;
            }
            store(sum, out + row * width + i);
        }
    }
}

}  // namespace

void attend(const Problem& problem, int64_t batch, int64_t group, Buffer<float>& room, float* out) {
    const int64_t rows = problem.rows();
    const int64_t stride = padded(problem.positions);
    const int64_t key_width = padded(problem.key.size);
    const int64_t value_width = padded(problem.value.size);
    const int64_t tile_width = std::max(key_width, value_width);
    room.assign(rows * key_width + kTileKeys * tile_width + rows * stride, 0.0f);
    float* const queries = room.data();
    float* const tile = queries + rows * key_width;
    float* const scores = tile + kTileKeys * tile_width;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = group * problem.group + row / problem.queries;
        widen(problem.query.row(batch, head, row % problem.queries), queries + row * key_width);
    }
    for (int64_t start = 0; start < problem.positions; start += kTileKeys) {
        const int64_t count = std::min(kTileKeys, problem.positions - start);
        for (int64_t key = 0; key < count; ++key) {
            widen(problem.key.row(batch, group, start + key), tile + key * key_width);
        }
        add_scores(queries, rows, tile, count, key_width, scores + start, stride);
    }
    for (int64_t row = 0; row < rows; ++row) {
        float* const weights = scores + row * stride;
        const int64_t visible = problem.visible(row);
        const float shift = largest(weights, visible);
        exp_weights(weights, visible, shift, problem.scale, weights);
        const auto inverse = static_cast<float>(1 / sum_double(weights, visible));
        std::transform(weights, weights + visible, weights, [=](float weight) { return weight * inverse; });
        std::fill(weights + visible, weights + problem.positions, 0.0f);
    }
    std::fill(out, out + rows * value_width, 0.0f);
    std::fill(tile, tile + kTileKeys * tile_width, 0.0f);  // the padding of the values
    for (int64_t start = 0; start < problem.positions; start += kTileKeys) {
        const int64_t count = std::min(kTileKeys, problem.positions - start);
        for (int64_t key = 0; key < count; ++key) {
            widen(problem.value.row(batch, group, start + key), tile + key * value_width);
        }
        add_values(scores + start, stride, rows, tile, count, value_width, out);
    }
}

}  // namespace speckv
