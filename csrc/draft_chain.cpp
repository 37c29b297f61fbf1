// A whole draft of a feature head in one call: its tokens, one after the other, and whether each is worth another.
//
// Token by token Python would read and make a dozen small objects between two of them, with code and data that a pass
// over the target's weights has driven from the caches. What is decided, and when, is what speckv.policy and
// speckv.adaptive decide token by token, to the last bit (tests/test_draft_chain.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <tuple>
#include <vector>

#include "draft_head.h"
#include "draft_sample.h"
#include "embedding.h"
#include "worth.h"

namespace speckv {
namespace {

// A draft goes on while a token is at least so sure, and all up to it together.
struct Limits {
    double least_confidence, most_entropy, least_survival;
};

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Drafts up to `most` tokens behind the first `end` of ids [1, room], into ids.
//
// start, brought, state, states, first, keys, values and cached are as in read_head; the head reads what lies between
// start and end first. uniform [1, most or more]; temperature and filters [1]. controller is empty where only the limits
// end a draft; else it and what follows are as in worth.h.
//
// Returns the logits [drafted, S] the tokens were drawn from, none where the temperature is 0, and a report [3 + 2 ·
// drafted] f64: how many seconds passed in the head, how many outside, the controller's acceptance of the draft (NaN
// without one), then entropy and confidence of each token.
std::tuple<Tensor, Tensor> draft_chain(
    int64_t number, Tensor ids, int64_t start, int64_t end, int64_t most, Tensor brought, Tensor state, Tensor states,
    int64_t first, Tensor keys, Tensor values, int64_t cached, Tensor temperature, Tensor uniform,
    std::optional<Tensor> top_k, std::optional<Tensor> top_p, std::optional<Tensor> min_p, double least_confidence,
    double most_entropy, double least_survival, std::vector<Tensor> controller, double draft_ms, double rate,
    double scale, double stands, int64_t most_counted, int64_t look_ahead, int64_t others) {
    const char* const op = "draft_chain";
    const auto begun = std::chrono::steady_clock::now();
    const auto head = heads().get(op, number);
    check_shape(op, "ids", ids, {1, kAnySize});
    check_int64(op, "ids", ids);
    const int64_t room = ids.size(1);
    if (!ids.is_contiguous() || most < 1 || end < 1 || most > room || end > room - most || start < 0 || start >= end) {
        refuse(op, "ids must be contiguous, start in [0, end), and there must be room for a draft of one token or more");
    }
    const Tensor whole_states = as_contiguous(states);
    const HeadInputs inputs = check_head_inputs(
        op, *head, start, end - start, most - 1, brought, state, whole_states, first, keys, values, cached);
    auto* const tokens = mutable_data<int64_t>(ids);
    check_embedding(op, head->embedding, head->hidden(), tokens + start, inputs.count);
    check_shape(op, "temperature", temperature, {1});
    check_float32(op, "temperature", temperature);
    check_shape(op, "uniform", uniform, {1, kAnySize});
    check_float32(op, "uniform", uniform);
    if (uniform.size(1) < most) {
        refuse(op, "uniform must have a number for each of ", most, " tokens");
    }
    const Tensor uniforms = as_contiguous(uniform);
    const FilterTensors filter_tensors{top_k, top_p, min_p};
    filter_tensors.check(op, 1);
    const float temperature_value = *data<float>(temperature);
    for (int64_t i = 0; i < most; ++i) {
        check_sampling_values(op, &temperature_value, data<float>(uniforms) + i, 1, 1);
    }
    const Filters filters = filters_of(filters_of_rows(op, filter_tensors, 1), 0);

    const Limits limits{least_confidence, most_entropy, least_survival};
    std::optional<Worth> worth;
    if (!controller.empty()) {
        worth.emplace(op, controller, draft_ms, rate, scale, most_counted, look_ahead, others);
    }

    const int64_t width = head->output->rows;
    const bool is_greedy = temperature_value == 0;
    Tensor logits = empty_float32<2>({is_greedy ? 0 : most, width});
    static thread_local Buffer<float> one_row;
    one_row.resize(is_greedy ? width : 0);
    float* const rows = is_greedy ? one_row.data() : mutable_data<float>(logits);
    std::vector<double> report(3, std::nan(""));
    std::exception_ptr failed;
    double in_head = 0.0;
    const auto draft = [&](Team& team) {
        HeadPass pass(*head, team);
        double survival = 1.0;
        for (int64_t i = 0; i < most; ++i) {
            float* const row = is_greedy ? rows : rows + i * width;
            const auto asked = std::chrono::steady_clock::now();
            if (i == 0) {
                pass.begin(inputs, tokens + start, false, row);
            } else {
                pass.next(inputs, tokens[end + i - 1], end + i - 1, cached + inputs.count + i - 1, row);
            }
            in_head += seconds_since(asked);
            const Row drafted_from{row, Dtype::kFloat32, width};
            const DraftSample sample = draft_sample_row(
                drafted_from, temperature_value, data<float>(uniforms)[i], filters);
            if (!sample.is_valid) {
                refuse(op, "row 0: ", reason(drafted_from));
            }
            tokens[end + i] = head->token_ids[sample.token];
            report.push_back(sample.entropy);
            report.push_back(sample.confidence);
            const double before = survival;
            survival *= sample.confidence;
            const Worth::Drawn drawn{sample.entropy, sample.confidence, -1.0, stands, before, survival};
            const bool is_worth_it = !worth || worth->goes_on(i, drawn);
            if (!is_worth_it || sample.confidence < limits.least_confidence ||
                sample.entropy > limits.most_entropy || survival < limits.least_survival) {
                break;
            }
        }
    };
    with_team(head->work(), [&](Team& team) {
        try {  // an exception must not cross PyTorch's threads
            draft(team);
        } catch (...) {
            failed = std::current_exception();
        }
    });
    if (failed) {
        std::rethrow_exception(failed);
    }
    const auto drafted = static_cast<int64_t>(report.size() - 3) / 2;
    if (worth) {
        report[2] = worth->acceptance_of(drafted);
    }
    Tensor reported = empty<1>({static_cast<int64_t>(report.size())}, aoti_torch_dtype_float64());
    report[0] = in_head;
    report[1] = seconds_since(begun) - in_head;
    std::copy(report.begin(), report.end(), mutable_data<double>(reported));
    return {is_greedy || drafted == most ? logits : torch::stable::narrow(logits, 0, 0, drafted), reported};
}

// How many tokens of a draft of copies are worth their time, where the drafter gives itself these confidences [n] f64,
// the controller's acceptance of so many, and the seconds it took; the rest as in worth.h.
std::tuple<int64_t, double, double> judge_copies(
    Tensor confidences, std::vector<Tensor> controller, double draft_ms, double rate, double scale,
    int64_t most_counted, int64_t look_ahead, int64_t others) {
    const char* const op = "judge_copies";
    const auto begun = std::chrono::steady_clock::now();
    check_shape(op, "confidences", confidences, {kAnySize});
    const int64_t most = confidences.size(0);
    if (dtype_of(confidences) != aoti_torch_dtype_float64() || !confidences.is_contiguous() || most < 1) {
        refuse(op, "confidences must be float64, contiguous, and one or more");
    }
    Worth worth(op, controller, draft_ms, rate, scale, most_counted, look_ahead, others);
    const auto* const own = data<double>(confidences);
    double survival = 1.0;
    int64_t count = 0;
    for (bool goes_on = true; goes_on && count < most; ++count) {
        const double before = survival;
        survival *= own[count];
        goes_on = worth.goes_on(count, {0.0f, 1.0f, own[count], own[count], before, survival});
    }
    const double acceptance = worth.acceptance_of(count);
    return {count, acceptance, seconds_since(begun)};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speckv, m) {
    m.def("draft_chain(int head, Tensor(a!) ids, int start, int end, int most, Tensor(b!) brought, Tensor(c!) state,"
          " Tensor states, int first, Tensor(d!) keys, Tensor(e!) values, int cached, Tensor temperature,"
          " Tensor uniform, Tensor? top_k, Tensor? top_p, Tensor? min_p, float least_confidence, float most_entropy,"
          " float least_survival, Tensor(f!)[] controller, float draft_ms, float rate, float scale, float stands,"
          " int most_counted, int look_ahead, int others) -> (Tensor logits, Tensor report)");
    m.def("judge_copies(Tensor confidences, Tensor(a!)[] controller, float draft_ms, float rate, float scale,"
          " int most_counted, int look_ahead, int others) -> (int count, float acceptance, float seconds)");
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("draft_chain", TORCH_BOX(&draft_chain));
    m.impl("judge_copies", TORCH_BOX(&judge_copies));
}

}  // namespace speckv
