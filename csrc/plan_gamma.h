// plan_gamma without tensors, for the op of that name and for draft_step.

#pragma once

#include <cstdint>

#include "checks.h"
#include "ops.h"

namespace speckv {

// The paper's MLP and the candidates it is asked about; all arrays contiguous.
struct Controller {
    const float* w1;        // [features + 1, hidden]; the last input is gamma
    const float* b1;        // [hidden]
    const float* w2;        // [hidden]
    const float* b2;        // [1]
    const int64_t* gammas;  // [candidates]
    const float* seconds;   // [candidates]
    int64_t features;
    int64_t hidden;
    int64_t candidates;
    float rate;  // tokens per second; 0 for the candidate with the most tokens per second of its own
};

// signals [5 or more] with one more token in them; `drafted` tokens were in them before, and at 0 they are not read.
void update_signals(float* signals, int64_t drafted, float entropy, float confidence);

// acceptance [candidates] receives the MLP's outputs. Returns the best candidate, the first of equals; has no meaning
// where an acceptance is not finite.
int64_t plan_gamma_row(const Controller& controller, const float* signals, float* acceptance);

void check_controller(
    const char* op, const View& signals, const View& w1, const View& b1, const View& w2, const View& b2);
void check_rate(const char* op, double rate);

void check_plan_gamma(const char* op, const View& signals, const ControllerViews& controller);

// A controller whose inputs have been checked, as arrays.
class ControllerArrays {
public:
    explicit ControllerArrays(const ControllerViews& views);
    Controller controller() const;

private:
    const ControllerViews& views_;
    Array<float> w1_, b1_, w2_, b2_;
    Array<int64_t> gammas_;
    Array<float> seconds_;
};

// Validates values, then fills gamma [rows] and acceptance [rows, candidates]; raises naming the first bad row.
void plan_gamma_rows(
    const char* op, const Controller& controller, const float* signals, int64_t rows, int64_t* gamma,
    float* acceptance);

}  // namespace speckv
