// A feature head as ops: all that it does for a draft token in one call.
//
// In PyTorch's operations a head of one layer spends as long between its products as in them.

#include "draft_head.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "embedding.h"

namespace speckv {

Registry<DraftHead>& heads() {
    static auto* const registry = new Registry<DraftHead>;
    return *registry;
}

int64_t DraftHead::work() const {
    const int64_t layer = hidden() * (2 * (decoder->heads + decoder->groups) * decoder->head_size +
                                      3 * decoder->intermediate);
    return layer * static_cast<int64_t>(decoder->layers.size()) + output->rows * output->columns;
}

HeadInputs check_head_inputs(
    const char* op, const DraftHead& head, int64_t start, int64_t count, int64_t later, const Tensor& brought,
    const Tensor& state, const Tensor& states, int64_t first, const Tensor& keys, const Tensor& values,
    int64_t cached) {
    const int64_t hidden = head.hidden();
    check_shape(op, "brought", brought, {kAnySize, hidden});
    check_float32(op, "brought", brought);
    check_shape(op, "state", state, {hidden});
    check_float32(op, "state", state);
    check_shape(op, "states", states, {kAnySize, head.fed()});
    check_float32(op, "states", states);
    const Cache cache = cache_of(op, *head.decoder, keys, values);
    check_room(op, cache, cached, count + later);
    const int64_t observed = states.size(0), positions = brought.size(0);
    if (!brought.is_contiguous() || !state.is_contiguous() || start < 0 || start > positions - count - later ||
        first < 0 || first > positions - observed) {
        refuse(op, "brought and state must be contiguous, and brought have a row for every position");
    }
    return {cache, cached, start, count, mutable_data<float>(brought), mutable_data<float>(state),
            data<float>(states), first, observed};
}

HeadPass::HeadPass(const DraftHead& head, Team& team) : head_(head), team_(team) {
    static thread_local Buffers buffers;
    buffers_ = &buffers;
}

void HeadPass::begin(const HeadInputs& inputs, const int64_t* ids, bool goes_on, float* logits) {
    const int64_t hidden = head_.hidden();
    if (inputs.observed > 0) {
        observe(inputs.states, inputs.observed, inputs.brought + inputs.first * hidden);
    }
    if (goes_on) {
        go_on(inputs, inputs.start);
    }
    read(ids, inputs.brought + (inputs.start - 1) * hidden, inputs.start == 0,
         {inputs.cache, inputs.cached, inputs.count}, inputs.state, logits);
}

// Takes its own state of the position before `position` for what that one brings.
void HeadPass::go_on(const HeadInputs& inputs, int64_t position) {
    product(*head_.from_last, inputs.state, 1, inputs.brought + (position - 1) * head_.hidden());
}

void HeadPass::next(const HeadInputs& inputs, int64_t id, int64_t position, int64_t cached, float* logits) {
    go_on(inputs, position);
    read(&id, inputs.brought + (position - 1) * head_.hidden(), false, {inputs.cache, cached, 1}, inputs.state, logits);
}

// What positions bring whose states [count, fed] the target has made: brought [count, hidden].
void HeadPass::observe(const float* states, int64_t count, float* brought) {
    const int64_t fed = head_.fed();
    buffers_->features.resize(count * fed);
    float* const features = buffers_->features.data();
    for (int64_t row = 0; row < count; ++row) {
        for (int64_t i = 0; i < fed; ++i) {
            const float feature = (states[row * fed + i] - head_.center[i]) * head_.scale[i];
            features[row * fed + i] = std::min(std::max(feature, -head_.farthest), head_.farthest);
        }
    }
    product(*head_.fuse, features, count, brought);
}

// Reads ids [count], each of which comes after a position that brought `before` [count, hidden] (nothing is before the
// first where starts_text), and makes logits of the last hidden state, which is left in `state`.
void HeadPass::read(
    const int64_t* ids, const float* before, bool starts_text, const Span& span, float* state, float* logits) {
    const int64_t hidden = head_.hidden(), count = span.count;
    buffers_->embedded.resize(count * hidden);
    buffers_->joined.resize(count * hidden);
    embed(head_.embedding, ids, count, buffers_->embedded.data());
    float* const joined = buffers_->joined.data();
    product(*head_.from_embedding, buffers_->embedded.data(), count, joined);
    for (int64_t token = 0; token < count; ++token) {
        for (int64_t i = 0; !(starts_text && token == 0) && i < hidden; ++i) {
            joined[token * hidden + i] += before[token * hidden + i];
        }
    }
    read_tokens(*head_.decoder, team_, {span}, joined, {}, nullptr, 0);
    normalize(joined + (count - 1) * hidden, head_.decoder->final_norm.data(), hidden, head_.decoder->epsilon, state);
    product(*head_.output, state, 1, logits);
    for (int64_t i = 0; head_.cap > 0 && i < head_.output->rows; ++i) {
        logits[i] = std::tanh(logits[i] / head_.cap) * head_.cap;
    }
}

void HeadPass::product(const Matrix& matrix, const float* values, int64_t count, float* out) {
    buffers_->inputs.set(values, count, matrix.columns);
    buffers_->inputs.arrange_for(matrix);
    multiply(matrix, team_, buffers_->inputs, out);
}

namespace {

std::shared_ptr<const Matrix> matrix_of(const char* op, const char* name, int64_t number, int64_t rows, int64_t columns) {
    auto matrix = matrices().get(op, number);
    if ((rows != kAnySize && matrix->rows != rows) || (columns != kAnySize && matrix->columns != columns)) {
        refuse(op, name, " has ", matrix->rows, " x ", matrix->columns, " weights, which do not fit");
    }
    return matrix;
}

int64_t open_head(
    int64_t decoder, int64_t fuse, int64_t from_last, int64_t from_embedding, int64_t output, Tensor embedding,
    Tensor token_ids, Tensor center, Tensor scale, double farthest, double cap) {
    const char* const op = "open_head";
    const auto layers = decoders().get(op, decoder);
    const int64_t hidden = layers->hidden;
    const auto fusing = matrix_of(op, "fuse", fuse, hidden, kAnySize);
    const auto writing = matrix_of(op, "output", output, kAnySize, hidden);
    check_shape(op, "token_ids", token_ids, {writing->rows});
    check_int64(op, "token_ids", token_ids);
    const Tensor whole_ids = as_contiguous(token_ids);
    const auto* const ids = data<int64_t>(whole_ids);
    check_embedding(op, embedding, hidden, ids, writing->rows);
    for (const auto& [name, tensor] : {std::pair{"center", center}, std::pair{"scale", scale}}) {
        check_shape(op, name, tensor, {fusing->columns});
        check_float32(op, name, tensor);
    }
    const auto values = [](const Tensor& tensor) {
        const Tensor whole = as_contiguous(tensor);
        return std::vector<float>{data<float>(whole), data<float>(whole) + whole.numel()};
    };
    return heads().add(std::make_shared<const DraftHead>(DraftHead{
        layers, fusing, matrix_of(op, "from_last", from_last, hidden, hidden),
        matrix_of(op, "from_embedding", from_embedding, hidden, hidden), writing, embedding,
        {ids, ids + writing->rows}, values(center), values(scale), static_cast<float>(farthest),
        static_cast<float>(cap)}));
}

void close_head(int64_t head) {
    heads().remove(head);
}

// Reads ids [n], the tokens at positions start, start + 1, ..., of which the cache of `length` tokens is to go on, and
// returns the logits [1, S] of the token after them.
//
// brought [positions, hidden] is what each position brings to the one after it. States [m, fed] are the target's of
// positions first, first + 1, ..., for which it is made now. state [hidden] receives the head's own hidden state of the
// last position; goes_on says that it is that of position start - 1, which the target has not read.
Tensor read_head(
    int64_t number, Tensor ids, int64_t start, Tensor brought, Tensor state, Tensor states, int64_t first, bool goes_on,
    Tensor keys, Tensor values, int64_t length) {
    const char* const op = "read_head";
    const auto head = heads().get(op, number);
    check_shape(op, "ids", ids, {kAnySize});
    check_int64(op, "ids", ids);
    const Tensor whole_ids = as_contiguous(ids), whole_states = as_contiguous(states);
    const HeadInputs inputs = check_head_inputs(
        op, *head, start, ids.size(0), 0, brought, state, whole_states, first, keys, values, length);
    if (goes_on && start == 0) {
        refuse(op, "nothing is before the first position");
    }
    const auto* const tokens = data<int64_t>(whole_ids);
    check_embedding(op, head->embedding, head->hidden(), tokens, inputs.count);
    Tensor logits = empty_float32<2>({1, head->output->rows});
    with_team(head->work(), [&](Team& team) {
        HeadPass(*head, team).begin(inputs, tokens, goes_on, mutable_data<float>(logits));
    });
    return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speckv, m) {
    m.def("open_head(int decoder, int fuse, int from_last, int from_embedding, int output, Tensor embedding,"
          " Tensor token_ids, Tensor center, Tensor scale, float farthest, float cap) -> int");
    m.def("close_head(int head) -> ()");
    m.def("read_head(int head, Tensor ids, int start, Tensor(a!) brought, Tensor(b!) state, Tensor states,"
          " int first, bool goes_on, Tensor(c!) keys, Tensor(d!) values, int length) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("open_head", TORCH_BOX(&open_head));
    m.impl("read_head", TORCH_BOX(&read_head));
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CompositeExplicitAutograd, m) {
    m.impl("close_head", TORCH_BOX(&close_head));
}

}  // namespace speckv
