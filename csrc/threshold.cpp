#include "threshold.h"

#include <cmath>

#include "bits.h"
#include "views.h"

namespace speckv {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();  // of what has a probability

// Unsigned integers in the order of the numbers. -0 comes before +0, but as the threshold of a comparison of numbers
// either keeps both.
uint32_t key_of(float value) {
    const uint32_t bits = to_bits(value);
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

float value_of(uint32_t key) {
    return from_bits(key >> 31 ? key & 0x7fffffffu : ~key);
}

double one(int64_t) {
    return 1.0;
}

// The value at which the weights of all values from the highest down to it first reach `limit` > 0; the lowest value
// where they never do. weight(i) >= 0 belongs to values[i]. With weights of 1 it is the limit-th highest value.
//
// A radix descent: the range of keys is cut into 256 parts, the sums of their weights say in which the value lies, and
// that part is cut again.
template <class Weight>
float value_reaching(const float* values, int64_t size, double limit, const Weight& weight) {
    uint32_t first = key_of(values[0]);
    uint32_t last = first;
    for (int64_t i = 1; i < size; ++i) {
        first = std::min(first, key_of(values[i]));
        last = std::max(last, key_of(values[i]));
    }
    uint64_t range = static_cast<uint64_t>(last - first) + 1;  // of keys from `first` on
    double above = 0.0;                                        // the weights of the keys behind the range
    for (;;) {
        int shift = 0;
        while ((range - 1) >> shift > 0xff) {
            ++shift;
        }
        double sums[256] = {};
        bool is_present[256] = {};
        for (int64_t i = 0; i < size; ++i) {
            const uint32_t offset = key_of(values[i]) - first;  // large, by wrapping round, where the key is smaller
            if (offset < range) {
                sums[offset >> shift] += weight(i);
                is_present[offset >> shift] = true;
            }
        }
        uint32_t part = 256;
        for (uint32_t lower = 256; lower-- > 0;) {
            if (!is_present[lower]) {
                continue;
            }
            above += part < 256 ? sums[part] : 0.0;
            part = lower;
            if (above + sums[part] >= limit) {
                break;
            }
        }
        first += part << shift;
        if (shift == 0) {
            return value_of(first);
        }
        range = uint64_t{1} << shift;
    }
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
    maximum_ = largest(maxima_.data(), static_cast<int64_t>(maxima_.size()));
    return std::isfinite(maximum_);
}

// Takes the logits from cut on, in vocabulary order; groups that have none are not read.
void FilteredDistribution::collect(float cut) {
    constexpr int64_t kGroupsPerBlock = kBlockSize / kGroupSize;
    if (static_cast<int64_t>(tokens_.size()) < row_.size + 1) {
        tokens_.resize(row_.size + 1);
        logits_.resize(row_.size + 1);
        weights_.resize(row_.size + 1);
    }
    // Locals, which the compiler need not write back for fear that the stores change them.
    int64_t* tokens = tokens_.data();
    float* logits = logits_.data();
    int64_t count = 0;
    BlockBuffer buffer;
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
            // Without branches: each logit is written, and stays where the count moves on.
            for (int64_t i = begin; i < end; ++i) {
                tokens[count] = start + i;
                logits[count] = block.values[i];
                count += block.values[i] >= cut;
            }
        }
    }
    count_ = count;
    threshold_ = cut;
}

void FilteredDistribution::drop_below(float threshold) {
    if (threshold <= threshold_) {
        return;
    }
    int64_t* tokens = tokens_.data();
    float* logits = logits_.data();
    float* weights = weights_.data();
    const int64_t size = count_;
    int64_t count = 0;
    for (int64_t i = 0; i < size; ++i) {
        const float logit = logits[i];
        tokens[count] = tokens[i];
        logits[count] = logit;
        weights[count] = weights[i];
        count += logit >= threshold;
    }
    count_ = count;
    threshold_ = threshold;
}

