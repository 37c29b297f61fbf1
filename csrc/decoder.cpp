#include "decoder.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "attention.h"
#include "buffers.h"
#include "simd.h"

namespace speckv {
namespace {

// Pairs (i, i + size / 2) of a head turned by the angle of their frequency.
void rotate(float* head, const float* cosine, const float* sine, int64_t half) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosine[i] - b * sine[i];
        head[i + half] = b * cosine[i] + a * sine[i];
    }
}

// One pass through the layers: its buffers, and its steps.
class Pass {
public:
    Pass(const Decoder& decoder, Team& team, const std::vector<Span>& spans, float* x)
        : decoder_(decoder), team_(team), spans_(spans), count_(0), x_(x) {
        for (const Span& span : spans) {
            count_ += span.count;
        }
        const int64_t count = count_;
        static thread_local Buffers buffers;
        buffers_ = &buffers;
        buffers.normed.resize(count * decoder.hidden);
        buffers.query.resize(count * query_width());
        buffers.attended.resize(count * query_width());
        buffers.key.resize(count * key_width());
        buffers.value.resize(count * key_width());
        buffers.gate.resize(count * decoder.intermediate);
        buffers.up.resize(count * decoder.intermediate);
        buffers.delta.resize(count * decoder.hidden);
        find_angles();
    }

    int64_t count() const { return count_; }

    void run(int64_t index) {
        const Layer& layer = decoder_.layers[index];
        normalize_all(layer.input_norm);
        project(layer);
        place(layer, index);
        attend_all(index);
        add_product(*layer.output, buffers_->attended.data(), query_width());
        normalize_all(layer.attention_norm);
        feed_forward(layer);
        add_product(*layer.down, buffers_->gate.data(), decoder_.intermediate);
    }

private:
    // The query heads of a span that share a key: where the span begins among all tokens, and the group's parts.
    struct Group {
        Problem problem;
        int64_t index, first, part;
    };
    struct Task {
        int64_t group, chunk;
    };
    struct Buffers {
        Buffer<float> normed, query, key, value, attended, gate, up, delta, cosine, sine, parts;
        std::vector<Group> groups;
        std::vector<Task> tasks;
        std::vector<std::atomic<int64_t>> left;  // chunks of each group
        Inputs inputs;
    };

    int64_t query_width() const { return decoder_.heads * decoder_.head_size; }
    int64_t key_width() const { return decoder_.groups * decoder_.head_size; }

    void find_angles() {
        const int64_t half = decoder_.head_size / 2;
        buffers_->cosine.resize(count_ * half);
        buffers_->sine.resize(count_ * half);
        int64_t at = 0;
        for (const Span& span : spans_) {
            for (int64_t token = 0; token < span.count; ++token) {
                for (int64_t i = 0; i < half; ++i, ++at) {
                    const float angle = static_cast<float>(span.start + token) * decoder_.inverse_frequencies[i];
                    buffers_->cosine[at] = std::cos(angle) * decoder_.rotary_scale;
                    buffers_->sine[at] = std::sin(angle) * decoder_.rotary_scale;
                }
            }
        }
    }

    void normalize_all(const std::vector<float>& weight) {
        for_rows(team_, count_, [&](int64_t begin, int64_t end) {
            for (int64_t token = begin; token < end; ++token) {
                normalize(x_ + token * decoder_.hidden, weight.data(), decoder_.hidden, decoder_.epsilon,
                          buffers_->normed.data() + token * decoder_.hidden);
            }
        });
        buffers_->inputs.set(buffers_->normed.data(), count_, decoder_.hidden);
    }

    void project(const Layer& layer) {
        const Matrix* const matrices[] = {layer.query.get(), layer.key.get(), layer.value.get()};
        float* const outs[] = {buffers_->query.data(), buffers_->key.data(), buffers_->value.data()};
        int64_t blocks = 0;
        for (const Matrix* matrix : matrices) {
            buffers_->inputs.arrange_for(*matrix, team_);
            blocks += matrix->blocks();
        }
        for_each_piece(team_, blocks, [&](int64_t begin, int64_t end) {
            int index = 0;
            int64_t before = 0;  // blocks of the matrices before this one
            for (int64_t block = begin; block < end; ++block) {
                for (; block - before >= matrices[index]->blocks(); ++index) {
                    before += matrices[index]->blocks();
                }
                multiply_block(*matrices[index], block - before, buffers_->inputs, outs[index], matrices[index]->rows);
            }
        });
    }

