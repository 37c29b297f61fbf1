#include "decoder.h"

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "simd.h"

namespace speckv {
namespace {

// A loop is cut into a few pieces a thread: enough that a slow thread is waited for briefly, few enough that taking
// them costs nothing.
constexpr int64_t kPiecesPerThread = 4;

// Calls work(block) for each of so many blocks of work.
template <class Work>
void for_each_block(Team& team, int64_t blocks, const Work& work) {
    const int64_t piece = std::max<int64_t>(1, blocks / (kPiecesPerThread * team.threads()));
    team.run((blocks + piece - 1) / piece, [&](int64_t index) {
        const int64_t end = std::min((index + 1) * piece, blocks);
        for (int64_t block = index * piece; block < end; ++block) {
            work(block);
        }
    });
}

// x / (1 + exp(-x)), in place.
void multiply_by_sigmoid(float* x, int64_t size) {
    BlockBuffer exponents;
    for (int64_t start = 0; start < size; start += kBlockSize) {
        const int64_t count = std::min(kBlockSize, size - start);
        float* const values = x + start;
        // exp(-|x|), whose argument is never above 0, serves both signs.
        for (int64_t i = 0; i < count; ++i) {
            exponents.values[i] = -std::fabs(values[i]);
        }
        exp_weights(exponents.values, count, 0.0f, 1.0f, exponents.values);
        for (int64_t i = 0; i < count; ++i) {
            const float e = exponents.values[i];
            values[i] *= (values[i] >= 0 ? 1.0f : e) / (1.0f + e);
        }
    }
}

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
    Pass(const Decoder& decoder, Team& team, const Cache& cache, int64_t start, int64_t count, float* x)
        : decoder_(decoder), team_(team), cache_(cache), start_(start), count_(count), x_(x) {
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
    struct Buffers {
        std::vector<float> normed, query, key, value, attended, gate, up, delta, cosine, sine;
        Inputs inputs;
    };

    int64_t query_width() const { return decoder_.heads * decoder_.head_size; }
    int64_t key_width() const { return decoder_.groups * decoder_.head_size; }

    void find_angles() {
        const int64_t half = decoder_.head_size / 2;
        buffers_->cosine.resize(count_ * half);
        buffers_->sine.resize(count_ * half);
        for (int64_t token = 0; token < count_; ++token) {
            for (int64_t i = 0; i < half; ++i) {
                const float angle = static_cast<float>(start_ + token) * decoder_.inverse_frequencies[i];
                buffers_->cosine[token * half + i] = std::cos(angle) * decoder_.rotary_scale;
                buffers_->sine[token * half + i] = std::sin(angle) * decoder_.rotary_scale;
            }
        }
    }

    void normalize_all(const std::vector<float>& weight) {
        for (int64_t token = 0; token < count_; ++token) {
            normalize(x_ + token * decoder_.hidden, weight.data(), decoder_.hidden, decoder_.epsilon,
                      buffers_->normed.data() + token * decoder_.hidden);
        }
        buffers_->inputs.set(buffers_->normed.data(), count_, decoder_.hidden);
    }

    void project(const Layer& layer) {
        const Matrix* const matrices[] = {layer.query.get(), layer.key.get(), layer.value.get()};
        float* const outs[] = {buffers_->query.data(), buffers_->key.data(), buffers_->value.data()};
        int64_t blocks = 0;
        for (const Matrix* matrix : matrices) {
            buffers_->inputs.arrange_for(*matrix);
            blocks += matrix->blocks();
        }
        for_each_block(team_, blocks, [&](int64_t block) {
            int index = 0;
            for (; block >= matrices[index]->blocks(); ++index) {
                block -= matrices[index]->blocks();
            }
            multiply_block(*matrices[index], block, buffers_->inputs, outs[index], matrices[index]->rows);
        });
    }

    // Norms and angles, and keys and values into the cache.
    void place(const Layer& layer, int64_t index) {
        const int64_t size = decoder_.head_size, half = size / 2;
        for (int64_t token = 0; token < count_; ++token) {
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
                const int64_t at = cache_offset(index, group) + (start_ + token) * size * element_bytes(cache_.dtype);
                narrow(key, size, cache_.dtype, cache_.keys + at);
                narrow(buffers_->value.data() + token * key_width() + group * size, size, cache_.dtype,
                       cache_.values + at);
            }
        }
    }

