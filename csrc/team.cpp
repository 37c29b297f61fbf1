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

// The next piece of a run, or -1.
int64_t take(std::atomic<uint64_t>& run) {
    uint64_t ticket = run.load(std::memory_order_acquire);
    while ((ticket & kPieceMask) < (ticket >> kPieceBits & kPieceMask)) {
        if (run.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) {
            return static_cast<int64_t>(ticket & kPieceMask);
        }
    }
    return -1;
}

}  // namespace

void Team::share(Job job, int64_t pieces) {
    job_ = job;
    pending_.store(pieces, std::memory_order_relaxed);
    for (int64_t i = shares_ - 1; i >= 0; --i) {
        std::atomic<uint64_t>& ticket = tickets_[i].ticket;
        const uint64_t loop = (ticket.load(std::memory_order_relaxed) >> (2 * kPieceBits)) + 1;
        const auto begin = static_cast<uint64_t>(pieces * i / shares_);
        const auto end = static_cast<uint64_t>(pieces * (i + 1) / shares_);
        ticket.store(loop << (2 * kPieceBits) | end << kPieceBits | begin, std::memory_order_release);
    }
    work(0);
    for (int64_t polls = 0; pending_.load(std::memory_order_acquire) > 0; ++polls) {
        wait_a_little(polls);
    }
}

// Does the pieces of a member's own run, then what is left of the others'; returns how many. The job is that of each
// piece: it stays until all its pieces are done.
int64_t Team::work(int64_t member) {
    int64_t done = 0;
    for (int64_t i = 0; i < shares_; ++i) {
        std::atomic<uint64_t>& run = tickets_[(member + i) % shares_].ticket;
        for (int64_t piece = take(run); piece >= 0; piece = take(run)) {
            job_.call(job_.context, piece);
            ++done;
        }
    }
    if (done > 0) {
        pending_.fetch_sub(done, std::memory_order_release);
    }
    return done;
}

void Team::help(int64_t member) {
    // While it waits it looks at its own run only, and leaves the others' counters where they are in use.
    const std::atomic<uint64_t>& own = tickets_[member % shares_].ticket;
    uint64_t seen = 0;
    for (int64_t polls = 0; !is_over_.load(std::memory_order_acquire); ++polls) {
        const uint64_t loop = own.load(std::memory_order_acquire) >> (2 * kPieceBits);
        if (loop != seen) {
            work(member);
            seen = loop;
            polls = 0;
        }
        wait_a_little(polls);
    }
}

}  // namespace speckv