    // Norms and angles, and keys and values into the caches.
    void place(const Layer& layer, int64_t index) {
        for_rows(team_, count_, [&](int64_t begin, int64_t end) {
            int64_t first = 0;
            for (const Span& span : spans_) {
                place_span(layer, index, span, first, std::max(first, begin), std::min(first + span.count, end));
                first += span.count;
            }
        });
    }

    // The tokens from begin to end, among all, of a span that begins with the first.
    void place_span(
        const Layer& layer, int64_t index, const Span& span, int64_t first, int64_t begin, int64_t end) {
        const int64_t size = decoder_.head_size, half = size / 2;
        const Cache& cache = span.cache;
        for (int64_t token = begin; token < end; ++token) {
            const float* const cosine = buffers_->cosine.data() + token * half;
            const float* const sine = buffers_->sine.data() + token * half;
            const auto turn = [&](float* head, const std::vector<float>& norm) {
                if (!norm.empty()) {
                    normalize(head, norm.data(), size, decoder_.epsilon, head);
                }
                rotate(head, cosine, sine, half);
            };
            for (int64_t head = 0; head < decoder_.heads; ++head) {
                turn(buffers_->query.data() + token * query_width() + head * size, layer.query_norm);
            }
            for (int64_t group = 0; group < decoder_.groups; ++group) {
                float* const key = buffers_->key.data() + token * key_width() + group * size;
                turn(key, layer.key_norm);
                const int64_t position = span.start + token - first;
                const int64_t at = cache_offset(cache, index, group) + position * size * element_bytes(cache.dtype);
                narrow(key, size, cache.dtype, cache.keys + at);
                narrow(buffers_->value.data() + token * key_width() + group * size, size, cache.dtype,
                       cache.values + at);
            }
        }
    }

    int64_t cache_offset(const Cache& cache, int64_t layer, int64_t group) const {
        return (layer * decoder_.groups + group) * cache.capacity * decoder_.head_size * element_bytes(cache.dtype);
    }

    void attend_all(int64_t layer) {
        buffers_->groups.clear();
        buffers_->tasks.clear();
        int64_t first = 0, room = 0;
        for (const Span& span : spans_) {
            const Problem problem = problem_of(span, layer, first);
            for (int64_t group = 0; group < decoder_.groups; ++group) {
                for (int64_t chunk = 0; chunk < chunks(problem); ++chunk) {
                    buffers_->tasks.push_back({static_cast<int64_t>(buffers_->groups.size()), chunk});
                }
                buffers_->groups.push_back({problem, group, first, room});
                room += chunks(problem) * part_size(problem);
            }
            first += span.count;
        }
        buffers_->parts.resize(room);
        if (buffers_->left.size() < buffers_->groups.size()) {
            buffers_->left = std::vector<std::atomic<int64_t>>(buffers_->groups.size());
        }
        for (size_t i = 0; i < buffers_->groups.size(); ++i) {
            buffers_->left[i].store(chunks(buffers_->groups[i].problem), std::memory_order_relaxed);
        }
        team_.run(static_cast<int64_t>(buffers_->tasks.size()), [this, buffers = buffers_](int64_t index) {
            const Task& task = buffers->tasks[index];
            const Group& group = buffers->groups[task.group];
            static thread_local Buffer<float> room;
            attend_chunk(group.problem, 0, group.index, task.chunk, room,
                         buffers->parts.data() + group.part + task.chunk * part_size(group.problem));
            // Whoever does a group's last chunk joins them.
            if (buffers->left[task.group].fetch_sub(1, std::memory_order_acq_rel) == 1) {
                join(group);
            }
        });
    }

    void join(const Group& group) {
        const Problem& problem = group.problem;
        const int64_t size = decoder_.head_size;
        static thread_local Buffer<float> results;
        results.resize(problem.rows() * padded(size));
        join_chunks(problem, buffers_->parts.data() + group.part, results.data());
        float* const out = buffers_->attended.data() + group.first * query_width();
        for (int64_t row = 0; row < problem.rows(); ++row) {
            const int64_t head = group.index * problem.group + row / problem.queries;
            const float* const from = results.data() + row * padded(size);
            std::copy(from, from + size, out + (row % problem.queries) * query_width() + head * size);
        }
    }

