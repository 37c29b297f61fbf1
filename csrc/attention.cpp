#include "attention.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "exponential.h"

namespace speckv {
namespace {

// Rows up to which bf16 keys and values are widened as they are read: by more they are brought to fp32 once for all.
constexpr int64_t kMostReading = 6;
constexpr int64_t kTileKeys = 32;  // brought to fp32 together: with 64 values each they take a quarter of L1

// Rows `first`, first + 1, ... of a head in fp32, `width` apart; what is behind a row up to there is left as it is.
void widen(const Heads& heads, int64_t batch, int64_t head, int64_t first, int64_t count, int64_t width, float* out) {
    const Row start = heads.row(batch, head, first);
    const bool is_one_piece = width == heads.size && heads.stride_bytes[2] == width * element_bytes(heads.dtype);
    const int64_t pieces = is_one_piece ? 1 : count;
    const int64_t size = is_one_piece ? count * width : heads.size;
    for (int64_t piece = 0; piece < pieces; ++piece) {
        const auto* const from = static_cast<const std::byte*>(start.logits) + piece * heads.stride_bytes[2];
        float* const to = out + piece * width;
        if (heads.dtype == Dtype::kFloat32) {
            std::copy_n(reinterpret_cast<const float*>(from), size, to);
        } else {
            const auto load = heads.dtype == Dtype::kBFloat16 ? load_bfloat16 : load_float16;
            load(reinterpret_cast<const uint16_t*>(from), size, to);
        }
    }
}

bool is_one_piece_of_bfloat16(const Heads& heads, int64_t width) {
    return heads.dtype == Dtype::kBFloat16 && width == heads.size && heads.stride_bytes[2] == 2 * width;
}

const uint16_t* bfloat16_of(const Heads& heads, int64_t batch, int64_t head, int64_t first) {
    return static_cast<const uint16_t*>(heads.row(batch, head, first).logits);
}

// Asks for rows that are wanted soon: what a sequence has in the cache is a short stream for every layer and head.
void ask_for(const Heads& heads, int64_t batch, int64_t head, int64_t first, int64_t count) {
    constexpr int64_t kLine = 64;
    const auto* const start = static_cast<const char*>(heads.row(batch, head, first).logits);
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t byte = 0; byte < heads.size * element_bytes(heads.dtype); byte += kLine) {
            __builtin_prefetch(start + row * heads.stride_bytes[2] + byte);
        }
    }
}

SPECKV_INLINE void load_some(const float* values, Floats& out) {
    load(values, out);
}

