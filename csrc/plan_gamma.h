// plan_gamma without tensors, for the op of that name and for draft_step.

#pragma once

#include <cstdint>

#include "checks.h"

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

// acceptance [candidates] receives the MLP's outputs. Returns the best candidate, the first of equals; has no meaning where an acceptance is not finite.
int64_t plan_gamma_row(const Controller& controller, const float* signals, float* acceptance);

void check_controller(
    const char* op, const Tensor& signals, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2);
void check_rate(const char* op, double rate);

void check_plan_gamma(
    const char* op, const Tensor& signals, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const Tensor& gammas, const Tensor& seconds, double rate);

// The controller's tensors made contiguous; keeps them alive while their pointers are used.
struct ControllerTensors {
    Tensor w1, b1, w2, b2, gammas, seconds;

    Controller controller(double rate) const;
};
ControllerTensors as_contiguous(
    const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& gammas,
    const Tensor& seconds);

// Validates values, then fills gamma [rows] and acceptance [rows, candidates]; raises naming the first bad row.
void plan_gamma_rows(
    const char* op, const Controller& controller, const float* signals, int64_t rows, int64_t* gamma,
    float* acceptance);

}  // namespace speckv
