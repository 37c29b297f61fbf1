// The rule of speckv/adaptive.py: a draft goes on while one more token, or a few, are worth their time.

#pragma once

#include <cstdint>
#include <vector>

#include "plan_gamma.h"
#include "tensors.h"

namespace speckv {

// What a pass of the target takes: StepCosts.verify_ms of speckv/cost.py, from its numbers [3, size].
struct PassCosts {
    const double *trials, *own, *rest;
    int64_t size;

    double ms(int64_t positions) const;
};

// The tensors are [signals, w1, b1, w2, b2, costs]: signals [1, 10] f32, those of speckv/draft_state.py, are brought up
// to date; then the controller's; costs [3, n] f64, n at least 5 and look_ahead + 2. They must outlive this object.
// draft_ms is what one more draft token takes; rate counts as rate / scale for the controller, which has seen drafts of
// up to most_counted tokens. The pass has `others` positions of other texts.
class Worth {
public:
    Worth(const char* op, const std::vector<Tensor>& tensors, double draft_ms, double rate, double scale,
          int64_t most_counted, int64_t look_ahead, int64_t others);

    // What a token was drawn from.
    struct Drawn {
        float entropy, confidence;
        double own;         // the confidence that the drafter gives itself; negative where it does not
        double stands;      // how often one more token stands where this one does
        double before;      // the probability with which the draft survived before it
        double survival;    // and with it
    };

    // Whether to draft another token after token number `drafted` (from 0).
    bool goes_on(int64_t drafted, const Drawn& drawn);

    // The controller's answer to a draft of gamma tokens.
    float acceptance_of(int64_t gamma);

private:
    double more_ms(int64_t gamma, int64_t more) const;

    const char* op_;
    Controller controller_;  // gammas are 0, 1, ..., most_counted; of seconds there are 1 + look_ahead
    PassCosts pass_;
    float* signals_;
    double draft_ms_, rate_;
    int64_t most_counted_, look_ahead_, others_;
    std::vector<int64_t> gammas_;
    std::vector<float> seconds_, acceptance_;
};

}  // namespace speckv
