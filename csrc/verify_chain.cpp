#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "ops.h"
#include "threshold.h"
#include "views.h"

namespace speckv {
namespace {

// The inputs of one row of the batch.
struct Chain {
    Logits target;
    Logits draft;
    int64_t row;
    const int64_t* draft_tokens;  // [proposed], none negative
    int64_t proposed;
    float temperature;
    Filters filters;
    const float* uniform;  // [K+1]
    float next_uniform;    // draws the token after the accepted ones
};

enum class Problem : uint8_t { kNone, kTarget, kDraft };

struct Verified {
    int64_t accepted;    // where there is a problem, the position that has it
    int64_t next_token;  // recovered or bonus
    Problem problem;
};

// softmax(row * scale) of the whole vocabulary: FilteredDistribution without filters, and without a list of tokens.
class WholeDistribution {
  public:
    bool read(const Row& row, float scale, const Filters&) {
        row_ = row;
        distribution_ = distribution(row, scale, masses_);
        return distribution_.is_valid;
    }

    float probability(int64_t token) const { return probability_at(row_, distribution_.softmax, token); }

    int64_t sample(float uniform) const {
        return speckv::sample(row_, distribution_.softmax, masses_, distribution_.total, uniform);
    }

    int64_t sample_residual(const WholeDistribution& q, float uniform) const {
        thread_local std::vector<double> masses;
        masses.resize(masses_.size());
        BlockBuffer p_buffer;
        BlockBuffer q_buffer;
        const auto residual = [&](int64_t start, float* weights) {
            const Block p_block = load_block(row_, start, p_buffer.values);
            const Block q_block = load_block(q.row_, start, q_buffer.values);
            return residual_weights(
                p_block.values, q_block.values, p_block.size, distribution_.softmax, q.distribution_.softmax, weights);
        };
        BlockBuffer weights;
        double total = 0.0;
        for (size_t i = 0; i < masses.size(); ++i) {
            masses[i] = residual(static_cast<int64_t>(i) * kBlockSize, weights.values);
            total += masses[i];
        }
        return total > 0 ? sample_inverse_cdf(masses, total, uniform, row_.size, residual) : sample(uniform);
    }

