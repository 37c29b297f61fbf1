#include "team.h"

#include <thread>

namespace speckv {
namespace {

constexpr uint64_t kPieceBits = 20;
constexpr uint64_t kPieceMask = (uint64_t{1} << kPieceBits) - 1;
// Then a thread that waits lets others have the processor: it may be one of them that is waited for.
constexpr int64_t kPolls = 20'000;

void wait_a_little(int64_t polls) {
    if (polls > kPolls) {
        std::this_thread::yield();
        return;
    }
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

void Team::share(Job job, int64_t pieces) {
    job_ = job;
    pending_.store(pieces, std::memory_order_relaxed);
    const uint64_t loop = (ticket_.load(std::memory_order_relaxed) >> (2 * kPieceBits)) + 1;
    ticket_.store(loop << (2 * kPieceBits) | static_cast<uint64_t>(pieces) << kPieceBits, std::memory_order_release);
    for (int64_t piece = take(); piece >= 0; piece = take()) {
        finish(piece);
    }
    for (int64_t polls = 0; pending_.load(std::memory_order_acquire) > 0; ++polls) {
        wait_a_little(polls);
    }
}

// The next piece of the loop that is going on, or -1.
int64_t Team::take() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    while ((ticket & kPieceMask) < (ticket >> kPieceBits & kPieceMask)) {
        if (ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
            return static_cast<int64_t>(ticket & kPieceMask);
        }
    }
    return -1;
}

// The job is that of the piece: it stays until all its pieces are done.
void Team::finish(int64_t piece) {
    job_.call(job_.context, piece);
    pending_.fetch_sub(1, std::memory_order_release);
}

void Team::help() {
    for (int64_t polls = 0; !is_over_.load(std::memory_order_acquire); ++polls) {
        for (int64_t piece = take(); piece >= 0; piece = take()) {
            finish(piece);
            polls = 0;
        }
        wait_a_little(polls);
    }
}

}  // namespace speckv