// Widened bf16.
SPECKV_INLINE void load_some(const uint16_t* values, Floats& out) {
    using Halves = uint16_t __attribute__((vector_size(32)));
    using Words = uint32_t __attribute__((vector_size(64)));
    Halves halves;
    std::memcpy(&halves, values, sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(&out, &words, sizeof(out));
}

// scores[row * stride + key] = queries[row] . keys[key] for kLanes keys.
template <int rows, class Value>
SPECKV_INLINE void add_scores_of_rows(
    const float* queries, const Value* keys, int64_t width, float* scores, int64_t stride) {
    Floats halves[rows][2];
    for (int half = 0; half < 2; ++half) {
        Floats sums[rows][8] = {};
        for (int64_t i = 0; i < width; i += kLanes) {
            Floats query[rows];
#pragma GCC unroll 4
            for (int row = 0; row < rows; ++row) {
                load(queries + row * width + i, query[row]);
            }
#pragma GCC unroll 8
            for (int key = 0; key < 8; ++key) {
                Floats value;
                load_some(keys + (8 * half + key) * width + i, value);
#pragma GCC unroll 4
                for (int row = 0; row < rows; ++row) {
                    sums[row][key] += query[row] * value;
                }
            }
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
            fold_eight(sums[row], halves[row][half]);
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
        Floats all;
        fold_two(halves[row][0], halves[row][1], all);
        store(all, scores + row * stride);
    }
}

// The same for all keys of a tile. What is behind a tile's last key up to a whole vector gets a score too.
template <class Value>
SPECKV_INLINE void add_all_scores(
    const float* queries, int64_t rows, const Value* keys, int64_t count, int64_t width, float* scores,
    int64_t stride) {
    for (int64_t first = 0; first < count; first += kLanes) {
        int64_t row = 0;
        for (; row + 3 <= rows; row += 3) {
            add_scores_of_rows<3>(
                queries + row * width, keys + first * width, width, scores + row * stride + first, stride);
        }
        for (; row < rows; ++row) {
            add_scores_of_rows<1>(
                queries + row * width, keys + first * width, width, scores + row * stride + first, stride);
        }
    }
}

void add_scores(
    const float* queries, int64_t rows, const float* keys, int64_t count, int64_t width, float* scores,
    int64_t stride) {
    in_widest_units([=]() SPECKV_INLINED {
        add_all_scores(queries, rows, keys, count, width, scores, stride);
    });
}

void add_scores_of_bfloat16(
    const float* queries, int64_t rows, const uint16_t* keys, int64_t count, int64_t width, float* scores,
    int64_t stride) {
    in_widest_units([=]() SPECKV_INLINED {
        add_all_scores(queries, rows, keys, count, width, scores, stride);
    });
}

constexpr float kNothing = -std::numeric_limits<float>::infinity();

// Scores [rows, kChunkKeys] made weights, of which a row sees the first visible[row]: exp((score - largest) * scale) of
// those, 0 behind them up to the chunk's end.
void weigh(
    float* scores, int64_t rows, const int64_t* visible, float scale, float* largest_scores, float* sums) {
    in_widest_units([=]() SPECKV_INLINED {
        for (int64_t row = 0; row < rows; ++row) {
            float* const weights = scores + row * kChunkKeys;
            std::fill(weights + visible[row], weights + kChunkKeys, kNothing);
            float lanes[kLanes];
            std::fill(lanes, lanes + kLanes, kNothing);
            for (int64_t i = 0; i < kChunkKeys; i += kLanes) {
#pragma omp simd
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    // A NaN is passed over here, and becomes a weight below.
                    lanes[lane] = weights[i + lane] > lanes[lane] ? weights[i + lane] : lanes[lane];
                }
            }
            float most = kNothing;
            for (float lane : lanes) {
                most = lane > most ? lane : most;
            }
            const float shift = most == kNothing ? 0.0f : most;
#pragma omp simd
            for (int64_t i = 0; i < kChunkKeys; ++i) {
                weights[i] = exp_or_zero((weights[i] - shift) * scale);
            }
            Floats total = {};
            for (int64_t i = 0; i < kChunkKeys; i += kLanes) {
                Floats some;
                load(weights + i, some);
                total += some;
            }
            largest_scores[row] = most;
            sums[row] = sum_lanes(total);
        }
    });
}

// Some rows and some vectors of a row at a time: a single sum would wait for its own result at every key.
template <int rows, int vectors, class Value>
SPECKV_INLINE void add_some_values(
    const float* weights, int64_t stride, const Value* values, int64_t count, int64_t width, float* out) {
    Floats sums[rows][vectors];
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            load(out + row * width + i * kLanes, sums[row][i]);
        }
    }
    for (int64_t key = 0; key < count; ++key) {
        Floats value[vectors];
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            load_some(values + key * width + i * kLanes, value[i]);
        }
#pragma GCC unroll 4
        for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
            for (int i = 0; i < vectors; ++i) {
                sums[row][i] += weights[row * stride + key] * value[i];
            }
        }
    }
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 4
        for (int i = 0; i < vectors; ++i) {
            store(sums[row][i], out + row * width + i * kLanes);
        }
    }
}

template <int rows, class Value>
SPECKV_INLINE void add_values_to_rows(
    const float* weights, int64_t stride, const Value* values, int64_t count, int64_t width, float* out) {
    int64_t i = 0;
    for (; i + 4 * kLanes <= width; i += 4 * kLanes) {
        add_some_values<rows, 4>(weights, stride, values + i, count, width, out + i);
    }
    for (; i < width; i += kLanes) {
        add_some_values<rows, 1>(weights, stride, values + i, count, width, out + i);
    }
}

// out[row] += weights[row * stride + key] * values[key], key by key in their order.
template <class Value>
SPECKV_INLINE void add_all_values(
    const float* weights, int64_t stride, int64_t rows, const Value* values, int64_t count, int64_t width, float* out) {
    int64_t row = 0;
    for (; row + 3 <= rows; row += 3) {
        add_values_to_rows<3>(weights + row * stride, stride, values, count, width, out + row * width);
    }
    for (; row < rows; ++row) {
        add_values_to_rows<1>(weights + row * stride, stride, values, count, width, out + row * width);
    }
}

void add_values(
    const float* weights, int64_t stride, int64_t rows, const float* values, int64_t count, int64_t width, float* out) {
    in_widest_units([=]() SPECKV_INLINED {
        add_all_values(weights, stride, rows, values, count, width, out);
    });
}

void add_values_of_bfloat16(
    const float* weights, int64_t stride, int64_t rows, const uint16_t* values, int64_t count, int64_t width,
    float* out) {
    in_widest_units([=]() SPECKV_INLINED {
        add_all_values(weights, stride, rows, values, count, width, out);
    });
}

