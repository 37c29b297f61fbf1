#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "draft_sample.h"
#include "plan_gamma.h"

namespace speckv {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> draft_step(
    const Tensor& logits, const Tensor& temperature, const Tensor& uniform, const Tensor& signals,
    const Tensor& drafted, const Tensor& w1, const Tensor& b1, const Tensor& w2, const Tensor& b2,
    const Tensor& gammas, const Tensor& seconds, double rate, const std::optional<Tensor>& top_k,
    const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p) {
    const char* op = "draft_step";
    const FilterTensors filters{top_k, top_p, min_p};
    check_draft_sample(op, logits, temperature, uniform, filters);
    check_plan_gamma(op, signals, w1, b1, w2, b2, gammas, seconds, rate);
    const int64_t rows = logits.size(0);
    const int64_t features = signals.size(1);
    check_shape(op, "signals", signals, {rows, kAnySize});
    check_shape(op, "drafted", drafted, {rows});
    check_int64(op, "drafted", drafted);
    const Tensor drafted_counts = as_contiguous(drafted);
    const auto* counts = data<int64_t>(drafted_counts);
    for (int64_t row = 0; row < rows; ++row) {
        if (counts[row] < 0) {
            refuse(op, "row ", row, ": drafted must be >= 0");
        }
    }

    const Tensor temperatures = as_contiguous(temperature);
    const Tensor uniforms = as_contiguous(uniform);
    const DraftSampleOutputs sampled = draft_sample_rows(
        op, as_logits(logits), data<float>(temperatures), data<float>(uniforms), filters, rows);

    const Tensor rows_of_signals = as_contiguous(signals);
    Tensor updated = empty_float32<2>({rows, features});
    auto* updated_data = mutable_data<float>(updated);
    const auto* signals_data = data<float>(rows_of_signals);
    std::copy(signals_data, signals_data + rows * features, updated_data);
    const auto* entropy = data<float>(sampled.entropy);
    const auto* confidence = data<float>(sampled.confidence);
    for (int64_t row = 0; row < rows; ++row) {
        update_signals(updated_data + row * features, counts[row], entropy[row], confidence[row]);
    }

    const ControllerTensors tensors = as_contiguous(w1, b1, w2, b2, gammas, seconds);
    const Controller controller = tensors.controller(rate);
    Tensor gamma = empty_int64<1>({rows});
    thread_local std::vector<float> acceptance;
    acceptance.resize(rows * controller.candidates);
    plan_gamma_rows(op, controller, updated_data, rows, mutable_data<int64_t>(gamma), acceptance.data());
    return {sampled.token, sampled.prob, sampled.entropy, sampled.confidence, updated, gamma};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("draft_step", TORCH_BOX(&draft_step));
}

}  // namespace speckv
