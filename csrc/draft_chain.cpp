// A whole draft of a feature head in one call: its tokens, one after the other, and whether each is worth another.
//
// Between two draft tokens Python reads and makes a dozen small objects, which a pass over the target's weights has
// driven from the caches: that takes as long as the head itself. What is decided, and when, is what speckv.policy and
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
#include "plan_gamma.h"

namespace speckv {
namespace {

// Where the adaptive controller's signals that change within a draft lie: speckv/draft_state.py.
constexpr int64_t kDrafted = 5, kSurvival = 8, kSignals = 10;

// A draft goes on while a token is at least so sure, and all up to it together.
struct Limits {
    double least_confidence, most_entropy, least_survival;
};

// What a pass of the target takes: StepCosts.verify_ms of speckv/cost.py, from its numbers [3, size].
struct PassCosts {
    const double *trials, *own, *rest;
    int64_t size;

    double ms(int64_t positions) const {
        const int64_t n = std::min(positions, size - 1);
        const double level = rest[0], height = rest[1], slope = rest[2], center = rest[3], line_trials = rest[4];
        const double line = std::max(height + slope * (static_cast<double>(n) - center), 0.1 * height);
        return level * (trials[n] > 0 ? (trials[n] * own[n] + line_trials * line) / (trials[n] + line_trials) : line);
    }
};

// Whether one more token is worth its time: the rule of speckv/adaptive.py.
struct Worth {
    Controller controller;   // gammas are 0, 1, ..., most_counted; of seconds there are 1 + look_ahead
    float* signals;          // [kSignals]
    float* seconds;
    float* acceptance;       // [1 + look_ahead]
    PassCosts pass;
    double draft_ms, rate, stands;
    int64_t most_counted, look_ahead;

    // After draft token number `drafted` (from 0), before which the draft survived with the probability `before`, and
    // with it with `survival`.
    bool goes_on(int64_t drafted, double before, double survival, float entropy, float confidence) {
        const int64_t counted = std::min(drafted + 1, most_counted);
        signals[kDrafted] = static_cast<float>(static_cast<double>(counted) / static_cast<double>(most_counted));
        signals[kSurvival] = static_cast<float>(before);
        update_signals(signals, drafted, entropy, confidence);
        const double rate_of_ms = rate / 1e3;
        double tokens = 0.0;
        bool is_worth_it = false;
        seconds[0] = 1.0f;
        for (int64_t more = 1; more <= look_ahead; ++more) {
            const double ms = more_ms(drafted + 1, more);
            seconds[more] = static_cast<float>(1 + ms / 1e3);  // only the differences matter to the rule
            survival *= stands;
            tokens += survival;
            is_worth_it = is_worth_it || tokens > rate_of_ms * ms;
        }
        const int64_t stop_here = std::min(drafted + 1, most_counted - 1);
        Controller from_here = controller;
        from_here.gammas += stop_here;
        from_here.candidates = std::min(1 + look_ahead, most_counted + 1 - stop_here);
        int64_t gamma;
        plan_gamma_rows("draft_chain", from_here, signals, 1, &gamma, acceptance);
        return gamma > stop_here && is_worth_it;
    }

    // What a step with gamma draft tokens takes longer by so many more.
    double more_ms(int64_t gamma, int64_t more) const {
        return static_cast<double>(more) * draft_ms + std::max(0.0, pass.ms(gamma + 1 + more) - pass.ms(gamma + 1));
    }

