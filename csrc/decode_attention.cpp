#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "attention.h"
#include "checks.h"
#include "views.h"

namespace speckv {
namespace {

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
        thread_local Buffer<float> room, parts, results;
        const int64_t width = padded(size);
        results.resize(problem.rows() * width);
        parts.resize(chunks(problem) * part_size(problem));
        for (int64_t task = begin; task < end; ++task) {
            const int64_t sequence = task / groups;
            const int64_t group = task % groups;
            for (int64_t chunk = 0; chunk < chunks(problem); ++chunk) {
                attend_chunk(problem, sequence, group, chunk, room, parts.data() + chunk * part_size(problem));
            }
            join_chunks(problem, parts.data(), results.data());
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
