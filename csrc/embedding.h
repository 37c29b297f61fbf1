// Rows of an embedding.

#pragma once

#include <cstdint>

#include "tensors.h"

namespace speckv {

// Refuses, in the name of op, ids [count] that are not rows of an embedding [V, H] of any floating dtype, and other
// tensors than such.
void check_embedding(const char* op, const Tensor& embedding, int64_t size, const int64_t* ids, int64_t count);

// Its rows, as out [count, H].
void embed(const Tensor& embedding, const int64_t* ids, int64_t count, float* out);

}  // namespace speckv
