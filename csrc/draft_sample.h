// draft_sample without tensors, for the op of that name and for draft_step.

#pragma once

#include <cstdint>

#include "checks.h"
#include "tensors.h"

namespace speckv {

struct DraftSample {
    bool is_valid;  // false where a logit is NaN or +inf, or all are -inf
    int64_t token;
    float prob;
    float entropy;  // bits
    float confidence;
};

// One pass over the row, and one block again for the token.
DraftSample draft_sample_row(const Row& row, float temperature, float uniform);

void check_draft_sample(const char* op, const Tensor& logits, const Tensor& temperature, const Tensor& uniform);

struct DraftSampleOutputs {
    Tensor token;
    Tensor prob;
    Tensor entropy;
    Tensor confidence;
};
// Validates values, then fills [B] outputs; raises naming the first bad row.
DraftSampleOutputs draft_sample_rows(
    const char* op, const Logits& logits, const float* temperature, const float* uniform, int64_t rows);

}  // namespace speckv
