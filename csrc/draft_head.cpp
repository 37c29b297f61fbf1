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

void HeadPass::begin(const std::vector<HeadRead>& reads, bool goes_on) {
    observe(reads);
    if (goes_on) {
        go_on(reads);
    }
    read(reads);
}

void HeadPass::next(const std::vector<HeadRead>& reads) {
    go_on(reads);
    read(reads);
}

// What positions bring whose states the target has made.
void HeadPass::observe(const std::vector<HeadRead>& reads) {
    const int64_t fed = head_.fed(), hidden = head_.hidden();
    int64_t count = 0;
    for (const HeadRead& read : reads) {
        count += read.inputs->observed;
    }
    if (count == 0) {
        return;
    }
    buffers_->features.resize(count * fed);
    buffers_->rows.resize(count * hidden);
    float* feature = buffers_->features.data();
    for (const HeadRead& read : reads) {
        const float* const states = read.inputs->states;
        for (int64_t i = 0; i < read.inputs->observed * fed; ++i) {
            const float value = (states[i] - head_.center[i % fed]) * head_.scale[i % fed];
            *feature++ = std::min(std::max(value, -head_.farthest), head_.farthest);
        }
    }
    product(*head_.fuse, buffers_->features.data(), count, buffers_->rows.data());
    const float* brought = buffers_->rows.data();
    for (const HeadRead& read : reads) {
        const int64_t size = read.inputs->observed * hidden;
        std::copy(brought, brought + size, read.inputs->brought + read.inputs->first * hidden);
        brought += size;
    }
}

// Takes its own state of the position before each read for what that position brings.
void HeadPass::go_on(const std::vector<HeadRead>& reads) {
    const int64_t hidden = head_.hidden(), count = static_cast<int64_t>(reads.size());
    buffers_->states.resize(count * hidden);
    buffers_->rows.resize(count * hidden);
    for (int64_t i = 0; i < count; ++i) {
        std::copy(reads[i].inputs->state, reads[i].inputs->state + hidden, buffers_->states.data() + i * hidden);
    }
    product(*head_.from_last, buffers_->states.data(), count, buffers_->rows.data());
    for (int64_t i = 0; i < count; ++i) {
        const float* const row = buffers_->rows.data() + i * hidden;
        std::copy(row, row + hidden, reads[i].inputs->brought + (reads[i].start - 1) * hidden);
    }
}

// Reads tokens, each of which comes after a position that brought something (nothing is before the first), and makes
// logits of the last hidden state of each sequence, which becomes its state.
void HeadPass::read(const std::vector<HeadRead>& reads) {
    const int64_t hidden = head_.hidden(), width = head_.output->rows, sequences = static_cast<int64_t>(reads.size());
    buffers_->ids.clear();
    buffers_->spans.clear();
    for (const HeadRead& read : reads) {
        buffers_->ids.insert(buffers_->ids.end(), read.ids, read.ids + read.count);
        buffers_->spans.push_back({read.inputs->cache, read.cached, read.count});
    }
    const auto count = static_cast<int64_t>(buffers_->ids.size());
    buffers_->embedded.resize(count * hidden);
    buffers_->joined.resize(count * hidden);
    embed(head_.embedding, buffers_->ids.data(), count, buffers_->embedded.data());
    float* const joined = buffers_->joined.data();
    product(*head_.from_embedding, buffers_->embedded.data(), count, joined);
    float* row = joined;
    for (const HeadRead& read : reads) {
        for (int64_t position = read.start; position < read.start + read.count; ++position, row += hidden) {
            const float* const before = read.inputs->brought + (position - 1) * hidden;
            for (int64_t i = 0; position > 0 && i < hidden; ++i) {
                row[i] += before[i];
            }
        }
    }
    read_tokens(*head_.decoder, team_, buffers_->spans, joined, {}, nullptr, 0);
    buffers_->states.resize(sequences * hidden);
    buffers_->rows.resize(sequences * width);
    int64_t end = 0;
    for (int64_t i = 0; i < sequences; ++i) {
        end += reads[i].count;
        float* const state = buffers_->states.data() + i * hidden;
        normalize(joined + (end - 1) * hidden, head_.decoder->final_norm.data(), hidden, head_.decoder->epsilon, state);
        std::copy(state, state + hidden, reads[i].inputs->state);
    }
    const bool is_alone = sequences == 1;
    product(*head_.output, buffers_->states.data(), sequences, is_alone ? reads[0].logits : buffers_->rows.data());
    for (int64_t i = 0; i < sequences; ++i) {
        if (!is_alone) {
            std::copy(&buffers_->rows[i * width], &buffers_->rows[i * width] + width, reads[i].logits);
        }
        for (int64_t j = 0; head_.cap > 0 && j < width; ++j) {
            reads[i].logits[j] = std::tanh(reads[i].logits[j] / head_.cap) * head_.cap;
        }
    }
}

void HeadPass::product(const Matrix& matrix, const float* values, int64_t count, float* out) {
    buffers_->inputs.set(values, count, matrix.columns);
    buffers_->inputs.arrange_for(matrix, team_);
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
        HeadPass(*head, team).begin(
            {{&inputs, tokens, start, inputs.count, length, mutable_data<float>(logits)}}, goes_on);
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
