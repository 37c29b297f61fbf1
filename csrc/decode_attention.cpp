#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "checks.h"
#include "tensors.h"
#include "vectors.h"

namespace speckv {
namespace {

constexpr int64_t kTileKeys = 32;  // brought to fp32 together: with 64 values each they take a quarter of L1

// Where [batch, heads, positions, size] lies.
struct Heads {
    const std::byte* start;
    Dtype dtype;
    int64_t size;
    std::array<int64_t, 3> stride_bytes;  // of the first three dimensions

    Row row(int64_t batch, int64_t head, int64_t position) const {
        return {start + batch * stride_bytes[0] + head * stride_bytes[1] + position * stride_bytes[2], dtype, size};
    }
};

struct Problem {
    Heads query, key, value;
    int64_t queries;    // tokens that ask, the last of the sequence
    int64_t positions;  // tokens that are asked
    int64_t group;      // query heads that share a key
    float scale;

    int64_t rows() const { return group * queries; }
    // Row r is query head r / queries of the group, token r % queries.
    int64_t visible(int64_t row) const { return positions - queries + 1 + row % queries; }
};

int64_t padded(int64_t size) {
    return (size + kLanes - 1) / kLanes * kLanes;
}

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

// All query heads that share a key: out [rows, width] fp32. What a row gets does not depend on the rows beside it.
void attend(const Problem& problem, int64_t batch, int64_t group, std::vector<float>& room, float* out) {
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

Heads as_heads(const Tensor& tensor) {
    const Logits layout = as_logits(tensor);
    const int64_t bytes = element_bytes(layout.dtype);
    return {layout.start, layout.dtype, layout.vocabulary,
            {tensor.stride(0) * bytes, tensor.stride(1) * bytes, tensor.stride(2) * bytes}};
}

void check_heads(const char* op, const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
    check_shape(op, name, tensor, expected);
    check_floating(op, name, tensor);
    if (tensor.size(3) < 1) {
        refuse(op, name, " must have heads of at least 1");
    }
    if (tensor.stride(3) != 1 && tensor.size(3) != 1) {
        refuse(op, name, " must be contiguous in its last dimension");
    }
}

void check_decode_attention(
    const char* op, const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
    check_heads(op, "query", query, {kAnySize, kAnySize, kAnySize, kAnySize});
    check_heads(op, "key", key, {query.size(0), kAnySize, kAnySize, query.size(3)});
    check_heads(op, "value", value, {query.size(0), key.size(1), key.size(2), kAnySize});
    if (dtype_of(key) != dtype_of(query) || dtype_of(value) != dtype_of(query)) {
        refuse(op, "query, key and value must have one dtype");
    }
    if (key.size(1) < 1 || query.size(1) % key.size(1) != 0) {
        refuse(op, "query must have a multiple of the ", key.size(1), " heads of key, got ", query.size(1));
    }
    if (query.size(2) > key.size(2)) {
        refuse(op, "query has ", query.size(2), " tokens, key only ", key.size(2));
    }
    if (!(scale > 0 && scale <= 1e30)) {
        refuse(op, "scale must be finite and > 0");
    }
}

Tensor decode_attention(const Tensor& query, const Tensor& key, const Tensor& value, double scale) {
    check_decode_attention("decode_attention", query, key, value, scale);
    const int64_t batch = query.size(0);
    const int64_t groups = key.size(1);
    const int64_t heads = query.size(1);
    const Problem problem{
        as_heads(query), as_heads(key),    as_heads(value),           query.size(2),
        key.size(2),     heads / groups, static_cast<float>(scale),
    };
    const int64_t size = value.size(3);
    Tensor out = empty<4>({batch, problem.queries, heads, size}, dtype_of(query));
    auto* const start = mutable_data<std::byte>(out);
    const auto run = [&](int64_t begin, int64_t end) {
        thread_local std::vector<float> room, results;
        const int64_t width = padded(size);
        results.resize(problem.rows() * width);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t sequence = task / groups;
            const int64_t group = task % groups;
            attend(problem, sequence, group, room, results.data());
            for (int64_t row = 0; row < problem.rows(); ++row) {
                const int64_t head = group * problem.group + row / problem.queries;
                const int64_t token = sequence * problem.queries + row % problem.queries;
                narrow(results.data() + row * width, size, problem.query.dtype,
                       start + (token * heads + head) * size * element_bytes(problem.query.dtype));
            }
        }
    };
    // Waking a thread costs as much as some 20 microseconds of this, and stalls where another process is busy.
    constexpr int64_t kProductsPerThread = int64_t{1} << 20;
    const int64_t products = std::max<int64_t>(
        1, problem.rows() * problem.positions * (problem.key.size + problem.value.size));
    const int64_t tasks = problem.queries > 0 ? batch * groups : 0;
    if (tasks * products < 2 * kProductsPerThread) {
        run(0, tasks);
    } else {
        torch::stable::parallel_for(0, tasks, std::max<int64_t>(1, kProductsPerThread / products), run);
    }
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("decode_attention", TORCH_BOX(&decode_attention));
}

}  // namespace speckv
