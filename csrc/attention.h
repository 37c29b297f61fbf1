// Causal attention of the last few tokens of a sequence, group by group of query heads that share a key.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "buffers.h"
#include "rows.h"
#include "vectors.h"

namespace speckv {

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

// A row of so many floats, in whole vectors.
inline int64_t padded(int64_t size) {
    return (size + kLanes - 1) / kLanes * kLanes;
}

// All query heads that share a key: out [rows, padded(value.size)] fp32. What a row gets does not depend on the rows
// beside it. room is scratch.
void attend(const Problem& problem, int64_t batch, int64_t group, Buffer<float>& room, float* out);

}  // namespace speckv
