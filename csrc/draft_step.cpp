#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "draft_sample.h"
#include "plan_gamma.h"

namespace speckv {

void draft_step(
    const View& logits, const View& temperature, const View& uniform, const View& signals, const View& drafted,
    const ControllerViews& views, const FilterViews& filters, Outputs& outputs) {
    const char* op = "draft_step";
    check_draft_sample(op, logits, temperature, uniform, filters);
    check_plan_gamma(op, signals, views);
    const int64_t rows = logits.size(0);
    const int64_t features = signals.size(1);
    check_shape(op, "signals", signals, {rows, kAnySize});
    check_shape(op, "drafted", drafted, {rows});
    check_int64(op, "drafted", drafted);
    const Array<int64_t> counts(drafted);
    for (int64_t row = 0; row < rows; ++row) {
        if (counts[row] < 0) {
            refuse(op, "row ", row, ": drafted must be >= 0");
        }
    }

    const Uncertainty uncertainty = draft_sample_rows(op, logits, temperature, uniform, filters, outputs);
    const Array<float> before(signals);
    float* const updated = outputs.add_float32({rows, features});
    std::copy(before.data(), before.data() + rows * features, updated);
    for (int64_t row = 0; row < rows; ++row) {
        update_signals(
            updated + row * features, counts[row], uncertainty.entropy[row], uncertainty.confidence[row]);
    }

    const ControllerArrays arrays(views);
    const Controller controller = arrays.controller();
    int64_t* const gamma = outputs.add_int64({rows});
    thread_local std::vector<float> acceptance;
    acceptance.resize(rows * controller.candidates);
    plan_gamma_rows(op, controller, updated, rows, gamma, acceptance.data());
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> dispatched(
    const Tensor& logits, const Tensor& temperature, const Tensor& uniform, const Tensor& signals,
    const Tensor& drafted, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const Tensor& gammas, const Tensor& seconds, double rate, const std::optional<Tensor>& top_k,
    const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p) {
    TensorOutputs<6> outputs;
    draft_step(logits, temperature, uniform, signals, drafted, {w1, b1, w2, b2, gammas, seconds, rate},
               {top_k, top_p, min_p}, outputs);
    return outputs.as_tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("draft_step", TORCH_BOX(&dispatched));
}

}  // namespace speckv
