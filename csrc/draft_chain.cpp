// A whole draft of a feature head in one call, or several: the tokens, one after the other, and whether each is worth
// another.
//
// Token by token Python would read and make a dozen small objects between two of them, with code and data that a pass
// over the target's weights has driven from the caches. What is decided, and when, is what speckv.policy and
// speckv.adaptive decide token by token, to the last bit (tests/test_draft_chain.py).

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <memory>
#include <numeric>
#include <optional>
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

// The numbers of a sequence's draft, as draft_chains is given them.
struct Numbers {
    static constexpr int64_t kWhole = 5, kReal = 10;

    int64_t start, end, most, first, cached;
    Limits limits;
    double draft_ms, rate, scale, stands;
    int64_t most_counted, look_ahead, others;

    Numbers(const int64_t* whole, const double* real)
        : start(whole[0]), end(whole[1]), most(whole[2]), first(whole[3]), cached(whole[4]),
          limits{real[0], real[1], real[2]}, draft_ms(real[3]), rate(real[4]), scale(real[5]), stands(real[6]),
          most_counted(static_cast<int64_t>(real[7])), look_ahead(static_cast<int64_t>(real[8])),
          others(static_cast<int64_t>(real[9])) {}
};

// The tensors of a sequence's draft.
struct Parts {
    Tensor ids, brought, state, states, keys, values, temperature, uniform;
    std::vector<Tensor> filters, controller;
};

// The draft of one sequence.
class Draft {
public:
    // logits is memory to draw from.
    Draft(const char* op, const DraftHead& head, const Numbers& numbers, const Parts& parts, Buffer<float>& logits)
        : op_(op), head_(head), numbers_(numbers), states_(as_contiguous(parts.states)),
          uniform_(as_contiguous(parts.uniform)), logits_(logits) {
        check_shape(op, "ids", parts.ids, {1, kAnySize});
        check_int64(op, "ids", parts.ids);
        const auto [start, end, most] = std::tuple{numbers.start, numbers.end, numbers.most};
        const int64_t room = parts.ids.size(1);
        if (!parts.ids.is_contiguous() || most < 1 || end < 1 || most > room || end > room - most || start < 0 ||
            start >= end) {
            refuse(op, "ids must be contiguous, start in [0, end), and there must be room for a draft of one token or "
                       "more");
        }
        inputs_ = check_head_inputs(op, head, start, end - start, most - 1, parts.brought, parts.state, states_,
                                    numbers.first, parts.keys, parts.values, numbers.cached);
        tokens_ = mutable_data<int64_t>(parts.ids);
        check_embedding(op, head.embedding, head.hidden(), tokens_ + start, inputs_.count);
        check_shape(op, "temperature", parts.temperature, {1});
        check_float32(op, "temperature", parts.temperature);
        check_shape(op, "uniform", uniform_, {1, kAnySize});
        check_float32(op, "uniform", uniform_);
        if (uniform_.size(1) < most) {
            refuse(op, "uniform must have a number for each of ", most, " tokens");
        }
        const FilterViews filter_views{filter(parts, 0), filter(parts, 1), filter(parts, 2)};
        filter_views.check(op, 1);
        temperature_ = *data<float>(parts.temperature);
        for (int64_t i = 0; i < most; ++i) {
            check_sampling_values(op, &temperature_, data<float>(uniform_) + i, 1, 1);
        }
        filters_ = filters_of(filters_of_rows(op, filter_views, 1), 0);
        if (!parts.controller.empty()) {
            worth_.emplace(op, parts.controller, numbers.draft_ms, numbers.rate, numbers.scale, numbers.most_counted,
                           numbers.look_ahead, numbers.others);
        }
        samples_.reserve(most);
        logits_.resize(std::max<size_t>(logits_.size(), (is_greedy() ? 1 : most) * width()));
    }

    bool is_greedy() const { return temperature_ == 0; }
    int64_t drafted() const { return static_cast<int64_t>(samples_.size()); }
    const float* logits() const { return logits_.data(); }

