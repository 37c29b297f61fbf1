#include "threshold.h"

#include <cmath>

#include "bits.h"
#include "tensors.h"

namespace speckv {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();  // of what has a probability

// Unsigned integers in the order of the numbers. -0 comes before +0, but as the threshold of a comparison of numbers
// either keeps both.
uint32_t key_of(float value) {
    const uint32_t bits = to_bits(value);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

float value_of(uint32_t key) {
    return from_bits(key >> 31 ? key & 0x7fffffffu : ~key);
}

// The value at which the weights of all values from the highest down to it first reach `limit` > 0; the lowest value
// where they never do. weight(i) >= 0 belongs to values[i]. With weights of 1 it is the limit-th highest value.
//
// A radix descent, eight bits of the key at a time: the weights under each digit, from the highest digit down, say
// which digit the value has.
template <class Weight>
float value_reaching(const std::vector<float>& values, double limit, const Weight& weight) {
    uint32_t prefix = 0;
    double above = 0.0;
    for (int shift = 24; shift >= 0; shift -= 8) {
        double sums[256] = {};
        bool is_present[256] = {};
        const uint64_t high = static_cast<uint64_t>(prefix) >> (shift + 8);  // of 64 bits: a shift by 32 is defined
        for (size_t i = 0; i < values.size(); ++i) {
            const uint32_t key = key_of(values[i]);
            if (static_cast<uint64_t>(key) >> (shift + 8) == high) {
                const uint32_t digit = key >> shift & 0xffu;
                sums[digit] += weight(i);
                is_present[digit] = true;
            }
        }
        uint32_t lowest = 256;
        for (uint32_t digit = 256; digit-- > 0;) {
            if (!is_present[digit]) {
                continue;
            }
            // Values behind it are left where the sum falls short of the limit.
            if (lowest < 256) {
                above += sums[lowest];
            }
            lowest = digit;
            if (above + sums[digit] >= limit) {
                break;
            }
        }
        prefix |= lowest << shift;
    }
    return value_of(prefix);
}

// The lowest number x with (x - maximum) * scale >= log(min_p): what has min_p of the highest probability or more. Found
// by bisection among all numbers, since a formula for x would round.
float min_p_threshold(float min_p, float maximum, float scale) {
    const float lowest = std::log(min_p);
    uint32_t below = key_of(-kInfinity);
    uint32_t reached = key_of(maximum);
    while (reached - below > 1) {
        const uint32_t middle = below + (reached - below) / 2;
        if ((value_of(middle) - maximum) * scale >= lowest) {
            reached = middle;
        } else {
            below = middle;
        }
    }
    return value_of(reached);
}

}  // namespace

// The largest logit of each group; false for what is no distribution.
bool FilteredDistribution::read_maxima() {
    static_assert(kBlockSize % kGroupSize == 0);
    maxima_.resize((row_.size + kGroupSize - 1) / kGroupSize);
    BlockBuffer buffer;
    for (int64_t start = 0; start < row_.size; start += kBlockSize) {
        const Block block = load_block(row_, start, buffer.values);
        if (has_nan(block.values, block.size)) {
            return false;
        }
        group_maxima(block.values, block.size, maxima_.data() + start / kGroupSize);
    }
    return std::isfinite(largest(maxima_.data(), static_cast<int64_t>(maxima_.size())));
}

// Takes the logits from cut on, in vocabulary order; groups that have none are not read.
void FilteredDistribution::collect(float cut) {
    constexpr int64_t kGroupsPerBlock = kBlockSize / kGroupSize;
    BlockBuffer buffer;
    size_t count = 0;
    for (int64_t start = 0; start < row_.size; start += kBlockSize) {
        Block block{nullptr, 0};
        const float* maxima = maxima_.data() + start / kGroupSize;
        const int64_t groups = std::min(kGroupsPerBlock, (row_.size - start + kGroupSize - 1) / kGroupSize);
        for (int64_t group = 0; group < groups; ++group) {
            if (maxima[group] < cut) {
                continue;
            }
            if (block.values == nullptr) {
                block = load_block(row_, start, buffer.values);
            }
            const int64_t begin = group * kGroupSize;
            const int64_t end = std::min(begin + kGroupSize, block.size);
            // Without branches, each logit is written and stays where the count moves on.
            tokens_.resize(count + kGroupSize);
            logits_.resize(count + kGroupSize);
            for (int64_t i = begin; i < end; ++i) {
                tokens_[count] = start + i;
                logits_[count] = block.values[i];
                count += block.values[i] >= cut;
            }
        }
    }
    tokens_.resize(count);
    logits_.resize(count);
    threshold_ = cut;
}

void FilteredDistribution::drop_below(float threshold) {
    if (threshold <= threshold_) {
        return;
    }
    size_t count = 0;
    for (size_t i = 0; i < logits_.size(); ++i) {
        const float logit = logits_[i];
        tokens_[count] = tokens_[i];
        logits_[count] = logit;
        weights_[count] = weights_[i];
        count += logit >= threshold;
    }
    tokens_.resize(count);
    logits_.resize(count);
    weights_.resize(count);
    threshold_ = threshold;
}

double FilteredDistribution::mass_kept() const {
    return sum_double(weights_.data(), static_cast<int64_t>(weights_.size()));
}

bool FilteredDistribution::read(const Row& row, float scale, const Filters& filters) {
    row_ = row;
    if (!read_maxima()) {
        return false;
    }
    const float maximum = largest(maxima_.data(), static_cast<int64_t>(maxima_.size()));
    const bool has_top_k = filters.top_k > 0;
    const bool has_top_p = filters.top_p < 1;
    const float least_by_min_p = filters.min_p > 0 ? min_p_threshold(filters.min_p, maximum, scale) : kLowest;

    // First a cut that is cheap to find and below which nothing matters; what is above is seldom more than some
    // hundred logits. min_p's own threshold is one, unless top_p needs the mass of all that top_k keeps.
    float cut = has_top_k && has_top_p ? kLowest : least_by_min_p;
    double row_total = 0.0;
    if (has_top_k) {
        // As many groups reach the k-th highest of their maxima, and with them as many logits.
        if (filters.top_k <= static_cast<int64_t>(maxima_.size())) {
            const auto top_k = static_cast<double>(filters.top_k);
            cut = std::max(cut, value_reaching(maxima_, top_k, [](size_t) { return 1.0; }));
        }
    } else if (has_top_p) {
        thread_local std::vector<double> masses;
        row_total = distribution(row, scale, masses).total;
        // Even if all logits stood at the cut, they would have but half of the mass that top_p leaves out.
        const double left_out = 0.5 * (1.0 - filters.top_p) * row_total;
        const double level = maximum + std::log(left_out / static_cast<double>(row.size)) / scale;
        cut = static_cast<float>(std::max<double>(cut, level));
    }
    collect(cut);

    weights_.resize(logits_.size());
    exp_weights(logits_.data(), static_cast<int64_t>(logits_.size()), maximum, scale, weights_.data());
    if (has_top_k) {
        drop_below(value_reaching(logits_, static_cast<double>(filters.top_k), [](size_t) { return 1.0; }));
    }
    if (has_top_p) {
        const double mass = has_top_k ? mass_kept() : row_total;
        // At top_p = 0 the highest logits still stay.
        const double limit = std::max(filters.top_p * mass, std::numeric_limits<double>::min());
        drop_below(value_reaching(logits_, limit, [&](size_t i) { return weights_[i]; }));
    }
    drop_below(least_by_min_p);
    total_ = mass_kept();
    softmax_ = {maximum, scale, static_cast<float>(1.0 / total_)};
    return true;
}

float FilteredDistribution::probability(int64_t token) const {
    return logit_at(row_, token) >= threshold_ ? probability_at(row_, softmax_, token) : 0.0f;
}

int64_t FilteredDistribution::sample(float uniform) const {
    return tokens_[search_block(weights_.data(), static_cast<int64_t>(weights_.size()), uniform * total_)];
}

int64_t FilteredDistribution::sample_residual(const FilteredDistribution& q, float uniform) const {
    // Only of the tokens kept can anything be left.
    thread_local std::vector<float> q_logits;
    thread_local std::vector<float> residual;
    const auto size = static_cast<int64_t>(tokens_.size());
    q_logits.resize(size);
    residual.resize(size);
    for (int64_t i = 0; i < size; ++i) {
        const float logit = logit_at(q.row_, tokens_[i]);
        q_logits[i] = logit >= q.threshold_ ? logit : -kInfinity;
    }
    residual_weights(logits_.data(), q_logits.data(), size, softmax_, q.softmax_, residual.data());
    const double total = sum_double(residual.data(), size);
    return total > 0 ? tokens_[search_block(residual.data(), size, uniform * total)] : sample(uniform);
}

void FilterTensors::check(const char* op, int64_t rows) const {
    if (top_k) {
        check_shape(op, "top_k", *top_k, {rows});
        check_int64(op, "top_k", *top_k);
    }
    if (top_p) {
        check_shape(op, "top_p", *top_p, {rows});
        check_float32(op, "top_p", *top_p);
    }
    if (min_p) {
        check_shape(op, "min_p", *min_p, {rows});
        check_float32(op, "min_p", *min_p);
    }
}

std::vector<Filters> filters_of_rows(const char* op, const FilterTensors& tensors, int64_t rows) {
    if (!tensors.top_k && !tensors.top_p && !tensors.min_p) {
        return {};
    }
    std::vector<Filters> filters(rows);
    if (tensors.top_k) {
        const Tensor top_k = as_contiguous(*tensors.top_k);
        for (int64_t row = 0; row < rows; ++row) {
            filters[row].top_k = data<int64_t>(top_k)[row];
            if (filters[row].top_k < 0) {
                refuse(op, "row ", row, ": top_k must be >= 0");
            }
        }
    }
    const auto read_share = [&](const std::optional<Tensor>& tensor, const char* name, float Filters::*share) {
        if (!tensor) {
            return;
        }
        const Tensor shares = as_contiguous(*tensor);
        for (int64_t row = 0; row < rows; ++row) {
            const float value = data<float>(shares)[row];
            if (!(value >= 0 && value <= 1)) {
                refuse(op, "row ", row, ": ", name, " must be in [0, 1]");
            }
            filters[row].*share = value;
        }
    };
    read_share(tensors.top_p, "top_p", &Filters::top_p);
    read_share(tensors.min_p, "min_p", &Filters::min_p);
    return filters;
}

}  // namespace speckv