// out[i] += factor * values[i]
void add_scaled(const float* values, float factor, int64_t size, float* out) {
    in_widest_units([=]() SPECKV_INLINED {
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] += factor * values[i];
        }
    });
}

}  // namespace

// A part is the largest score of each row [rows], the sum of its weights [rows], and the values times their weights
// [rows, width], where a weight is 1 for the largest score.
void attend_chunk(
    const Problem& problem, int64_t batch, int64_t group, int64_t chunk, Buffer<float>& room, float* part) {
    const int64_t rows = problem.rows();
    const int64_t begin = chunk * kChunkKeys, end = std::min(begin + kChunkKeys, problem.positions);
    const int64_t key_width = padded(problem.key.size);
    const int64_t value_width = padded(problem.value.size);
    const int64_t tile_width = std::max(key_width, value_width);
    room.resize(rows * key_width + kTileKeys * tile_width + rows * kChunkKeys);
    float* const queries = room.data();
    float* const tile = queries + rows * key_width;
    float* const scores = tile + kTileKeys * tile_width;
    if (key_width != problem.key.size) {  // the padding
        std::fill(queries, scores, 0.0f);
    }
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t head = group * problem.group + row / problem.queries;
        widen(problem.query, batch, head, row % problem.queries, 1, key_width, queries + row * key_width);
    }
    const bool reads_keys = rows <= kMostReading && is_one_piece_of_bfloat16(problem.key, key_width);
    const bool reads_values = rows <= kMostReading && is_one_piece_of_bfloat16(problem.value, value_width);
    for (int64_t start = begin; start < end; start += kTileKeys) {
        const int64_t count = std::min(kTileKeys, end - start);
        ask_for(problem.value, batch, group, start, count);
        float* const tile_scores = scores + start - begin;
        // What lies behind the last key of a whole vector is another key, or not the cache's.
        if (reads_keys && count % kLanes == 0) {
            add_scores_of_bfloat16(queries, rows, bfloat16_of(problem.key, batch, group, start), count, key_width,
                                   tile_scores, kChunkKeys);
            continue;
        }
        widen(problem.key, batch, group, start, count, key_width, tile);
        add_scores(queries, rows, tile, count, key_width, tile_scores, kChunkKeys);
    }
    static thread_local std::vector<int64_t> visible;
    visible.resize(rows);
    for (int64_t row = 0; row < rows; ++row) {
        visible[row] = std::clamp<int64_t>(problem.visible(row) - begin, 0, end - begin);
    }
    float* const values = part + 2 * rows;
    weigh(scores, rows, visible.data(), problem.scale, part, part + rows);
    std::fill(values, values + rows * value_width, 0.0f);
    if (value_width != problem.value.size) {
        std::fill(tile, tile + kTileKeys * tile_width, 0.0f);
    }
    for (int64_t start = begin; start < end; start += kTileKeys) {
        const int64_t count = std::min(kTileKeys, end - start);
        ask_for(problem.key, batch, group, start + kChunkKeys, std::min(count, problem.positions - start - kChunkKeys));
        if (reads_values) {
            add_values_of_bfloat16(scores + start - begin, kChunkKeys, rows,
                                   bfloat16_of(problem.value, batch, group, start), count, value_width, values);
            continue;
        }
        widen(problem.value, batch, group, start, count, value_width, tile);
        add_values(scores + start - begin, kChunkKeys, rows, tile, count, value_width, values);
    }
}

void join_chunks(const Problem& problem, const float* parts, float* out) {
    const int64_t rows = problem.rows(), width = padded(problem.value.size);
    const int64_t count = chunks(problem), size = part_size(problem);
    std::fill(out, out + rows * width, 0.0f);
    for (int64_t row = 0; row < rows; ++row) {
        // Those that the row does not see have weights of 0, and values that may be NaN.
        const int64_t seen = std::min(count, (problem.visible(row) + kChunkKeys - 1) / kChunkKeys);
        float shift = kNothing;
        for (int64_t chunk = 0; chunk < seen; ++chunk) {
            shift = std::max(shift, parts[chunk * size + row]);
        }
        float sum = 0;
        for (int64_t chunk = 0; chunk < seen; ++chunk) {
            const float* const part = parts + chunk * size;
            float factor;
            exp_weights(part + row, 1, shift, problem.scale, &factor);
            sum += factor * part[rows + row];
            add_scaled(part + 2 * rows + row * width, factor, width, out + row * width);
        }
        const float inverse = 1 / sum;
        std::transform(out + row * width, out + (row + 1) * width, out + row * width,
                       [=](float value) { return value * inverse; });
    }
}

}  // namespace speckv