    // Attention of a span that begins with this token of all.
    Problem problem_of(const Span& span, int64_t layer, int64_t first) const {
        const Cache& cache = span.cache;
        const int64_t size = decoder_.head_size, bytes = element_bytes(cache.dtype);
        const int64_t offset = cache_offset(cache, layer, 0);
        const auto cached = [&](const std::byte* from) {
            return Heads{from + offset, cache.dtype, size, {0, cache.capacity * size * bytes, size * bytes}};
        };
        const float* const query = buffers_->query.data() + first * query_width();
        return {{reinterpret_cast<const std::byte*>(query), Dtype::kFloat32, size,
                 {0, size * int64_t{sizeof(float)}, query_width() * int64_t{sizeof(float)}}},
                cached(cache.keys), cached(cache.values), span.count, span.start + span.count,
                decoder_.heads / decoder_.groups, decoder_.attention_scale};
    }

    // What the layer adds to its input: a product with values [count, columns].
    void add_product(const Matrix& matrix, const float* values, int64_t columns) {
        buffers_->inputs.set(values, count_, columns);
        buffers_->inputs.arrange_for(matrix, team_);
        multiply(matrix, team_, buffers_->inputs, buffers_->delta.data());
        for_rows(team_, count_, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * decoder_.hidden; i < end * decoder_.hidden; ++i) {
                x_[i] += buffers_->delta[i];
            }
        });
    }

    // silu(gate) * up, into gate.
    void feed_forward(const Layer& layer) {
        buffers_->inputs.arrange_for(*layer.gate, team_);
        buffers_->inputs.arrange_for(*layer.up, team_);
        const int64_t width = decoder_.intermediate;
        for_each_piece(team_, layer.gate->blocks(), [&](int64_t first, int64_t last) {
            for (int64_t block = first; block < last; ++block) {
                multiply_block(*layer.gate, block, buffers_->inputs, buffers_->gate.data(), width);
                multiply_block(*layer.up, block, buffers_->inputs, buffers_->up.data(), width);
            }
            const int64_t begin = first * kBlockRows, end = std::min(last * kBlockRows, width);
            for (int64_t token = 0; token < count_; ++token) {
                multiply_by_silu(buffers_->gate.data() + token * width + begin,
                                 buffers_->up.data() + token * width + begin, end - begin);
            }
        });
    }

    const Decoder& decoder_;
    Team& team_;
    const std::vector<Span>& spans_;
    int64_t count_;  // tokens of all spans
    float* x_;
    Buffers* buffers_;
};

}  // namespace

void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
    in_widest_units([=]() SPECKV_INLINED {
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < size; ++i) {
            sum += x[i] * x[i];
        }
        const float factor = 1.0f / std::sqrt(sum / static_cast<float>(size) + epsilon);
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
            out[i] = x[i] * factor * weight[i];
        }
    });
}

void multiply(const Matrix& matrix, Team& team, const Inputs& inputs, float* out) {
    for_each_piece(team, matrix.blocks(), [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
            multiply_block(matrix, block, inputs, out, matrix.rows);
        }
    });
}

void read_tokens(
    const Decoder& decoder, Team& team, const std::vector<Span>& spans, float* x, const std::vector<Wanted>& wanted,
    float* states, int64_t state_stride) {
    Pass pass(decoder, team, spans, x);
    const int64_t count = pass.count();
    size_t next = 0;
    const auto keep = [&](int64_t layers_done) {
        for (; next < wanted.size() && wanted[next].layer == layers_done; ++next) {
            for (int64_t token = 0; token < count; ++token) {
                std::copy(x + token * decoder.hidden, x + (token + 1) * decoder.hidden,
                          states + token * state_stride + wanted[next].column);
            }
        }
    };
    keep(0);
    for (size_t layer = 0; layer < decoder.layers.size(); ++layer) {
        pass.run(static_cast<int64_t>(layer));
        keep(static_cast<int64_t>(layer) + 1);
    }
}

}  // namespace speckv
