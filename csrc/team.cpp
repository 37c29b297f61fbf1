#include "team.h"

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <thread>

namespace speckv {
namespace {

constexpr uint64_t kPieceBits = 20;
constexpr uint64_t kPieceMask = (uint64_t{1} << kPieceBits) - 1;
constexpr int kPolls = 200;  // between two looks at the clock
constexpr auto kSpin = std::chrono::microseconds(200);
constexpr auto kYield = std::chrono::milliseconds(3);  // longer than what lies between two passes of a decode

uint64_t loop_of(uint64_t ticket) {
    return ticket >> (2 * kPieceBits);
}

void pause() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Process {
    std::mutex in_use;
    pid_t id = 0;
    Team* team = nullptr;
};

Process& process() {
    static Process* const process = new Process;  // outlives the helpers, which end with the process
    return *process;
}

}  // namespace

void Team::share(Job job, int64_t pieces) {
    job_ = job;
    pending_.store(pieces, std::memory_order_relaxed);
    const uint64_t loop = loop_of(ticket_.load(std::memory_order_relaxed)) + 1;
    ticket_.store(loop << (2 * kPieceBits) | static_cast<uint64_t>(pieces) << kPieceBits);
    if (sleeping_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
    for (int64_t piece = take(); piece >= 0; piece = take()) {
        finish(piece);
    }
    for (int polls = 0; pending_.load(std::memory_order_acquire) > 0; ++polls) {
        if (polls < 100 * kPolls) {
            pause();
        } else {
            std::this_thread::yield();
        }
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

void Team::help(int64_t index) {
    using Clock = std::chrono::steady_clock;
    uint64_t seen = loop_of(ticket_.load());
    auto idle_since = Clock::now();
    for (int polls = 0;; ++polls) {
        const uint64_t loop = loop_of(ticket_.load(std::memory_order_acquire));
        if (loop != seen) {
            seen = loop;
            if (index < helpers_.load(std::memory_order_relaxed)) {
                for (int64_t piece = take(); piece >= 0; piece = take()) {
                    finish(piece);
                }
            }
            polls = 0;
            idle_since = Clock::now();
            continue;
        }
        if (polls < kPolls) {
            pause();
            continue;
        }
        polls = 0;
        const auto idle = Clock::now() - idle_since;
        if (idle > kYield) {
            std::unique_lock<std::mutex> lock(mutex_);
            sleeping_.fetch_add(1);
            wake_.wait(lock, [&] { return loop_of(ticket_.load()) != seen; });
            sleeping_.fetch_sub(1);
        } else if (idle > kSpin) {
            std::this_thread::yield();
        }
    }
}

TeamLease::TeamLease(int64_t threads) {
    Process& shared = process();
    if (threads < 2 || !shared.in_use.try_lock()) {
        return;
    }
    if (shared.id != getpid()) {  // at first, and after a fork, which takes no helpers along
        shared.id = getpid();
        shared.team = new Team;
    }
    team_ = shared.team;
    for (; team_->started_ < threads - 1; ++team_->started_) {
        std::thread([team = team_, index = team_->started_] { team->help(index); }).detach();
    }
    team_->helpers_ = threads - 1;
}

TeamLease::~TeamLease() {
    if (team_ != &alone_) {
        process().in_use.unlock();
    }
}

}  // namespace speckv
