#include "draft_sample.h"

#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "ops.h"

namespace speckv {
namespace {

// Sums over the blocks read so far, against the largest logit among them.
class RunningSums {
public:
    float maximum() const { return maximum_; }
    int64_t maximum_start() const { return maximum_start_; }
    double total() const { return total_; }        // of e = exp(x - maximum)
    double weighted() const { return weighted_; }  // of (x - maximum) * e

    void raise_maximum(float raised, int64_t start) {
        add_up();
        if (total_ > 0) {
            const double change = static_cast<double>(maximum_) - raised;
            const double factor = std::exp(change);
            weighted_ = (weighted_ + change * total_) * factor;
            total_ *= factor;
        }
        maximum_ = raised;
        maximum_start_ = start;
    }

    // Adds a block and loads the next, and leaves it for add_up() to see what they come to.
    void add(const Blocks& block, Ahead* next) {
        add_exp_parts(block.values(), block.size(), block.order(), maximum_, next, parts_);
        if (++blocks_ == kMostBlocks) {
            add_up();
        }
    }

    // Adds a block, loads the next, and returns the block's own total.
    float add_alone(const Blocks& block, Ahead* next) {
        const ExpSums sums = exp_sums(block.values(), block.size(), block.order(), maximum_, next);
        total_ += sums.sum;
        weighted_ += sums.weighted;
        return sums.sum;
    }

    void add_up() {
        if (blocks_ > 0) {
            const ExpSums sums = sum_of_parts(parts_);
            total_ += sums.sum;
            weighted_ += sums.weighted;
            parts_ = {};
            blocks_ = 0;
        }
    }

private:
    static constexpr int64_t kMostBlocks = 2;  // with eight, entropy is off four times as far

    float maximum_ = -kInfinity;
    int64_t maximum_start_ = 0;  // where the first block that holds the maximum starts
    double total_ = 0.0;
    double weighted_ = 0.0;
    ExpParts parts_;
    int64_t blocks_ = 0;  // in parts_
};

}  // namespace

DraftSample draft_sample_row(const Row& row, float temperature, float uniform, const Filters& filters) {
    const bool is_greedy = temperature == 0;
    const bool is_filtered = !is_greedy && filters.is_on();
    // Of each block, to draw from: its mass, and the largest logit so far, which it is against.
    thread_local std::vector<double> masses;
    thread_local std::vector<float> shifts;
    const bool needs_masses = !is_greedy && !is_filtered;
    if (needs_masses) {
        masses.assign(block_count(row.size), 0.0);
        shifts.resize(masses.size());
    }
    const float scale = needs_masses ? scale_of(temperature) : 1.0f;
    RunningSums sums;
    int64_t i = 0;
    for (Blocks of_row(row); !of_row.are_over(); of_row.advance(), ++i) {
        if (of_row.largest() > sums.maximum()) {
            sums.raise_maximum(of_row.largest(), of_row.start());
        }
        if (needs_masses) {
            shifts[i] = sums.maximum();
        }
        if (of_row.largest() == -kInfinity) {
            if (has_nan(of_row.values(), of_row.size())) {
                return {};
            }
            continue;
        }
        if (needs_masses && scale == 1.0f) {  // then those of entropy serve
            masses[i] = sums.add_alone(of_row, of_row.ahead());
            continue;
        }
        sums.add(of_row, of_row.ahead());
        if (needs_masses) {
            masses[i] = exp_sum(of_row.values(), of_row.size(), of_row.order(), sums.maximum(), scale);
        }
    }
    sums.add_up();
    if (!std::isfinite(sums.maximum()) || !std::isfinite(sums.total())) {
        return {};
    }

    DraftSample drafted{};
    drafted.is_valid = true;
    const double entropy = std::log(sums.total()) - sums.weighted() / sums.total();
    drafted.entropy = static_cast<float>(std::max(0.0, entropy) / std::log(2.0));
    drafted.confidence = static_cast<float>(1.0 / sums.total());
    if (is_greedy) {
        drafted.token = find_maximum(row, sums.maximum_start(), sums.maximum());
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
    const double total = rescale_masses(masses, shifts, sums.maximum(), scale);
    const Softmax softmax{sums.maximum(), scale, static_cast<float>(1.0 / total)};
    drafted.token = sample(row, softmax, masses, total, uniform);
    drafted.prob = probability_at(row, softmax, drafted.token);
    return drafted;
}

void check_draft_sample(
    const char* op, const View& logits, const View& temperature, const View& uniform, const FilterViews& filters) {
    check_shape(op, "logits", logits, {kAnySize, kAnySize});
    check_logits(op, "logits", logits);
    check_shape(op, "temperature", temperature, {logits.size(0)});
    check_float32(op, "temperature", temperature);
    check_shape(op, "uniform", uniform, {logits.size(0)});
    check_float32(op, "uniform", uniform);
    filters.check(op, logits.size(0));
}

Uncertainty draft_sample_rows(
    const char* op, const View& logits, const View& temperature, const View& uniform, const FilterViews& filters,
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
    const View& logits, const View& temperature, const View& uniform, const FilterViews& filters,
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