    // The controller's answer to a draft of gamma tokens.
    float acceptance_of(int64_t gamma) {
        Controller this_one = controller;
        this_one.gammas += std::min(gamma, most_counted);
        this_one.candidates = 1;
        this_one.rate = 0.0f;
        seconds[0] = 1.0f;
        int64_t planned;
        plan_gamma_rows("draft_chain", this_one, signals, 1, &planned, acceptance);
        return *acceptance;
    }
};

double seconds_since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void check_float64(const char* op, const char* name, const Tensor& tensor) {
    if (dtype_of(tensor) != aoti_torch_dtype_float64() || !tensor.is_contiguous()) {
        refuse(op, name, " must be float64 and contiguous");
    }
}

// Drafts up to `most` tokens behind the first `end` of ids [1, room], into ids.
//
// start, brought, state, states, first, keys, values and cached are as in read_head; the head reads what lies between
// start and end first. uniform [1, most or more]; temperature and filters [1]. controller is empty where only the limits
// end a draft; else it is signals [1, 10] f32, which are brought up to date, w1, b1, w2, b2, and the costs [3, 5 or more]
// f64 of passes.
//
// Returns the logits [drafted, S] the tokens were drawn from, none where the temperature is 0, and a report [3 + 2 ·
// drafted] f64: how many seconds passed in the head, how many outside, the controller's acceptance of the draft (NaN
// without one), then entropy and confidence of each token.
std::tuple<Tensor, Tensor> draft_chain(
    int64_t number, Tensor ids, int64_t start, int64_t end, int64_t most, Tensor brought, Tensor state, Tensor states,
    int64_t first, Tensor keys, Tensor values, int64_t cached, Tensor temperature, Tensor uniform,
    std::optional<Tensor> top_k, std::optional<Tensor> top_p, std::optional<Tensor> min_p, double least_confidence,
    double most_entropy, double least_survival, std::vector<Tensor> controller, double draft_ms, double rate,
    double scale, double stands, int64_t most_counted, int64_t look_ahead) {
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
    std::vector<int64_t> gammas;
    std::vector<float> scratch;
    if (!controller.empty()) {
        if (controller.size() != 6) {
            refuse(op, "a controller is given as six tensors");
        }
        const Tensor &signals = controller[0], &costs = controller[5];
        check_controller(op, signals, controller[1], controller[2], controller[3], controller[4]);
        check_shape(op, "signals", signals, {1, kSignals});
        check_float64(op, "costs", costs);
        if (most_counted < 1 || look_ahead < 1 || look_ahead > most_counted) {
            refuse(op, "look_ahead must be in [1, most_counted]");
        }
        check_shape(op, "costs", costs, {3, kAnySize});
        if (costs.size(1) < 5) {
            refuse(op, "costs must have at least 5 columns");
        }
        check_rate(op, rate / scale);
        for (const Tensor& tensor : controller) {
            if (!tensor.is_contiguous()) {
                refuse(op, "a controller's tensors must be contiguous");
            }
        }
        gammas.resize(most_counted + 1);
        for (int64_t i = 0; i <= most_counted; ++i) {
            gammas[i] = i;
        }
        scratch.resize(2 * (1 + look_ahead));
        float* const seconds = scratch.data();
        const auto* const numbers = data<double>(costs);
        const int64_t size = costs.size(1);
        worth = Worth{
            {data<float>(controller[1]), data<float>(controller[2]), data<float>(controller[3]),
             data<float>(controller[4]), gammas.data(), seconds, kSignals, controller[1].size(1), 1,
             static_cast<float>(rate / scale)},
            mutable_data<float>(signals), seconds, seconds + 1 + look_ahead,
            {numbers, numbers + size, numbers + 2 * size, size}, draft_ms, rate, stands, most_counted, look_ahead};
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
            const bool is_worth_it =
                !worth || worth->goes_on(i, before, survival, sample.entropy, sample.confidence);
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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speckv, m) {
    m.def("draft_chain(int head, Tensor(a!) ids, int start, int end, int most, Tensor(b!) brought, Tensor(c!) state,"
          " Tensor states, int first, Tensor(d!) keys, Tensor(e!) values, int cached, Tensor temperature,"
          " Tensor uniform, Tensor? top_k, Tensor? top_p, Tensor? min_p, float least_confidence, float most_entropy,"
          " float least_survival, Tensor(f!)[] controller, float draft_ms, float rate, float scale, float stands,"
          " int most_counted, int look_ahead) -> (Tensor logits, Tensor report)");
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("draft_chain", TORCH_BOX(&draft_chain));
}

}  // namespace speckv
