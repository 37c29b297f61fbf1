// A feature head (speckv/head.py) at work: what it makes of the target's states and of the tokens so far.

#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffers.h"
#include "registry.h"
#include "tensors.h"

namespace speckv {

struct DraftHead {
    std::shared_ptr<const Decoder> decoder;
    std::shared_ptr<const Matrix> fuse, from_last, from_embedding, output;
    Tensor embedding;
    std::vector<int64_t> token_ids;  // what each row of the output stands for
    std::vector<float> center, scale;
    float farthest, cap;

    int64_t hidden() const { return decoder->hidden; }
    int64_t fed() const { return fuse->columns; }
    // Of one token, as with_team counts it.
    int64_t work() const;
};

Registry<DraftHead>& heads();

// What both ops that run a head are given of a sequence: of which positions the head is to read the tokens next, what
// each position brings to the one after it, and the target's states that have not been taken in.
struct HeadInputs {
    Cache cache;
    int64_t cached;              // tokens in the cache
    int64_t start, count;        // the positions to read
    float* brought;              // [positions, hidden]
    float* state;                // [hidden]; receives the head's own hidden state of the last position read
    const float* states;         // [observed, fed], the target's
    int64_t first, observed;     // of the positions first, first + 1, ...
};

// Refuses, in the name of op, what does not fit a head that is to read `later` positions more after those from `start`
// on. states must be contiguous, and is kept by the caller.
HeadInputs check_head_inputs(
    const char* op, const DraftHead& head, int64_t start, int64_t count, int64_t later, const Tensor& brought,
    const Tensor& state, const Tensor& states, int64_t first, const Tensor& keys, const Tensor& values,
    int64_t cached);

// What a head reads next of a sequence.
struct HeadRead {
    const HeadInputs* inputs;
    const int64_t* ids;       // [count], the tokens at the positions from `start` on
    int64_t start, count;
    int64_t cached;           // tokens in the cache before
    float* logits;            // [S], receives those of the token after them
};

// A head at work on the next tokens of one sequence, or of several in one walk through its weights. What a sequence
// gets does not depend on the others.
class HeadPass {
public:
    HeadPass(const DraftHead& head, Team& team);

    // Takes in the target's states of each and reads what is to be read of them. goes_on says that the position before
    // is one that only the head has read, in the call before.
    void begin(const std::vector<HeadRead>& reads, bool goes_on);

    // Reads the tokens behind those that were read last.
    void next(const std::vector<HeadRead>& reads);

private:
    struct Buffers {
        Buffer<float> features, embedded, joined, states, rows;
        std::vector<int64_t> ids;
        std::vector<Span> spans;
        Inputs inputs;
    };

    void observe(const std::vector<HeadRead>& reads);
    void go_on(const std::vector<HeadRead>& reads);
    void read(const std::vector<HeadRead>& reads);
    void product(const Matrix& matrix, const float* values, int64_t count, float* out);

    const DraftHead& head_;
    Team& team_;
    Buffers* buffers_;
};

}  // namespace speckv
