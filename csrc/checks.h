// What the ops refuse, in the words of kernels/checks.py: shapes and dtypes first, then values.

#pragma once

#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>

#include "rows.h"
#include "views.h"

namespace speckv {

// STD_TORCH_CHECK would put a C++ function, file and line before the sentence that the caller is to read.
template <class... Words>
[[noreturn]] void refuse(const char* op, const Words&... words) {
    std::ostringstream message;
    message << op << ": ";
    ((message << words), ...);
    throw std::runtime_error(message.str());
}

constexpr int64_t kAnySize = -1;

void check_shape(const char* op, const char* name, const View& tensor, std::initializer_list<int64_t> expected);
void check_float32(const char* op, const char* name, const View& tensor);
void check_int64(const char* op, const char* name, const View& tensor);
// A dtype that load_block reads.
void check_floating(const char* op, const char* name, const View& tensor);
// A dtype that load_block reads, at least one token, unit stride along the vocabulary.
void check_logits(const char* op, const char* name, const View& logits);

// temperature [rows] finite and >= 0, uniform [rows, columns] in [0, 1).
void check_sampling_values(
    const char* op, const float* temperature, const float* uniform, int64_t rows, int64_t columns);

// Why a row of logits is not a distribution; slow, for rows known to be bad.
const char* reason(const Row& row);

}  // namespace speckv
