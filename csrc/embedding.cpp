#include "embedding.h"

#include <algorithm>

#include "checks.h"
#include "rows.h"

namespace speckv {

void check_embedding(const char* op, const Tensor& embedding, int64_t size, const int64_t* ids, int64_t count) {
    check_shape(op, "embedding", embedding, {kAnySize, size});
    check_logits(op, "embedding", embedding);
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= embedding.size(0)) {
            refuse(op, "ids must be in [0, ", embedding.size(0), "), got ", ids[i]);
        }
    }
}

void embed(const Tensor& embedding, const int64_t* ids, int64_t count, float* out) {
    const int64_t size = embedding.size(1);
    const Logits table = as_logits(embedding);
    BlockBuffer room;
    for (int64_t token = 0; token < count; ++token) {
        const Row row = table.row(ids[token]);
        for (int64_t start = 0; start < size; start += kBlockSize) {
            const Block block = load_block(row, start, room.values);
            std::copy(block.values, block.values + block.size, out + token * size + start);
        }
    }
}

}  // namespace speckv