bool FilteredDistribution::read(const Row& row, float scale, const Filters& filters) {
    row_ = row;
    if (!read_maxima()) {
        return false;
    }
    const auto groups = static_cast<int64_t>(maxima_.size());
    const bool has_top_k = filters.top_k > 0;
    const bool has_top_p = filters.top_p < 1;
    const auto top_k = static_cast<double>(filters.top_k);
    const float least_by_min_p = filters.min_p > 0 ? min_p_threshold(filters.min_p, maximum_, scale) : kLowest;
    // At top_p = 0 the highest logits still stay.
    const auto mass_to_reach = [&](double total) {
        return std::max(filters.top_p * total, std::numeric_limits<double>::min());
    };

    // First a cut that is cheap to find and not above the threshold; what reaches it is seldom more than some hundred
    // logits. With the maxima of the groups alone, top_k and top_p are reached at a logit that is at most as high.
    // min_p's own threshold will do too, unless top_p needs the mass of all that top_k keeps.
    float cut = has_top_k && has_top_p ? kLowest : least_by_min_p;
    double row_total = 0.0;
    if (has_top_k) {
        if (filters.top_k <= groups) {
            cut = std::max(cut, value_reaching(maxima_.data(), groups, top_k, one));
        }
    } else if (has_top_p) {
        thread_local std::vector<double> masses;
        thread_local std::vector<float> weights;
        row_total = distribution(row, scale, masses).total;
        weights.resize(groups);
        exp_weights(maxima_.data(), groups, maximum_, scale, weights.data());
        if (sum_double(weights.data(), groups) >= mass_to_reach(row_total)) {
            const auto weight = [&](int64_t i) { return weights[i]; };
            cut = std::max(cut, value_reaching(maxima_.data(), groups, mass_to_reach(row_total), weight));
        } else {
            // Even if all logits stood at the cut, they would have but half of the mass that top_p leaves out.
            const double left_out = 0.5 * (1.0 - filters.top_p) * row_total;
            const double level = maximum_ + std::log(left_out / static_cast<double>(row.size)) / scale;
            cut = static_cast<float>(std::max<double>(cut, level));
        }
    }
    collect(cut);

    exp_weights(logits_.data(), count_, maximum_, scale, weights_.data());
    if (has_top_k) {
        drop_below(value_reaching(logits_.data(), count_, top_k, one));
    }
    if (has_top_p) {
        const double limit = mass_to_reach(has_top_k ? sum_double(weights_.data(), count_) : row_total);
        drop_below(value_reaching(logits_.data(), count_, limit, [weights = weights_.data()](int64_t i) {
            return weights[i];
        }));
    }
    drop_below(least_by_min_p);
    total_ = sum_double(weights_.data(), count_);
    softmax_ = {maximum_, scale, static_cast<float>(1.0 / total_)};
    return true;
}

float FilteredDistribution::probability(int64_t token) const {
    return logit_at(row_, token) >= threshold_ ? probability_at(row_, softmax_, token) : 0.0f;
}

int64_t FilteredDistribution::sample(float uniform) const {
    return tokens_[search_block(weights_.data(), count_, uniform * total_)];
}

int64_t FilteredDistribution::sample_residual(const FilteredDistribution& q, float uniform) const {
    // Only of the tokens kept can anything be left.
    thread_local std::vector<float> q_logits;
    thread_local std::vector<float> residual;
    q_logits.resize(count_);
    residual.resize(count_);
    for (int64_t i = 0; i < count_; ++i) {
        const float logit = logit_at(q.row_, tokens_[i]);
        q_logits[i] = logit >= q.threshold_ ? logit : -kInfinity;
    }
    residual_weights(logits_.data(), q_logits.data(), count_, softmax_, q.softmax_, residual.data());
    const double total = sum_double(residual.data(), count_);
    return total > 0 ? tokens_[search_block(residual.data(), count_, uniform * total)] : sample(uniform);
}

void FilterViews::check(const char* op, int64_t rows) const {
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

std::vector<Filters> filters_of_rows(const char* op, const FilterViews& tensors, int64_t rows) {
    if (!tensors.top_k && !tensors.top_p && !tensors.min_p) {
        return {};
    }
    std::vector<Filters> filters(rows);
    if (tensors.top_k) {
        const Array<int64_t> top_k(*tensors.top_k);
        for (int64_t row = 0; row < rows; ++row) {
            filters[row].top_k = top_k[row];
            if (filters[row].top_k < 0) {
                refuse(op, "row ", row, ": top_k must be >= 0");
            }
        }
    }
    const auto read_share = [&](const std::optional<View>& tensor, const char* name, float Filters::*share) {
        if (!tensor) {
            return;
        }
        const Array<float> shares(*tensor);
        for (int64_t row = 0; row < rows; ++row) {
            const float value = shares[row];
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
