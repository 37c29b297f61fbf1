// Threads that share out one forward pass: hundreds of loops of a few microseconds each, too short to wake a thread for.
//
// Between two loops of a pass the helpers spin, so that a loop starts within a fraction of a microsecond; when a pass
// is over they yield, and after a while they sleep. Whoever is free takes the next piece of a loop, and the caller
// takes pieces too: a helper that the machine keeps busy elsewhere delays nothing but the piece it holds.

#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>

namespace speckv {

class Team {
public:
    // Calls work(piece) for each piece of [0, pieces), spread over the team; returns when all are done. work must not
    // throw, and pieces must be fewer than 2^20.
    template <class Work>
    void run(int64_t pieces, const Work& work) {
        if (helpers_ == 0 || pieces < 2) {
            for (int64_t piece = 0; piece < pieces; ++piece) {
                work(piece);
            }
            return;
        }
        share({[](const void* context, int64_t piece) { (*static_cast<const Work*>(context))(piece); }, &work}, pieces);
    }

    int64_t threads() const { return helpers_ + 1; }

private:
    friend class TeamLease;

    struct Job {
        void (*call)(const void*, int64_t);
        const void* context;
    };

    void share(Job job, int64_t pieces);
    int64_t take();
    void finish(int64_t piece);
    void help(int64_t index);

    // Which loop it is, how many pieces it has, and which is next, in one word: 24, 20 and 20 bits. A helper that comes
    // late cannot take a piece of another loop than the one it saw.
    std::atomic<uint64_t> ticket_{0};
    std::atomic<int64_t> pending_{0};
    std::atomic<int64_t> sleeping_{0};
    std::atomic<int64_t> helpers_{0};  // that may take pieces: those of lower index
    int64_t started_ = 0;              // threads that exist
    Job job_{};
    std::mutex mutex_;
    std::condition_variable wake_;
};

// The process's team for as long as a pass takes, or, where another thread of the program has it, a team of one.
class TeamLease {
public:
    explicit TeamLease(int64_t threads);
    ~TeamLease();
    TeamLease(const TeamLease&) = delete;
    TeamLease& operator=(const TeamLease&) = delete;

    Team& operator*() { return *team_; }

private:
    Team alone_;
    Team* team_ = &alone_;
};

}  // namespace speckv
