#include "draft_sample.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "ops.h"

namespace speckv {
namespace {

// Sums over the blocks read so far, against the largest logit among them.
struct RunningSums {
    float maximum = -kInfinity;
    int64_t maximum_start = 0;  // where the first block that holds the maximum starts
    double total = 0.0;         // of e = exp(x - maximum)
    double weighted = 0.0;      // of (x - maximum) * e

    void raise_maximum(float raised, int64_t start) {
        if (total > 0) {
            const double change = static_cast<double>(maximum) - raised;
            weighted = (weighted + change * total) * std::exp(change);
            total *= std::exp(change);
        }
        maximum = raised;
        maximum_start = start;
    }
};

}  // namespace

DraftSample draft_sample_row(const Row& row, float temperature, float uniform, const Filters& filters) {
    thread_local std::vector<double> masses;
    thread_local std::vector<float> shifts;
    const int64_t blocks = block_count(row.size);
    masses.resize(blocks);
    shifts.resize(blocks);

    const bool is_greedy = temperature == 0;
    const bool is_filtered = !is_greedy && filters.is_on();
    const float scale = is_greedy || is_filtered ? 1.0f : scale_of(temperature);
    RunningSums sums;
    int64_t i = 0;
    for (Blocks of_row(row); !of_row.are_over(); of_row.advance(), ++i) {
        if (of_row.largest() > sums.maximum) {
            sums.raise_maximum(of_row.largest(), of_row.start());
        }
        shifts[i] = sums.maximum;
        masses[i] = 0.0;
        if (of_row.largest() == -kInfinity) {
            if (has_nan(of_row.values(), of_row.size())) {
                return {};
            }
            continue;
        }
        const ExpSums block_sums =
            exp_sums(of_row.values(), of_row.size(), of_row.order(), sums.maximum, of_row.ahead());
        sums.total += block_sums.sum;
        sums.weighted += block_sums.weighted;
        // At temperature 1, and when greedy or filtered, where the masses are not needed, one exp serves for both.
        masses[i] = scale == 1.0f
                        ? block_sums.sum
                        : exp_sum(of_row.values(), of_row.size(), of_row.order(), sums.maximum, scale);
    }
    if (!std::isfinite(sums.maximum) || !std::isfinite(sums.total)) {
        return {};
    }

    DraftSample drafted{};
    drafted.is_valid = true;
    const double entropy = std::log(sums.total) - sums.weighted / sums.total;
    drafted.entropy = static_cast<float>(std::max(0.0, entropy) / std::log(2.0));
    drafted.confidence = static_cast<float>(1.0 / sums.total);
    if (is_greedy) {
        drafted.token = find_maximum(row, sums.maximum_start, sums.maximum);
        drafted.prob = 1.0f;
        return drafted;
    }
    if (is_filtered) {
        thread_local FilteredDistribution filtered;
        if (!filtered.read(row, scale_of(temperature), filters)) {
            return {};
        }
        drafted.token = filtered.sample(uniform);
        drafted.prob = filtered.probability(drafted.token);
        return drafted;
    }
    const double total = rescale_masses(masses, shifts, sums.maximum, scale);
    const Softmax softmax{sums.maximum, scale, static_cast<float>(1.0 / total)};
    drafted.token = sample(row, softmax, masses, total, uniform);
    drafted.prob = probability_at(row, softmax, drafted.token);
    return drafted;
}

void check_draft_sample(
    const char* op, const View& logits, const View& temperature, const View& uniform, const FilterTensors& filters) {
    check_shape(op, "logits", logits, {kAnySize, kAnySize});
    check_logits(op, "logits", logits);
    check_shape(op, "temperature", temperature, {logits.size(0)});
    check_float32(op, "temperature", temperature);
    check_shape(op, "uniform", uniform, {logits.size(0)});
    check_float32(op, "uniform", uniform);
    filters.check(op, logits.size(0));
}

Uncertainty draft_sample_rows(
    const char* op, const View& logits, const View& temperature, const View& uniform, const FilterTensors& filters,
    Outputs& outputs) {
    const int64_t rows = logits.size(0);
    const Array<float> temperatures(temperature), uniforms(uniform);
    check_sampling_values(op, temperatures.data(), uniforms.data(), rows, 1);
    const std::vector<Filters> row_filters = filters_of_rows(op, filters, rows);

    const Logits all = as_logits(logits);
    int64_t* const token = outputs.add_int64({rows});
    float* const prob = outputs.add_float32({rows});
    float* const entropy = outputs.add_float32({rows});
    float* const confidence = outputs.add_float32({rows});
    for_each_row(rows, all.vocabulary, [&](int64_t i) {
        const DraftSample drafted = draft_sample_row(
            all.row(i), temperatures[i], uniforms[i], filters_of(row_filters, i));
        token[i] = drafted.is_valid ? drafted.token : -1;
        prob[i] = drafted.prob;
        entropy[i] = drafted.entropy;
        confidence[i] = drafted.confidence;
    });
    for (int64_t i = 0; i < rows; ++i) {
        if (token[i] < 0) {
            refuse(op, "row ", i, ": ", reason(all.row(i)));
        }
    }
    return {entropy, confidence};
}

void draft_sample(
    const View& logits, const View& temperature, const View& uniform, const FilterTensors& filters,
    Outputs& outputs) {
    check_draft_sample("draft_sample", logits, temperature, uniform, filters);
    draft_sample_rows("draft_sample", logits, temperature, uniform, filters, outputs);
}

namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> dispatched(
    const Tensor& logits, const Tensor& temperature, const Tensor& uniform, const std::optional<Tensor>& top_k,
    const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p) {
    TensorOutputs<4> outputs;
    draft_sample(logits, temperature, uniform, {top_k, top_p, min_p}, outputs);
    return outputs.as_tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("draft_sample", TORCH_BOX(&dispatched));
}

}  // namespace speckv
