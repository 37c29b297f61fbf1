// draft_sample without tensors, for the op of that name and for draft_step.

#pragma once

#include <cstdint>

#include "checks.h"
#include "threshold.h"
#include "views.h"

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
    const char* op, const View& logits, const View& temperature, const View& uniform, const FilterViews& filters);

struct Uncertainty {
    const float* entropy;     // [rows]
    const float* confidence;  // [rows]
};
// Validates values, then adds and fills draft_sample's outputs; raises naming the first bad row. What it returns lies
// in the outputs.
Uncertainty draft_sample_rows(
    const char* op, const View& logits, const View& temperature, const View& uniform, const FilterViews& filters,
    Outputs& outputs);

}  // namespace speckv
