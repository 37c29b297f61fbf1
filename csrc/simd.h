// The loops over one block of a vocabulary row.
//
// Every loop reads fp32 that a load has brought into L1, so that its order of summation does not depend on the dtype of
// the logits: equal logits give equal sums, and a residual p - q of equal distributions is exactly zero.

#pragma once

#include <cstdint>

namespace speckv {

// 4 KiB of fp32: two such buffers stay in L1, and the block that the inverse CDF reads again is a small part of a row.
constexpr int64_t kBlockSize = 1024;

// A part of a block that is looked at, or passed over, as one.
constexpr int64_t kGroupSize = 64;

// fp32 of one block, aligned to a cache line: a 64-byte store across two lines takes twice as long.
struct alignas(64) BlockBuffer {
    float values[kBlockSize];
};

// dst[i] = float(src[i]). Loops of their own: GCC gives a reduction next to 16-bit loads half vectors.
void load_bfloat16(const uint16_t* src, int64_t size, float* dst);
void load_float16(const uint16_t* src, int64_t size, float* dst);
// Of a loaded block. kPaired is what load_bfloat16_and_largest leaves: with 512-bit units, of each 32 values in a row
// the 16 even ones before the 16 odd ones. Sums are taken in the same order whichever it is.
enum class Order { kAsItLies, kPaired };

// The same in order kPaired, and largest() of what was loaded, which on its way through a register costs little.
float load_bfloat16_and_largest(const uint16_t* src, int64_t size, float* dst);
// The way back, rounded to nearest even.
void store_bfloat16(const float* src, int64_t size, uint16_t* dst);
void store_float16(const float* src, int64_t size, uint16_t* dst);

// NaN is passed over; -inf where there is nothing else.
float largest(const float* values, int64_t size);
// The same of each kGroupSize values; the last group may be shorter.
void group_maxima(const float* values, int64_t size, float* out);
bool has_nan(const float* values, int64_t size);
// Index of the first element equal to value, or size.
int64_t find_first(const float* values, int64_t size, float value);

// The sums below take shift >= every value, finite or +inf, and carry a NaN among the values into the result. A term
// below exp(-87) counts as exp(-87), which is nothing beside the term of the row's maximum, exp(0).

// A block for load_bfloat16_and_largest, which a sum calls on the way: beside exp that takes less time than alone.
struct Ahead {
    const uint16_t* src;
    int64_t size;
    float* dst;     // holds bf16, or zeros: the lower halves are not written everywhere
    float largest;  // what it returned
};

struct ExpSums {
    float sum = 0.0f;       // of e = exp(x - shift)
    float weighted = 0.0f;  // of (x - shift) * e
};
ExpSums exp_sums(const float* values, int64_t size, Order order, float shift, Ahead* next);

// The same of several blocks of one shift, as parts that are yet to be added up: 15 ns for a block that takes 200.
struct alignas(64) ExpParts {
    float sums[32] = {};
    float weighted_sums[32] = {};
    ExpSums rest;  // of what filled no vector, and of everything where there are none of 512 bits
};
void add_exp_parts(const float* values, int64_t size, Order order, float shift, Ahead* next, ExpParts& parts);
ExpSums sum_of_parts(const ExpParts& parts);
// Of exp((x - shift) * scale).
float exp_sum(const float* values, int64_t size, Order order, float shift, float scale, Ahead* next = nullptr);

// softmax(x / temperature) of a row, without its elements.
struct Softmax {
    float shift;    // the row's largest logit
    float scale;    // 1 / temperature
    float inverse;  // 1 / sum of exp((x - shift) * scale)
};
// out[i] = exp((x - shift) * scale), exactly 0 where that is below exp(-87), a normal number elsewhere.
void exp_weights(const float* values, int64_t size, float shift, float scale, float* out);
// gate[i] *= up[i] / (1 + exp(-gate[i])).
void multiply_by_silu(float* gate, const float* up, int64_t size);
// out[i] = max(0, p(i) - q(i)); returns their sum.
float residual_weights(const float* p_values, const float* q_values, int64_t size, Softmax p, Softmax q, float* out);

// The sum in fp64.
double sum_double(const float* values, int64_t size);

}  // namespace speckv
