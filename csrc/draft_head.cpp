// A feature head (speckv/head.py) as an op: all that it does for a draft token in one call.
//
// In PyTorch's operations a head of one layer spends as long between its products as in them.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>

#include "buffers.h"
#include "embedding.h"
#include "registry.h"

namespace speckv {
namespace {

struct DraftHead {
    std::shared_ptr<const Decoder> decoder;
    std::shared_ptr<const Matrix> fuse, from_last, from_embedding, output;
    Tensor embedding;
    std::vector<float> center, scale;
    float farthest, cap;

    int64_t hidden() const { return decoder->hidden; }
    int64_t fed() const { return fuse->columns; }
    int64_t work() const {
        const int64_t layer = hidden() * (2 * (decoder->heads + decoder->groups) * decoder->head_size +
                                          3 * decoder->intermediate);
        return layer * static_cast<int64_t>(decoder->layers.size()) + output->rows * output->columns;
    }
};

Registry<DraftHead>& heads() {
    static auto* const registry = new Registry<DraftHead>;
    return *registry;
}

std::shared_ptr<const Matrix> matrix_of(const char* op, const char* name, int64_t number, int64_t rows, int64_t columns) {
    auto matrix = matrices().get(op, number);
    if ((rows != kAnySize && matrix->rows != rows) || (columns != kAnySize && matrix->columns != columns)) {
        refuse(op, name, " has ", matrix->rows, " x ", matrix->columns, " weights, which do not fit");
    }
    return matrix;
}

int64_t open_head(
    int64_t decoder, int64_t fuse, int64_t from_last, int64_t from_embedding, int64_t output, Tensor embedding,
    Tensor center, Tensor scale, double farthest, double cap) {
    const char* const op = "open_head";
    const auto layers = decoders().get(op, decoder);
    const int64_t hidden = layers->hidden;
    const auto fusing = matrix_of(op, "fuse", fuse, hidden, kAnySize);
    check_embedding(op, embedding, hidden, nullptr, 0);
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
        matrix_of(op, "from_embedding", from_embedding, hidden, hidden),
        matrix_of(op, "output", output, kAnySize, hidden), embedding, values(center), values(scale),
        static_cast<float>(farthest), static_cast<float>(cap)}));
}

void close_head(int64_t head) {
    heads().remove(head);
}

// A head at work on the next tokens of one sequence.
class Draft {
public:
    Draft(const DraftHead& head, Team& team) : head_(head), team_(team) {
        static thread_local Buffers buffers;
        buffers_ = &buffers;
    }

    // What positions bring whose states [count, fed] the target has made: brought [count, hidden].
    void observe(const float* states, int64_t count, float* brought) {
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

    // What a position brings, from the head's own hidden state of it.
    void go_on(const float* state, float* brought) { product(*head_.from_last, state, 1, brought); }

    // Reads ids [count], each of which comes after a position that brought `before` [count, hidden] (nothing is before the
    // first where starts_text), and makes logits of the last hidden state, which is left in `state`.
    void read(const int64_t* ids, const float* before, bool starts_text, const Span& span, float* state, float* logits) {
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
        normalize(joined + (count - 1) * hidden, head_.decoder->final_norm.data(), hidden, head_.decoder->epsilon,
                  state);
        product(*head_.output, state, 1, logits);
        for (int64_t i = 0; head_.cap > 0 && i < head_.output->rows; ++i) {
            logits[i] = std::tanh(logits[i] / head_.cap) * head_.cap;
        }
    }

private:
    struct Buffers {
        Buffer<float> features, embedded, joined;
        Inputs inputs;
    };

    void product(const Matrix& matrix, const float* values, int64_t count, float* out) {
        buffers_->inputs.set(values, count, matrix.columns);
        buffers_->inputs.arrange_for(matrix);
        multiply(matrix, team_, buffers_->inputs, out);
    }

    const DraftHead& head_;
    Team& team_;
    Buffers* buffers_;
};

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
    const int64_t hidden = head->hidden();
    check_shape(op, "ids", ids, {kAnySize});
    check_int64(op, "ids", ids);
    check_shape(op, "brought", brought, {kAnySize, hidden});
    check_float32(op, "brought", brought);
    check_shape(op, "state", state, {hidden});
    check_float32(op, "state", state);
    check_shape(op, "states", states, {kAnySize, head->fed()});
    check_float32(op, "states", states);
    const Cache cache = cache_of(op, *head->decoder, keys, values);
    const int64_t count = ids.size(0), observed = states.size(0), positions = brought.size(0);
    check_room(op, cache, length, count);
    if (!brought.is_contiguous() || !state.is_contiguous() || start < 0 || start + count > positions || first < 0 ||
        first + observed > positions || (goes_on && start == 0)) {
        refuse(op, "brought and state must be contiguous, and brought have a row for every position");
    }
    const Tensor whole_ids = as_contiguous(ids), whole_states = as_contiguous(states);
    const auto* const tokens = data<int64_t>(whole_ids);
    check_embedding(op, head->embedding, hidden, tokens, count);
    float* const rows = mutable_data<float>(brought);
    Tensor logits = empty_float32<2>({1, head->output->rows});
    with_team(head->work(), [&](Team& team) {
        Draft draft(*head, team);
        if (observed > 0) {
            draft.observe(data<float>(whole_states), observed, rows + first * hidden);
        }
        if (goes_on) {
            draft.go_on(mutable_data<float>(state), rows + (start - 1) * hidden);
        }
        const bool starts_text = start == 0;
        draft.read(tokens, rows + (start - 1) * hidden, starts_text, {cache, length, count}, mutable_data<float>(state),
                   mutable_data<float>(logits));
    });
    return logits;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speckv, m) {
    m.def("open_head(int decoder, int fuse, int from_last, int from_embedding, int output, Tensor embedding,"
          " Tensor center, Tensor scale, float farthest, float cap) -> int");
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
