// draft_sample without tensors, for the op of that name and for draft_step.

#pragma once

#include <cstdint>

#include "checks.h"
#include "tensors.h"
#include "threshold.h"

namespace speckv {

struct DraftSample {
    bool is_valid;  // false where a logit is NaN or +inf, or all are -inf
    int64_t token;
    float prob;
    float entropy;  // bits
    float confidence;
};

// One pass over the row, and one block again for the token; with filters, two or three passes.
DraftSample draft_sample_row(const Row& row, float temperature, float uniform, const Filters& filters);

void check_draft_sample(
    const char* op, const Tensor& logits, const Tensor& temperature, const Tensor& uniform,
    const FilterTensors& filters);

struct DraftSampleOutputs {
    Tensor token;
    Tensor prob;
    Tensor entropy;
    Tensor confidence;
};
// Validates values, then fills [B] outputs; raises naming the first bad row.
DraftSampleOutputs draft_sample_rows(
    const char* op, const Logits& logits, const float* temperature, const float* uniform,
    const FilterTensors& filters, int64_t rows);

}  // namespace speckv
