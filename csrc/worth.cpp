#include "worth.h"

#include <algorithm>

namespace speckv {
namespace {

// Where the controller's signals that change within a draft lie.
constexpr int64_t kDrafted = 5, kIsEstimate = 6, kOwnConfidence = 7, kSurvival = 8, kSignals = 10;
constexpr int64_t kNumbers = 5;  // of a run's costs, in the third row

}  // namespace

double PassCosts::ms(int64_t positions) const {
    const int64_t n = std::min(positions, size - 1);
    const double level = rest[0], height = rest[1], slope = rest[2], center = rest[3], line_trials = rest[4];
    const double line = std::max(height + slope * (static_cast<double>(n) - center), 0.1 * height);
    return level * (trials[n] > 0 ? (trials[n] * own[n] + line_trials * line) / (trials[n] + line_trials) : line);
}

Worth::Worth(
    const char* op, const std::vector<Tensor>& tensors, double draft_ms, double rate, double scale,
    int64_t most_counted, int64_t look_ahead, int64_t others)
    : op_(op), draft_ms_(draft_ms), rate_(rate), most_counted_(most_counted), look_ahead_(look_ahead),
      others_(others) {
    if (tensors.size() != 6) {
        refuse(op, "a controller is given as six tensors");
    }
    const Tensor &signals = tensors[0], &w1 = tensors[1], &b1 = tensors[2], &w2 = tensors[3], &b2 = tensors[4],
                 &costs = tensors[5];
    check_controller(op, signals, w1, b1, w2, b2);
    check_shape(op, "signals", signals, {1, kSignals});
    check_shape(op, "costs", costs, {3, kAnySize});
    if (dtype_of(costs) != aoti_torch_dtype_float64() || costs.size(1) < std::max(kNumbers, look_ahead + 2)) {
        refuse(op, "costs must be float64, with at least 5 columns and look_ahead + 2");
    }
    if (most_counted < 1 || look_ahead < 1 || look_ahead > most_counted) {
        refuse(op, "look_ahead must be in [1, most_counted]");
    }
    if (others < 0) {
        refuse(op, "others must be >= 0");
    }
    check_rate(op, rate / scale);
    for (const Tensor& tensor : tensors) {
        if (!tensor.is_contiguous()) {
            refuse(op, "a controller's tensors must be contiguous");
        }
    }
    for (int64_t i = 0; i <= most_counted; ++i) {
        gammas_.push_back(i);
    }
    seconds_.resize(1 + look_ahead);
    acceptance_.resize(1 + look_ahead);
    signals_ = mutable_data<float>(signals);
    const auto* const numbers = data<double>(costs);
    const int64_t size = costs.size(1);
    pass_ = {numbers, numbers + size, numbers + 2 * size, size};
    controller_ = {data<float>(w1), data<float>(b1), data<float>(w2), data<float>(b2), gammas_.data(),
                   seconds_.data(), kSignals, w1.size(1), 1, static_cast<float>(rate / scale)};
}

bool Worth::goes_on(int64_t drafted, const Drawn& drawn) {
    const int64_t counted = std::min(drafted + 1, most_counted_);
    signals_[kDrafted] = static_cast<float>(static_cast<double>(counted) / static_cast<double>(most_counted_));
    signals_[kIsEstimate] = drawn.own < 0 ? 0.0f : 1.0f;
    signals_[kOwnConfidence] = drawn.own < 0 ? 0.0f : static_cast<float>(drawn.own);
    signals_[kSurvival] = static_cast<float>(drawn.before);
    update_signals(signals_, drafted, drawn.entropy, drawn.confidence);
    const double rate_of_ms = rate_ / 1e3;
    double tokens = 0.0, survival = drawn.survival;
    bool is_worth_it = false;
    seconds_[0] = 1.0f;
    for (int64_t more = 1; more <= look_ahead_; ++more) {
        const double ms = more_ms(drafted + 1, more);
        seconds_[more] = static_cast<float>(1 + ms / 1e3);  // only the differences matter to the rule
        survival *= drawn.stands;
        tokens += survival;
        is_worth_it = is_worth_it || tokens > rate_of_ms * ms;
    }
    const int64_t stop_here = std::min(drafted + 1, most_counted_ - 1);
    Controller from_here = controller_;
    from_here.gammas += stop_here;
    from_here.candidates = std::min(1 + look_ahead_, most_counted_ + 1 - stop_here);
    int64_t gamma;
    plan_gamma_rows(op_, from_here, signals_, 1, &gamma, acceptance_.data());
    return gamma > stop_here && is_worth_it;
}

float Worth::acceptance_of(int64_t gamma) {
    Controller this_one = controller_;
    this_one.gammas += std::min(gamma, most_counted_);
    this_one.rate = 0.0f;
    seconds_[0] = 1.0f;
    int64_t planned;
    plan_gamma_rows(op_, this_one, signals_, 1, &planned, acceptance_.data());
    return acceptance_[0];
}

// What a step with gamma draft tokens takes longer by so many more.
double Worth::more_ms(int64_t gamma, int64_t more) const {
    const int64_t positions = std::min(gamma + 1 + others_, pass_.size - 1 - look_ahead_);
    return static_cast<double>(more) * draft_ms_ + std::max(0.0, pass_.ms(positions + more) - pass_.ms(positions));
}

}  // namespace speckv