    // What the head is to read for the next token.
    HeadRead wanted() {
        if (drafted() == 0) {
            return {&inputs_, tokens_ + numbers_.start, numbers_.start, inputs_.count, numbers_.cached, row(0)};
        }
        const int64_t position = numbers_.end + drafted() - 1;
        return {&inputs_, tokens_ + position, position, 1, numbers_.cached + inputs_.count + drafted() - 1,
                row(drafted())};
    }

    // Draws the next token from the logits that were wanted.
    void draw() {
        samples_.push_back(draft_sample_row(
            {row(drafted()), Dtype::kFloat32, width()}, temperature_, data<float>(uniform_)[drafted()], filters_));
    }

    // Whether another one is wanted.
    bool goes_on(int64_t sequence) {
        const int64_t last = drafted() - 1;
        const DraftSample& sample = samples_.back();
        if (!sample.is_valid) {
            refuse(op_, "row ", sequence, ": ", reason({row(last), Dtype::kFloat32, width()}));
        }
        tokens_[numbers_.end + last] = head_.token_ids[sample.token];
        const double before = survival_;
        survival_ *= sample.confidence;
        const Worth::Drawn drawn{sample.entropy, sample.confidence, -1.0, numbers_.stands, before, survival_};
        const bool is_worth_it = !worth_ || worth_->goes_on(last, drawn);
        return is_worth_it && sample.confidence >= numbers_.limits.least_confidence &&
               sample.entropy <= numbers_.limits.most_entropy && survival_ >= numbers_.limits.least_survival &&
               drafted() < numbers_.most;
    }

    void report(double in_head, double outside, double* out) {
        *out++ = static_cast<double>(drafted());
        *out++ = in_head;
        *out++ = outside;
        *out++ = worth_ ? worth_->acceptance_of(drafted()) : std::nan("");
        for (const DraftSample& sample : samples_) {
            *out++ = sample.entropy;
            *out++ = sample.confidence;
        }
    }

private:
    static std::optional<Tensor> filter(const Parts& parts, size_t number) {
        const Tensor& given = parts.filters[number];
        return given.numel() == 0 ? std::nullopt : std::optional<Tensor>(given);
    }

    int64_t width() const { return head_.output->rows; }
    // Of the logits of a token; greedy ones take each other's place.
    float* row(int64_t number) { return logits_.data() + (is_greedy() ? 0 : number * width()); }

    const char* const op_;
    const DraftHead& head_;
    const Numbers numbers_;
    const Tensor states_, uniform_;
    HeadInputs inputs_;
    int64_t* tokens_;
    float temperature_;
    Filters filters_;
    std::optional<Worth> worth_;
    Buffer<float>& logits_;
    std::vector<DraftSample> samples_;
    double survival_ = 1.0;
};