    int64_t cache_offset(int64_t layer, int64_t group) const {
        return (layer * decoder_.groups + group) * cache_.capacity * decoder_.head_size * element_bytes(cache_.dtype);
    }

    void attend_all(int64_t layer) {
        const int64_t size = decoder_.head_size, bytes = element_bytes(cache_.dtype);
        const int64_t offset = cache_offset(layer, 0);
        const auto cached = [&](const std::byte* from) {
            return Heads{from + offset, cache_.dtype, size, {0, cache_.capacity * size * bytes, size * bytes}};
        };
        const Problem problem{
            {reinterpret_cast<const std::byte*>(buffers_->query.data()), Dtype::kFloat32, size,
             {0, size * int64_t{sizeof(float)}, query_width() * int64_t{sizeof(float)}}},
            cached(cache_.keys), cached(cache_.values), count_, start_ + count_, decoder_.heads / decoder_.groups,
            decoder_.attention_scale};
        float* const out = buffers_->attended.data();
        team_.run(decoder_.groups, [&](int64_t group) {
            static thread_local std::vector<float> room, results;
            results.resize(problem.rows() * padded(size));
            attend(problem, 0, group, room, results.data());
            for (int64_t row = 0; row < problem.rows(); ++row) {
                const int64_t head = group * problem.group + row / count_;
                const float* const from = results.data() + row * padded(size);
                std::copy(from, from + size, out + (row % count_) * query_width() + head * size);
            }
        });
    }

    // What the layer adds to its input: a product with values [count, columns].
    void add_product(const Matrix& matrix, const float* values, int64_t columns) {
        buffers_->inputs.set(values, count_, columns);
        buffers_->inputs.arrange_for(matrix);
        multiply(matrix, team_, buffers_->inputs, buffers_->delta.data());
        for (int64_t i = 0; i < count_ * decoder_.hidden; ++i) {
            x_[i] += buffers_->delta[i];
        }
    }

    // silu(gate) * up, into gate.
    void feed_forward(const Layer& layer) {
        buffers_->inputs.arrange_for(*layer.gate);
        buffers_->inputs.arrange_for(*layer.up);
        const int64_t width = decoder_.intermediate;
        for_each_block(team_, layer.gate->blocks(), [&](int64_t block) {
            multiply_block(*layer.gate, block, buffers_->inputs, buffers_->gate.data(), width);
            multiply_block(*layer.up, block, buffers_->inputs, buffers_->up.data(), width);
            const int64_t begin = block * kBlockRows, end = std::min(begin + kBlockRows, width);
            for (int64_t token = 0; token < count_; ++token) {
                float* const gate = buffers_->gate.data() + token * width;
                const float* const up = buffers_->up.data() + token * width;
                multiply_by_sigmoid(gate + begin, end - begin);
                for (int64_t i = begin; i < end; ++i) {
                    gate[i] *= up[i];
                }
            }
        });
    }

    const Decoder& decoder_;
    Team& team_;
    const Cache& cache_;
    int64_t start_, count_;
    float* x_;
    Buffers* buffers_;
};

}  // namespace

SPECKV_CLONES void normalize(const float* x, const float* weight, int64_t size, float epsilon, float* out) {
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
}

void multiply(const Matrix& matrix, Team& team, const Inputs& inputs, float* out) {
    for_each_block(team, matrix.blocks(), [&](int64_t block) {
        multiply_block(matrix, block, inputs, out, matrix.rows);
    });
}

void read_tokens(
    const Decoder& decoder, Team& team, const Cache& cache, int64_t start, int64_t count, float* x,
    const std::vector<int64_t>& wanted, float* states, int64_t state_stride) {
    Pass pass(decoder, team, cache, start, count, x);
    size_t next = 0;
    const auto keep = [&](int64_t layers_done) {
        for (; next < wanted.size() && wanted[next] == layers_done; ++next) {
            for (int64_t token = 0; token < count; ++token) {
                std::copy(x + token * decoder.hidden, x + (token + 1) * decoder.hidden,
                          states + token * state_stride + static_cast<int64_t>(next) * decoder.hidden);
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
