#include "rows.h"

#include <cmath>

namespace speckv {

int64_t find_maximum(const Row& row, int64_t start, float maximum) {
    constexpr int64_t kPart = kBlockSize / 8;  // half of them on average are not looked at
    alignas(64) float buffer[kPart];
    for (; start < row.size; start += kPart) {
        const Row rest{row.logits, row.dtype, std::min(start + kPart, row.size)};
        const Block part = load_block(rest, start, buffer);
        const int64_t first = find_first(part.values, part.size, maximum);
        if (first < part.size) {
            return start + first;
        }
    }
    return row.size;
}

Largest largest_of(const Row& row, int64_t start, int64_t end) {
    BlockBuffer buffer;
    const Row some{row.logits, row.dtype, end};
    Largest found{false, -kInfinity, start};
    for (; start < end; start += kBlockSize) {
        const auto [block, maximum] = load_block_and_largest(some, start, buffer.values);
        found.has_nan = found.has_nan || has_nan(block.values, block.size);
        if (maximum > found.value) {
            found.value = maximum;
            found.start = start;
        }
    }
    return found;
}

Argmax argmax_of_parts(const Row& row, const Largest* parts, int64_t count) {
    const Largest* best = parts;
    for (int64_t i = 0; i < count; ++i) {
        if (parts[i].has_nan) {
            return {false, -1};
        }
        best = parts[i].value > best->value ? parts + i : best;
    }
    return std::isfinite(best->value) ? Argmax{true, find_maximum(row, best->start, best->value)} : Argmax{false, -1};
}

Argmax argmax(const Row& row) {
    const Largest whole = largest_of(row, 0, row.size);
    return argmax_of_parts(row, &whole, 1);
}

Distribution distribution(const Row& row, float scale, std::vector<double>& masses) {
    thread_local std::vector<float> shifts;
    const int64_t blocks = block_count(row.size);
    masses.resize(blocks);
    shifts.resize(blocks);
    float shift = -kInfinity;
    int64_t i = 0;
    for (Blocks of_row(row); !of_row.are_over(); of_row.advance(), ++i) {
        shift = std::max(shift, of_row.largest());
        shifts[i] = shift;
        if (of_row.largest() > -kInfinity) {
            masses[i] = exp_sum(of_row.values(), of_row.size(), of_row.order(), shift, scale, of_row.ahead());
        } else if (has_nan(of_row.values(), of_row.size())) {
            return {};
        } else {
            masses[i] = 0.0;
        }
    }
    if (!std::isfinite(shift)) {
        return {};
    }
    const double total = rescale_masses(masses, shifts, shift, scale);
    return {std::isfinite(total), {shift, scale, static_cast<float>(1.0 / total)}, total};
}

double rescale_masses(std::vector<double>& masses, const std::vector<float>& shifts, float shift, float scale) {
    double total = 0.0;
    double factor = 1.0;
    float factor_shift = shift;
    for (size_t i = 0; i < masses.size(); ++i) {
        if (shifts[i] != factor_shift) {
            factor_shift = shifts[i];
            factor = std::exp(static_cast<double>(factor_shift - shift) * scale);
        }
        masses[i] *= factor;
        total += masses[i];
    }
    return total;
}

float probability_at(const Row& row, const Softmax& softmax, int64_t token) {
    return std::exp((logit_at(row, token) - softmax.shift) * softmax.scale) * softmax.inverse;
}

int64_t search_block(const float* weights, int64_t size, double threshold) {
    // Whole groups are skipped by their sum, so that only one group is added up element by element.
    double sum = 0.0;
    int64_t last = -1;
    for (int64_t start = 0; start < size; start += kGroupSize) {
        const int64_t end = std::min(start + kGroupSize, size);
        const double after = sum + sum_double(weights + start, end - start);
        if (after > sum) {
            last = start;
        }
        if (after <= threshold) {
            sum = after;
            continue;
        }
        for (int64_t i = start; i < end; ++i) {
            sum += weights[i];
            if (weights[i] > 0 && sum > threshold) {
                return i;
            }
        }
    }
    if (last < 0) {
        return -1;
    }
    int64_t index = std::min(last + kGroupSize, size) - 1;
    while (weights[index] <= 0) {
        --index;
    }
    return index;
}

int64_t sample(const Row& row, const Softmax& softmax, const std::vector<double>& masses, double total, float uniform) {
    return sample_inverse_cdf(masses, total, uniform, row.size, [&](int64_t start, float* weights) {
        const Block block = load_block(row, start, weights);
        exp_weights(block.values, block.size, softmax.shift, softmax.scale, weights);
    });
}

}  // namespace speckv
