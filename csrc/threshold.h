// Top-k, top-p and min-p without a sort. Each of them keeps the tokens whose logit is at least some threshold, so all
// three together keep those from the highest of the three thresholds on.
//
// Sources: top-k, Fan et al., arXiv 1805.04833; top-p, Holtzman et al., arXiv 1904.09751; min-p, Nguyen et al.,
// arXiv 2407.01082.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "checks.h"
#include "rows.h"

namespace speckv {

// Of one row.
struct Filters {
    int64_t top_k = 0;   // off at 0
    float top_p = 1.0f;  // off at 1
    float min_p = 0.0f;  // off at 0

    bool is_on() const { return top_k > 0 || top_p < 1 || min_p > 0; }
};

// softmax(row * scale) of the tokens that the filters of a row keep. Keeps its memory from row to row.
class FilteredDistribution {
  public:
    // False where the row is no distribution; there the other members have no meaning.
    bool read(const Row& row, float scale, const Filters& filters);
    float probability(int64_t token) const;
    int64_t sample(float uniform) const;
    // Draws from max(0, this - q), or from this where that is zero everywhere.
    int64_t sample_residual(const FilteredDistribution& q, float uniform) const;

  private:
    bool read_maxima();
    void collect(float cut);
    void drop_below(float threshold);

    Row row_;
    float maximum_;
    float threshold_;  // the lowest logit kept
    Softmax softmax_;
    double total_;  // of the weights
    // The tokens kept, in vocabulary order; each vector is as long as the longest row so far.
    int64_t count_;
    std::vector<int64_t> tokens_;
    std::vector<float> logits_;
    std::vector<float> weights_;  // exp((logit - maximum) * scale)
    std::vector<float> maxima_;   // of each group of kGroupSize logits
};

// Filters as an op is given them, for each row; a tensor left out is off in all rows.
struct FilterViews {
    std::optional<View> top_k;  // [rows] i64
    std::optional<View> top_p;  // [rows] f32
    std::optional<View> min_p;  // [rows] f32

    void check(const char* op, int64_t rows) const;
};

// The filters of each row, checked; empty where no tensor is given. Raises naming the first bad row.
std::vector<Filters> filters_of_rows(const char* op, const FilterViews& tensors, int64_t rows);

inline Filters filters_of(const std::vector<Filters>& filters, int64_t row) {
    return filters.empty() ? Filters{} : filters[row];
}

}  // namespace speckv
