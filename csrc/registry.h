// Objects that are kept between calls: opened once for a model, then called by number.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "checks.h"
#include "decoder.h"

namespace speckv {

// Objects by number; one that is closed while it is at work lives until that is done.
template <class Object>
class Registry {
public:
    int64_t add(std::shared_ptr<const Object> object) {
        const std::lock_guard<std::mutex> lock(mutex_);
        objects_.emplace(++last_, std::move(object));
        return last_;
    }

    std::shared_ptr<const Object> get(const char* op, int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto found = objects_.find(number);
        if (found == objects_.end()) {
            refuse(op, "there is none of number ", number);
        }
        return found->second;
    }

    void remove(int64_t number) {
        const std::lock_guard<std::mutex> lock(mutex_);
        objects_.erase(number);
    }

private:
    std::mutex mutex_;
    std::map<int64_t, std::shared_ptr<const Object>> objects_;
    int64_t last_ = 0;
};

Registry<Decoder>& decoders();
Registry<Matrix>& matrices();

// The cache of one sequence of a decoder, from keys and values [layers, groups, capacity, head_size]; refuses, in the
// name of op, what does not fit.
Cache cache_of(const char* op, const Decoder& decoder, const Tensor& keys, const Tensor& values);

// Refuses tokens for which the cache has no room.
void check_room(const char* op, const Cache& cache, int64_t start, int64_t count);

}  // namespace speckv