// Drafts for n sequences, of each up to `most` tokens behind the first `end` of ids [1, room], into ids, token after
// token of all in one walk through the head's weights. What one gets does not depend on the others.
//
// whole holds start, end, most, first and cached of each sequence; start, brought, state, states, first, keys, values
// and cached are as in read_head; the head reads what lies between start and end first. uniform [1, most or more];
// temperature [1]; filters are three for each, top_k, top_p and min_p, [1] or empty. A controller's tensors are six for
// each, all of them or none: without, only the limits end a draft; else it and what follows are as in worth.h. real
// holds of each least_confidence, most_entropy, least_survival, draft_ms, rate, scale, stands, most_counted, look_ahead
// and others.
//
// Returns the logits that the tokens were drawn from, those of all sequences one after the other [sum of drafted, S],
// without those of a temperature of 0, and a report [n, 4 + 2 · the most drafted] f64: how many tokens, how many
// seconds passed in the head and how many outside, for all sequences together, the controller's acceptance of the draft
// (NaN without one), then entropy and confidence of each token.
std::tuple<Tensor, Tensor> draft_chains(
    int64_t number, std::vector<Tensor> ids, std::vector<int64_t> whole, std::vector<Tensor> brought,
    std::vector<Tensor> state, std::vector<Tensor> states, std::vector<Tensor> keys, std::vector<Tensor> values,
    std::vector<Tensor> temperature, std::vector<Tensor> uniform, std::vector<Tensor> filters,
    std::vector<Tensor> controllers, std::vector<double> real) {
    const char* const op = "draft_chains";
    const auto begun = std::chrono::steady_clock::now();
    const auto head = heads().get(op, number);
    const size_t count = ids.size(), tensors = controllers.size() / std::max<size_t>(count, 1);
    for (const std::vector<Tensor>* some : {&brought, &state, &states, &keys, &values, &temperature, &uniform}) {
        if (some->size() != count || count == 0) {
            refuse(op, "there must be as many tensors of each kind as sequences, one or more");
        }
    }
    if (whole.size() != count * Numbers::kWhole || real.size() != count * Numbers::kReal ||
        filters.size() != 3 * count || controllers.size() != tensors * count) {
        refuse(op, "there must be as many numbers, filters and controllers as sequences");
    }
    static thread_local std::vector<Buffer<float>> memory;
    memory.resize(std::max(memory.size(), count));
    std::vector<std::unique_ptr<Draft>> drafts;
    for (size_t i = 0; i < count; ++i) {
        drafts.push_back(std::make_unique<Draft>(
            op, *head, Numbers(&whole[i * Numbers::kWhole], &real[i * Numbers::kReal]),
            Parts{ids[i], brought[i], state[i], states[i], keys[i], values[i], temperature[i], uniform[i],
                  {filters.begin() + 3 * i, filters.begin() + 3 * (i + 1)},
                  {controllers.begin() + tensors * i, controllers.begin() + tensors * (i + 1)}},
            memory[i]));
    }
    std::exception_ptr failed;
    double in_head = 0.0;
    const auto draft = [&](Team& team) {
        HeadPass pass(*head, team);
        std::vector<size_t> active(count), still;
        std::iota(active.begin(), active.end(), size_t{0});
        for (bool is_first = true; !active.empty(); is_first = false) {
            const auto asked = std::chrono::steady_clock::now();
            std::vector<HeadRead> reads;
            for (const size_t i : active) {
                reads.push_back(drafts[i]->wanted());
            }
            if (is_first) {
                pass.begin(reads, false);
            } else {
                pass.next(reads);
            }
            in_head += seconds_since(asked);
            team.run(static_cast<int64_t>(active.size()), [&](int64_t i) { drafts[active[i]]->draw(); });
            still.clear();
            for (const size_t i : active) {
                if (drafts[i]->goes_on(static_cast<int64_t>(i))) {
                    still.push_back(i);
                }
            }
            std::swap(active, still);
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
    int64_t rows = 0, longest = 0;
    for (const auto& each : drafts) {
        rows += each->is_greedy() ? 0 : each->drafted();
        longest = std::max(longest, each->drafted());
    }
    const int64_t width = head->output->rows, columns = 4 + 2 * longest;
    Tensor logits = empty_float32<2>({rows, width});
    Tensor reported = empty<2>({static_cast<int64_t>(count), columns}, aoti_torch_dtype_float64());
    auto* row = mutable_data<float>(logits);
    auto* report = mutable_data<double>(reported);
    std::fill_n(report, static_cast<int64_t>(count) * columns, 0.0);
    for (const auto& each : drafts) {
        if (!each->is_greedy()) {
            row = std::copy_n(each->logits(), each->drafted() * width, row);
        }
        each->report(in_head, seconds_since(begun) - in_head, report);
        report += columns;
    }
    return {logits, reported};
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
    m.def("draft_chains(int head, Tensor(a!)[] ids, int[] whole, Tensor(b!)[] brought, Tensor(c!)[] state,"
          " Tensor[] states, Tensor(d!)[] keys, Tensor(e!)[] values, Tensor[] temperature, Tensor[] uniform,"
          " Tensor[] filters, Tensor(f!)[] controllers, float[] real) -> (Tensor logits, Tensor report)");
    m.def("judge_copies(Tensor confidences, Tensor(a!)[] controller, float draft_ms, float rate, float scale,"
          " int most_counted, int look_ahead, int others) -> (int count, float acceptance, float seconds)");
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("draft_chains", TORCH_BOX(&draft_chains));
    m.impl("judge_copies", TORCH_BOX(&judge_copies));
}

}  // namespace speckv
