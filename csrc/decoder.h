// The decoder layers of a Llama-like model over a few new tokens, with a cache written in place.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "matrices.h"
#include "team.h"

namespace speckv {

struct Layer {
    // Empty where the model has none: query_norm, key_norm.
    std::vector<float> input_norm, attention_norm, query_norm, key_norm;
    std::unique_ptr<Matrix> query, key, value, output, gate, up, down;
};

struct Decoder {
    std::vector<Layer> layers;
    std::vector<float> final_norm;
    std::vector<float> inverse_frequencies;  // [head_size / 2], of the rotary position encoding
    int64_t hidden, heads, groups, head_size, intermediate;
    float epsilon, attention_scale, rotary_scale;
};

// [layers, groups, capacity, head_size] each.
struct Cache {
    std::byte* keys;
    std::byte* values;
    Dtype dtype;
    int64_t capacity;
};

// The next tokens of one sequence: its cache, the position of the first of them, and how many they are.
struct Span {
    Cache cache;
    int64_t start, count;
};

// What so many layers made of the tokens is kept, from this place in a row on.
struct Wanted {
    int64_t layer, column;
};

// Reads the next tokens of one sequence or several, whose embeddings x [sum of counts, hidden] lie one span after the
// other, at the positions from `start` on, for which each cache must have room. x is left as what the last layer made
// of them, before the final norm. states [sum of counts, state_stride] receives what is wanted, by ascending layer.
void read_tokens(
    const Decoder& decoder, Team& team, const std::vector<Span>& spans, float* x, const std::vector<Wanted>& wanted,
    float* states, int64_t state_stride);

// out[i] = x[i] / sqrt(mean(x^2) + epsilon) * weight[i]
void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* out);

// out [inputs.count(), matrix.rows], spread over the team. inputs are arranged for the matrix.
void multiply(const Matrix& matrix, Team& team, const Inputs& inputs, float* out);

}  // namespace speckv