  private:
    Row row_;
    Distribution distribution_;
    std::vector<double> masses_;
};

Verified verify_greedy(const Chain& chain) {
    for (int64_t i = 0;; ++i) {
        const Argmax best = argmax(chain.target.row(chain.row, i));
        if (!best.is_valid) {
            return {i, -1, Problem::kTarget};
        }
        if (i == chain.proposed || best.token != chain.draft_tokens[i]) {
            return {i, best.token, Problem::kNone};
        }
    }
}

// Reads the two rows of a position only when the positions before it were accepted.
template <class RowDistribution>
Verified verify_sampling(const Chain& chain) {
    thread_local RowDistribution p;
    thread_local RowDistribution q;
    const float scale = scale_of(chain.temperature);
    for (int64_t i = 0;; ++i) {
        if (!p.read(chain.target.row(chain.row, i), scale, chain.filters)) {
            return {i, -1, Problem::kTarget};
        }
        if (i == chain.proposed) {
            return {i, p.sample(chain.next_uniform), Problem::kNone};
        }
        if (!q.read(chain.draft.row(chain.row, i), scale, chain.filters)) {
            return {i, -1, Problem::kDraft};
        }
        const int64_t token = chain.draft_tokens[i];
        // A product, so that q = 0 is harmless; strict, so that p = 0 is rejected at a uniform of 0.
        if (!(chain.uniform[i] * q.probability(token) < p.probability(token))) {
            return {i, p.sample_residual(q, chain.next_uniform), Problem::kNone};
        }
    }
}

Verified verify(const Chain& chain) {
    if (chain.temperature == 0) {
        return verify_greedy(chain);
    }
    return chain.filters.is_on() ? verify_sampling<FilteredDistribution>(chain)
                                 : verify_sampling<WholeDistribution>(chain);
}

void check_verify_chain(
    const char* op, const View& target_logits, const View& draft_logits, const View& draft_tokens,
    const View& num_draft, const View& temperature, const View& uniform, const FilterViews& filters) {
    check_shape(op, "target_logits", target_logits, {kAnySize, kAnySize, kAnySize});
    const int64_t batch = target_logits.size(0);
    const int64_t width = target_logits.size(1);
    if (width < 1) {
        refuse(op, "target_logits must have at least one position");
    }
    check_logits(op, "target_logits", target_logits);
    check_shape(op, "draft_logits", draft_logits, {batch, width - 1, target_logits.size(2)});
    check_logits(op, "draft_logits", draft_logits);
    check_shape(op, "draft_tokens", draft_tokens, {batch, width - 1});
    check_int64(op, "draft_tokens", draft_tokens);
    check_shape(op, "num_draft", num_draft, {batch});
    check_int64(op, "num_draft", num_draft);
    check_shape(op, "temperature", temperature, {batch});
    check_float32(op, "temperature", temperature);
    check_shape(op, "uniform", uniform, {batch, width});
    check_float32(op, "uniform", uniform);
    filters.check(op, batch);
}

// The draft of a row ends at num_draft or at the first negative id.
int64_t count_proposed(const int64_t* draft_tokens, int64_t num_draft) {
    int64_t proposed = 0;
    while (proposed < num_draft && draft_tokens[proposed] >= 0) {
        ++proposed;
    }
    return proposed;
}

void check_draft_values(
    const char* op, const int64_t* draft_tokens, const int64_t* num_draft, int64_t batch, int64_t max_draft,
    int64_t vocabulary) {
    for (int64_t row = 0; row < batch; ++row) {
        if (num_draft[row] < 0 || num_draft[row] > max_draft) {
            refuse(op, "row ", row, ": num_draft must be in [0, ", max_draft, "]");
        }
    }
    for (int64_t row = 0; row < batch; ++row) {
        const int64_t* tokens = draft_tokens + row * max_draft;
        for (int64_t i = 0; i < count_proposed(tokens, num_draft[row]); ++i) {
            if (tokens[i] >= vocabulary) {
                refuse(op, "row ", row, ": a draft token is outside the vocabulary of ", vocabulary);
            }
        }
    }
}

}  // namespace

void verify_chain(
    const View& target_logits, const View& draft_logits, const View& draft_tokens, const View& num_draft,
    const View& temperature, const View& uniform, const FilterViews& filters, Outputs& outputs) {
    const char* op = "verify_chain";
    check_verify_chain(op, target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, filters);
    const int64_t batch = target_logits.size(0);
    const int64_t width = target_logits.size(1);
    const int64_t max_draft = width - 1;
    const Array<int64_t> ids(draft_tokens), counts(num_draft);
    const Array<float> temperatures(temperature), uniforms(uniform);
    const Logits target = as_logits(target_logits);
    const Logits draft = as_logits(draft_logits);
    check_sampling_values(op, temperatures.data(), uniforms.data(), batch, width);
    const std::vector<Filters> row_filters = filters_of_rows(op, filters, batch);
    check_draft_values(op, ids.data(), counts.data(), batch, max_draft, target.vocabulary);

    int64_t* const tokens = outputs.add_int64({batch, width});
    int64_t* const accepted = outputs.add_int64({batch});
    std::vector<Problem> problems(batch);
    for_each_row(batch, width * target.vocabulary, [&](int64_t row) {
        const int64_t* row_ids = ids.data() + row * max_draft;
        const float* row_uniform = uniforms.data() + row * width;
        const Chain chain{
            target,
            draft,
            row,
            row_ids,
            count_proposed(row_ids, counts[row]),
            temperatures[row],
            filters_of(row_filters, row),
            row_uniform,
            row_uniform[counts[row]],
        };
        const Verified verified = verify(chain);
        problems[row] = verified.problem;
        accepted[row] = verified.accepted;
        int64_t* row_tokens = tokens + row * width;
        std::copy(row_ids, row_ids + verified.accepted, row_tokens);
        row_tokens[verified.accepted] = verified.next_token;
        std::fill(row_tokens + verified.accepted + 1, row_tokens + width, int64_t{-1});
    });
    for (const Problem problem : {Problem::kTarget, Problem::kDraft}) {
        for (int64_t row = 0; row < batch; ++row) {
            if (problems[row] == problem) {
                const int64_t position = accepted[row];
                const bool is_target = problem == Problem::kTarget;
                refuse(
                    op, "row ", row, ", position ", position, is_target ? ": target logits: " : ": draft logits: ",
                    reason((is_target ? target : draft).row(row, position)));
            }
        }
    }
}

namespace {

std::tuple<Tensor, Tensor> dispatched(
    const Tensor& target_logits, const Tensor& draft_logits, const Tensor& draft_tokens, const Tensor& num_draft,
    const Tensor& temperature, const Tensor& uniform, const std::optional<Tensor>& top_k,
    const std::optional<Tensor>& top_p, const std::optional<Tensor>& min_p) {
    TensorOutputs<2> outputs;
    verify_chain(target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform, {top_k, top_p, min_p},
                 outputs);
    return outputs.as_tuple();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("verify_chain", TORCH_BOX(&dispatched));
}

}  // namespace speckv
