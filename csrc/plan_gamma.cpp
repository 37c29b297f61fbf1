#include "plan_gamma.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "views.h"

namespace speckv {
namespace {

constexpr double kLargestRate = 1e30;  // as in kernels/checks.py

float larger(float a, float b) {
    return b > a || b != b ? b : a;  // a NaN passes, as in torch.maximum
}

float smaller(float a, float b) {
    return b < a || b != b ? b : a;
}

}  // namespace

void update_signals(float* signals, int64_t drafted, float entropy, float confidence) {
    if (drafted == 0) {
        signals[0] = signals[2] = entropy;
        signals[1] = signals[3] = confidence;
        return;
    }
    const auto count = static_cast<float>(drafted);
    signals[0] = (signals[0] * count + entropy) / (count + 1);
    signals[1] = (signals[1] * count + confidence) / (count + 1);
    signals[2] = larger(signals[2], entropy);
    signals[3] = smaller(signals[3], confidence);
}

int64_t plan_gamma_row(const Controller& controller, const float* signals, float* acceptance) {
    // What the signals contribute to each hidden unit is the same for every candidate.
    thread_local std::vector<float> from_signals;
    from_signals.assign(controller.b1, controller.b1 + controller.hidden);
    for (int64_t i = 0; i < controller.features; ++i) {
        const float* weights = controller.w1 + i * controller.hidden;
        for (int64_t j = 0; j < controller.hidden; ++j) {
            from_signals[j] += signals[i] * weights[j];
        }
    }
    const float* gamma_weights = controller.w1 + controller.features * controller.hidden;

    int64_t best = 0;
    float best_score = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < controller.candidates; ++i) {
        const auto gamma = static_cast<float>(controller.gammas[i]);
        float output = *controller.b2;
        for (int64_t j = 0; j < controller.hidden; ++j) {
            const float hidden = from_signals[j] + gamma * gamma_weights[j];
            output += (hidden < 0 ? 0.0f : hidden) * controller.w2[j];  // a NaN passes, as in torch.relu
        }
        acceptance[i] = output;
        const float tokens = std::clamp(output, 0.0f, 1.0f) * gamma + 1.0f;
        const float seconds = controller.seconds[i];
        const float score = controller.rate > 0 ? tokens - controller.rate * seconds : tokens / seconds;
        if (score > best_score) {
            best_score = score;
            best = i;
        }
    }
    return controller.gammas[best];
}

void check_controller(
    const char* op, const View& signals, const View& w1, const View& b1, const View& w2, const View& b2) {
    check_shape(op, "signals", signals, {kAnySize, kAnySize});
    const int64_t features = signals.size(1);
    if (features < 5) {
        refuse(op, "signals must have at least 5 columns, got ", features);
    }
    check_shape(op, "w1", w1, {features + 1, kAnySize});
    const int64_t hidden = w1.size(1);
    if (hidden < 1) {
        refuse(op, "w1 must have at least one hidden unit");
    }
    check_shape(op, "b1", b1, {hidden});
    check_shape(op, "w2", w2, {hidden, 1});
    check_shape(op, "b2", b2, {1});
    check_float32(op, "signals", signals);
    check_float32(op, "w1", w1);
    check_float32(op, "b1", b1);
    check_float32(op, "w2", w2);
    check_float32(op, "b2", b2);
}

void check_rate(const char* op, double rate) {
    if (!(rate >= 0 && rate <= kLargestRate)) {
        refuse(op, "rate must be finite and >= 0");
    }
}

void check_plan_gamma(const char* op, const View& signals, const ControllerViews& controller) {
    const View &gammas = controller.gammas, &seconds = controller.seconds;
    check_controller(op, signals, controller.w1, controller.b1, controller.w2, controller.b2);
    check_float32(op, "seconds", seconds);
    check_shape(op, "gammas", gammas, {kAnySize});
    check_int64(op, "gammas", gammas);
    if (gammas.size(0) < 1) {
        refuse(op, "gammas must name at least one candidate");
    }
    check_shape(op, "seconds", seconds, {gammas.size(0)});
    check_rate(op, controller.rate);
}

ControllerArrays::ControllerArrays(const ControllerViews& views)
    : views_(views), w1_(views.w1), b1_(views.b1), w2_(views.w2), b2_(views.b2), gammas_(views.gammas),
      seconds_(views.seconds) {}

Controller ControllerArrays::controller() const {
    return {
        w1_.data(), b1_.data(), w2_.data(), b2_.data(), gammas_.data(), seconds_.data(), views_.w1.size(0) - 1,
        views_.w1.size(1), views_.gammas.size(0), static_cast<float>(views_.rate),
    };
}

void plan_gamma_rows(
    const char* op, const Controller& controller, const float* signals, int64_t rows, int64_t* gamma,
    float* acceptance) {
    for (int64_t i = 0; i < controller.candidates; ++i) {
        if (!(std::isfinite(controller.seconds[i]) && controller.seconds[i] > 0)) {
            refuse(op, "seconds must be finite and > 0");
        }
    }
    for (int64_t row = 0; row < rows; ++row) {
        float* row_acceptance = acceptance + row * controller.candidates;
        gamma[row] = plan_gamma_row(controller, signals + row * controller.features, row_acceptance);
        const auto is_finite = [](float value) { return std::isfinite(value); };
        if (!std::all_of(row_acceptance, row_acceptance + controller.candidates, is_finite)) {
            refuse(op, "row ", row, ": predicted acceptance is not finite");
        }
    }
}

void plan_gamma(const View& signals, const ControllerViews& views, Outputs& outputs) {
    check_plan_gamma("plan_gamma", signals, views);
    const ControllerArrays arrays(views);
    const Controller controller = arrays.controller();
    const Array<float> rows_of_signals(signals);
    const int64_t rows = signals.size(0);
    int64_t* const gamma = outputs.add_int64({rows});
    float* const acceptance = outputs.add_float32({rows, controller.candidates});
    plan_gamma_rows("plan_gamma", controller, rows_of_signals.data(), rows, gamma, acceptance);
}

namespace {

std::tuple<Tensor, Tensor> dispatched(
    const Tensor& signals, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2, const Tensor& gammas,
    const Tensor& seconds, double rate) {
    TensorOutputs<2> outputs;
    plan_gamma(signals, {w1, b1, w2, b2, gammas, seconds, rate}, outputs);
    return outputs.as_tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("plan_gamma", TORCH_BOX(&dispatched));
}

}  // namespace speckv
