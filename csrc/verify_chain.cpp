#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "tensors.h"

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
    const float* uniform;  // [K+1]
    float next_uniform;    // draws the token after the accepted ones
};

enum class Problem : uint8_t { kNone, kTarget, kDraft };

struct Verified {
    int64_t accepted;    // where there is a problem, the position that has it
    int64_t next_token;  // recovered or bonus
    Problem problem;
};

int64_t sample_residual(
    const Row& target, const Softmax& p, const std::vector<double>& p_masses, double p_total, const Row& draft,
    const Softmax& q, float uniform) {
    thread_local std::vector<double> masses;
    masses.resize(p_masses.size());
    BlockBuffer p_buffer;
    BlockBuffer q_buffer;
    const auto residual = [&](int64_t start, float* weights) {
        const Block p_block = load_block(target, start, p_buffer.values);
        const Block q_block = load_block(draft, start, q_buffer.values);
        return residual_weights(p_block.values, q_block.values, p_block.size, p, q, weights);
    };
    BlockBuffer weights;
    double total = 0.0;
    for (size_t i = 0; i < masses.size(); ++i) {
        masses[i] = residual(static_cast<int64_t>(i) * kBlockSize, weights.values);
        total += masses[i];
    }
    if (total > 0) {
        return sample_inverse_cdf(masses, total, uniform, target.size, residual);
    }
    return sample(target, p, p_masses, p_total, uniform);
}

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
Verified verify_sampling(const Chain& chain) {
    thread_local std::vector<double> p_masses;
    thread_local std::vector<double> q_masses;
    const float scale = scale_of(chain.temperature);
    for (int64_t i = 0;; ++i) {
        const Row target = chain.target.row(chain.row, i);
        const Distribution p = distribution(target, scale, p_masses);
        if (!p.is_valid) {
            return {i, -1, Problem::kTarget};
        }
        if (i == chain.proposed) {
            return {i, sample(target, p.softmax, p_masses, p.total, chain.next_uniform), Problem::kNone};
        }
        const Row draft = chain.draft.row(chain.row, i);
        const Distribution q = distribution(draft, scale, q_masses);
        if (!q.is_valid) {
            return {i, -1, Problem::kDraft};
        }
        const int64_t token = chain.draft_tokens[i];
        // A product, so that q = 0 is harmless; strict, so that p = 0 is rejected at a uniform of 0.
        if (!(chain.uniform[i] * probability_at(draft, q.softmax, token) < probability_at(target, p.softmax, token))) {
            return {
                i,
                sample_residual(target, p.softmax, p_masses, p.total, draft, q.softmax, chain.next_uniform),
                Problem::kNone,
            };
        }
    }
}

void check_verify_chain(
    const char* op, const Tensor& target_logits, const Tensor& draft_logits, const Tensor& draft_tokens,
    const Tensor& num_draft, const Tensor& temperature, const Tensor& uniform) {
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

std::tuple<Tensor, Tensor> verify_chain(
    const Tensor& target_logits, const Tensor& draft_logits, const Tensor& draft_tokens, const Tensor& num_draft,
    const Tensor& temperature, const Tensor& uniform) {
    const char* op = "verify_chain";
    check_verify_chain(op, target_logits, draft_logits, draft_tokens, num_draft, temperature, uniform);
    const int64_t batch = target_logits.size(0);
    const int64_t width = target_logits.size(1);
    const int64_t max_draft = width - 1;
    const Tensor draft_ids = as_contiguous(draft_tokens);
    const Tensor draft_counts = as_contiguous(num_draft);
    const Tensor temperatures = as_contiguous(temperature);
    const Tensor uniforms = as_contiguous(uniform);
    const auto* ids = data<int64_t>(draft_ids);
    const auto* counts = data<int64_t>(draft_counts);
    const auto* temperature_data = data<float>(temperatures);
    const auto* uniform_data = data<float>(uniforms);
    const Logits target = as_logits(target_logits);
    const Logits draft = as_logits(draft_logits);
    check_sampling_values(op, temperature_data, uniform_data, batch, width);
    check_draft_values(op, ids, counts, batch, max_draft, target.vocabulary);

    Tensor tokens = empty_int64<2>({batch, width});
    Tensor accepted = empty_int64<1>({batch});
    auto* tokens_data = mutable_data<int64_t>(tokens);
    auto* accepted_data = mutable_data<int64_t>(accepted);
    std::vector<Problem> problems(batch);
    for_each_row(batch, width * target.vocabulary, [&](int64_t row) {
        const int64_t* row_ids = ids + row * max_draft;
        const float* row_uniform = uniform_data + row * width;
        const Chain chain{
            target,
            draft,
            row,
            row_ids,
            count_proposed(row_ids, counts[row]),
            temperature_data[row],
            row_uniform,
            row_uniform[counts[row]],
        };
        const Verified verified = chain.temperature == 0 ? verify_greedy(chain) : verify_sampling(chain);
        problems[row] = verified.problem;
        accepted_data[row] = verified.accepted;
        int64_t* row_tokens = tokens_data + row * width;
        std::copy(row_ids, row_ids + verified.accepted, row_tokens);
        row_tokens[verified.accepted] = verified.next_token;
        std::fill(row_tokens + verified.accepted + 1, row_tokens + width, int64_t{-1});
    });
    for (const Problem problem : {Problem::kTarget, Problem::kDraft}) {
        for (int64_t row = 0; row < batch; ++row) {
            if (problems[row] == problem) {
                const int64_t position = accepted_data[row];
                const bool is_target = problem == Problem::kTarget;
                refuse(
                    op, "row ", row, ", position ", position, is_target ? ": target logits: " : ": draft logits: ",
                    reason((is_target ? target : draft).row(row, position)));
            }
        }
    }
    return {tokens, accepted};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("verify_chain", TORCH_BOX(&verify_chain));
}

}  // namespace speckv
