// The ops of speculative decoding as kernels/reference.py specifies them, by whatever way they are called: each checks
// its inputs, raises std::runtime_error in the words of kernels/checks.py, and adds its outputs in their order.

#pragma once

#include "threshold.h"
#include "views.h"

namespace speckv {

// The MLP of a controller and the lengths it is asked about.
struct ControllerViews {
    View w1, b1, w2, b2, gammas, seconds;
    double rate;
};

void draft_sample(
    const View& logits, const View& temperature, const View& uniform, const FilterViews& filters, Outputs& outputs);

void plan_gamma(const View& signals, const ControllerViews& controller, Outputs& outputs);

void draft_step(
    const View& logits, const View& temperature, const View& uniform, const View& signals, const View& drafted,
    const ControllerViews& controller, const FilterViews& filters, Outputs& outputs);

void verify_chain(
    const View& target_logits, const View& draft_logits, const View& draft_tokens, const View& num_draft,
    const View& temperature, const View& uniform, const FilterViews& filters, Outputs& outputs);

}  // namespace speckv
