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

// Keys are taken so many at a time, from the first on, and what they make of a row is joined afterwards: threads can
// share a group, and the sums of a row depend on neither how many do nor on the rows beside it.
constexpr int64_t kChunkKeys = 128;

inline int64_t chunks(const Problem& problem) {
    return (problem.positions + kChunkKeys - 1) / kChunkKeys;
}

// Floats that a chunk leaves of all query heads that share a key.
inline int64_t part_size(const Problem& problem) {
    return problem.rows() * (2 + padded(problem.value.size));
}

// What one chunk of keys makes of all query heads that share a key, into part [part_size]. room is scratch.
void attend_chunk(
    const Problem& problem, int64_t batch, int64_t group, int64_t chunk, Buffer<float>& room, float* part);

// All chunks, of which the parts lie one behind the other: out [rows, padded(value.size)] fp32.
void join_chunks(const Problem& problem, const float* parts, float* out);

}  // namespace speckv
