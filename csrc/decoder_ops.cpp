// The decoder and its matrices as ops.

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "embedding.h"
#include "registry.h"

namespace speckv {

Registry<Decoder>& decoders() {
    static auto* const registry = new Registry<Decoder>;
    return *registry;
}

Registry<Matrix>& matrices() {
    static auto* const registry = new Registry<Matrix>;
    return *registry;
}

Cache cache_of(const char* op, const Decoder& decoder, const Tensor& keys, const Tensor& values) {
    check_shape(op, "keys", keys, {static_cast<int64_t>(decoder.layers.size()), decoder.groups, kAnySize,
                                   decoder.head_size});
    check_shape(op, "values", values, {keys.size(0), keys.size(1), keys.size(2), keys.size(3)});
    check_floating(op, "keys", keys);
    if (dtype_of(values) != dtype_of(keys) || !keys.is_contiguous() || !values.is_contiguous()) {
        refuse(op, "keys and values must be contiguous and of one dtype");
    }
    return {mutable_data<std::byte>(keys), mutable_data<std::byte>(values), as_logits(keys).dtype, keys.size(2)};
}

void check_room(const char* op, const Cache& cache, int64_t start, int64_t count) {
    if (start < 0 || count < 1 || count > cache.capacity || start > cache.capacity - count) {
        refuse(op, "the cache has room for ", cache.capacity, " tokens, not for ", count, " more after ", start);
    }
}

namespace {

constexpr size_t kModelTensors = 3;   // final norm, inverse frequencies, table
constexpr size_t kLayerTensors = 25;  // four norms, seven matrices of three tensors

std::vector<float> vector_of(const char* op, const char* name, const Tensor& tensor, int64_t size, bool is_optional) {
    if (is_optional && tensor.numel() == 0) {
        return {};
    }
    check_shape(op, name, tensor, {size});
    check_float32(op, name, tensor);
    const Tensor whole = as_contiguous(tensor);
    return {data<float>(whole), data<float>(whole) + size};
}

int64_t open_decoder(
    std::vector<Tensor> tensors, int64_t heads, int64_t groups, int64_t head_size, double epsilon,
    double attention_scale, double rotary_scale) {
    const char* const op = "open_decoder";
    if (tensors.size() < kModelTensors + kLayerTensors ||
        (tensors.size() - kModelTensors) % kLayerTensors != 0) {
        refuse(op, "tensors must be 3, and 25 for each layer");
    }
    if (heads < 1 || groups < 1 || heads % groups != 0 || head_size < 2 || head_size % 2 != 0) {
        refuse(op, "heads must be a multiple of groups, and head_size even");
    }
    auto decoder = std::make_shared<Decoder>();
    decoder->heads = heads;
    decoder->groups = groups;
    decoder->head_size = head_size;
    decoder->epsilon = static_cast<float>(epsilon);
    decoder->attention_scale = static_cast<float>(attention_scale);
    decoder->rotary_scale = static_cast<float>(rotary_scale);
    check_shape(op, "final_norm", tensors[0], {kAnySize});
    decoder->hidden = tensors[0].size(0);
    decoder->final_norm = vector_of(op, "final_norm", tensors[0], decoder->hidden, false);
    decoder->inverse_frequencies = vector_of(op, "inverse_frequencies", tensors[1], head_size / 2, false);
    decoder->intermediate = 0;
    for (size_t at = kModelTensors; at < tensors.size(); at += kLayerTensors) {
        Layer& layer = decoder->layers.emplace_back();
        layer.input_norm = vector_of(op, "input_norm", tensors[at], decoder->hidden, false);
        layer.attention_norm = vector_of(op, "attention_norm", tensors[at + 1], decoder->hidden, false);
        layer.query_norm = vector_of(op, "query_norm", tensors[at + 2], head_size, true);
        layer.key_norm = vector_of(op, "key_norm", tensors[at + 3], head_size, true);
        size_t next = at + 4;
        const auto matrix = [&](const char* name, int64_t rows, int64_t columns) {
            auto made = make_matrix(op, name, tensors[next], tensors[next + 1], tensors[next + 2], tensors[2]);
            next += 3;
            if (made->is_empty() || (rows != kAnySize && made->rows != rows) || made->columns != columns) {
                refuse(op, name, " must be [", rows, ", ", columns, "], got [", made->rows, ", ", made->columns, "]");
            }
            return made;
        };
        layer.query = matrix("query", heads * head_size, decoder->hidden);
        layer.key = matrix("key", groups * head_size, decoder->hidden);
        layer.value = matrix("value", groups * head_size, decoder->hidden);
        layer.output = matrix("output", decoder->hidden, heads * head_size);
        layer.gate = matrix("gate", kAnySize, decoder->hidden);
        layer.up = matrix("up", layer.gate->rows, decoder->hidden);
        layer.down = matrix("down", decoder->hidden, layer.gate->rows);
        if (decoder->intermediate != 0 && layer.gate->rows != decoder->intermediate) {
            refuse(op, "all layers must have one width");
        }
        decoder->intermediate = layer.gate->rows;
    }
    return decoders().add(std::move(decoder));
}

void close_decoder(int64_t decoder) {
    decoders().remove(decoder);
}

// The spans of the sequences, whose counts add up to `count`.
std::vector<Span> spans_of(
    const char* op, const Decoder& decoder, int64_t count, const std::vector<Tensor>& keys,
    const std::vector<Tensor>& values, const std::vector<int64_t>& starts, const std::vector<int64_t>& counts) {
    int64_t left = count;
    std::vector<Span> spans;
    for (size_t i = 0; i < keys.size(); ++i) {
        const Cache cache = cache_of(op, decoder, keys[i], values[i]);
        check_room(op, cache, starts[i], counts[i]);
        if (counts[i] > left) {
            break;
        }
        left -= counts[i];
        spans.push_back({cache, starts[i], counts[i]});
    }
    if (left != 0 || spans.size() != keys.size()) {
        refuse(op, "counts must add up to the ", count, " ids");
    }
    return spans;
}

// What the ops that read a model are given: see read_model.
struct ModelInputs {
    int64_t decoder, head;
    Tensor embedding, ids;
    std::vector<Tensor> keys, values;
    std::vector<int64_t> starts, counts, kept, layers;
};

// Reads tokens and returns their hidden states. place(rows, V) says where the logits of so many tokens go, and
// after(team, rows, V) follows when they are there.
template <class Place, class After>
Tensor read_model_into(const char* op, const ModelInputs& given, const Place& place, const After& after) {
    const auto decoder = decoders().get(op, given.decoder);
    const auto head = matrices().get(op, given.head);
    const auto& keys = given.keys;
    const auto& values = given.values;
    const auto& starts = given.starts;
    const auto& counts = given.counts;
    const auto& kept = given.kept;
    const auto& layers = given.layers;
    const int64_t hidden = decoder->hidden, depth = static_cast<int64_t>(decoder->layers.size());
    check_shape(op, "ids", given.ids, {kAnySize});
    check_int64(op, "ids", given.ids);
    if (head->columns != hidden) {
        refuse(op, "the head must take hidden states of ", hidden, ", not of ", head->columns);
    }
    if (keys.empty() || values.size() != keys.size() || starts.size() != keys.size() ||
        counts.size() != keys.size() || kept.size() != keys.size()) {
        refuse(op, "keys, values, starts, counts and kept must be as many as there are sequences, one or more");
    }
    const int64_t count = given.ids.size(0);
    const std::vector<Span> spans = spans_of(op, *decoder, count, keys, values, starts, counts);
    int64_t rows = 0;
    for (size_t i = 0; i < kept.size(); ++i) {
        if (kept[i] < 0 || kept[i] > counts[i]) {
            refuse(op, "kept must be in [0, ", counts[i], "], got ", kept[i]);
        }
        rows += kept[i];
    }
    const auto is_last = [&](int64_t layer) { return layer == -1 || layer == depth; };
    std::vector<Wanted> wanted;
    for (size_t i = 0; i < layers.size(); ++i) {
        if (layers[i] < -1 || layers[i] > depth) {
            refuse(op, "layers must be in [-1, ", depth, "], got ", layers[i]);
        }
        if (!is_last(layers[i])) {
            wanted.push_back({layers[i], static_cast<int64_t>(i) * hidden});
        }
    }
    std::stable_sort(wanted.begin(), wanted.end(),
                     [](const Wanted& a, const Wanted& b) { return a.layer < b.layer; });

    static thread_local Buffer<float> residual, last;
    static thread_local Inputs inputs;
    residual.resize(count * hidden);
    last.resize(rows * hidden);
    const Tensor whole_ids = as_contiguous(given.ids);
    check_embedding(op, given.embedding, hidden, data<int64_t>(whole_ids), count);
    embed(given.embedding, data<int64_t>(whole_ids), count, residual.data());
    const int64_t width = hidden * static_cast<int64_t>(layers.size());
    Tensor states = empty_float32<2>({count, width});
    auto* const states_data = mutable_data<float>(states);
    float* const logits = place(rows, head->rows);
    with_team(hidden * decoder->intermediate * depth, [&](Team& team) {
        read_tokens(*decoder, team, spans, residual.data(), wanted, states_data, width);
        const auto normalized = [&](int64_t token, float* out) {
            normalize(residual.data() + token * hidden, decoder->final_norm.data(), hidden, decoder->epsilon, out);
        };
        for (size_t i = 0; i < layers.size(); ++i) {
            for (int64_t token = 0; is_last(layers[i]) && token < count; ++token) {
                normalized(token, states_data + token * width + static_cast<int64_t>(i) * hidden);
            }
        }
        int64_t end = 0, row = 0;
        for (size_t i = 0; i < kept.size(); ++i) {
            end += counts[i];
            for (int64_t token = end - kept[i]; token < end; ++token, ++row) {
                normalized(token, last.data() + row * hidden);
            }
        }
        if (rows > 0) {
            inputs.set(last.data(), rows, hidden);
            inputs.arrange_for(*head, team);
            multiply(*head, team, inputs, logits);
            after(team, rows, head->rows);
        }
    });
    return states;
}

// Reads ids [n], the next tokens of one sequence or several: counts[i] of them at the positions from starts[i] on.
//
// Returns the logits [sum of kept, V] of the last kept[i] tokens of each, and the hidden states [n, layers * hidden]
// that `layers` numbers of layers made of all; those of -1, or of all layers, are the last ones, after the final norm.
std::tuple<Tensor, Tensor> read_model(
    int64_t decoder, int64_t head, Tensor embedding, Tensor ids, std::vector<Tensor> keys, std::vector<Tensor> values,
    std::vector<int64_t> starts, std::vector<int64_t> counts, std::vector<int64_t> kept, std::vector<int64_t> layers) {
    std::optional<Tensor> logits;
    const Tensor states = read_model_into(
        "read_model", {decoder, head, embedding, ids, keys, values, starts, counts, kept, layers},
        [&](int64_t rows, int64_t vocabulary) {
            logits = empty_float32<2>({rows, vocabulary});
            return mutable_data<float>(*logits);
        },
        [](Team&, int64_t, int64_t) {});
    return {*logits, states};
}

// As read_model, but of each token's logits only which is the largest, the first of equals; -1 where they are no
// distribution. They are looked through while they lie in the caches, and in memory that every pass finds again.
std::tuple<Tensor, Tensor> read_best(
    int64_t decoder, int64_t head, Tensor embedding, Tensor ids, std::vector<Tensor> keys, std::vector<Tensor> values,
    std::vector<int64_t> starts, std::vector<int64_t> counts, std::vector<int64_t> kept, std::vector<int64_t> layers) {
    constexpr int64_t kPart = 8 * kBlockSize;
    static thread_local Buffer<float> memory;
    Buffer<float>& logits = memory;  // this thread's, whichever runs what follows
    std::optional<Tensor> best;
    std::vector<Largest> parts;
    const Tensor states = read_model_into(
        "read_best", {decoder, head, embedding, ids, keys, values, starts, counts, kept, layers},
        [&](int64_t rows, int64_t vocabulary) {
            best = empty_int64<1>({rows});
            logits.resize(rows * vocabulary);
            return logits.data();
        },
        [&](Team& team, int64_t rows, int64_t vocabulary) {
            const int64_t in_row = (vocabulary + kPart - 1) / kPart;
            parts.resize(rows * in_row);
            const auto row_of = [&](int64_t row) {
                return Row{logits.data() + row * vocabulary, Dtype::kFloat32, vocabulary};
            };
            team.run(rows * in_row, [&](int64_t part) {
                const int64_t start = part % in_row * kPart;
                parts[part] = largest_of(row_of(part / in_row), start, std::min(start + kPart, vocabulary));
            });
            for (int64_t row = 0; row < rows; ++row) {
                mutable_data<int64_t>(*best)[row] =
                    argmax_of_parts(row_of(row), parts.data() + row * in_row, in_row).token;
            }
        });
    return {*best, states};
}

int64_t open_matrix(Tensor weight, Tensor scale, Tensor bias, Tensor table) {
    std::shared_ptr<const Matrix> matrix = make_matrix("open_matrix", "weight", weight, scale, bias, table);
    if (matrix->is_empty()) {
        refuse("open_matrix", "weight must have at least one row");
    }
    return matrices().add(std::move(matrix));
}

void close_matrix(int64_t matrix) {
    matrices().remove(matrix);
}

Tensor multiply_matrix(int64_t number, Tensor x) {
    const char* const op = "multiply_matrix";
    const auto matrix = matrices().get(op, number);
    check_shape(op, "x", x, {kAnySize, matrix->columns});
    check_float32(op, "x", x);
    const Tensor whole = as_contiguous(x);
    Tensor out = empty_float32<2>({x.size(0), matrix->rows});
    static thread_local Inputs inputs;
    inputs.set(data<float>(whole), x.size(0), matrix->columns);
    with_team(matrix->rows * matrix->columns, [&](Team& team) {
        inputs.arrange_for(*matrix, team);
        multiply(*matrix, team, inputs, mutable_data<float>(out));
    });
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(speckv, m) {
    m.def("open_decoder(Tensor[] tensors, int heads, int groups, int head_size, float epsilon, float attention_scale,"
          " float rotary_scale) -> int");
    m.def("close_decoder(int decoder) -> ()");
    m.def("read_model(int decoder, int head, Tensor embedding, Tensor ids, Tensor(a!)[] keys, Tensor(b!)[] values,"
          " int[] starts, int[] counts, int[] kept, int[] layers) -> (Tensor logits, Tensor states)");
    m.def("read_best(int decoder, int head, Tensor embedding, Tensor ids, Tensor(a!)[] keys, Tensor(b!)[] values,"
          " int[] starts, int[] counts, int[] kept, int[] layers) -> (Tensor best, Tensor states)");
    m.def("open_matrix(Tensor weight, Tensor scale, Tensor bias, Tensor table) -> int");
    m.def("close_matrix(int matrix) -> ()");
    m.def("multiply_matrix(int matrix, Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CPU, m) {
    m.impl("open_decoder", TORCH_BOX(&open_decoder));
    m.impl("read_model", TORCH_BOX(&read_model));
    m.impl("read_best", TORCH_BOX(&read_best));
    m.impl("open_matrix", TORCH_BOX(&open_matrix));
    m.impl("multiply_matrix", TORCH_BOX(&multiply_matrix));
}

STABLE_TORCH_LIBRARY_IMPL(speckv, CompositeExplicitAutograd, m) {
    m.impl("close_decoder", TORCH_BOX(&close_decoder));
    m.impl("close_matrix", TORCH_BOX(&close_matrix));
}

}  // namespace speckv
